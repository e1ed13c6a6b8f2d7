"""k-center greedy: cover the corpus with the smallest possible radius."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import corpus_points
from prune.methods.rsprune import near_then_far
from prune.pool import Pool, Selection


@dataclass(frozen=True)
class KCenterGreedy:
    """Core-set by farthest-first traversal (Sener and Savarese 2018, arXiv 1708.00489, algorithm 1).

    The method starts with a random image; each step takes the image farthest from all taken images. It works on unit
    vectors, for which cosine and Euclidean distance give the same order. The paper's mixed-integer refinement is left
    out. Time is proportional to N x budget x D, memory to N x D.
    """

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows, points = corpus_points(pool)
        budget = min(budget, len(rows))
        if budget == 0:
            return Selection.of(pool, rows[:0], "redundant")
        first = generator.integers(len(rows), size=1)
        picked, _ = near_then_far(points[rows], first, 1, budget, np.float32(np.inf))
        return Selection.of(pool, rows[picked], "redundant")
