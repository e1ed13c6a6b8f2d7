"""Facility location: choose a subset so that every image is near a kept image."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from prune.clusters import corpus_points
from prune.neighbours import nearest_neighbours
from prune.pool import Pool, Selection
from runtime.ranges import check_options


@dataclass(frozen=True)
class FacilityLocation:
    """Facility location by lazy greedy (Minoux 1978; as a coreset: Mirzasoleiman et al. 2020, CRAIG).

    The method maximises sum_i max_{j kept} s_ij with s = (1 + cosine) / 2 on the graph of nearest neighbours.
    Similarities outside the graph count as zero, which limits memory to N x neighbours. CRAIG's gradients are left out,
    because no model is trained.

    Args:
        neighbours: number of neighbours of each image in the graph; N - 1 gives the exact function.
    """

    neighbours: int = 64

    def __post_init__(self) -> None:
        check_options(self, "prune", counts=("neighbours",))

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows, points = corpus_points(pool)
        result, cosines = nearest_neighbours(points[rows], self.neighbours)
        similarity = np.where(result < 0, 0, (1 + np.maximum(cosines, -1)) / 2)
        return Selection.of(pool, rows[lazy_greedy(result, similarity, min(budget, len(rows)))], "redundant")


def lazy_greedy(neighbours: np.ndarray, similarity: np.ndarray, budget: int) -> np.ndarray:
    """Greedy facility location on a graph.

    Gains only fall, so an image whose updated gain is still the highest is the best one (Minoux 1978).

    Args:
        neighbours: int64 [n, k], -1 for none.
        similarity: float [n, k] in [0, 1]; the similarity of an image to itself is 1.
        budget: number of images to take, at most n.
    Returns:
        int64 [budget], in the order of picking; ties go to the first image.
    """
    size = len(neighbours)
    known = neighbours.ravel() >= 0
    sources = np.repeat(np.arange(size), neighbours.shape[1])[known]
    targets, values = neighbours.ravel()[known], similarity.ravel()[known].astype(np.float64)
    order = np.argsort(targets, kind="stable")  # groups the edges by target j: the images that j would serve
    sources, values = sources[order], values[order]
    ends = np.searchsorted(targets[order], np.arange(size + 1))
    served = np.zeros(size)

    def gain(index: int) -> float:
        column = slice(ends[index], ends[index + 1])
        return np.maximum(values[column] - served[sources[column]], 0).sum() + (1 - served[index])

    heap = [(-gain(index), index) for index in range(size)]
    heapq.heapify(heap)
    picked = np.empty(budget, dtype=np.int64)
    taken = 0
    while taken < budget:
        _, index = heapq.heappop(heap)
        fresh = gain(index)
        if heap and (-fresh, index) > heap[0]:
            heapq.heappush(heap, (-fresh, index))
            continue
        picked[taken] = index
        taken += 1
        column = slice(ends[index], ends[index + 1])
        np.maximum.at(served, sources[column], values[column])
        served[index] = 1.0
    return picked
