"""The interface of image encoders, and the embedding of a set of images."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from runtime.progress import progress


class Encoder(Protocol):
    """A frozen network: uint8 images [B, H, W, 3] to float32 features [B, D].

    Attributes:
        name: name in metric names (`fd_<name>`).
        batch_size: images per forward pass.
        dimensions: number D of features.
    """

    name: str
    batch_size: int
    dimensions: int

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


def device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def embed(encoder: Encoder, images: np.ndarray, *, batch_size: int = 64, label: str = "embedding") -> np.ndarray:
    """Embed images, uint8 [N, H, W, 3], in batches; returns float32 [N, D]."""
    if len(images) == 0:
        return np.empty((0, encoder.dimensions), np.float32)
    batches = range(0, len(images), batch_size)
    return np.concatenate([encoder(images[start : start + batch_size]) for start in progress(batches, label)])
