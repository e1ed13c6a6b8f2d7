"""Use of a device's arithmetic by a training: model FLOPs utilisation (Chowdhery et al. 2022, appendix B)."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train.networks import predict


@torch.no_grad()
def training_flops(network: nn.Module, latents: torch.Tensor, text: torch.Tensor) -> float:
    """Floating-point operations for training on one image: the counted forward pass, and twice as many for the
    backward.

    Args:
        latents: float [1, C, h, w].
        text: float [1, L, D].
    """
    # PyTorch cannot count the CPU's fused attention, only the separate products of the math backend
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predict(network, latents, torch.zeros(1, device=latents.device), text)
    return 3.0 * counter.get_total_flops()


@lru_cache(maxsize=4)
def peak_flops(device: torch.device, dtype: torch.dtype, side: int = 2048, seconds: float = 0.3) -> float:
    """Floating-point operations per second of large matrix products on this device: an upper bound for networks."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # synchronises with the device
        best = max(best, 2.0 * side**3 / (time.perf_counter() - start))
    return best


def compute_dtype(mixed_precision: str) -> torch.dtype:
    """The dtype in which Accelerate's `mixed_precision` computes."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
