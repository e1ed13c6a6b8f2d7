"""k-means of a scene of any size: fitted to bounded samples, level by level; the other images are then assigned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import faiss
import numba
import numpy as np

from prune.pool import Pool, Selection
from prune.ranks import ascending

CHUNK = 16_384
#: Number of products (points x clusters) from which k-means is faster with more than one thread.
MANY_PRODUCTS = 4_000_000
#: Largest number of levels: images that are all alike cannot be split, so the recursion must end.
DEEPEST = 6
#: Smallest norm that a vector is divided by.
TINY = np.float32(1e-12)


@dataclass(frozen=True)
class Points:
    """Rows of an embedding matrix, usually a memory map; rows are read when they are accessed.

    Attributes:
        embeddings: float [N, D].
        centre: float32 [D], subtracted from every row.
        spherical: whether rows are scaled to unit length.
    """

    embeddings: np.ndarray
    centre: np.ndarray
    spherical: bool = True

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """The rows as float32 [K, D], centred and, if spherical, of unit length; a zero vector stays zero."""
        values = np.asarray(self.embeddings[rows])
        vectors = np.empty(values.shape, np.float32)
        if values.dtype == np.float16:
            _from_half(np.ascontiguousarray(values).view(np.uint16), _halves(), self.centre, self.spherical, vectors)
        else:
            _from_single(np.ascontiguousarray(values, np.float32), self.centre, self.spherical, vectors)
        return vectors

    def restricted(self, rows: np.ndarray) -> Points:
        """A copy of some rows in memory, numbered from 0, which can be sent to another machine."""
        return Points(np.array(self.embeddings[rows]), self.centre, self.spherical)


@cache
def _halves() -> np.ndarray:
    """Table float32 [65536] of the value of every half-precision number, indexed by its bits."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


@numba.njit(cache=True, nogil=True)
def _from_half(bits: np.ndarray, halves: np.ndarray, centre: np.ndarray, spherical: bool, out: np.ndarray) -> None:
    """Write half-precision rows, given as bits uint16 [K, D], into `out`: centred and, if spherical, of unit length."""
    for row in range(len(bits)):
        for column in range(bits.shape[1]):
            out[row, column] = halves[bits[row, column]] - centre[column]
        if spherical:
            _to_unit_length(out[row])


@numba.njit(cache=True, nogil=True)
def _from_single(values: np.ndarray, centre: np.ndarray, spherical: bool, out: np.ndarray) -> None:
    """The same as `_from_half`, for values float32 [K, D]."""
    for row in range(len(values)):
        for column in range(values.shape[1]):
            out[row, column] = values[row, column] - centre[column]
        if spherical:
            _to_unit_length(out[row])


@numba.njit(nogil=True)
def _to_unit_length(vector: np.ndarray) -> None:
    """Divide a vector by its norm, in place.

    The squares are summed in the order of PyTorch's `norm`, so that published selections stay the same: eight sums side
    by side, then four numbers, then the rest with fused multiplication and addition.
    """
    size = len(vector)
    whole = size - size % 8
    a = b = c = d = e = f = g = h = np.float32(0)
    for start in range(0, whole, 8):
        a += vector[start] * vector[start]
        b += vector[start + 1] * vector[start + 1]
        c += vector[start + 2] * vector[start + 2]
        d += vector[start + 3] * vector[start + 3]
        e += vector[start + 4] * vector[start + 4]
        f += vector[start + 5] * vector[start + 5]
        g += vector[start + 6] * vector[start + 6]
        h += vector[start + 7] * vector[start + 7]
    total = a + b + c + d + e + f + g + h
    fused = size - size % 4
    for column in range(whole, fused):
        total += vector[column] * vector[column]
    for column in range(fused, size):
        total = np.float32(np.float64(vector[column]) * np.float64(vector[column]) + np.float64(total))
    norm = np.sqrt(total)
    if norm < TINY:
        norm = TINY
    for column in range(size):
        vector[column] /= norm


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Scale each row to unit length, float32 [N, D]; a zero row stays zero."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def kmeans(points: np.ndarray, clusters: int, seed: int, *, iterations: int = 20, spherical: bool = True) -> np.ndarray:
    """Centroids by faiss k-means, float32 [min(clusters, n), D]; spherical ones have unit length.

    A small k-means runs in one thread: more threads would make it slower, and several can run side by side.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    clusters = min(clusters, len(points))
    if clusters == len(points):
        return points.copy()
    model = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=iterations,
        spherical=spherical,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=1_000_000_000,
    )
    threads = faiss.omp_get_max_threads()
    if len(points) * clusters < MANY_PRODUCTS:
        faiss.omp_set_num_threads(1)  # the setting applies to the current thread only
    try:
        model.train(points)
    finally:
        faiss.omp_set_num_threads(threads)
    return model.centroids


def nearest_centroid(
    points: np.ndarray, centroids: np.ndarray, spherical: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest centroid, int64 [n], and the distance to it, float32 [n].

    The distance is 1 - cosine for spherical clusters and Euclidean otherwise. Ties go to the first centroid.
    """
    products = points @ centroids.T
    if spherical:
        labels = products.argmax(axis=1)
        return labels, 1 - np.take_along_axis(products, labels[:, None], axis=1)[:, 0]
    squares = (points**2).sum(axis=1, keepdims=True) - 2 * products + (centroids**2).sum(axis=1)
    labels = squares.argmin(axis=1)
    return labels, np.sqrt(np.maximum(np.take_along_axis(squares, labels[:, None], axis=1)[:, 0], 0))


