"""A common grid of cells over the Earth that puts images of the same ground into the same split.

The rows of the grid are latitude bands of equal height. Each row is divided into whole cells of about the same width.
The grid depends on the side of a cell only, so scenes of different dates, projections and extents share it.
"""

from __future__ import annotations

import numpy as np

#: Length in metres of one degree of latitude, and of one degree of longitude at the equator.
DEGREE = 111_320.0
#: Length of the equator in metres, an upper limit for the side of a pixel.
EARTH = 360 * DEGREE


def cells(lon: np.ndarray, lat: np.ndarray, side: float) -> np.ndarray:
    """Row and column of the cell of every point, int64 [..., 2].

    Args:
        lon, lat: coordinates in degrees, WGS 84, arrays of any shape.
        side: side of a cell in metres.
    """
    rows = np.floor((lat + 90) * DEGREE / side).astype(np.int64)
    middle = np.clip((rows + 0.5) * side / DEGREE - 90, -90, 90)
    across = np.maximum(1, np.round(np.cos(np.radians(middle)) * 360 * DEGREE / side)).astype(np.int64)
    columns = np.floor((lon % 360) / 360 * across).astype(np.int64)
    return np.stack([rows, np.minimum(columns, across - 1)], axis=-1)


def touched(lon: np.ndarray, lat: np.ndarray, side: float) -> list[tuple[str, ...]]:
    """The cells that each footprint touches: the cell of its first point, then the others, sorted.

    Args:
        lon, lat: coordinates in degrees, [N, K], of K points of every footprint, such as its centre and its corners. A
            footprint smaller than a cell touches only the cells of its corners.
        side: side of a cell in metres.
    """
    result = cells(lon, lat, side)
    names = [[f"{row},{column}" for row, column in points] for points in result.tolist()]
    return [tuple(dict.fromkeys(points)) for points in names]
