"""Pruning of plain NumPy arrays, without configuration or files."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from prune.clusters import CHUNK
from prune.methods import rsprune
from prune.pool import Method, Pool, Selection, checked
from runtime.errors import UserError
from runtime.ranges import check_seed

NAMED = 5  # largest number of bad rows that an error message names


class RSPrune:
    """RS-Prune (arXiv 2512.23239) on arrays.

    >>> selection = RSPrune(ratio=0.85).select(embeddings, entropy=bits, reference=known, labels=classes)
    >>> subset = images[selection.kept]

    Args:
        ratio: fraction of the images to remove, in [0, 1): exactly N - round(ratio N) images are kept.
        seed: random seed; the same seed gives the same selection, bit for bit.
        parameters: parameters of `prune.methods.rsprune.RSPrune`, for example `uniformity=0.5`.
    Raises:
        TypeError: a parameter is unknown.
        UserError: the ratio, the seed or a parameter is out of range.
    """

    def __init__(self, ratio: float = 0.85, *, seed: int = 0, **parameters: Any) -> None:
        budget_of(1, ratio)
        check_seed(seed)
        self.ratio = ratio
        self.seed = seed
        self.method = rsprune.RSPrune(**parameters)

    def select(
        self,
        embeddings: np.ndarray,
        *,
        entropy: np.ndarray | None = None,
        reference: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        readable: np.ndarray | None = None,
    ) -> Selection:
        """Choose the images to keep; the arguments are those of `select_from_arrays`."""
        return select_from_arrays(
            self.method,
            embeddings,
            ratio=self.ratio,
            seed=self.seed,
            entropy=entropy,
            reference=reference,
            labels=labels,
            readable=readable,
        )


def select_from_arrays(
    method: Method,
    embeddings: np.ndarray,
    *,
    ratio: float,
    seed: int = 0,
    entropy: np.ndarray | None = None,
    reference: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    readable: np.ndarray | None = None,
) -> Selection:
    """Run any pruning method on arrays.

    Args:
        method: the pruning method, for example `prune.methods.semdedup.SemDeDup()`; not an `RSPrune` of this module,
            which has a ratio and a seed of its own.
        embeddings: float [N, D], one row per image; a memory map is read in parts.
        ratio: fraction of the images to remove, in [0, 1).
        seed: random seed; the same seed gives the same selection.
        entropy: float [N], local entropy in bits (`prune.entropy.local_entropy`); None: no image is dropped for its
            entropy.
        reference: float [M, D], embeddings of a labelled set by the same encoder; None: no scenes are distinguished.
        labels: [M], class of each row of the reference.
        readable: bool [N]; unreadable images count in N and are never kept. None: all images are readable.
    Returns:
        the selection: `kept` is int64 [K], ascending; `reason`, `scene`, `cluster` etc. have one entry per image.
    Raises:
        UserError: `method` is not a pruning method, shapes disagree, a value is not finite, or the ratio or the seed is
            out of range.
    """
    if isinstance(method, RSPrune):
        raise UserError(
            f"RSPrune has a ratio and a seed of its own: call RSPrune(ratio={ratio}, seed={seed}).select(embeddings, "
            "...), or give select_from_arrays a method of prune.methods"
        )
    if isinstance(method, type) or not callable(getattr(method, "select", None)):
        raise UserError(f"{method!r} is not a pruning method: give an object with the function select, e.g. SemDeDup()")
    check_seed(seed)
    pool = _pool(embeddings, entropy, reference, labels, readable)
    budget = budget_of(len(pool), ratio)
    selection = method.select(pool, budget, np.random.default_rng([seed, 2]))
    return checked(selection, pool, budget, type(method).__name__)


def _pool(
    embeddings: np.ndarray,
    entropy: np.ndarray | None,
    reference: np.ndarray | None,
    labels: np.ndarray | None,
    readable: np.ndarray | None,
) -> Pool:
    """Check the arguments of `select_from_arrays` and make a pool of them."""
    embeddings = _matrix(embeddings, "embeddings")
    size = len(embeddings)
    readable = np.ones(size, dtype=bool) if readable is None else _vector(readable, size, "readable").astype(bool)
    refuse_not_finite(embeddings, readable, "embeddings")
    if entropy is None:
        entropy = np.full(size, np.nan, dtype=np.float32)
    else:
        entropy = _vector(entropy, size, "entropy").astype(np.float32)
        refuse_not_finite(entropy[:, None], readable, "entropy")
    if (reference is None) != (labels is None):
        raise UserError("reference and labels belong together: give both or neither")
    if reference is None or labels is None:
        reference, labels = np.empty((0, embeddings.shape[1]), np.float32), np.empty(0, dtype=object)
    reference = _matrix(reference, "reference")
    if reference.shape[1] != embeddings.shape[1]:
        raise UserError(
            f"reference has {reference.shape[1]} dimensions and embeddings {embeddings.shape[1]}: "
            "embed both with one encoder"
        )
    refuse_not_finite(reference, np.ones(len(reference), dtype=bool), "reference")
    return Pool(
        ids=np.arange(size).astype(f"U{len(str(size))}"),  # as short as possible: each digit takes four bytes
        readable=readable,
        entropy=entropy,
        embeddings=embeddings,
        reference_embeddings=reference,
        reference_labels=_vector(labels, len(reference), "labels").astype(str).astype(object),
    )


def budget_of(images: int, ratio: float) -> int:
    """Number of images to keep: exactly N - round(ratio N), for N images.

    Raises:
        UserError: the ratio is not in [0, 1).
    """
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 <= ratio < 1:
        raise UserError(
            f"ratio={ratio} is not a number in [0, 1): it is the fraction that is removed, for example ratio=0.85"
        )
    return images - round(float(ratio) * images)


def _matrix(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values) if not isinstance(values, np.ndarray) else values
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.floating):
        raise UserError(f"{name} must be floats of shape [images, dimensions], not {values.dtype} {values.shape}")
    return values


def _vector(values: np.ndarray, size: int, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (size,):
        raise UserError(f"{name} must have shape ({size},), one entry a row, not {values.shape}")
    return values


def refuse_not_finite(values: np.ndarray, requested: np.ndarray, name: str) -> None:
    """Raise a UserError that names the first requested rows with values that are not finite."""
    bad: list[int] = []
    for start in range(0, len(values), CHUNK):
        part = slice(start, start + CHUNK)
        # the sum of a row is finite only if all its values are; no encoder gives values large enough to overflow it
        sums = values[part].sum(axis=1, dtype=np.float32)
        suspects = np.flatnonzero(~np.isfinite(sums) & requested[part]) + start
        bad += [int(row) for row in suspects if not np.isfinite(values[row]).all()]
    if bad:
        named = ", ".join(map(str, bad[:NAMED])) + (" ..." if len(bad) > NAMED else "")
        raise UserError(
            f"{name} of {len(bad)} images are not finite (rows {named}): embed them again or mark them unreadable"
        )
