"""The InceptionV3 that FID is defined with, through clean-fid."""

from __future__ import annotations

import hashlib
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
#: SHA-256 of that file, as published by crowsonkb/k-diffusion (evaluation.py).
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


@dataclass(frozen=True)
class InceptionV3:
    """The InceptionV3 of FID: the 2048 pooled features of the TorchScript file that clean-fid uses.

    Images are resized as in clean-fid's mode "clean" (Parmar et al. 2022): with PIL's bicubic filter, by channel,
    without rounding.

    Args:
        folder: folder with `inception-2015-12-05.pt`.
        download: download the file from clean-fid's source if it does not exist.
        batch_size: images per forward pass.
    Raises:
        UserError: the file does not exist and cannot be downloaded, or it is a different file.
    """

    folder: str = "~/.cache/clean-fid"
    download: bool = True
    batch_size: int = 32
    #: fixed, because the metric `fid` is identified by this name
    name: str = field(default=INCEPTION, init=False)
    input_size: int = field(default=299, init=False)
    dimensions: int = field(default=2048, init=False)

    def network(self) -> nn.Module:
        """The frozen network in eval mode: float32 [B, 3, 299, 299] in [0, 255] in, [B, 2048] out."""
        return _inception(Path(self.folder).expanduser(), self.download)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 [B, 2048] of float images [B, 3, H, W] in [-1, 1]; differentiable.

        The images are resized with torch, which differs from PIL by rounding; distances are computed with `__call__`.
        """
        size = (self.input_size, self.input_size)
        pixels = (images.to(device()) + 1) * 127.5
        pixels = nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        return self.network()(pixels.clamp(0, 255)).float()

    def resize(self, images: np.ndarray) -> torch.Tensor:
        """Resize images uint8 [B, H, W, 3] to float32 [B, 3, 299, 299] in [0, 255]."""
        from cleanfid.resize import build_resizer

        resizer = build_resizer("clean")
        return torch.from_numpy(np.stack([resizer(image) for image in images])).permute(0, 3, 1, 2)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        network = self.network()  # a missing file is refused before anything is computed
        with torch.no_grad():
            return network(self.resize(images).to(device())).float().cpu().numpy()


@lru_cache(maxsize=1)
def _inception(folder: Path, download: bool) -> nn.Module:
    # TorchScript is read by torch's own archive reader, not by Python's pickle
    from cleanfid.inception_torchscript import InceptionV3W

    path = folder / INCEPTION_FILE
    if not path.is_file() and download:
        try:
            _fetch_inception(path)
        except (OSError, HTTPException) as error:
            raise _missing(path, " ".join(str(error).split()) or type(error).__name__) from error
    if not path.is_file():
        raise _missing(path, "encoder.download=false")
    if _sha256(path) != INCEPTION_SHA256:
        raise UserError(
            f"{path} is not the InceptionV3 that defines FID (its SHA-256 is {_sha256(path)}, not "
            f"{INCEPTION_SHA256}): remove it, so that it is downloaded again, or {AVOID}"
        )
    return InceptionV3W(str(folder), download=False).eval().requires_grad_(False).to(device())


def _missing(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}, the InceptionV3 that defines FID, is missing and could not be downloaded ({reason}): put the file "
        f"there, give its folder as encoder.folder (in profile=paper evaluation_encoder.folder), or {AVOID}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_inception(path: Path) -> None:
    """Download the file to a temporary name and rename it.

    Raises:
        OSError, HTTPException: the file cannot be downloaded or written, or it is a different file; no file is left.
    """
    from cleanfid.downloads_helper import inception_url

    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(inception_url, timeout=30) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        if _sha256(partial) != INCEPTION_SHA256:
            raise OSError(f"{inception_url} sent a different file, with the SHA-256 {_sha256(partial)}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
