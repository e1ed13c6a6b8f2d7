"""PSNR and SSIM by BasicSR's arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache

import numpy as np

#: Rounding to 8 bits alone leaves a mean squared error of 1/12: above this, two pictures cannot be told apart.
LARGEST_PSNR = float(10 * np.log10(12 * 255**2))


@lru_cache(maxsize=1)
def basicsr_metrics() -> tuple[Callable, Callable]:
    """`calculate_psnr` and `calculate_ssim` of basicsr 1.4.2.

    Imported on first use: basicsr takes seconds, and asks for a torchvision module that is gone.
    """
    import torchvision.transforms.functional

    sys.modules.setdefault("torchvision.transforms.functional_tensor", torchvision.transforms.functional)
    from basicsr.metrics.psnr_ssim import calculate_psnr, calculate_ssim

    return calculate_psnr, calculate_ssim


def psnr_ssim(images: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Mean PSNR (dB) and mean SSIM over pairs of RGB images, no border cut.

    A pair's PSNR counts at most `LARGEST_PSNR`: one featureless ocean tile, met exactly, would make the mean infinite.

    Args:
        images, references: uint8 [N, H, W, 3], H and W at least 11.
    """
    psnr, ssim = basicsr_metrics()
    pairs = list(zip(images, references, strict=True))
    return {
        "psnr": float(np.mean([min(LARGEST_PSNR, psnr(*pair, crop_border=0)) for pair in pairs])),
        "ssim": float(np.mean([ssim(*pair, crop_border=0) for pair in pairs])),
    }
