"""D2 pruning: difficulty passed over the neighbourhood graph."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from prune.clusters import cluster_diagnostics, corpus_clusters
from prune.neighbours import nearest_neighbours
from prune.pool import Pool, Selection


@dataclass(frozen=True)
class D2Pruning:
    """D2 pruning (Maharana et al. 2024, arXiv 2310.07931, section 3), its self-supervised form.

    Forward pass: every image's difficulty grows by its neighbours', weighted by exp(-gamma_forward d^2). Then the
    hardest image is taken and its neighbours' scores fall by exp(-gamma_reverse d^2) times its own, again and again.
    Difficulty is the distance to the nearest k-means centroid, over its largest, as for unlabelled data in the paper.
    Left out: the paper's search for both gammas on a validation set.

    Args:
        neighbours: of each image in the graph.
        gamma_forward, gamma_reverse: of the two kernels.
        clusters: k-means clusters; None: the square root of the number of images.
    """

    neighbours: int = 10
    gamma_forward: float = 1.0
    gamma_reverse: float = 1.0
    clusters: int | None = None

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows, points, labels, distances = corpus_clusters(pool, self.clusters, generator)
        result, cosines = nearest_neighbours(points[rows], self.neighbours)
        squares = np.where(result < 0, np.inf, 2 - 2 * cosines)  # squared distance of unit vectors
        score = distances / max(float(distances.max(initial=0)), 1e-12)
        score = score + (np.exp(-self.gamma_forward * squares) * score[result]).sum(axis=1)
        picked = greedy(score.astype(np.float64), result, np.exp(-self.gamma_reverse * squares), budget)
        diagnostics = cluster_diagnostics(pool, rows, labels, distances)
        return Selection.of(pool, rows[picked], "redundant", **diagnostics)


def greedy(score: np.ndarray, neighbours: np.ndarray, weights: np.ndarray, budget: int) -> np.ndarray:
    """Take the highest score, lower its neighbours' by weight x that score, repeat; int64 [budget], ties to the first.

    Scores only fall, so a heap entry that is still true is the highest.

    Args:
        score: float64 [n], changed in place; neighbours: int64 [n, k], -1 for none; weights: float [n, k].
    """
    heap = [(-value, index) for index, value in enumerate(score.tolist())]
    heapq.heapify(heap)
    taken = np.zeros(len(score), dtype=bool)
    picked: list[int] = []
    while heap and len(picked) < budget:
        value, index = heapq.heappop(heap)
        if taken[index]:
            continue
        if -value > score[index]:
            heapq.heappush(heap, (-score[index], index))
            continue
        taken[index] = True
        picked.append(index)
        around = neighbours[index]
        fall = weights[index][around >= 0] * max(score[index], 0.0)
        score[around[around >= 0]] -= fall
    return np.array(picked, dtype=np.int64)
