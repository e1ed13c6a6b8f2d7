"""k-center greedy: cover the corpus with the smallest radius."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import corpus_points
from prune.methods.rsprune import near_then_far
from prune.pool import Pool, Selection


@dataclass(frozen=True)
class KCenterGreedy:
    """Core-set by farthest-first traversal (Sener and Savarese 2018, arXiv 1708.00489, algorithm 1).

    Starts at a random image and takes, each time, the one farthest from all taken; on unit vectors, where cosine and
    Euclidean distance order alike. Left out: the paper's mixed-integer refinement. Time and memory are N x budget x D
    and N x D.
    """

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows, points = corpus_points(pool)
        budget = min(budget, len(rows))
        if budget == 0:
            return Selection.of(pool, rows[:0], "redundant")
        first = generator.integers(len(rows), size=1)
        picked, _ = near_then_far(points[rows], first, 1, budget, np.float32(np.inf))
        return Selection.of(pool, rows[picked], "redundant")
