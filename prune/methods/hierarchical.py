"""Hierarchical k-means sampling: balanced over a tree of clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prune.allocation import water_fill
from prune.clusters import Clustering, Points, cluster_diagnostics, corpus_points, kmeans, members_of, nearest_centroid
from prune.pool import Pool, Selection


@dataclass(frozen=True)
class HierarchicalKMeans:
    """Hierarchical k-means with balanced sampling (Vo et al. 2024, arXiv 2405.15613, ssl-data-curation).

    k-means on the images, then on its centroids, and so on; at each level above the first, k-means is repeated on the
    centroids nearest to the new ones (resampling), which spreads them evenly. The budget is water-filled from the top
    level down to the first, and images are drawn at random in a cluster of the first level, as in the paper.
    Left out: the paper's distributed k-means.

    Args:
        shrink: members of each cluster at each level, bottom up: sqrt-like levels of N/16, N/256 ... clusters.
        levels: of the tree.
        resampling: rounds of resampling at each level above the first.
        resample_size: centroids kept nearest to each new one in a round.
    """

    shrink: int = 16
    levels: int = 3
    resampling: int = 3
    resample_size: int = 4

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
        """Labels of the images at the first level, then of each level's clusters at the next; image distances."""
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
        levels: labels int64 [n_l] of level l's items in level l + 1; the first are the images.
        budget: at most the number of images.
    """
    counts = [np.bincount(levels[0])]  # images under each cluster, level by level
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
