"""Pruning by local entropy only, the first step of RS-Prune."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import ranked
from prune.pool import Pool, Selection
from runtime.errors import UserError


@dataclass(frozen=True)
class EntropyOnly:
    """Keep the images of the highest local entropy (RS-Prune, arXiv 2512.23239, step 1); nothing of it is left out.

    Images of equal entropy at the cut are in a fixed random order (`prune.ranks`).

    Raises:
        UserError: no entropy is known.
    """

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows = np.flatnonzero(pool.readable)
        if len(rows) and np.isnan(pool.entropy[rows]).all():
            raise UserError("entropy_only needs the entropy of the images: give entropy, or use random")
        return ranked(pool, rows, pool.entropy[rows], budget, "low_entropy")
