"""Density-based pruning: complex clusters keep more images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import cluster_diagnostics, corpus_clusters, members_of, normalise
from prune.pool import Pool, Selection
from runtime.ranges import check_options


@dataclass(frozen=True)
class DensityPruning:
    """Density-based pruning (Abbas et al. 2024, arXiv 2401.04578).

    The complexity of a cluster is the product of two mean distances: of its centroid to the nearest other centroids,
    and of its images to its centroid. A softmax over the complexities gives each cluster's fraction of the budget; a
    quadratic program finds the nearest feasible allocation. Inside a cluster the images farthest from the centroid are
    kept. The de-duplication and the CLIP-score filter that the paper runs first are left out.

    Args:
        clusters: number of k-means clusters; None: the square root of the number of images.
        temperature: temperature of the softmax.
        neighbours: number of nearest other centroids that the distance between centroids is averaged over.
    """

    clusters: int | None = None
    temperature: float = 0.1
    neighbours: int = 20

    def __post_init__(self) -> None:
        check_options(self, "prune", counts=("neighbours", "clusters"), above_zero=("temperature",))

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows, points, labels, distances = corpus_clusters(pool, self.clusters, generator)
        budget = min(budget, len(rows))
        members = members_of(labels, int(labels.max(initial=-1)) + 1)
        if budget == 0:
            return Selection.of(pool, rows[:0], "redundant")
        centroids = normalise(np.stack([points[rows[group]].mean(axis=0) for group in members]))
        inner = np.array([distances[group].mean() for group in members])
        complexity = inner * outer_distance(centroids, self.neighbours)
        fractions = np.exp((complexity - complexity.max()) / self.temperature)
        budgets = nearest_feasible(
            budget * fractions / fractions.sum(), np.array([len(group) for group in members]), budget
        )
        kept = [
            group[np.argsort(-distances[group], kind="stable")[:count]]
            for group, count in zip(members, budgets, strict=True)
        ]
        diagnostics = cluster_diagnostics(pool, rows, labels, distances)
        return Selection.of(pool, rows[np.concatenate(kept)], "redundant", **diagnostics)


def outer_distance(centroids: np.ndarray, neighbours: int) -> np.ndarray:
    """Mean cosine distance of each unit centroid to its `neighbours` nearest others, float [k]; 1 for a single one."""
    if len(centroids) == 1:
        return np.ones(1)
    distances = 1 - centroids @ centroids.T
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, : min(neighbours, len(centroids) - 1)].mean(axis=1)


def nearest_feasible(requested: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    """Integers x with 0 <= x <= sizes and sum `budget` that are nearest to `requested` in least squares.

    The program min |x - requested|^2 with sum x = budget and 0 <= x <= sizes has the solution
    x = clip(requested + shift, 0, sizes). The shift is found by bisection; x is then rounded by largest remainders.
    """
    low, high = -requested.max() - 1.0, float(sizes.max()) + 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(requested + middle, 0, sizes).sum() < budget else (low, middle)
    exact = np.clip(requested + high, 0, sizes)
    whole = np.floor(exact + 1e-9).astype(np.int64)
    for index in np.argsort(whole - exact, kind="stable"):
        if whole.sum() >= budget:
            break
        whole[index] += whole[index] < sizes[index]
    return whole
