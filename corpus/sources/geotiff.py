"""Source for GeoTIFF scenes, which are tiled by windowed reads; every tile has a location on Earth."""

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
#: Upper limit of pixels per byte of a file; one repeated byte compressed by Zstandard, the strongest codec here,
#: reaches half of it.
PIXELS_A_BYTE = 2**16
#: Largest number of tiles of one scene: a file of a few bytes can claim any size, and every tile is a row.
MOST_TILES = 2**20
#: Side in pixels of the reduced image of a scene that its stretch is computed from.
OVERVIEW = 512
#: Upper limit of the numbers in a transform on Earth, in units of the coordinate system.
FARTHEST = 1e12
EDGES = ("leave", "shift")
NO_BANDS = Bands((), None)


@dataclass(frozen=True)
class _Scene:
    """The properties of a raster, or of several files with one band each, that tiling needs."""

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
    """A tile, given by its top-left pixel; `cells` are the ground cells that it touches."""

    scene: _Scene
    x: int
    y: int
    cells: tuple[str, ...]


@dataclass(frozen=True)
class GeoTiff(Shown):
    """Square tiles of the raster scenes below a folder, or of one file, in all formats that GDAL reads by suffix.

    A row of the manifest has lon and lat (degrees, WGS 84, tile centre; NaN without a coordinate system),
    ground_sampling_distance (metres per pixel of the tile), crs, transform (GDAL's six numbers as JSON) and the pixel
    window. The scene is the first sub-folder.

    Splits share no ground. The Earth is divided by a common grid (`corpus.ground`) with cells as large as a `block` of
    the largest scene. A cell is held out with everything in it, from any file, date or projection. A tile across the
    border of two splits is in no split. `ground` is the cell of a tile, "" for a tile across a border. A scene without
    a location on Earth is divided into separate blocks. If a VRT in the same folder refers to files, only the VRT is
    read.

    Args:
        root: a folder, which is searched at any depth, or one file.
        tile: side of a tile in pixels of the scene; None: equal to `resolution`.
        overlap: number of pixels that neighbouring tiles share.
        edge: treatment of the last pixels of a row or column that are too few for a tile: "leave" leaves them out,
            "shift" moves the last tile back to the border, so that it overlaps the tile before it.
        bands, no_data, stretch, low, high: as in `corpus.raster.RasterOptions`. If bands are given by name (B04), files
            with one band each are stacked as well, as in products of Sentinel-2 and Landsat.
        most_no_data: largest fraction of no-data pixels in a tile; other tiles are not readable images.
        block: side of the held-out cells, in tiles.
        split: "all", "train", "val" or "test", by a hash of the cell.
        resolution: side of the resulting images in pixels.
        val_fraction, test_fraction: fractions of the cells that the hash holds out.
        limit: largest number of tiles to keep, evenly spread (None: all).
        content_hash: detect changed scenes by their bytes, which requires reading all files, instead of size and time.
        workers: number of reading processes (None: one per core); the result does not depend on it.
    Raises:
        UserError: no root is given, there are no scenes, options contradict each other, or the files have one band each
            and `bands` is not given.
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
            raise UserError("corpus=geotiff needs scenes: give a folder or a file with corpus.root=PATH")
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
        """A digest of the path, size and time of change of every scene."""
        files = [file for group in self._groups.values() for file in group]
        text = "\n".join(f"{file}\0{file_stamp(self._folder / file, self.content_hash)}" for file in files)
        return {"scenes": hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]}

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the corpus: `covered`, for every scene the fraction of its pixels that tiles show."""
        return {
            "covered": {_text(scene.name): round(self._covered(scene), 3) for scene in self._scenes if scene.height}
        }

    def manifest(self) -> pd.DataFrame:
        """Table with one row per tile, scene by scene, row by row; an invalid scene has one row with a reason."""
        scale, shown = self._side / self.resolution, self.survey.stamp
        rows = pd.DataFrame([_row(tile, scale, shown) for tile in self._chosen])
        if rows.empty:
            return rows
        for crs, tiles in rows.groupby("crs"):
            if crs:
                transforms = np.array([json.loads(text) for text in tiles["transform"]])
                near = (np.abs(transforms) < FARTHEST).all(
                    axis=1
                )  # an extreme transform would make the conversion of all others fail
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
        """The files of every scene, by the name of the scene."""
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
            notice(f"{self.name}: {sum(passed.values()):,} files ignored: {counted(passed)}")
        files = self._without_sources(files)
        stacked, others = grouped(self.name, self._root, files, self.bands)
        used = {file for group in stacked.values() for file in group} | others
        return dict(sorted({**stacked, **{file: (file,) for file in files if file not in used}}.items()))

    def _without_sources(self, files: list[str]) -> list[str]:
        """The files, without those that a VRT among them refers to."""
        import rasterio

        shown: set[str] = set()
        for file in files:
            if file.lower().endswith(".vrt") and (self._root / file).is_file():
                try:
                    with quiet_gdal(), rasterio.open(self._root / file) as mosaic:
                        shown |= {os.path.realpath(source) for source in mosaic.files[1:]}
                except Exception:  # its row in the manifest reports that it cannot be opened
                    continue
        kept = [file for file in files if os.path.realpath(self._root / file) not in shown]
        if len(kept) < len(files):
            notice(f"{self.name}: {len(files) - len(kept)} files are left out because a VRT file refers to them")
        return kept

    @cached_property
    def _scenes(self) -> list[_Scene]:
        groups = progress(self._groups.items(), f"open {self.name}", unit="scene", total=len(self._groups))
        with native_stderr_closed():
            return [self._open(name, files) for name, files in groups]

    @cached_property
    def survey(self) -> Survey:
        """Survey of reduced images of scenes that are spread over the corpus, independent of the split that is read."""
        deep = [scene for scene in self._scenes if scene.sampled]
        pictures = (_overview(self._folder, deep[row], self.raster) for row in spread(len(deep)))
        with native_stderr_closed():
            return survey_of(pictures, self.raster)

    @cached_property
    def _cell(self) -> float:
        """Side of the cells in metres: the side of a block of the largest scene."""
        pixels = (self.block - 1) * (self._side - self.overlap) + self._side
        return float(max(round(pixels * max((scene.metres for scene in self._scenes), default=0)), 1))

    @cached_property
    def _chosen(self) -> list[_Tile]:
        """The tiles of the split, reduced to the limit."""
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
            notice(f"{self.name}: {border} tiles lie across the border of two splits and are in no split")
        if seen and not tiles:
            notice(
                f"{self.name}: the scenes lie in {len(seen)} ground cells, and none of them is in {self.split}: make "
                f"the cells smaller with corpus.block (now {self.block} tiles)"
            )
        return [tiles[row] for row in thinned(len(tiles), self.limit)]

    def _grid(self, scene: _Scene) -> Iterator[_Tile]:
        """Tiles of a scene, row by row within its blocks, with the cells that they touch."""
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
        """First pixels of tiles along a side of a scene, and the blocks that each tile touches: one unless shifted."""
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
        """Fraction of the pixels of a scene that tiles show."""
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
        if not all((self._folder / file).is_file() for file in files):  # reading a pipe may never end
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
        except Exception:  # GDAL may raise any exception
            return _Scene(name, files, stamp, problem=NOT_A_SCENE)


