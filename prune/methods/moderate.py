"""Moderate coreset: keep neither the easiest nor the hardest images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import Points, cluster_diagnostics, corpus_points, members_of
from prune.pool import Pool, Selection
from prune.scenes import assign_scenes, fit_prototypes
from runtime.ranges import check_options


@dataclass(frozen=True)
class ModerateCoreset:
    """Moderate coreset (Xia et al. 2023, ICLR): keep images at about the median distance from the mean of their class.

    As the corpus has no labels, the class of an image is the scene of its nearest reference prototype. The middle of
    the sorted distances is taken over all classes together, as in the paper.

    Args:
        prototypes_per_class: number of k-means prototypes of each reference class.
    """

    uses_reference = True

    prototypes_per_class: int = 8

    def __post_init__(self) -> None:
        check_options(self, "prune", counts=("prototypes_per_class",))

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows, points = corpus_points(pool)
        seed = int(generator.integers(2**31))
        labels = np.zeros(len(pool), dtype=np.int64)
        if len(pool.reference_embeddings):
            prototypes = fit_prototypes(
                pool.reference_embeddings, pool.reference_labels, self.prototypes_per_class, 0.0, seed
            )
            labels, _ = assign_scenes(pool.embeddings, prototypes)
        labels = labels[rows]
        distances = distances_to_means(points, rows, labels)
        first = (len(rows) - min(budget, len(rows))) // 2
        kept = rows[np.argsort(distances, kind="stable")[first : first + budget]]
        return Selection.of(pool, kept, "redundant", **cluster_diagnostics(pool, rows, labels, distances))


def distances_to_means(points: Points, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Euclidean distance of each row to the mean of the rows with the same label, float32 [n]."""
    distances = np.empty(len(rows), dtype=np.float32)
    for group in members_of(labels, int(labels.max(initial=-1)) + 1):
        if len(group):
            vectors = points[rows[group]]
            distances[group] = np.linalg.norm(vectors - vectors.mean(axis=0), axis=1)
    return distances
