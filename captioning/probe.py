"""The cleaning ratio of every scene by what small generators make of it."""

from __future__ import annotations

import numpy as np


def best_ratios(
    distances: np.ndarray, images: np.ndarray, everywhere: np.ndarray, ratios: np.ndarray, prior_images: float
) -> np.ndarray:
    """The tried ratio with the least distance in every scene, float64 [S]; of equals the smallest.

    Few images tell a scene's distance badly, so the distance over all scenes counts as `prior_images` more.

    Args:
        distances: float [R, S] of the generated images of each scene to its held-out ones, by ratio; NaN: unknown.
        images: int64 [S] held-out images of each scene.
        everywhere: float [R], over all scenes.
        ratios: float [R], ascending.
    """
    known = np.isfinite(distances)
    own = np.where(known, distances, 0) * (images * known)
    mean = (own + prior_images * everywhere[:, None]) / (images * known + prior_images)
    return ratios[np.argmin(mean, axis=0)]
