"""Combination of RS-Prune, which selects images, and DLDC, which excludes mismatched pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from prune.methods.dldc import MISMATCHED, NO_CAPTION, pair_scores_of
from prune.methods.rsprune import RSPrune
from prune.pool import Pool, Selection
from runtime.ranges import check_options


@dataclass(frozen=True)
class RSPruneDLDC(RSPrune):
    """RS-Prune among the images whose best caption is not mismatched; other images are kept only if these are too few.

    Args:
        most_mismatch: a pair is mismatched if its mismatch probability is above this value. All other parameters are
            those of `RSPrune`.
    """

    uses_captions = True

    most_mismatch: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, "prune", probabilities=("most_mismatch",))

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        scores = pair_scores_of(pool, "rsprune_dldc")
        captioned = pool.readable & np.isfinite(scores.mismatch)
        clean = captioned & (scores.mismatch <= self.most_mismatch)
        chosen = RSPrune.select(self, replace(pool, readable=clean), budget, generator)
        reason = chosen.reason.copy()
        reason[captioned & ~clean] = MISMATCHED
        reason[pool.readable & ~captioned] = NO_CAPTION
        kept = chosen.kept
        missing = min(budget, int(pool.readable.sum())) - len(kept)
        if missing > 0:
            rest = np.flatnonzero(pool.readable & ~clean)
            kept = np.concatenate([kept, rest[np.argsort(scores.mismatch[rest], kind="stable")][:missing]])
        diagnostics = {**chosen.diagnostics, "mismatched": int((captioned & ~clean).sum())}
        return Selection.of(
            pool,
            kept,
            MISMATCHED,
            reason=reason,
            scene=chosen.scene,
            scene_similarity=chosen.scene_similarity,
            cluster=chosen.cluster,
            centroid_distance=chosen.centroid_distance,
            diagnostics=diagnostics,
        )
