"""Enlargements without a network."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

Interpolation = Literal["nearest", "bicubic", "lanczos"]


def enlarge(low: np.ndarray, factor: int, kind: Interpolation) -> np.ndarray:
    """Enlarge by PIL, uint8 [N, h, w, 3] to [N, factor h, factor w, 3]."""
    size = (low.shape[2] * factor, low.shape[1] * factor)
    if not len(low):
        return np.empty((0, size[1], size[0], 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling[kind.upper()])) for image in low])
