"""PSNR and SSIM by basicsr 1.4.2, the oracle of tests: imported here alone, for it asks for a module that is gone."""

from __future__ import annotations

import sys

import torchvision.transforms.functional

sys.modules.setdefault("torchvision.transforms.functional_tensor", torchvision.transforms.functional)

from basicsr.metrics.psnr_ssim import calculate_psnr, calculate_ssim  # noqa: E402

__all__ = ["calculate_psnr", "calculate_ssim"]
