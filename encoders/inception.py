"""The InceptionV3 that FID is defined on, by clean-fid."""

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
from torch import nn

from encoders.embedding import device
from encoders.pixels import AVOID
from runtime.errors import UserError

INCEPTION = "inception"
INCEPTION_FILE = "inception-2015-12-05.pt"


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
        pixels = (images.to(device()) + 1) * 127.5
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
            return network(self.resize(images).to(device())).float().cpu().numpy()


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
            f"encoder.folder (in profile=paper yardstick.folder), or {AVOID}"
        )
    try:
        network = InceptionV3W(str(folder), download=False)
    except RuntimeError as error:
        raise UserError(f"{path} is no TorchScript file: remove it, so that it is fetched again") from error
    return network.eval().requires_grad_(False).to(device())


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
