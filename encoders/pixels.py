"""Preprocessing of images for networks of the hub, and the exceptions of their loaders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from torch import nn

#: Exceptions of `from_pretrained` for a network that does not exist, cannot be reached or is broken.
LOAD_ERRORS = (OSError, ValueError, HTTPError, SafetensorError)
#: Advice in messages about a missing encoder.
AVOID = "choose encoder=efficientnet_lite0, which a package ships (in profile=paper also encoder@evaluation_encoder=…)"


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@dataclass(frozen=True)
class PixelRecipe:
    """The resizing and the colour normalisation that a network was trained with.

    Args:
        size: side in pixels of the network's input; whole images are resized (antialiased bicubic), not cropped.
        mean, std: mean and standard deviation of the channels in [0, 1].
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, path: str, size: int, revision: str | None = None) -> PixelRecipe:
        """Read the recipe of a network from its preprocessor_config.json."""
        from transformers import AutoImageProcessor  # slow to import, and most encoders need none

        processor = AutoImageProcessor.from_pretrained(path, revision=revision)
        return cls(size, tuple(processor.image_mean), tuple(processor.image_std))

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [N, H, W, 3] to float32 [N, 3, size, size]."""
        return self.apply(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1)

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Float [N, 3, H, W] in [-1, 1] to [N, 3, size, size]; differentiable."""
        size = (self.size, self.size)
        if images.shape[-2:] != size:
            images = nn.functional.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        mean, std = (images.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
        return ((images.clamp(-1, 1) + 1) / 2 - mean) / std
