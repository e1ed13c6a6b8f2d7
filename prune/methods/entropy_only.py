"""The first step of RS-Prune alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import ranked
from prune.pool import Pool, Selection


@dataclass(frozen=True)
class EntropyOnly:
    """Keep the images of the highest local entropy (RS-Prune, arXiv 2512.23239, step 1). Nothing is left out."""

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows = np.flatnonzero(pool.readable)
        return ranked(pool, rows, pool.entropy[rows], budget, "low_entropy")
