"""Local information entropy, step 1 of RS-Prune."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def _patch_entropies(luma: np.ndarray, patch: int, out: np.ndarray) -> None:
    height, width = luma.shape
    columns = width // patch
    inverse = 1.0 / (patch * patch)
    for row in range(height // patch):
        for column in range(columns):
            counts = np.zeros(256, dtype=np.int64)
            for y in range(row * patch, (row + 1) * patch):
                for x in range(column * patch, (column + 1) * patch):
                    counts[luma[y, x]] += 1
            entropy = 0.0
            for count in counts:
                if count:
                    share = count * inverse
                    entropy -= share * np.log2(share)
            out[row * columns + column] = entropy


@numba.njit(cache=True, nogil=True)
def _luma(image: np.ndarray, out: np.ndarray) -> None:
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            red, green, blue = np.int64(image[y, x, 0]), np.int64(image[y, x, 1]), np.int64(image[y, x, 2])
            out[y, x] = (299 * red + 587 * green + 114 * blue + 500) // 1000


def patch_entropies(image: np.ndarray, patch: int) -> np.ndarray:
    """Shannon entropy in bits of the 256-bin luma histogram of each non-overlapping patch.

    Luma is ITU-R BT.601, rounded. Rows and columns beyond the last whole patch are left out.

    Args:
        image: uint8 [H, W, 3].
        patch: side in pixels, at most min(H, W).
    Returns:
        float64 [(H // patch) * (W // patch)], each in [0, min(8, 2 log2 patch)] bits.
    """
    luma = np.empty(image.shape[:2], dtype=np.uint8)
    _luma(image, luma)
    out = np.empty((image.shape[0] // patch) * (image.shape[1] // patch))
    _patch_entropies(luma, patch, out)
    return out


def local_entropy(image: np.ndarray, patch: int = 16) -> float:
    """Mean patch entropy of one image in bits (RS-Prune, stage 1; docs/method.md, section 1)."""
    return float(patch_entropies(image, patch).mean())