@dataclass(frozen=True)
class Clustering:
    """Settings by which a set of rows is clustered; calling the object clusters them.

    Args:
        branches: largest number of clusters of one k-means.
        hierarchical: if more than `branches` clusters are requested, split every cluster again until there are as many
            as requested; if False, there are at most `branches` clusters.
        sample_per_cluster: rows per cluster that one k-means is fitted to; the other rows are assigned afterwards.
        iterations: iterations of Lloyd's algorithm.
    """

    branches: int = 64
    hierarchical: bool = True
    sample_per_cluster: int = 256
    iterations: int = 20

    def __call__(
        self, points: Points, rows: np.ndarray, clusters: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Divide `rows`, int64 [n], into about `clusters` clusters.

        With b branches the cost is n b log(clusters) / log(b) products and a bounded k-means per branch. This is
        near-linear in n, whereas one k-means with as many clusters would be quadratic.

        Returns:
            labels: int64 [n], 0..k-1, no cluster is empty.
            distances: float32 [n], distance to the centroid of the last level.
        """
        labels, distances = self._split(points, rows, clusters, generator, DEEPEST)
        return np.unique(labels, return_inverse=True)[1], distances

    def _split(
        self, points: Points, rows: np.ndarray, clusters: int, generator: np.random.Generator, levels: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run one k-means and, while `levels` remain, one inside each of its clusters; labels may skip numbers."""
        branches = max(1, min(clusters, self.branches, len(rows)))
        sample = rows
        if len(rows) > branches * self.sample_per_cluster:
            sample = rows[np.sort(generator.choice(len(rows), branches * self.sample_per_cluster, replace=False))]
        seed = int(generator.integers(2**31))
        centroids = kmeans(points[sample], branches, seed, iterations=self.iterations, spherical=points.spherical)
        labels, distances = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            labels[part], distances[part] = nearest_centroid(points[rows[part]], centroids, points.spherical)
        if self.hierarchical and clusters > branches and levels > 1:
            groups, offset = members_of(labels, branches), 0
            for group in groups:
                requested = round(len(group) * clusters / len(rows))
                if requested > 1:
                    labels[group], distances[group] = self._split(points, rows[group], requested, generator, levels - 1)
                    labels[group] += offset
                else:
                    labels[group] = offset
                offset = labels[group].max(initial=offset - 1) + 1
        return labels, distances


def members_of(labels: np.ndarray, count: int) -> list[np.ndarray]:
    """Positions of every label 0..count-1, each ascending; all labels are found with one sort."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, count)))


def corpus_points(pool: Pool) -> tuple[np.ndarray, Points]:
    """Readable rows of a pool, int64 [n], and its embeddings, centred on their mean and scaled to unit length.

    They are centred because features after a ReLU all point in a similar direction, so their raw cosines say little.
    """
    rows = np.flatnonzero(pool.readable)
    return rows, Points(pool.embeddings, mean_embedding(pool.embeddings, rows))


def mean_embedding(embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean of some rows of a memory map, float32 [D], read part by part; zeros if there are no rows."""
    total = np.zeros(embeddings.shape[1], dtype=np.float64)
    for start in range(0, len(rows), CHUNK):
        total += np.asarray(embeddings[rows[start : start + CHUNK]], dtype=np.float32).sum(axis=0)
    return (total / max(1, len(rows))).astype(np.float32)


def corpus_clusters(
    pool: Pool, clusters: int | None, generator: np.random.Generator
) -> tuple[np.ndarray, Points, np.ndarray, np.ndarray]:
    """Run one flat spherical k-means on the n readable images; if `clusters` is None, there are sqrt(n) clusters.

    Returns:
        the rows, int64 [n]; the points; the labels, int64 [n]; the cosine distances to the centroids, float32 [n].
    """
    rows, points = corpus_points(pool)
    if len(rows) == 0:
        return rows, points, np.empty(0, np.int64), np.empty(0, np.float32)
    clusters = clusters or max(1, round(len(rows) ** 0.5))
    labels, distances = Clustering(clusters, hierarchical=False)(points, rows, clusters, generator)
    return rows, points, labels, distances


def ranked(pool: Pool, rows: np.ndarray, score: np.ndarray, budget: int, reason: str, **diagnostics: Any) -> Selection:
    """Keep the `budget` rows of the highest score; ties at the cut are in a fixed random order (`prune.ranks`)."""
    kept = rows[ascending(-score)[:budget]]
    return Selection.of(pool, kept, reason, **diagnostics)


def cluster_diagnostics(pool: Pool, rows: np.ndarray, labels: np.ndarray, distances: np.ndarray) -> dict[str, Any]:
    """The columns `cluster` and `centroid_distance` of a selection, from the clusters of some rows."""
    cluster = np.full(len(pool), -1, dtype=np.int32)
    distance = np.full(len(pool), np.nan, dtype=np.float32)
    cluster[rows], distance[rows] = labels, distances
    return {"cluster": cluster, "centroid_distance": distance}
