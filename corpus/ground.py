"""A common grid of cells over the Earth, by which images of the same ground come into the same split.

Rows of cells are bands of latitude of equal height; each row is divided into whole cells of about that width. The grid
depends on the cell's side alone: scenes of other dates, projections and extents, and mosaics of them, share it.
"""

from __future__ import annotations

import numpy as np

#: Metres of a degree of latitude, and of longitude at the equator.
DEGREE = 111_320.0
#: Metres around the equator: no pixel is larger.
EARTH = 360 * DEGREE


def cells(lon: np.ndarray, lat: np.ndarray, side: float) -> np.ndarray:
    """Row and column of the cell of every point, int64 [..., 2].

    Args:
        lon, lat: degrees, WGS 84, of any shape.
        side: of a cell, in metres.
    """
    rows = np.floor((lat + 90) * DEGREE / side).astype(np.int64)
    middle = np.clip((rows + 0.5) * side / DEGREE - 90, -90, 90)
    across = np.maximum(1, np.round(np.cos(np.radians(middle)) * 360 * DEGREE / side)).astype(np.int64)
    columns = np.floor((lon % 360) / 360 * across).astype(np.int64)
    return np.stack([rows, np.minimum(columns, across - 1)], axis=-1)


def touched(lon: np.ndarray, lat: np.ndarray, side: float) -> list[tuple[str, ...]]:
    """The cells that each footprint touches, sorted, its first point's first.

    Args:
        lon, lat: degrees of some points of every footprint, such as its centre and its corners, [N, K]. A footprint
            smaller than a cell touches no cell but those of its corners.
    """
    result = cells(lon, lat, side)
    names = [[f"{row},{column}" for row, column in points] for points in result.tolist()]
    return [tuple(dict.fromkeys(points)) for points in names]
