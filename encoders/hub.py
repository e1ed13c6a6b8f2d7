"""Image networks of `transformers`, from the hub or a folder: DINOv2, CLIP, RemoteCLIP."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from encoders.embedding import device
from encoders.inception import INCEPTION
from encoders.pixels import AVOID, LOAD_ERRORS, PixelRecipe
from runtime.errors import UserError


@dataclass(frozen=True)
class TransformersEncoder:
    """The pooled output of an image network of `transformers`, from the hub or a folder.

    For DINOv2, the output is the normalised class token. For CLIP, and RemoteCLIP in the format of CLIP, it is the
    projected image embedding.

    Args:
        name: name in metric names (`fd_<name>`).
        path: hub name (`owner/name`) or folder, with safetensors weights and preprocessor_config.json.
        revision: commit on the hub, to pin the weights; None: the newest. A folder has no revision. Fingerprints
            identify the weights by path and revision.
        input_size: side in pixels to which images are resized.
        batch_size: images per forward pass.
    Raises:
        UserError: the name is reserved for FID, or the network cannot be loaded or does not take images of this size.
    """

    name: str
    path: str
    revision: str | None = None
    input_size: int = 224
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.name == INCEPTION:
            raise UserError(
                f"encoder.name={INCEPTION} is reserved for the standard InceptionV3 that defines FID: name the "
                "encoder after its network"
            )

    @property
    def dimensions(self) -> int:
        with torch.no_grad():
            return self.features(torch.zeros(1, 3, self.input_size, self.input_size)).shape[1]

    def network(self) -> nn.Module:
        """The frozen network in eval mode."""
        return _transformers_network(self)[0]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features of float images [B, 3, H, W] in [-1, 1]; differentiable. Returns float32 [B, D]."""
        network, recipe = _transformers_network(self)
        pixels = recipe.apply(images.to(next(network.parameters()).device))
        forward = getattr(network, "get_image_features", network)
        return forward(pixel_values=pixels).pooler_output.float()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
            return self.features(pixels).cpu().numpy()


@lru_cache(maxsize=2)
def _transformers_network(encoder: TransformersEncoder) -> tuple[nn.Module, PixelRecipe]:
    path = os.path.expanduser(encoder.path)
    try:
        config = AutoConfig.from_pretrained(
            path, revision=encoder.revision
        )  # the first call that fails if the hub cannot be reached
        network = AutoModel.from_pretrained(path, config=config, revision=encoder.revision, use_safetensors=True)
        recipe = PixelRecipe.of(path, encoder.input_size, encoder.revision)
    except LOAD_ERRORS as error:
        commit = f" (encoder.revision={encoder.revision})" if encoder.revision else ""
        raise UserError(
            f"no image encoder at encoder.path={encoder.path}{commit}: give a hub name that can be reached, with a "
            "revision of its own or null, or a folder with config.json, model.safetensors and "
            f"preprocessor_config.json, or {AVOID}"
        ) from error
    if hasattr(network, "get_image_features") and network.config.vision_config.image_size != encoder.input_size:
        side = network.config.vision_config.image_size
        raise UserError(f"{encoder.path} accepts only images of {side} px: give encoder.input_size={side}")
    return network.eval().requires_grad_(False).to(device()), recipe