def _by_block(starts: dict[int, tuple[int, ...]]) -> list[list[int]]:
    """Starts of tiles, grouped by block."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for start, blocks in starts.items():
        groups.setdefault(blocks, []).append(start)
    return list(groups.values())


def _metres(raster: Any) -> float:
    """Nominal side of a pixel in metres; 0 if the raster has no location on Earth."""
    if not raster.crs or raster.transform.is_identity:
        return 0.0
    side = math.sqrt(abs(raster.transform.determinant))
    try:
        metres = side * (DEGREE if raster.crs.is_geographic else raster.crs.linear_units_factor[1])
        return metres if metres < EARTH else 0.0  # also 0 for NaN and infinity
    except Exception:  # a local coordinate system
        return 0.0


def _grounds(scene: _Scene, corners: Sequence[tuple[int, int]], side: int, cell: float) -> list[tuple[str, ...]] | None:
    """The cells that each tile touches, the centre's first; None if the scene has no location on Earth."""
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
    """A reduced image of a scene; if a block of the scene is damaged, of its first rows only."""
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
            except Exception:  # the tiles report the error
                return Pixels(np.zeros((0, 0, len(scene.bands.shown)), np.uint8))


@dataclass(frozen=True)
class _Rule:
    """Settings by which tiles are converted into images."""

    options: RasterOptions
    survey: Survey
    most_no_data: float
    side: int
    resolution: int


def _read_tiles(folder: Path, tiles: Sequence[_Tile], rule: _Rule) -> Iterator[np.ndarray | str]:
    """Read tiles by windowed reads; each scene is opened once and closed after its last tile."""
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
            except Exception:  # a truncated or damaged block: other tiles may be intact
                yield DAMAGED
                continue
            if pixels.valid is not None and 1 - pixels.valid.mean() > rule.most_no_data:
                yield NO_DATA
                continue
            yield square(to_rgb(pixels, rule.options, rule.survey), rule.resolution)


def _row(tile: _Tile, scale: float, shown: str) -> dict[str, Any]:
    """Row of a tile in the manifest; its location is added later, for all tiles at once."""
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
    """The name of a file as valid Unicode."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _centres(crs: str, transforms: np.ndarray, resolution: int) -> np.ndarray:
    """Longitude, latitude and metres per pixel at tile centres, float64 [n, 3], from GDAL transforms [n, 6]."""
    from rasterio.warp import transform as to_crs

    def at(column: float, row: float) -> np.ndarray:
        x = transforms[:, 0] + column * transforms[:, 1] + row * transforms[:, 2]
        y = transforms[:, 3] + column * transforms[:, 4] + row * transforms[:, 5]
        return np.stack(to_crs(crs, "EPSG:4326", x, y))

    half = resolution / 2
    try:
        centre = at(half, half)
    except Exception:  # a local coordinate system, without a location on Earth
        return np.full((len(transforms), 3), np.nan)
    with np.errstate(over="ignore", invalid="ignore"):  # an invalid transform may overflow
        shrink = np.stack(
            [np.cos(np.radians(centre[1])), np.ones(len(transforms))]
        )  # length of a degree of longitude relative to one of latitude
        metres = [np.hypot(*((other - centre) * shrink)) * DEGREE for other in (at(half + 1, half), at(half, half + 1))]
        longitude = (centre[0] + 180) % 360 - 180
    return np.stack([longitude, centre[1], np.sqrt(metres[0] * metres[1])], axis=1)
