"""Nearest neighbours among the images of a pool, computed with faiss."""

from __future__ import annotations

import faiss
import numpy as np

EXACT = 20_000  # largest number of images searched exhaustively; for more, an inverted file is searched


def nearest_neighbours(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` other rows with the highest cosine to each row.

    The search is exact up to `EXACT` rows; for more rows it probes 16 lists of an inverted file of sqrt(n) lists.

    Args:
        points: float32 [n, D], unit length.
        count: number of neighbours, at most n - 1 (a larger value is reduced to n - 1).
    Returns:
        indices int64 [n, count] and cosines float32 [n, count], best first; -1 and -inf where the search found fewer.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    count = min(count, len(points) - 1)
    if count <= 0:
        return np.empty((len(points), 0), np.int64), np.empty((len(points), 0), np.float32)
    index = faiss.IndexFlatIP(points.shape[1])
    if len(points) > EXACT:
        lists = round(len(points) ** 0.5)
        index = faiss.IndexIVFFlat(index, points.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = 16
        index.train(points[:: max(1, len(points) // (lists * 64))])
    index.add(points)
    cosines, result = index.search(points, count + 1)
    itself = result == np.arange(len(points))[:, None]
    itself[~itself.any(axis=1), -1] = True  # duplicates displaced the image itself: drop the last
    keep = ~itself
    shape = (len(points), count)
    result, cosines = result[keep].reshape(shape), cosines[keep].reshape(shape)
    return result, np.where(result < 0, -np.inf, cosines)
