"""The two baselines of the comparison: the whole corpus and a random subset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.pool import Pool, Selection


@dataclass(frozen=True)
class Full:
    """Keep every readable image, whatever the ratio is."""

    keeps_everything = True

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        return Selection.of(pool, np.flatnonzero(pool.readable), "unreadable")


@dataclass(frozen=True)
class Random:
    """Uniform random sampling without replacement."""

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        readable = np.flatnonzero(pool.readable)
        return Selection.of(pool, generator.permutation(readable)[:budget], "not_drawn")
