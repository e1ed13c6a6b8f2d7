"""SemDeDup: drop images that have a near-duplicate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import cluster_diagnostics, corpus_clusters, members_of, ranked
from prune.pool import Pool, Selection
from runtime.ranges import check_options

BLOCK = 2048


@dataclass(frozen=True)
class SemDeDup:
    """Semantic de-duplication (Abbas et al. 2023, arXiv 2303.09540).

    Inside each k-means cluster, the images are ordered by their distance to the centroid, the farthest first. An image
    is dropped if its cosine to an image before it exceeds a threshold, so the image of a group of duplicates that is
    farthest from the centroid is kept. The paper fixes the threshold. Here, images are dropped in the order of their
    largest such cosine, which is equivalent to the threshold that meets the budget exactly.

    Args:
        clusters: number of k-means clusters; None: the square root of the number of images.
    """

    clusters: int | None = None

    def __post_init__(self) -> None:
        check_options(self, "prune", counts=("clusters",))

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows, points, labels, distances = corpus_clusters(pool, self.clusters, generator)
        duplicate = np.full(len(rows), -np.inf, dtype=np.float32)
        for group in members_of(labels, int(labels.max(initial=-1)) + 1):
            group = group[np.argsort(-distances[group], kind="stable")]
            duplicate[group] = largest_cosine_before(points[rows[group]])
        diagnostics = cluster_diagnostics(pool, rows, labels, distances)
        return ranked(pool, rows, -duplicate, budget, "redundant", **diagnostics)


def largest_cosine_before(points: np.ndarray) -> np.ndarray:
    """Largest cosine of each row of float32 [n, D], unit length, to any row before it; -inf for the first row."""
    result = np.full(len(points), -np.inf, dtype=np.float32)
    for start in range(0, len(points), BLOCK):
        block = points[start : start + BLOCK]
        cosines = block @ points[: start + len(block)].T
        later = np.arange(cosines.shape[1])[None] >= start + np.arange(len(block))[:, None]
        cosines[later] = -np.inf
        result[start : start + len(block)] = cosines.max(axis=1)
    return result
