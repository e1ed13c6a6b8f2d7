"""What of basicsr 1.4.2 is used: blur kernels, a network, metrics. It is imported here alone, and on first use.

It asks for a module that torchvision has no more, and switches off NumPy's warnings of divisions for everybody.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
import torchvision.transforms.functional

sys.modules.setdefault("torchvision.transforms.functional_tensor", torchvision.transforms.functional)

with np.errstate(), warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from basicsr.archs.edsr_arch import EDSR
    from basicsr.data.degradations import (
        bivariate_Gaussian,
        bivariate_generalized_Gaussian,
        bivariate_plateau,
        circular_lowpass_kernel,
    )
    from basicsr.metrics.psnr_ssim import calculate_psnr, calculate_ssim

__all__ = [
    "EDSR",
    "bivariate_Gaussian",
    "bivariate_generalized_Gaussian",
    "bivariate_plateau",
    "calculate_psnr",
    "calculate_ssim",
    "circular_lowpass_kernel",
]
