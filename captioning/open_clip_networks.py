"""CLIP models in the format of open_clip, with the interface of `encoders.clip_scores.ClipScorer`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn

from encoders.clip_scores import BATCH, ClipScorer
from encoders.embedding import device
from encoders.pixels import PixelRecipe
from runtime.artefacts import file_digest


@dataclass(frozen=True)
class OpenClip(ClipScorer):
    """A `ClipScorer` with a model and tokenizer of open_clip."""

    @torch.no_grad()
    def image_embeddings(self, images: np.ndarray) -> torch.Tensor:
        parts = [self.pixels(images[start : start + BATCH]).to(device()) for start in range(0, len(images), BATCH)]
        return nn.functional.normalize(torch.cat([self.model.encode_image(part).float() for part in parts]), dim=1)

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenizer(list(texts)).to(device()).split(BATCH)
        return nn.functional.normalize(torch.cat([self.model.encode_text(part).float() for part in tokens]), dim=1)

    def cut(self, texts: Sequence[str]) -> int:
        longest, tokenizer = self.tokenizer.context_length, self.tokenizer
        if hasattr(tokenizer, "tokenizer"):  # a tokenizer of transformers
            return sum(len(ids) > longest for ids in tokenizer.tokenizer(list(texts), verbose=False).input_ids)
        return sum(len(tokenizer.encode(text)) + 2 > longest for text in texts)


def load_open_clip(
    name: str, architecture: str, path: str, *, repository: str | None = None, revision: str | None = None
) -> OpenClip:
    """Load a network from a file.

    Raises:
        one of `encoders.pixels.LOAD_ERRORS`: the file or the architecture does not exist, or they do not match.
    """
    import open_clip

    file = Path(hf_hub_download(repository, path, revision=revision) if repository else path).expanduser()
    if not file.is_file():
        raise OSError(f"no such file: {file}")
    try:
        with _root_logger_silent():
            model = open_clip.create_model(architecture, pretrained=None)
        tokenizer = open_clip.get_tokenizer(architecture)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    try:
        model.load_state_dict(_weights(file))
    except RuntimeError as error:
        raise ValueError(f"its weights are not those of {architecture}") from error
    model.eval().requires_grad_(False).to(device())
    size = model.visual.image_size
    recipe = PixelRecipe(
        size[0] if isinstance(size, tuple) else size, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    )
    return OpenClip(name, model, tokenizer, file_digest(file), recipe)


@contextlib.contextmanager
def _root_logger_silent() -> Iterator[None]:
    """Silence the root logger: open_clip warns that weights are random, which is true only until they are loaded."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file by name; no other objects are read from it.

    Raises:
        ValueError: the file holds no tensors, or other objects as well.
    """
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        result: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the type of the exception depends on the content of the file
        raise ValueError("it is not a file that contains only tensors, and other content is not loaded") from error
    result = result.get("state_dict", result) if isinstance(result, dict) else result
    if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
        raise ValueError("it contains no named tensors")
    return {key.removeprefix("module."): value for key, value in result.items()}
