"""What a pruning method gets and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class PairScores:
    """How well each image's best caption fits it; NaN where an image has none. See `captioning.loop`.

    Attributes:
        mismatch: float32 [N], probability that the caption is of an image of another scene.
        fit: float32 [N], log ratio of fitting this image to fitting another one of its scene, up to a constant.
        cosine: float32 [N], of image and caption, the mean over the scorers.
        scene: str [N], the image's scene.
    """

    mismatch: np.ndarray
    fit: np.ndarray
    cosine: np.ndarray
    scene: np.ndarray


@dataclass(frozen=True)
class Pool:
    """A corpus as a pruning method sees it: arrays only, in corpus order.

    Attributes:
        ids: str [N].
        readable: bool [N]; unreadable images count in N and are never kept.
        entropy: float32 [N], bits.
        embeddings: float [N, D], usually a memory map.
        reference_embeddings: float [M, D] of the labelled reference set, or of the strata of a corpus without one; no
            rows where the method does not say that it `uses_reference`.
        reference_labels: str [M].
        captions: str [N], or None.
        pair_scores: where the method says that it `uses_captions`, else None.
    """

    ids: np.ndarray
    readable: np.ndarray
    entropy: np.ndarray
    embeddings: np.ndarray
    reference_embeddings: np.ndarray
    reference_labels: np.ndarray
    captions: np.ndarray | None = None
    pair_scores: PairScores | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Selection:
    """A method's answer.

    Attributes:
        kept: int64 [K], ascending indices into the pool.
        reason: str [N]: kept, unreadable, low_entropy, redundant, not_drawn.
        scene: str [N], "" where the method assigns none.
        scene_similarity: float32 [N], cosine to the nearest prototype, NaN where there is none.
        cluster: int32 [N], -1 where there is none.
        centroid_distance: float32 [N], NaN where there is none.
        diagnostics: what the summary should say besides (thresholds, counts).
    """

    kept: np.ndarray
    reason: np.ndarray
    scene: np.ndarray
    scene_similarity: np.ndarray
    cluster: np.ndarray
    centroid_distance: np.ndarray
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pool: Pool, kept: np.ndarray, dropped_reason: str, **columns: Any) -> Selection:
        """A selection; columns and diagnostics are empty by default, other rows are `dropped_reason` or unreadable."""
        size = len(pool)
        kept = np.sort(np.asarray(kept, dtype=np.int64))
        reason = columns.pop("reason") if "reason" in columns else everywhere(size, dropped_reason)
        reason[~pool.readable] = "unreadable"
        reason[kept] = "kept"
        defaults: dict[str, Callable[[], Any]] = {
            "scene": lambda: everywhere(size, ""),
            "scene_similarity": lambda: np.full(size, np.nan, dtype=np.float32),
            "cluster": lambda: np.full(size, -1, dtype=np.int32),
            "centroid_distance": lambda: np.full(size, np.nan, dtype=np.float32),
        }
        missing: dict[str, Any] = {name: default() for name, default in defaults.items() if name not in columns}
        return cls(kept=kept, reason=reason, **missing, **columns)


def everywhere(size: int, text: str) -> np.ndarray:
    """One string in every place of an object [size]; `numpy.full` would make a string of its own for each."""
    array = np.empty(size, dtype=object)
    array[:] = text
    return array


class Method(Protocol):
    """A pruning method: a frozen dataclass with one method, no I/O.

    A method that reads the pool's reference says so with an attribute `uses_reference = True`, which is no field; the
    others get none, and need no labelled images anywhere. One that reads `pair_scores` says `uses_captions = True`. One
    that can say itself how much goes has `estimated_budget(pool) -> int`, the budget with `ratio=null`.
    """

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        """Keep `budget` images of the pool (fewer only where fewer are readable)."""
