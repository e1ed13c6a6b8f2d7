"""Choice of the cleaning ratio of every scene by the images of small generators."""

from __future__ import annotations

import numpy as np


def best_ratios(
    distances: np.ndarray, images: np.ndarray, everywhere: np.ndarray, ratios: np.ndarray, prior_images: float
) -> np.ndarray:
    """The tested ratio with the smallest distance in every scene, float64 [S]; the smallest ratio among ties.

    The distance of a scene with few images is uncertain, so the distance over all scenes is added with the weight of
    `prior_images` images.

    Args:
        distances: float [R, S], distance of the generated images of each scene to its held-out images, by ratio; NaN:
            unknown.
        images: int64 [S], number of held-out images of each scene.
        everywhere: float [R], distances over all scenes.
        ratios: float [R], ascending.
        prior_images: weight of the distances over all scenes, as a number of images.
    """
    known = np.isfinite(distances)
    own = np.where(known, distances, 0) * (images * known)
    mean = (own + prior_images * everywhere[:, None]) / (images * known + prior_images)
    return ratios[np.argmin(mean, axis=0)]
