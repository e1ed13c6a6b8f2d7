"""Back-projection (Irani and Peleg 1991): correct images so that their reduction equals a low-resolution image."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch.nn.functional import interpolate

from downstream.degradation import LinearKind, reduce

#: Largest number of exact corrections after the smooth ones; without clipping one would be enough.
MOST_EXACT_STEPS = 64
#: Largest accepted error of a pixel of the reduced image, in grey levels.
TOLERANCE = 0.01


def back_project(images: np.ndarray, low: np.ndarray, factor: int, kind: LinearKind, iterations: int) -> np.ndarray:
    """Correct images so that `reduce` of them gives `low`: iterate x + up(low - reduce(x)).

    In the first iterations `up` is bicubic, which is smooth but leaves a high-frequency residual. Then `up` is the
    pseudo-inverse of the reduction, which gives the smallest exact correction; for `area` it is the nearest-neighbour
    enlargement. Values are clipped to 0..255 after every step. An image is finished when no pixel of its reduction is
    wrong by more than `TOLERANCE`; a larger error remains only where nearly all of its pixels are 0 or 255.

    Args:
        images: float32 [N, H, W, 3]; values outside 0..255 are clipped first.
        low: uint8 or float [N, H/factor, W/factor, 3] in 0..255.
        kind: the reduction, area or bicubic.
        iterations: number of smooth corrections.
    Returns:
        float32 [N, H, W, 3] in 0..255.
    """
    target, result = np.asarray(low, dtype=np.float32), np.asarray(images, dtype=np.float32).clip(0, 255)
    unfinished = np.arange(len(result))
    for step in range(iterations + MOST_EXACT_STEPS):
        rest = target[unfinished] - reduce(result[unfinished], factor, kind)
        wrong = np.abs(rest).max(axis=(1, 2, 3)) > TOLERANCE
        unfinished, rest = unfinished[wrong], rest[wrong]
        if not len(unfinished):
            break
        up = _smooth(rest, factor) if step < iterations else _least(rest, factor, kind)
        result[unfinished] = (result[unfinished] + up).clip(0, 255)
    return result


def _smooth(rest: np.ndarray, factor: int) -> np.ndarray:
    values = torch.from_numpy(rest).permute(0, 3, 1, 2)
    size = (rest.shape[1] * factor, rest.shape[2] * factor)
    return interpolate(values, size, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).numpy()


def _least(rest: np.ndarray, factor: int, kind: LinearKind) -> np.ndarray:
    rows, columns = (_pseudo_inverse(side * factor, factor, kind) for side in rest.shape[1:3])
    return np.einsum("yi,nijc,xj->nyxc", rows, rest, columns, optimize=True)


@functools.lru_cache
def _pseudo_inverse(side: int, factor: int, kind: LinearKind) -> np.ndarray:
    """The pseudo-inverse of the reduction along one axis, float32 [side, side / factor]."""
    identity = torch.eye(side, dtype=torch.float64)[None, None]
    size = (side // factor, side)
    if kind == "area":
        matrix = interpolate(identity, size, mode="area")
    else:
        matrix = interpolate(identity, size, mode="bicubic", antialias=True, align_corners=False)
    return np.linalg.pinv(matrix[0, 0].numpy()).astype(np.float32)
