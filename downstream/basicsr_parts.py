"""The parts of basicsr for super-resolution: blur kernels and a network.

Import this module inside functions, because the import takes seconds.
"""

from __future__ import annotations

from runtime.basicsr_alias import basicsr_module

_degradations = basicsr_module("data.degradations")
bivariate_Gaussian = _degradations.bivariate_Gaussian
bivariate_generalized_Gaussian = _degradations.bivariate_generalized_Gaussian
bivariate_plateau = _degradations.bivariate_plateau
circular_lowpass_kernel = _degradations.circular_lowpass_kernel
EDSR = basicsr_module("archs.edsr_arch").EDSR

__all__ = [
    "EDSR",
    "bivariate_Gaussian",
    "bivariate_generalized_Gaussian",
    "bivariate_plateau",
    "circular_lowpass_kernel",
]
