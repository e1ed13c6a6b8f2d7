"""Local information entropy, step 1 of RS-Prune."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np

from runtime.errors import UserError
from runtime.ranges import check_options

AGGREGATES = ("mean", "min", "quantile", "fraction")


@numba.njit(cache=True, nogil=True)
def _luma(image: np.ndarray) -> np.ndarray:
    """0.299 R + 0.587 G + 0.114 B in 15-bit fixed point: the same values as OpenCV's, but faster on small images."""
    height, width, _ = image.shape
    grey = np.empty((height, width), dtype=np.uint8)
    colours, out = image.reshape(-1), grey.reshape(-1)
    red, green, blue, half, bits = np.uint32(9798), np.uint32(19235), np.uint32(3735), np.uint32(16384), np.uint32(15)
    for pixel in range(height * width):
        out[pixel] = (
            colours[3 * pixel] * red + colours[3 * pixel + 1] * green + colours[3 * pixel + 2] * blue + half
        ) >> bits
    return grey


@numba.njit(cache=True, nogil=True)
def _patch_entropies(
    luma: np.ndarray,
    patch: int,
    shift: np.uint8,
    no_data: int,
    steps: np.ndarray,
    unit: float,
    counts: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write the entropy H = log2 n - sum over bins of (c log2 c) / n of each patch into `out`, summed pixel by pixel.

    The c-th pixel of a bin adds c log2 c - (c - 1) log2 (c - 1). The table `steps` holds these terms as integer
    multiples of `unit`. So no pass over the bins is needed, and the sum is exact in any order.
    """
    height, width = luma.shape
    flat = luma.ravel()
    columns = width // patch
    unsigned = np.uint64  # an unsigned index needs no check for negative values
    for row in range(height // patch):
        for column in range(columns):
            counts[:] = 0
            seen, total = patch * patch, np.int64(0)
            for y in range(row * patch, (row + 1) * patch):
                start = unsigned(y * width + column * patch)
                if no_data < 0:
                    for x in range(unsigned(0), unsigned(patch)):
                        level = flat[start + x] >> shift
                        count = counts[level]
                        counts[level] = count + 1
                        total += steps[count]
                    continue
                for x in range(unsigned(0), unsigned(patch)):
                    level = flat[start + x]
                    if level == no_data:
                        seen -= 1
                    else:
                        count = counts[level >> shift]
                        counts[level >> shift] = count + 1
                        total += steps[count]
            entropy = np.log2(seen) - total * unit / seen if seen else 0.0
            out[row * columns + column] = max(entropy, 0.0) if 2 * seen >= patch * patch else np.nan


@lru_cache(maxsize=16)
def _steps(count: int) -> tuple[np.ndarray, float]:
    """c log2 c - (c - 1) log2 (c - 1) for c = 1..count, as int64 multiples of a unit, and that unit."""
    numbers = np.arange(count + 1, dtype=np.float64)
    unit = 2.0 ** (np.ceil(np.log2(count * max(np.log2(count), 1))) - 60)  # the sum of all terms stays below 2^61
    return np.round(np.diff(numbers * np.log2(np.maximum(numbers, 1))) / unit).astype(np.int64), float(unit)


def luma(image: np.ndarray) -> np.ndarray:
    """ITU-R BT.601 luma, rounded, uint8 [H, W], of an image uint8 [H, W, 3]; a grey image [H, W] is returned as is.

    Raises:
        UserError: the image has another shape or dtype, or no pixels.
    """
    image = np.ascontiguousarray(image)
    # checked here because the compiled functions would read beyond the arrays
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or not image.size:
        raise UserError(
            f"an image must be uint8 of shape [height, width, 3] or [height, width], not {image.dtype} {image.shape}: "
            "give the images one by one, and scale other values to 0-255 first"
        )
    return image if image.ndim == 2 else _luma(image)


def patch_entropies(image: np.ndarray, patch: int, *, bins: int = 256, no_data: int | None = None) -> np.ndarray:
    """Shannon entropy, in bits, of the luma histogram of each non-overlapping patch.

    Rows and columns beyond the last whole patch are left out.

    Args:
        image: uint8 [H, W, 3] or grey uint8 [H, W].
        patch: side of a patch in pixels, at most min(H, W).
        bins: number of histogram bins, a power of two up to 256.
        no_data: luma value that marks missing pixels, which are not counted; None: all pixels are counted.
    Returns:
        float64 [(H // patch) * (W // patch)], each in [0, min(log2 bins, 2 log2 patch)] bits; NaN where more than half
        of a patch is no data.
    """
    grey = luma(image)
    out = np.empty((grey.shape[0] // patch) * (grey.shape[1] // patch))
    steps, unit = _steps(patch**2)
    shift = np.uint8(8 - bins.bit_length() + 1)
    counts = np.zeros(256, dtype=np.uint16 if patch < 256 else np.uint32)  # a smaller array is faster to clear
    _patch_entropies(grey, patch, shift, -1 if no_data is None else no_data, steps, unit, counts, out)
    return out


@dataclass(frozen=True)
class LocalEntropy:
    """Local entropy of one image, aggregated over its patches (RS-Prune, stage 1; docs/method.md, section 1).

    Args:
        patch: side of a patch in pixels; a smaller image is treated as one patch.
        bins: number of bins of each patch's histogram, a power of two up to 256.
        aggregate: "mean", "min" or "quantile" of the patch entropies, in bits; or "fraction": the fraction of patches
            whose entropy is above `bits`.
        quantile: the quantile in [0, 1] that the aggregate "quantile" takes.
        bits: threshold in bits of the aggregate "fraction".
        denoise: apply a 3 x 3 median filter first, because sensor noise is not information.
        no_data: luma value of missing pixels (for example borders of a mosaic), which are not counted; None: every
            pixel is counted.
    Raises:
        UserError: the aggregate is unknown, `patch` is below 1, or `bins` is not a power of two.
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
            raise UserError(f"entropy.aggregate={self.aggregate}: give one of {', '.join(AGGREGATES)}")
        check_options(self, "entropy", counts=("patch",), fractions=("quantile",), at_least_zero=("bits",))
        if self.bins not in [2**power for power in range(1, 9)]:
            raise UserError(f"entropy.bins={self.bins}: give a power of two from 2 to 256")

    def __call__(self, image: np.ndarray) -> float:
        """Entropy of an image uint8 [H, W, 3] or [H, W]; 0 if more than half of every patch is no data.

        Raises:
            UserError: the image has another shape or dtype, or no pixels.
        """
        grey = luma(image)
        if self.denoise:
            import cv2  # imported here: only the median filter needs it

            filtered = cv2.medianBlur(grey, 3)
            # no-data pixels are restored: the median at their border would shrink or grow the no-data area
            grey = filtered if self.no_data is None else np.where(grey == self.no_data, grey, filtered)
        patches = patch_entropies(grey, min(self.patch, *grey.shape), bins=self.bins, no_data=self.no_data)
        if self.no_data is not None:
            patches = patches[~np.isnan(patches)]
            if len(patches) == 0:
                return 0.0
        if self.aggregate == "min":
            return float(patches.min())
        if self.aggregate == "quantile":
            return float(np.quantile(patches, self.quantile))
        if self.aggregate == "fraction":
            return float((patches > self.bits).mean())
        return float(patches.sum() / len(patches))


def entropies(measure: LocalEntropy, images: np.ndarray) -> np.ndarray:
    """Entropy of each image of a batch uint8 [B, H, W, 3], as float32 [B]."""
    return np.array([measure(image) for image in images], dtype=np.float32)


def local_entropy(image: np.ndarray, patch: int = 16) -> float:
    """Mean entropy, in bits, of the `patch` x `patch` pixel patches of one image, uint8 [H, W, 3] or [H, W].

    Raises:
        UserError: the image has another shape or dtype, or no pixels, or `patch` is below 1.
    """
    return LocalEntropy(patch=patch)(image)
