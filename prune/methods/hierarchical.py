"""Hierarchical k-means sampling: balanced over a tree of clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prune.allocation import water_fill
from prune.clusters import Clustering, Points, cluster_diagnostics, corpus_points, kmeans, members_of, nearest_centroid
from prune.pool import Pool, Selection
from runtime.ranges import check_options


@dataclass(frozen=True)
class HierarchicalKMeans:
    """Hierarchical k-means with balanced sampling (Vo et al. 2024, arXiv 2405.15613, ssl-data-curation).

    k-means is run on the images, then on the resulting centroids, and so on. At each level above the first, k-means is
    repeated on the lower centroids that are nearest to the new ones (resampling), which spreads the new centroids
    evenly. The budget is water-filled from the top level down to the first, and the images of a cluster of the first
    level are drawn at random, as in the paper. The paper's distributed k-means is left out.

    Args:
        shrink: mean number of members per cluster at each level; 16 gives levels of N/16, N/256 ... clusters.
        levels: number of levels of the tree.
        resampling: number of resampling rounds at each level above the first.
        resample_size: number of lower centroids nearest to each new centroid that a round keeps.
    """

    shrink: int = 16
    levels: int = 3
    resampling: int = 3
    resample_size: int = 4

    def __post_init__(self) -> None:
        check_options(self, "prune", counts=("shrink", "levels", "resample_size"), counts_or_zero=("resampling",))

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows, points = corpus_points(pool)
        budget = min(budget, len(rows))
        if budget == 0:
            return Selection.of(pool, rows[:0], "redundant")
        levels, distances = self._tree(points, rows, generator)
        kept = sample_tree(levels, budget, generator)
        return Selection.of(pool, rows[kept], "redundant", **cluster_diagnostics(pool, rows, levels[0], distances))

    def _tree(
        self, points: Points, rows: np.ndarray, generator: np.random.Generator
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Labels of the images at the first level and of each level's clusters at the next one; image distances."""
        clusters = max(1, len(rows) // self.shrink)
        labels, distances = Clustering(clusters, hierarchical=False)(points, rows, clusters, generator)
        levels = [labels]
        members = members_of(labels, int(labels.max()) + 1)
        below = np.stack([points[rows[group]].mean(axis=0) for group in members])
        for _ in range(1, self.levels):
            clusters = max(1, len(below) // self.shrink)
            centroids = kmeans(below, clusters, int(generator.integers(2**31)))
            for _ in range(self.resampling):
                near = np.argsort(-(centroids @ below.T), axis=1, kind="stable")[:, : self.resample_size]
                centroids = kmeans(below[np.unique(near)], clusters, int(generator.integers(2**31)))
            assigned, _ = nearest_centroid(below, centroids)
            used, assigned = np.unique(assigned, return_inverse=True)
            levels.append(assigned)
            below = centroids[used]
        return levels, distances


def sample_tree(levels: Sequence[np.ndarray], budget: int, generator: np.random.Generator) -> np.ndarray:
    """Water-fill a budget from the top of a tree down, then draw at random; int64 [budget].

    Args:
        levels: for each level l, labels int64 [n_l] of its items in level l + 1; the items of level 0 are the images.
        budget: number of images to draw, at most the number of images.
    """
    counts = [np.bincount(levels[0])]  # number of images in each cluster, level by level
    for labels in levels[1:]:
        counts.append(np.bincount(labels, weights=counts[-1]).astype(np.int64))
    budgets = water_fill(counts[-1], budget)
    for labels, sizes in zip(reversed(levels[1:]), reversed(counts[:-1]), strict=True):
        below = np.zeros(len(sizes), dtype=np.int64)
        for group, fraction in zip(members_of(labels, len(budgets)), budgets, strict=True):
            below[group] = water_fill(sizes[group], int(fraction))
        budgets = below
    groups = members_of(levels[0], len(budgets))
    return np.concatenate(
        [generator.permutation(group)[:fraction] for group, fraction in zip(groups, budgets, strict=True)]
    )
