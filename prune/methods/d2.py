"""D2 pruning: difficulty scores that are passed along the graph of nearest neighbours."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from prune.clusters import cluster_diagnostics, corpus_clusters
from prune.neighbours import nearest_neighbours
from prune.pool import Pool, Selection
from runtime.ranges import check_options


@dataclass(frozen=True)
class D2Pruning:
    """D2 pruning (Maharana et al. 2024, arXiv 2310.07931, section 3) in its self-supervised form.

    In the forward pass, each image adds the difficulties of its neighbours, weighted by exp(-gamma_forward d^2), to its
    own difficulty. Then the image of the highest score is taken, and the scores of its neighbours fall by
    exp(-gamma_reverse d^2) times this score; this step is repeated. The difficulty of an image is its distance to the
    nearest k-means centroid, divided by the largest such distance, as for unlabelled data in the paper. The paper's
    search for both gammas on a validation set is left out.

    Args:
        neighbours: number of neighbours of each image in the graph.
        gamma_forward, gamma_reverse: parameters of the two kernels.
        clusters: number of k-means clusters; None: the square root of the number of images.
    """

    neighbours: int = 10
    gamma_forward: float = 1.0
    gamma_reverse: float = 1.0
    clusters: int | None = None

    def __post_init__(self) -> None:
        check_options(
            self, "prune", counts=("neighbours", "clusters"), at_least_zero=("gamma_forward", "gamma_reverse")
        )

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
    """Repeatedly take the image of the highest score and lower its neighbours' scores by weight times that score.

    Scores only fall, so the top heap entry is the highest score if it is still up to date.

    Args:
        score: float64 [n], changed in place.
        neighbours: int64 [n, k], -1 for none.
        weights: float [n, k].
        budget: number of images to take, at most n.
    Returns:
        int64 [budget], in the order of picking; ties go to the first image.
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
