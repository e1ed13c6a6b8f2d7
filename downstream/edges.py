"""Edges of images by Canny's detector, and the agreement of two edge maps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_dilation
from skimage.feature import canny

from eval.pairs import luma

#: Largest distance in pixels, along rows and columns, between an edge pixel and its counterpart.
TOLERANCE = 1


@dataclass(frozen=True)
class Canny:
    """Options of Canny's detector.

    Attributes:
        sigma: sigma of the Gaussian blur before the detection, in pixels.
        low, high: thresholds of the gradient's magnitude; an edge has a pixel above `high` and none below `low`. Grey
            levels are fractions of the largest one, gradients those of a Sobel filter of unit weight.
    Raises:
        ValueError: sigma is not above 0, or the thresholds are not 0 < low <= high.
    """

    sigma: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and 0 < self.low <= self.high):
            raise ValueError(f"sigma={self.sigma} must be above 0, and 0 < low={self.low} <= high={self.high}")


def edges(images: np.ndarray, options: Canny) -> np.ndarray:
    """Edges of the images' BT.601 luma by scikit-image, bool [N, H, W] of uint8 [N, H, W, 3]."""
    result = np.zeros(images.shape[:3], dtype=bool)
    for edge, grey in zip(result, luma(images)[..., 0] / 255, strict=True):
        edge[:] = canny(grey, options.sigma, options.low, options.high)
    return result


def edge_agreement(result: np.ndarray, truth: np.ndarray) -> float:
    """F-score of edge pixels over all images together, bool [N, H, W] each; NaN if neither has any edge.

    It is the harmonic mean of precision, the fraction of found pixels with a true one within `TOLERANCE`, and recall,
    the fraction of true pixels with a found one within `TOLERANCE`. Boundaries are compared in this way by Martin et
    al. 2004, but with a one-to-one assignment, which is omitted here.
    """
    around = np.ones((1, 2 * TOLERANCE + 1, 2 * TOLERANCE + 1), dtype=bool)
    right = np.count_nonzero(result & binary_dilation(truth, around))
    met = np.count_nonzero(truth & binary_dilation(result, around))
    if not result.any() and not truth.any():
        return math.nan
    if not right:
        return 0.0
    precision, recall = right / np.count_nonzero(result), met / np.count_nonzero(truth)
    return 2 * precision * recall / (precision + recall)
