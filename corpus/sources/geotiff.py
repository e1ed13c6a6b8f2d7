"""GeoTIFF scenes, tiled by windowed reads; every tile knows where on Earth it lies."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from corpus.decoding import DAMAGED, STRETCH, square
from corpus.splits import check, hashed_split, thinned
from runtime.artefacts import file_stamp
from runtime.errors import UserError
from runtime.progress import progress

SUFFIXES = (".tif", ".tiff", ".jp2", ".vrt", ".img")
NO_DATA = "no data"
SMALLER = "smaller than a tile"
NOT_A_SCENE = "cannot be opened as a scene"
#: Side of the reduced picture of a scene from which its stretch is measured, in pixels.
OVERVIEW = 512
#: Metres of a degree of latitude, and of longitude at the equator.
DEGREE = 111_320.0


@dataclass(frozen=True)
class _Scene:
    """One file, as far as tiling needs to know it."""

    file: str
    stamp: str
    height: int = 0
    width: int = 0
    problem: str = ""
    crs: str = ""
    transform: tuple[float, ...] = ()
    bands: tuple[int, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class GeoTiff:
    """Square tiles of raster scenes below a folder, or of one file; every format that GDAL reads by these suffixes.

    A manifest row has lon, lat (degrees, WGS 84, tile centre; NaN without a coordinate system),
    ground_sampling_distance (metres a pixel of the tile), crs, transform (GDAL's six numbers, JSON) and the pixel
    window. The scene is the first sub-folder. `ground` is the tile's block: tiles of two blocks share no pixel.

    Args:
        root: a folder, searched at any depth, or one file.
        tile: side of a tile in pixels of the scene; None: the resolution.
        overlap: pixels that neighbouring tiles share.
        bands: three for red, green and blue, or one for grey, counted from 1; None: the first three, or the first.
        stretch: how values become 0..255: "percentile" (2nd to 98th of the scene, each band), "range" (from `low` to
            `high`), or "none" (values are 0..255).
        low, high: of "range", in the scene's units.
        most_no_data: largest share of no-data pixels of a tile that is still an image.
        block: side in tiles of the squares that are held out together, so that no pixel is in two splits.
        split: "all", "train", "val" or "test", by a hash of the block.
        resolution: side of the images handed on, in pixels.
        val_share, test_share: shares of the blocks that the hash holds out.
        limit: keep at most so many tiles, evenly spread (None: all).
        content_hash: a scene has changed if its bytes have, all of which are read for it, not its size or time.
        workers: reading processes (None: one a core); the result does not depend on it.
    Raises:
        UserError: no root, no scenes, or options that contradict each other.
    """

    root: str | None = None
    tile: int | None = None
    overlap: int = 0
    bands: tuple[int, ...] | None = None
    stretch: str = "percentile"
    low: float = 0.0
    high: float = 255.0
    most_no_data: float = 0.5
    block: int = 8
    split: str = "all"
    resolution: int = 64
    val_share: float = 0.1
    test_share: float = 0.1
    limit: int | None = None
    content_hash: bool = False
    workers: int | None = field(default=None, metadata={"fingerprint": False})
    name: str = "geotiff"
    mask_classes = ()

    def __post_init__(self) -> None:
        if self.root is None:
            raise UserError("corpus=geotiff reads no scenes yet: say which with corpus.root=DIR or a file")
        if not self._root.exists():
            raise UserError(f"corpus.root={self.root} does not exist: give a folder of GeoTIFF scenes, or one file")
        check(self.split, self.val_share, self.test_share, self.limit, self.resolution)
        if not 0 <= self.overlap < self._side:
            raise UserError(f"corpus.overlap={self.overlap} must lie in 0..{self._side - 1}, below the tile's side")
        if self.bands is not None and len(self.bands) not in (1, 3):
            raise UserError(
                f"corpus.bands={list(self.bands)}: name three bands for red, green and blue, or one for grey"
            )
        if self.bands is not None and min(self.bands) < 1:
            raise UserError(f"corpus.bands={list(self.bands)}: bands are counted from 1")
        if self.stretch not in ("percentile", "range", "none"):
            raise UserError(f"corpus.stretch={self.stretch} is unknown: take percentile, range or none")
        if self.stretch == "range" and not self.low < self.high:
            raise UserError(f"corpus.low={self.low} is not below corpus.high={self.high}")
        if self.block < 1:
            raise UserError(f"corpus.block={self.block}: give at least 1 tile")

    @property
    def version(self) -> dict[str, str]:
        """A digest of every scene's path, size and time of change."""
        text = "\n".join(f"{file}\0{file_stamp(self._folder / file, self.content_hash)}" for file in self._files)
        return {"scenes": hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]}

    def manifest(self) -> pd.DataFrame:
        """One row a tile, scene by scene, row by row; a file that is no scene is a row whose reason says so."""
        scale = self._side / self.resolution
        rows = pd.DataFrame([_row(scene, x, y, block, scale) for scene, x, y, block in self._chosen])
        if rows.empty:
            return rows
        for crs, tiles in rows.groupby("crs"):
            if crs:
                transforms = np.array([json.loads(text) for text in tiles["transform"]])
                rows.loc[tiles.index, ["lon", "lat", "ground_sampling_distance"]] = _places(
                    str(crs), transforms, self.resolution
                )
        return rows

    def reader(self, rows: np.ndarray) -> Callable[[], Iterator[np.ndarray | str]]:
        places = [self._chosen[row][:3] for row in rows]
        rule = (self.stretch, self.most_no_data)
        return partial(_read_tiles, self._folder, places, self._side, rule, self.resolution)

    @property
    def _root(self) -> Path:
        return Path(str(self.root)).expanduser()

    @property
    def _folder(self) -> Path:
        return self._root if self._root.is_dir() else self._root.parent

    @property
    def _side(self) -> int:
        return self.tile or self.resolution

    @cached_property
    def _files(self) -> list[str]:
        if self._root.is_file():
            return [self._root.name]
        found = [
            (Path(folder) / name).relative_to(self._root).as_posix()
            for folder, _, names in os.walk(self._root)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
        if not found:
            raise UserError(f"corpus.root={self.root} has no scenes ({', '.join(SUFFIXES)}): give another folder")
        return sorted(found)

    @cached_property
    def _chosen(self) -> list[tuple[_Scene, int, int, str]]:
        """Scene, top-left pixel (column, row) and block of every tile of the split, thinned to the limit."""
        tiles = []
        for file in progress(self._files, f"open {self.name}", unit="scene"):
            scene = self._open(file)
            if scene.problem:
                tiles.append((scene, 0, 0, ""))
                continue
            for x, y, place in self._grid(scene):
                block = f"{_text(file)}:{place}"
                if self.split in ("all", hashed_split(block, self.val_share, self.test_share)):
                    tiles.append((scene, x, y, block))
        return [tiles[row] for row in thinned(len(tiles), self.limit)]

    def _grid(self, scene: _Scene) -> Iterator[tuple[int, int, str]]:
        """Tiles of a scene, none across the border of a block; a last block may be smaller."""
        side, step = self._side, self._side - self.overlap
        extent = (self.block - 1) * step + side
        for top in range(0, scene.height, extent):
            rows = range(top, min(top + extent, scene.height) - side + 1, step)
            for y in rows:
                for left in range(0, scene.width, extent):
                    for x in range(left, min(left + extent, scene.width) - side + 1, step):
                        yield x, y, f"{top // extent},{left // extent}"

    def _open(self, file: str) -> _Scene:
        import rasterio
        from rasterio.errors import RasterioError

        path = self._folder / file
        stamp = file_stamp(path, self.content_hash)
        try:
            with _quiet(), rasterio.open(path) as raster:
                bands = tuple(self.bands or ((1, 2, 3) if raster.count >= 3 else (1,)))
                if min(raster.height, raster.width) < self._side:
                    return _Scene(file, stamp, problem=SMALLER)
                if max(bands) > raster.count:
                    return _Scene(file, stamp, problem=f"has {raster.count} bands, not {max(bands)}")
                low, high = (self.low,) * len(bands), (self.high,) * len(bands)
                if self.stretch == "percentile":
                    low, high = _percentiles(raster, bands)
                return _Scene(
                    file=file,
                    stamp=stamp,
                    height=raster.height,
                    width=raster.width,
                    crs=raster.crs.to_string() if raster.crs else "",
                    transform=tuple(raster.transform.to_gdal()),
                    bands=bands,
                    low=low,
                    high=high,
                )
        except (RasterioError, OSError, ValueError):
            return _Scene(file, stamp, problem=NOT_A_SCENE)


def _quiet() -> Any:
    import rasterio

    return rasterio.Env(CPL_LOG_ERRORS="OFF", GDAL_PAM_ENABLED="NO")


def _percentiles(raster: Any, bands: Sequence[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of every band's valid pixels in a reduced picture of the scene."""
    scale = max(1.0, max(raster.height, raster.width) / OVERVIEW)
    shape = (len(bands), math.ceil(raster.height / scale), math.ceil(raster.width / scale))
    try:
        read = raster.read(list(bands), out_shape=shape, masked=True)
    except Exception:  # a block of it is damaged: what its first rows hold is measured instead
        read = raster.read(list(bands), window=((0, min(OVERVIEW, raster.height) // 4), (0, raster.width)), masked=True)
    values, valid = _values(read)
    ends = [np.percentile(band[valid], STRETCH) if valid.any() else (0.0, 1.0) for band in values]
    return tuple(float(low) for low, _ in ends), tuple(float(high) for _, high in ends)


def _values(read: np.ma.MaskedArray) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 [bands, H, W], and where all bands have data, bool [H, W]."""
    values = read.filled(0).astype(np.float32)
    valid = ~np.ma.getmaskarray(read).any(axis=0) & np.isfinite(values).all(axis=0)
    return values, valid


def _read_tiles(
    folder: Path, places: Sequence[tuple[_Scene, int, int]], side: int, rule: tuple[str, float], resolution: int
) -> Iterator[np.ndarray | str]:
    """Tiles by windowed reads, each scene opened once for as long as its turn lasts."""
    import rasterio
    from rasterio.windows import Window

    stretch, most_no_data = rule
    file, raster = None, None
    try:
        with _quiet():
            for scene, x, y in places:
                if scene.problem:
                    yield scene.problem
                    continue
                try:
                    if file != scene.file:
                        if raster is not None:
                            raster.close()
                        file, raster = None, rasterio.open(folder / scene.file)
                        file = scene.file
                    read = raster.read(list(scene.bands), window=Window(x, y, side, side), masked=True)
                except Exception:  # a block that is cut off or damaged: other tiles may be whole
                    yield DAMAGED
                    continue
                values, valid = _values(read)
                if 1 - valid.mean() > most_no_data:
                    yield NO_DATA
                    continue
                yield square(_colours(values, valid, scene, stretch), resolution)
    finally:
        if raster is not None:
            raster.close()


def _colours(values: np.ndarray, valid: np.ndarray, scene: _Scene, stretch: str) -> np.ndarray:
    """uint8 [H, W, 3]; no data is black."""
    if stretch != "none":
        low, high = (np.array(ends, dtype=np.float32)[:, None, None] for ends in (scene.low, scene.high))
        values = (values - low) * (255 / np.where(high > low, high - low, 1))
    colours = np.where(valid, np.clip(values, 0, 255).round(), 0).astype(np.uint8)
    return np.broadcast_to(colours, (3, *valid.shape)).transpose(1, 2, 0)


def _row(scene: _Scene, x: int, y: int, block: str, scale: float) -> dict[str, Any]:
    """A tile's row; its place on Earth comes later, for all tiles at once."""
    folders = Path(scene.file).parts[:-1]
    identifier = _text(scene.file)
    own = ()
    if not scene.problem:
        left, width, shear_x, top, shear_y, height = scene.transform
        corner = (left + x * width + y * shear_x, top + x * shear_y + y * height)
        own = (corner[0], width * scale, shear_x * scale, corner[1], shear_y * scale, height * scale)
    return {
        "id": identifier if scene.problem else f"{identifier}/{y:06d}_{x:06d}",
        "scene": _text(folders[0]) if folders else "",
        "caption": "",
        "stamp": scene.stamp,
        "ground": block,
        "lon": math.nan,
        "lat": math.nan,
        "ground_sampling_distance": math.nan,
        "crs": scene.crs,
        "transform": json.dumps(own),
        "column": x,
        "row": y,
    }


def _text(name: str) -> str:
    """A file's name as valid Unicode."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _places(crs: str, transforms: np.ndarray, resolution: int) -> np.ndarray:
    """Of tiles with GDAL transforms [n, 6]: lon, lat of the centre and metres a pixel there, float64 [n, 3]."""
    from rasterio.warp import transform as to_crs

    def at(column: float, row: float) -> np.ndarray:
        x = transforms[:, 0] + column * transforms[:, 1] + row * transforms[:, 2]
        y = transforms[:, 3] + column * transforms[:, 4] + row * transforms[:, 5]
        return np.stack(to_crs(crs, "EPSG:4326", x, y))

    half = resolution / 2
    try:
        centre = at(half, half)
    except Exception:  # a local coordinate system, which has no place on Earth
        return np.full((len(transforms), 3), np.nan)
    shrink = np.stack([np.cos(np.radians(centre[1])), np.ones(len(transforms))])  # of a degree of longitude
    metres = [np.hypot(*((other - centre) * shrink)) * DEGREE for other in (at(half + 1, half), at(half, half + 1))]
    longitude = (centre[0] + 180) % 360 - 180
    return np.stack([longitude, centre[1], np.sqrt(metres[0] * metres[1])], axis=1)
