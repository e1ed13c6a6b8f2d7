"""Herding: a subset with the same mean embedding as the corpus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import corpus_points
from prune.pool import Pool, Selection


@dataclass(frozen=True)
class Herding:
    """Herding (Welling 2009) as used to pick exemplars (Rebuffi et al. 2017, iCaRL, algorithm 4), without classes.

    Each step takes the image that brings the mean embedding of the taken images nearest to that of the corpus. No image
    is taken twice. The embeddings are not centred, because their mean is matched. The time is proportional to
    N x budget x D.
    """

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows, points = corpus_points(pool)
        budget = min(budget, len(rows))
        embeddings = np.asarray(pool.embeddings[rows], dtype=np.float32) if len(rows) else np.empty((0, 1), np.float32)
        return Selection.of(pool, rows[herd(embeddings, points.centre, budget)], "redundant")


def herd(embeddings: np.ndarray, mean: np.ndarray, budget: int) -> np.ndarray:
    """Greedily minimise |mean - mean of the taken rows|; returns int64 [budget] in the order of picking.

    Step t takes argmin |t mean - sum - x|^2 = argmin |x|^2 - 2 x (t mean - sum), where sum is over the taken rows.

    Args:
        embeddings: float32 [n, D].
        mean: float32 [D].
        budget: number of rows to take, at most n.
    """
    squares = (embeddings**2).sum(axis=1)
    missing = np.zeros(embeddings.shape[1], dtype=np.float32)
    picked = np.empty(budget, dtype=np.int64)
    for step in range(budget):
        missing += mean
        best = int((squares - 2 * (embeddings @ missing)).argmin())
        picked[step] = best
        missing -= embeddings[best]
        squares[best] = np.inf
    return picked
