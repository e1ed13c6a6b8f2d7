"""Input and output of a pruning method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from runtime.errors import UserError


@dataclass(frozen=True)
class PairScores:
    """How well the best caption of each image fits the image; NaN where an image has no caption. See `captioning.loop`.

    Attributes:
        mismatch: float32 [N], probability that the caption describes an image of another scene.
        fit: float32 [N], log of the likelihood ratio, up to a constant: the caption fits this image, or it fits another
            image of the same scene.
        cosine: float32 [N], cosine of image and caption, mean over the scorers.
        scene: str [N], scene of the image.
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
        reference_embeddings: float [M, D], embeddings of the labelled reference set, or of the strata of a corpus that
            has no labelled reference; M is 0 if the method does not set `uses_reference`.
        reference_labels: str [M], scene of each row of the reference.
        captions: str [N], or None.
        pair_scores: scores of images and captions if the method sets `uses_captions`, else None.
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
    """Result of a pruning method.

    Attributes:
        kept: int64 [K], ascending indices of the kept images in the pool.
        reason: str [N]: kept, unreadable, low_entropy, redundant, not_drawn.
        scene: str [N], "" where the method assigns none.
        scene_similarity: float32 [N], cosine to the nearest prototype, NaN where there is none.
        cluster: int32 [N], cluster of each image, -1 where there is none.
        centroid_distance: float32 [N], distance to the centroid of the cluster, NaN where there is none.
        diagnostics: further entries of the summary (thresholds, counts).
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
        """A selection of the rows `kept`; the reason of all other rows is `dropped_reason` or unreadable.

        Columns and diagnostics that are not given are empty.
        """
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


def checked(selection: Selection, pool: Pool, budget: int, name: str) -> Selection:
    """The selection, if it keeps as many images as it has to.

    Raises:
        UserError: it keeps another number than the budget (all readable images, if there are fewer), an image twice, or
            one that cannot be read.
    """
    kept = np.asarray(selection.kept, dtype=np.int64)
    expected = min(budget, int(pool.readable.sum()))
    twice, unreadable = len(kept) - len(np.unique(kept)), int((~pool.readable[kept]).sum())
    if len(kept) == expected and not twice and not unreadable:
        return selection
    more = f", {twice} of them twice" * bool(twice) + f", {unreadable} of them unreadable" * bool(unreadable)
    raise UserError(
        f"prune={name} keeps {len(kept)} images{more}, but must keep {expected} of {len(pool)}: let its `select` "
        "return the rows of that many different readable images (docs/add_a_method.md)"
    )


def everywhere(size: int, text: str) -> np.ndarray:
    """An object array [size] whose elements are all the same string object; `numpy.full` would copy the string."""
    array = np.empty(size, dtype=object)
    array[:] = text
    return array


class Method(Protocol):
    """A pruning method: a frozen dataclass with one method, without input or output of files.

    A class that reads the pool's reference sets the attribute `uses_reference = True`, which is not a dataclass field;
    all others get no reference and need no labelled images. A class that reads `pair_scores` sets
    `uses_captions = True`. A class that can determine by itself how many images to keep defines
    `estimated_budget(pool) -> int`, the budget with `ratio=null`.
    """

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        """Keep `budget` images of the pool; fewer only if fewer images are readable."""
