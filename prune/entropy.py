"""Local information entropy, step 1 of RS-Prune."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numba
import numpy as np

AGGREGATES = ("mean", "min", "quantile", "share")


@numba.njit(cache=True, nogil=True)
def _patch_entropies(luma: np.ndarray, patch: int, shift: int, no_data: int, out: np.ndarray) -> None:
    height, width = luma.shape
    columns = width // patch
    counts = np.zeros(256, dtype=np.int64)
    for row in range(height // patch):
        for column in range(columns):
            counts[:] = 0
            seen = 0
            for y in range(row * patch, (row + 1) * patch):
                for x in range(column * patch, (column + 1) * patch):
                    if luma[y, x] != no_data:
                        counts[luma[y, x] >> shift] += 1
                        seen += 1
            entropy = 0.0
            for count in counts:
                if count:
                    share = count / seen
                    entropy -= share * np.log2(share)
            out[row * columns + column] = entropy if 2 * seen >= patch * patch else np.nan


@numba.njit(cache=True, nogil=True)
def _luma(image: np.ndarray, out: np.ndarray) -> None:
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            red, green, blue = np.int64(image[y, x, 0]), np.int64(image[y, x, 1]), np.int64(image[y, x, 2])
            out[y, x] = (299 * red + 587 * green + 114 * blue + 500) // 1000


def luma(image: np.ndarray) -> np.ndarray:
    """ITU-R BT.601 luma, rounded: uint8 [H, W] of uint8 [H, W, 3]; a grey image uint8 [H, W] is its own."""
    if image.ndim == 2:
        return np.ascontiguousarray(image)
    out = np.empty(image.shape[:2], dtype=np.uint8)
    _luma(image, out)
    return out


def patch_entropies(image: np.ndarray, patch: int, *, bins: int = 256, no_data: int | None = None) -> np.ndarray:
    """Shannon entropy in bits of the luma histogram of each non-overlapping patch.

    Rows and columns beyond the last whole patch are left out.

    Args:
        image: uint8 [H, W, 3] or grey uint8 [H, W].
        patch: side in pixels, at most min(H, W).
        bins: of the histogram, a power of two up to 256.
        no_data: luma that means "no pixel here": not counted.
    Returns:
        float64 [(H // patch) * (W // patch)], each in [0, min(log2 bins, 2 log2 patch)] bits; NaN where more than half
        of a patch is no data.
    """
    grey = luma(image)
    out = np.empty((grey.shape[0] // patch) * (grey.shape[1] // patch))
    _patch_entropies(grey, patch, 8 - bins.bit_length() + 1, -1 if no_data is None else no_data, out)
    return out


@dataclass(frozen=True)
class LocalEntropy:
    """The entropy of one image from those of its patches (RS-Prune, stage 1; docs/method.md, section 1).

    Args:
        patch: side in pixels; an image smaller than it is one patch.
        bins: of each patch's histogram, a power of two up to 256.
        aggregate: "mean", "min" or "quantile" over the patches, in bits; or "share" of the patches above `bits`.
        quantile: of "quantile".
        bits: of "share".
        denoise: take a 3 x 3 median first: sensor noise is not information.
        no_data: luma of pixels that are not there (borders of a mosaic): not counted. None: every pixel counts.
    Raises:
        ValueError: there is no such aggregate, or the bins are no power of two.
    """

    patch: int = 16
    bins: int = 256
    aggregate: str = "mean"
    quantile: float = 0.1
    bits: float = 3.0
    denoise: bool = False
    no_data: int | None = None

    def __post_init__(self) -> None:
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate={self.aggregate}: give one of {', '.join(AGGREGATES)}")
        if self.bins not in [2**power for power in range(1, 9)]:
            raise ValueError(f"bins={self.bins}: give a power of two from 2 to 256")

    def __call__(self, image: np.ndarray) -> float:
        """Entropy of uint8 [H, W, 3] or [H, W]; 0 where nothing but no-data is left."""
        grey = luma(image)
        if self.denoise:
            filtered = cv2.medianBlur(grey, 3)
            # the hole stays as it was: a median at its rim would eat into the image, or grow into it
            grey = filtered if self.no_data is None else np.where(grey == self.no_data, grey, filtered)
        patches = patch_entropies(grey, min(self.patch, *grey.shape), bins=self.bins, no_data=self.no_data)
        patches = patches[~np.isnan(patches)]
        if len(patches) == 0:
            return 0.0
        if self.aggregate == "min":
            return float(patches.min())
        if self.aggregate == "quantile":
            return float(np.quantile(patches, self.quantile))
        if self.aggregate == "share":
            return float((patches > self.bits).mean())
        return float(patches.mean())


def local_entropy(image: np.ndarray, patch: int = 16) -> float:
    """Mean patch entropy of one image in bits."""
    return LocalEntropy(patch=patch)(image)
