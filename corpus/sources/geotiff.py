"""GeoTIFF scenes, tiled by windowed reads; every tile knows where on Earth it lies."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from corpus.decoding import DAMAGED, NO_DATA, NOT_A_FILE, square
from corpus.ground import DEGREE, EARTH, touched
from corpus.names import counted, is_companion, suffix_of
from corpus.raster import (
    Bands,
    Pixels,
    RasterOptions,
    Survey,
    choose_bands,
    is_deep,
    quiet_gdal,
    read_stack,
    spread,
    survey_of,
    to_rgb,
)
from corpus.reading import Shown
from corpus.splits import check, hashed_split, thinned
from corpus.stacks import grouped, scene_folders
from runtime.artefacts import file_stamp
from runtime.errors import UserError
from runtime.notices import notice
from runtime.progress import progress
from runtime.quiet import native_stderr_closed

SUFFIXES = (".tif", ".tiff", ".jp2", ".vrt", ".img")
SMALLER = "smaller than a tile"
NOT_A_SCENE = "cannot be opened as a scene"
TOO_MANY_TILES = "more than 1,048,576 tiles: raise corpus.tile"
HOLLOW = "claims more pixels than its file can hold"
#: No compression is stronger: that of one repeated byte by Zstandard, the strongest here, reaches half of it.
PIXELS_A_BYTE = 2**16
#: Of one scene; a file of a few bytes can claim any size, and every tile is a row.
MOST_TILES = 2**20
#: Side of the reduced picture of a scene from which its stretch is measured, in pixels.
OVERVIEW = 512
#: Units of a coordinate system: no number of a transform on Earth is larger.
FARTHEST = 1e12
EDGES = ("leave", "shift")
NO_BANDS = Bands((), None)


@dataclass(frozen=True)
class _Scene:
    """One raster, or one file a band, as far as tiling needs to know it."""

    name: str
    files: tuple[str, ...]
    stamp: str
    height: int = 0
    width: int = 0
    problem: str = ""
    crs: str = ""
    transform: tuple[float, ...] = ()
    metres: float = 0.0
    bands: Bands = NO_BANDS
    sampled: bool = False


class _Tile(NamedTuple):
    """A tile by its top-left pixel; `cells` are the pieces of ground that it touches."""

    scene: _Scene
    x: int
    y: int
    cells: tuple[str, ...]


@dataclass(frozen=True)
class GeoTiff(Shown):
    """Square tiles of raster scenes below a folder, or of one file; every format that GDAL reads by these suffixes.

    A manifest row has lon, lat (degrees, WGS 84, tile centre; NaN without a coordinate system),
    ground_sampling_distance (metres a pixel of the tile), crs, transform (GDAL's six numbers, JSON) and the pixel
    window. The scene is the first sub-folder.

    Splits share no ground: a cell of a common grid over the Earth (`corpus.ground`), as large as the largest scene's
    `block`, is held out with all that lies in it, whatever file, date or projection it comes from. A tile across the
    border of two splits is in none. `ground` is the tile's cell, "" across a border. A scene that has no place on Earth
    is divided into blocks of its own. Files that a VRT of the same folder shows are left to the VRT.

    Args:
        root: a folder, searched at any depth, or one file.
        tile: side of a tile in pixels of the scene; None: the resolution.
        overlap: pixels that neighbouring tiles share.
        edge: what becomes of the last pixels of a row or column, too few for a tile: "leave" them, or "shift" a last
            tile back to the border, over the tile before it.
        bands, no_data, stretch, low, high: as in `corpus.raster.RasterOptions`. Bands by name (B04) also stack files of
            one band each, as Sentinel-2 and Landsat are delivered.
        most_no_data: largest fraction of no-data pixels of a tile that is still an image.
        block: side in tiles of the cells that are held out together.
        split: "all", "train", "val" or "test", by a hash of the cell.
        resolution: side of the images handed on, in pixels.
        val_fraction, test_fraction: fractions of the cells that the hash holds out.
        limit: keep at most so many tiles, evenly spread (None: all).
        content_hash: a scene has changed if its bytes have, all of which are read for it, not its size or time.
        workers: reading processes (None: one a core); the result does not depend on it.
    Raises:
        UserError: no root, no scenes, options that contradict each other, or files of one band each and no `bands`.
    """

    root: str | None = None
    tile: int | None = None
    overlap: int = 0
    edge: str = "leave"
    most_no_data: float = 0.5
    block: int = 8
    split: str = "all"
    resolution: int = 64
    val_fraction: float = 0.1
    test_fraction: float = 0.1
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
        check(self.split, self.val_fraction, self.test_fraction, self.limit, self.resolution)
        if not 0 <= self.overlap < self._side:
            raise UserError(f"corpus.overlap={self.overlap} must lie in 0..{self._side - 1}, below the tile's side")
        if self.edge not in EDGES:
            raise UserError(f"corpus.edge={self.edge} is unknown: take {' or '.join(EDGES)}")
        _ = self.raster
        if self.block < 1:
            raise UserError(f"corpus.block={self.block}: give at least 1 tile")

    @property
    def version(self) -> dict[str, str]:
        """A digest of every scene's path, size and time of change."""
        files = [file for group in self._groups.values() for file in group]
        text = "\n".join(f"{file}\0{file_stamp(self._folder / file, self.content_hash)}" for file in files)
        return {"scenes": hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]}

    @property
    def metadata(self) -> dict[str, Any]:
        """`covered`: the fraction of every scene's pixels that some tile shows."""
        return {
            "covered": {_text(scene.name): round(self._covered(scene), 3) for scene in self._scenes if scene.height}
        }

    def manifest(self) -> pd.DataFrame:
        """One row a tile, scene by scene, row by row; a file that is no scene is a row whose reason says so."""
        scale, shown = self._side / self.resolution, self.survey.stamp
        rows = pd.DataFrame([_row(tile, scale, shown) for tile in self._chosen])
        if rows.empty:
            return rows
        for crs, tiles in rows.groupby("crs"):
            if crs:
                transforms = np.array([json.loads(text) for text in tiles["transform"]])
                near = (np.abs(transforms) < FARTHEST).all(
                    axis=1
                )  # one that is not spoils all that are transformed with it
                tiles, transforms = tiles[near], transforms[near]
                rows.loc[tiles.index, ["lon", "lat", "ground_sampling_distance"]] = _centres(
                    str(crs), transforms, self.resolution
                )
        return rows

    def reader(self, rows: np.ndarray) -> Callable[[], Iterator[np.ndarray | str]]:
        tiles = [self._chosen[row] for row in rows]
        rule = _Rule(self.raster, self.survey, self.most_no_data, self._side, self.resolution)
        return partial(_read_tiles, self._folder, tiles, rule)

    @property
    def files(self) -> list[Path]:
        """The files of all scenes."""
        return [self._folder / file for group in self._groups.values() for file in group]

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
    def _groups(self) -> dict[str, tuple[str, ...]]:
        """The files of every scene, by its name."""
        if self._root.is_file():
            return {self._root.name: (self._root.name,)}
        result = [
            (Path(folder) / name).relative_to(self._root).as_posix()
            for folder, _, names in os.walk(self._root)
            for name in names
            if not name.startswith(".")
        ]
        files = sorted(file for file in result if file.lower().endswith(SUFFIXES))
        if not files:
            raise UserError(f"corpus.root={self.root} has no scenes ({', '.join(SUFFIXES)}): give another folder")
        passed = Counter(suffix_of(file) for file in set(result) - set(files) if not is_companion(file))
        if passed:
            notice(f"{self.name}: {sum(passed.values()):,} files passed over: {counted(passed)}")
        files = self._without_sources(files)
        stacked, others = grouped(self.name, self._root, files, self.bands)
        used = {file for group in stacked.values() for file in group} | others
        return dict(sorted({**stacked, **{file: (file,) for file in files if file not in used}}.items()))

    def _without_sources(self, files: list[str]) -> list[str]:
        """Files but for those that a VRT among them shows."""
        import rasterio

        shown: set[str] = set()
        for file in files:
            if file.lower().endswith(".vrt") and (self._root / file).is_file():
                try:
                    with quiet_gdal(), rasterio.open(self._root / file) as mosaic:
                        shown |= {os.path.realpath(source) for source in mosaic.files[1:]}
                except Exception:  # its own row says that it cannot be opened
                    continue
        kept = [file for file in files if os.path.realpath(self._root / file) not in shown]
        if len(kept) < len(files):
            notice(f"{self.name}: {len(files) - len(kept)} files are left out, which a VRT beside them shows")
        return kept

    @cached_property
    def _scenes(self) -> list[_Scene]:
        groups = progress(self._groups.items(), f"open {self.name}", unit="scene", total=len(self._groups))
        with native_stderr_closed():
            return [self._open(name, files) for name, files in groups]

    @cached_property
    def survey(self) -> Survey:
        """Of reduced pictures of scenes that are spread over the corpus, whichever split is read."""
        deep = [scene for scene in self._scenes if scene.sampled]
        pictures = (_overview(self._folder, deep[row], self.raster) for row in spread(len(deep)))
        with native_stderr_closed():
            return survey_of(pictures, self.raster)

    @cached_property
    def _cell(self) -> float:
        """Side of the cells in metres: of the largest scene's block."""
        pixels = (self.block - 1) * (self._side - self.overlap) + self._side
        return float(max(round(pixels * max((scene.metres for scene in self._scenes), default=0)), 1))

    @cached_property
    def _chosen(self) -> list[_Tile]:
        """Tiles of the split, thinned to the limit."""
        tiles: list[_Tile] = []
        border, seen = 0, set()
        for scene in self._scenes:
            if scene.problem:
                tiles.append(_Tile(scene, 0, 0, ()))
                continue
            for tile in self._grid(scene):
                splits = {hashed_split(cell, self.val_fraction, self.test_fraction) for cell in tile.cells}
                border += len(splits) > 1
                seen.update(tile.cells)
                if self.split == "all" or splits == {self.split}:
                    tiles.append(tile)
        if border and self.split != "all":
            notice(f"{self.name}: {border} tiles lie across the border of two splits and are in none")
        if seen and not tiles:
            notice(
                f"{self.name}: the scenes lie in {len(seen)} cells of ground, none of which falls to {self.split}: "
                f"make them smaller with corpus.block (now {self.block} tiles)"
            )
        return [tiles[row] for row in thinned(len(tiles), self.limit)]

    def _grid(self, scene: _Scene) -> Iterator[_Tile]:
        """Tiles of a scene, row by row within its blocks; which cells they touch."""
        ys, xs = self._starts(scene.height), self._starts(scene.width)
        corners = [(x, y) for rows in _by_block(ys) for columns in _by_block(xs) for y in rows for x in columns]
        grounds = _grounds(scene, corners, self._side, self._cell) if scene.metres else None
        if grounds is None:
            grounds = [
                tuple(f"{_text(scene.name)}:{row},{column}" for row in ys[y] for column in xs[x]) for x, y in corners
            ]
        for (x, y), cells in zip(corners, grounds, strict=True):
            yield _Tile(scene, x, y, cells)

    def _starts(self, length: int) -> dict[int, tuple[int, ...]]:
        """First pixels of tiles along a side of a scene, and the blocks that each touches: one unless shifted."""
        side, step = self._side, self._side - self.overlap
        extent = (self.block - 1) * step + side
        starts = {
            start: (block // extent,)
            for block in range(0, length, extent)
            for start in range(block, min(block + extent, length) - side + 1, step)
        }
        last = length - side
        if self.edge == "shift" and last not in starts:
            starts[last] = tuple(range(last // extent, (length - 1) // extent + 1))
        return starts

    def _covered(self, scene: _Scene) -> float:
        """The fraction of a scene's pixels that some tile shows."""
        fraction = 1.0
        for length in (scene.height, scene.width):
            seen = np.zeros(length, bool)
            for start in self._starts(length):
                seen[start : start + self._side] = True
            fraction *= seen.mean()
        return float(fraction)

    def _open(self, name: str, files: tuple[str, ...]) -> _Scene:
        import rasterio

        stamp = "+".join(file_stamp(self._folder / file, self.content_hash) for file in files)
        if not all((self._folder / file).is_file() for file in files):  # a pipe has no end
            return _Scene(name, files, stamp, problem=NOT_A_FILE if (self._folder / files[0]).exists() else NOT_A_SCENE)
        try:
            with quiet_gdal(), rasterio.open(self._folder / files[0]) as raster:
                one = files == (name,)
                bands = choose_bands(raster, self.raster) if one else Bands(tuple(range(1, len(files) + 1)), None)
                if min(raster.height, raster.width) < self._side:
                    return _Scene(name, files, stamp, problem=SMALLER)
                if raster.height * raster.width > MOST_TILES * (self._side - self.overlap) ** 2:
                    return _Scene(name, files, stamp, problem=TOO_MANY_TILES)
                size = (self._folder / files[0]).stat().st_size
                if raster.driver != "VRT" and raster.height * raster.width > PIXELS_A_BYTE * size:
                    return _Scene(name, files, stamp, problem=HOLLOW)
                if isinstance(bands, str):
                    return _Scene(name, files, stamp, problem=bands)
                return _Scene(
                    name=name,
                    files=files,
                    stamp=stamp,
                    height=raster.height,
                    width=raster.width,
                    crs=raster.crs.to_string() if raster.crs else "",
                    transform=tuple(raster.transform.to_gdal()),
                    metres=_metres(raster),
                    bands=bands,
                    sampled=bands.alpha is not None or is_deep(np.dtype(raster.dtypes[bands.shown[0] - 1])),
                )
        except Exception:  # GDAL raises whatever it likes
            return _Scene(name, files, stamp, problem=NOT_A_SCENE)


def _by_block(starts: dict[int, tuple[int, ...]]) -> list[list[int]]:
    """Starts of tiles in groups of one block."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for start, blocks in starts.items():
        groups.setdefault(blocks, []).append(start)
    return list(groups.values())


def _metres(raster: Any) -> float:
    """Nominal side of a pixel in metres; 0 where the raster has no place on Earth."""
    if not raster.crs or raster.transform.is_identity:
        return 0.0
    side = math.sqrt(abs(raster.transform.determinant))
    try:
        metres = side * (DEGREE if raster.crs.is_geographic else raster.crs.linear_units_factor[1])
        return metres if metres < EARTH else 0.0  # NaN and infinity are no size either
    except Exception:  # a local coordinate system
        return 0.0


def _grounds(scene: _Scene, corners: Sequence[tuple[int, int]], side: int, cell: float) -> list[tuple[str, ...]] | None:
    """The cells that each tile touches, its centre's first; None where the scene's system has no place on Earth."""
    from rasterio.warp import transform as to_crs

    points = np.array([(0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1)]) * side
    positions = np.array(corners, dtype=np.float64).reshape(-1, 1, 2) + points
    left, width, shear_x, top, shear_y, height = scene.transform
    columns, rows = positions[..., 0], positions[..., 1]
    x, y = left + columns * width + rows * shear_x, top + columns * shear_y + rows * height
    try:
        lon, lat = to_crs(scene.crs, "EPSG:4326", x.ravel(), y.ravel())
    except Exception:
        return None
    if not np.isfinite([lon, lat]).all():
        return None
    return touched(np.reshape(lon, x.shape), np.reshape(lat, x.shape), cell)


def _overview(folder: Path, scene: _Scene, options: RasterOptions) -> Pixels:
    """A reduced picture of a scene; where a block of it is damaged, of its first rows."""
    import rasterio
    from rasterio.windows import Window

    scale = max(1.0, max(scene.height, scene.width) / OVERVIEW)
    shape = (math.ceil(scene.height / scale), math.ceil(scene.width / scale))
    with quiet_gdal(), ExitStack() as files:
        rasters = [files.enter_context(rasterio.open(folder / file)) for file in scene.files]
        try:
            return read_stack(rasters, scene.bands, options, None, shape)
        except Exception:
            try:
                first = Window(0, 0, scene.width, min(OVERVIEW, scene.height) // 4)
                return read_stack(rasters, scene.bands, options, first, None)
            except Exception:  # its tiles will say so
                return Pixels(np.zeros((0, 0, len(scene.bands.shown)), np.uint8))


@dataclass(frozen=True)
class _Rule:
    """How a tile becomes an image."""

    options: RasterOptions
    survey: Survey
    most_no_data: float
    side: int
    resolution: int


def _read_tiles(folder: Path, tiles: Sequence[_Tile], rule: _Rule) -> Iterator[np.ndarray | str]:
    """Tiles by windowed reads, each scene opened once for as long as its turn lasts."""
    import rasterio
    from rasterio.windows import Window

    scene, rasters = None, []
    with quiet_gdal(), ExitStack() as files:
        for tile in tiles:
            if tile.scene.problem:
                yield tile.scene.problem
                continue
            try:
                if scene != tile.scene:
                    files.close()
                    scene = None
                    rasters = [files.enter_context(rasterio.open(folder / file)) for file in tile.scene.files]
                    scene = tile.scene
                window = Window(tile.x, tile.y, rule.side, rule.side)
                pixels = read_stack(rasters, scene.bands, rule.options, window, None)
            except Exception:  # a block that is cut off or damaged: other tiles may be whole
                yield DAMAGED
                continue
            if pixels.valid is not None and 1 - pixels.valid.mean() > rule.most_no_data:
                yield NO_DATA
                continue
            yield square(to_rgb(pixels, rule.options, rule.survey), rule.resolution)


def _row(tile: _Tile, scale: float, shown: str) -> dict[str, Any]:
    """A tile's row; its place on Earth comes later, for all tiles at once."""
    scene, x, y, cells = tile
    folders = Path(scene.name).parts[:-1] if scene.files == (scene.name,) else scene_folders(scene.name)
    identifier = _text(scene.name)
    own = ()
    if not scene.problem:
        left, width, shear_x, top, shear_y, height = scene.transform
        corner = (left + x * width + y * shear_x, top + x * shear_y + y * height)
        own = (corner[0], width * scale, shear_x * scale, corner[1], shear_y * scale, height * scale)
    return {
        "id": identifier if scene.problem else f"{identifier}/{y:06d}_{x:06d}",
        "scene": _text(folders[0]) if folders else "",
        "caption": "",
        "stamp": scene.stamp + shown,
        "ground": cells[0] if len(cells) == 1 else "",
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


def _centres(crs: str, transforms: np.ndarray, resolution: int) -> np.ndarray:
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
    with np.errstate(over="ignore", invalid="ignore"):  # of a transform that leads nowhere
        shrink = np.stack([np.cos(np.radians(centre[1])), np.ones(len(transforms))])  # of a degree of longitude
        metres = [np.hypot(*((other - centre) * shrink)) * DEGREE for other in (at(half + 1, half), at(half, half + 1))]
        longitude = (centre[0] + 180) % 360 - 180
    return np.stack([longitude, centre[1], np.sqrt(metres[0] * metres[1])], axis=1)
