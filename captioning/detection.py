"""Measures of the detection of mismatched pairs, for data in which the mismatched pairs are known."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score


def worst_first(mismatch: np.ndarray, fit: np.ndarray, most_mismatch: float) -> np.ndarray:
    """Order in which pairs are removed, int64 [P]: mismatched pairs by their probability, then the others by `fit`."""
    bad = mismatch > most_mismatch
    return np.lexsort((np.where(bad, -mismatch, fit), ~bad))


def detection(swapped: np.ndarray, order: np.ndarray, removed: int) -> dict[str, float | None]:
    """Precision and recall of the first `removed` pairs of an order, and of as many pairs as are swapped.

    Args:
        swapped: bool [P], whether the caption of a pair was exchanged.
        order: int64 [P], order in which pairs are removed.
        removed: number of removed pairs.
    Returns:
        swap_removed (fraction), swap_precision, swap_recall, swap_precision_at_true and swap_auc, the area under the
        curve of the order; None where it is undefined.
    """
    true, gone = int(swapped.sum()), order[:removed]
    hits = int(swapped[gone].sum())
    rank = np.empty(len(order))
    rank[order] = np.arange(len(order), 0, -1)
    return {
        "swap_removed": removed / max(1, len(order)),
        "swap_precision": hits / removed if removed and true else None,
        "swap_recall": hits / true if true else None,
        "swap_precision_at_true": float(swapped[order[:true]].mean()) if true else None,
        "swap_auc": float(roc_auc_score(swapped, rank)) if 0 < true < len(order) else None,
    }


def fraction_error(swapped: np.ndarray, scene: np.ndarray, fractions: np.ndarray) -> float:
    """Mean over scenes of the absolute difference between the estimated fraction, float [S], and the true one."""
    pairs = np.bincount(scene, minlength=len(fractions))
    true = np.bincount(scene, swapped, len(fractions)) / np.maximum(pairs, 1)
    return float(np.abs(fractions - true)[pairs > 0].mean())
