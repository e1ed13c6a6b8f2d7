"""Encoders whose weights no package ships: any image network of the hub, and the InceptionV3 that FID is defined on."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from corpus.errors import UserError

#: What `from_pretrained` raises for a network that is not there, cannot be reached or is broken.
LOAD_ERRORS = (OSError, ValueError, HTTPError, SafetensorError)
INCEPTION = "inception"
INCEPTION_FILE = "inception-2015-12-05.pt"
_AVOID = "choose encoder=efficientnet_lite0, which a package ships (in profile=paper also encoder@yardstick=…)"


def _device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@dataclass(frozen=True)
class PixelRecipe:
    """The resizing and the colour normalisation that a network was trained with.

    Args:
        size: side in pixels of what the network sees; images are resized whole (antialiased bicubic), not cropped.
        mean, std: of the channels in [0, 1].
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, path: str, size: int, revision: str | None = None) -> PixelRecipe:
        """The recipe that lies beside a network of the hub (preprocessor_config.json)."""
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


@dataclass(frozen=True)
class TransformersEncoder:
    """The pooled output of an image network of `transformers`, from the hub or a folder.

    DINOv2: the normalised class token. CLIP, and RemoteCLIP in that form: the projected image embedding.

    Args:
        name: in metric names (`fd_<name>`).
        path: of the hub (`owner/name`) or a folder; weights as safetensors, with preprocessor_config.json.
        revision: commit of the hub, to pin the weights; a fingerprint knows them by path and revision.
        input_size: side in pixels to which images are resized.
        batch_size: images a forward pass.
    Raises:
        UserError: the name is FID's, the network cannot be loaded or does not take images of this size.
    """

    name: str
    path: str
    revision: str | None = None
    input_size: int = 224
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.name == INCEPTION:
            raise UserError(
                f"encoder.name={INCEPTION} is kept for the standard InceptionV3, which fid is defined on: name the "
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
        config = AutoConfig.from_pretrained(path, revision=encoder.revision)  # without the hub, the first to give up
        network = AutoModel.from_pretrained(path, config=config, revision=encoder.revision, use_safetensors=True)
        recipe = PixelRecipe.of(path, encoder.input_size, encoder.revision)
    except LOAD_ERRORS as error:
        raise UserError(
            f"no image encoder at encoder.path={encoder.path}: give a hub name that can be reached or a folder with "
            f"config.json, model.safetensors and preprocessor_config.json, or {_AVOID}"
        ) from error
    if hasattr(network, "get_image_features") and network.config.vision_config.image_size != encoder.input_size:
        side = network.config.vision_config.image_size
        raise UserError(f"{encoder.path} takes images of {side} px only: encoder.input_size={side}")
    return network.eval().requires_grad_(False).to(_device()), recipe


@dataclass(frozen=True)
class InceptionV3:
    """The InceptionV3 of FID: the pooled 2048 features of the TorchScript file that clean-fid uses.

    Images are resized as clean-fid's mode "clean" does (Parmar et al. 2022): PIL's bicubic, by channel, unrounded.

    Args:
        folder: holds `inception-2015-12-05.pt`.
        download: fetch the file from where clean-fid gets it, if it is not there.
        batch_size: images a forward pass.
    Raises:
        UserError: the file is missing and cannot be fetched, or is broken.
    """

    folder: str = "~/.cache/clean-fid"
    download: bool = True
    batch_size: int = 32
    #: fixed, since `fid` goes by it
    name: str = field(default=INCEPTION, init=False)
    input_size: int = field(default=299, init=False)
    dimensions: int = field(default=2048, init=False)

    def network(self) -> nn.Module:
        """The frozen network in eval mode: float32 [B, 3, 299, 299] in [0, 255] in, [B, 2048] out."""
        return _inception(Path(self.folder).expanduser(), self.download)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 [B, 2048] of float images [B, 3, H, W] in [-1, 1]; differentiable.

        The resize is torch's, which differs from PIL's by rounding: distances go through `__call__`.
        """
        size = (self.input_size, self.input_size)
        pixels = (images.to(_device()) + 1) * 127.5
        pixels = nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        return self.network()(pixels.clamp(0, 255)).float()

    def resize(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, 3] to float32 [B, 3, 299, 299] in [0, 255]."""
        from cleanfid.resize import build_resizer

        resizer = build_resizer("clean")
        return torch.from_numpy(np.stack([resizer(image) for image in images])).permute(0, 3, 1, 2)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        network = self.network()  # refused before anything is computed
        with torch.no_grad():
            return network(self.resize(images).to(_device())).float().cpu().numpy()


@lru_cache(maxsize=1)
def _inception(folder: Path, download: bool) -> nn.Module:
    # TorchScript is read by torch's own archive reader, not by Python's pickle
    from cleanfid.inception_torchscript import InceptionV3W

    path = folder / INCEPTION_FILE
    if not path.is_file() and download:
        _fetch_inception(path)
    if not path.is_file():
        raise UserError(
            f"no {path}, the InceptionV3 that fid is defined on: put the file there, name its folder with "
            f"encoder.folder (in profile=paper yardstick.folder), or {_AVOID}"
        )
    try:
        network = InceptionV3W(str(folder), download=False)
    except RuntimeError as error:
        raise UserError(f"{path} is no TorchScript file: remove it, so that it is fetched again") from error
    return network.eval().requires_grad_(False).to(_device())


def _fetch_inception(path: Path) -> None:
    """Download beside and rename into place; without a connection nothing happens."""
    from cleanfid.downloads_helper import inception_url

    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(inception_url, timeout=30) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        os.replace(partial, path)
    except (OSError, HTTPException):
        partial.unlink(missing_ok=True)
