"""DLDC (Dual Loop Data Cleaning, JSTARS 2025): select image-text pairs by how well they match, scene by scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.allocation import proportional
from prune.pool import PairScores, Pool, Selection
from runtime.errors import UserError
from runtime.ranges import check_options

#: Reasons to drop an image: its caption describes another scene; captions of other images of its scene fit better; it
#: has no caption.
MISMATCHED, LESS_FITTING, NO_CAPTION = "mismatched_caption", "less_fitting_caption", "no_caption"
#: Largest number of scenes that an error message names.
NAMED = 12


def pair_scores_of(pool: Pool, method: str) -> PairScores:
    """The pair scores of the pool.

    Raises:
        UserError: the pool has no pair scores.
    """
    if pool.pair_scores is None:
        raise UserError(f"{method} needs scores of images and captions: give pair_scores, or use random")
    return pool.pair_scores


@dataclass(frozen=True)
class DLDC:
    """Drop mismatched pairs, a different fraction in each scene; docs/method.md, section 8, has the formulas.

    Without a budget (`ratio=null`), exactly the pairs that are not mismatched are kept. With a smaller budget, every
    scene keeps the same fraction of these pairs: those whose captions fit their images best among the images of the
    scene. With a larger budget, the least mismatched pairs are kept as well.

    Args:
        most_mismatch: a pair is mismatched if its mismatch probability is above this value.
        cleaning_ratio: fraction of the pairs of each scene to drop, the worst first, instead of the mismatched pairs:
            one number, or numbers by scene, in which "" stands for all other scenes. None: drop the mismatched pairs.
    """

    uses_captions = True

    most_mismatch: float = 0.6
    cleaning_ratio: float | dict[str, float] | None = None

    def __post_init__(self) -> None:
        check_options(self, "prune", probabilities=("most_mismatch",))
        given = self.cleaning_ratio
        for ratio in given.values() if isinstance(given, dict) else [given]:
            if ratio is not None and not (isinstance(ratio, (int, float)) and 0 <= ratio < 1):
                raise UserError(f"prune.cleaning_ratio={ratio}: give a fraction of each scene in [0, 1), or null")

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        scores = pair_scores_of(pool, "dldc")
        usable = pool.readable & np.isfinite(scores.mismatch)
        clean = self.clean(scores, usable)
        mismatched = usable & (scores.mismatch > self.most_mismatch)
        reason = np.where(mismatched, MISMATCHED, np.where(usable, LESS_FITTING, NO_CAPTION)).astype(object)
        kept = keep_best(scores, clean, usable, pool.readable, budget, self.most_mismatch)
        diagnostics = {"mismatched": int(mismatched.sum()), "without_caption": int((pool.readable & ~usable).sum())}
        return Selection.of(
            pool, kept, LESS_FITTING, reason=reason, scene=scores.scene.astype(object), diagnostics=diagnostics
        )

    def estimated_budget(self, pool: Pool) -> int:
        """Number of pairs that are kept with `ratio=null`."""
        scores = pair_scores_of(pool, "dldc")
        return int(self.clean(scores, pool.readable & np.isfinite(scores.mismatch)).sum())

    def clean(self, scores: PairScores, usable: np.ndarray) -> np.ndarray:
        """The pairs that are kept before the budget is applied, bool [N].

        Raises:
            UserError: `cleaning_ratio` names an unknown scene.
        """
        if self.cleaning_ratio is None:
            return usable & (scores.mismatch <= self.most_mismatch)
        clean = np.zeros(len(usable), bool)
        given = self.cleaning_ratio
        names = set(scores.scene.astype(str).tolist())
        unknown = sorted(set(given) - names - {""}) if isinstance(given, dict) else []
        if unknown:
            known = ", ".join(sorted(names - {""})[:NAMED])
            raise UserError(f"prune.cleaning_ratio has {unknown[0]!r}, which is not a scene: give some of {known}")
        for name in sorted(set(scores.scene[usable].astype(str).tolist())):
            rows = np.flatnonzero(usable & (scores.scene == name))
            ratio = given.get(name, given.get("", 0.0)) if isinstance(given, dict) else given
            worst_first = rows[np.argsort(goodness(scores, rows, self.most_mismatch), kind="stable")]
            clean[worst_first[round(ratio * len(rows)) :]] = True
        return clean


def goodness(scores: PairScores, rows: np.ndarray, most_mismatch: float) -> np.ndarray:
    """Score that orders the pairs of one scene: mismatched pairs come last, by probability; the others by `fit`."""
    fit = scores.fit[rows]
    level = np.argsort(np.argsort(fit, kind="stable"), kind="stable") / max(1, len(rows))
    return np.where(scores.mismatch[rows] > most_mismatch, -scores.mismatch[rows], level)


def keep_best(
    scores: PairScores,
    clean: np.ndarray,
    usable: np.ndarray,
    readable: np.ndarray,
    budget: int,
    most_mismatch: float,
) -> np.ndarray:
    """Rows of exactly `budget` images, int64; fewer only if fewer images are readable.

    Each scene keeps the same fraction of its clean pairs. If there are too few clean pairs, the least mismatched pairs
    are added, and then images without a caption.
    """
    chosen = np.flatnonzero(clean)
    if budget >= len(chosen):
        rest = np.flatnonzero(usable & ~clean)
        rest = rest[np.argsort(scores.mismatch[rest], kind="stable")]
        nameless = np.flatnonzero(readable & ~usable)
        return np.concatenate([chosen, rest, nameless])[: min(budget, int(readable.sum()))]
    _, scene = np.unique(scores.scene[chosen].astype(str), return_inverse=True)
    groups = [chosen[scene == number] for number in range(int(scene.max()) + 1)]
    kept = []
    counts = proportional(np.array([len(group) for group in groups]), budget)
    for group, count in zip(groups, counts, strict=True):
        best_first = np.argsort(-goodness(scores, group, most_mismatch), kind="stable")
        kept.append(group[best_first[:count]])
    return np.concatenate(kept)


@dataclass(frozen=True)
class ClipScore:
    """Rank the pairs of all scenes together by the cosine of image and caption (Schuhmann et al. 2022: LAION-5B)."""

    uses_captions = True

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        scores = pair_scores_of(pool, "clip_score")
        rows = np.flatnonzero(pool.readable)
        order = np.argsort(-np.nan_to_num(scores.cosine[rows], nan=-np.inf), kind="stable")
        return Selection.of(pool, rows[order[:budget]], LESS_FITTING, scene=scores.scene.astype(object))
