"""PSNR, SSIM, NIQE and colour conversion by basicsr 1.4.2, as the reference implementation for tests."""

from __future__ import annotations

from runtime.basicsr_alias import basicsr_module

calculate_psnr = basicsr_module("metrics.psnr_ssim").calculate_psnr
calculate_ssim = basicsr_module("metrics.psnr_ssim").calculate_ssim
calculate_niqe = basicsr_module("metrics.niqe").calculate_niqe
rgb2ycbcr = basicsr_module("utils").rgb2ycbcr

__all__ = ["calculate_niqe", "calculate_psnr", "calculate_ssim", "rgb2ycbcr"]
