"""Locations of georeferenced image files, read from their headers, to find the images that share ground."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from corpus.ground import DEGREE, touched
from corpus.raster import quiet_gdal
from runtime.progress import progress

#: Candidate sides of a grid cell, as multiples of the side of the largest footprint. The first one that gives `ENOUGH`
#: cells is used; if none does, the first one is.
CELL_SIDES = (8, 4, 2)
ENOUGH = 20
#: Suffixes of files that may carry a coordinate system.
PLACED = (".tif", ".tiff", ".jp2", ".j2k")
#: TIFF tag of the directory of GeoTIFF keys, which every TIFF with a coordinate system has.
_GEO_KEYS = 34735
#: Upper limit for the number of entries of a TIFF's first directory.
_MOST_TAGS = 4096
#: Number of results to keep, so that the splits of one corpus share one search.
_KEPT = 4
_answers: dict[Hashable, list[tuple[str, ...]]] = {}


class Footprint(NamedTuple):
    """Longitude and latitude of an image's centre and corners, float64 [5] each, and its longer side in metres."""

    lon: np.ndarray
    lat: np.ndarray
    side: float


def grounds_of(corpus: str, files: Sequence[Path | None], key: Hashable) -> list[tuple[str, ...]]:
    """The cells of a common grid that each image touches, the centre's cell first; () for an image without a location.

    The side of a cell is a multiple of the longest side of an image (`CELL_SIDES`), so no image touches more than four
    cells.

    Args:
        corpus: name of the corpus, for messages.
        files: file of each image; None: an image without a file.
        key: everything that the result depends on; the result is kept under this key for the next call.
    """
    if key not in _answers:
        while len(_answers) >= _KEPT:
            _answers.pop(next(iter(_answers)))
        _answers[key] = _grounds(corpus, files)
    return _answers[key]


def _grounds(corpus: str, files: Sequence[Path | None]) -> list[tuple[str, ...]]:
    cells: list[tuple[str, ...]] = [()] * len(files)
    placed = [at for at, file in enumerate(files) if file is not None and file.suffix.lower() in PLACED]
    result = {}
    for at in progress(placed, f"read locations of {corpus}", unit="image"):
        footprint = footprint_of(files[at])
        if footprint is not None:
            result[at] = footprint
    if not result:
        return cells
    side = max(footprint.side for footprint in result.values())
    lon, lat = (np.stack([footprint[axis] for footprint in result.values()]) for axis in (0, 1))
    grids = [touched(lon, lat, float(max(round(times * side), 1))) for times in CELL_SIDES]
    enough = (grid for grid in grids if len({touching[0] for touching in grid}) >= ENOUGH)
    for at, touching in zip(result, next(enough, grids[0]), strict=True):
        cells[at] = touching
    return cells


def footprint_of(path: Path) -> Footprint | None:
    """The footprint of a georeferenced TIFF or JPEG 2000 file; None if there is no file or no coordinate system."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    try:
        with path.open("rb") as file:
            if not _may_be_placed(file):
                return None
        with quiet_gdal(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as raster:
                return _footprint(raster)
    except Exception:  # a damaged file has no footprint; the damage is reported when the file is read
        return None


def _footprint(raster: Any) -> Footprint | None:
    from rasterio.warp import transform as to_crs

    if not raster.crs or raster.transform.is_identity:
        return None
    columns, rows = (np.array([(0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1)]) * (raster.width, raster.height)).T
    x, y = raster.transform * (columns, rows)
    lon, lat = (np.array(values) for values in to_crs(raster.crs, "EPSG:4326", x, y))
    if not np.isfinite([lon, lat]).all() or np.abs(lat).max() > 90:
        return None
    east = (lon[1:] - lon[0] + 180) % 360 - 180
    width, height = np.ptp(east) * np.cos(np.radians(lat[0])), np.ptp(lat)
    return Footprint(lon, lat, float(max(width, height) * DEGREE))


def _may_be_placed(file: BinaryIO) -> bool:
    """False for a TIFF whose first directory has no GeoTIFF keys; true for all other files."""
    head = file.read(16)
    if head[:2] not in (b"II", b"MM"):
        return bool(head)
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    [start] = struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])
    width, size = (8, 20) if big else (2, 12)
    file.seek(start)
    count = int.from_bytes(file.read(width), "little" if order == "<" else "big")
    entries = file.read(min(count, _MOST_TAGS) * size)
    tags = (struct.unpack_from(order + "H", entries, at)[0] for at in range(0, len(entries) - size + 1, size))
    return _GEO_KEYS in tags
