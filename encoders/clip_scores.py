"""CLIP metrics: how well images fit their captions, and which scene CLIP recognises in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from encoders.pixels import PixelRecipe, to_tensor
from runtime.artefacts import file_digest, fingerprint

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

BATCH = 256


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP model with its tokenizer.

    Attributes:
        name: name of the model in metric names (`clip_<name>`).
        pixels: function that converts uint8 images [N, H, W, 3] into the input of the model.
        fingerprint: fingerprint of the weights.
    """

    name: str
    model: CLIPModel
    tokenizer: CLIPTokenizer
    fingerprint: str
    pixels: Callable[[np.ndarray], torch.Tensor] = to_tensor

    @torch.no_grad()
    def image_embeddings(self, images: np.ndarray) -> torch.Tensor:
        """Unit embeddings float32 [N, D] of uint8 images [N, H, W, 3]."""
        device = next(self.model.parameters()).device
        parts = (self.pixels(images[start : start + BATCH]).to(device) for start in range(0, len(images), BATCH))
        result = [self.model.get_image_features(pixel_values=part).pooler_output.float() for part in parts]
        return nn.functional.normalize(torch.cat(result), dim=1)

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit embeddings of texts, float32 [T, D]; texts longer than the model's limit are truncated."""
        device = next(self.model.parameters()).device
        tokens = tokenize(self.tokenizer, list(texts)).split(BATCH)
        result = [self.model.get_text_features(input_ids=part.to(device)).pooler_output.float() for part in tokens]
        return nn.functional.normalize(torch.cat(result), dim=1)

    def cut(self, texts: Sequence[str]) -> int:
        """Number of texts with more tokens than the model reads."""
        most = self.tokenizer.model_max_length
        return sum(len(ids) > most for ids in self.tokenizer(list(texts), truncation=False, verbose=False).input_ids)

    def scores(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """100 times the cosine of the embeddings of each image and its caption, float32 [N].

        The source is CLIPScore, Hessel et al. 2021.
        """
        distinct, position = np.unique(np.asarray(captions, dtype=str), return_inverse=True)
        texts = self.text_embeddings(distinct.tolist())[torch.from_numpy(position)]
        return 100 * (self.image_embeddings(images) * texts).sum(1).cpu().numpy()

    def recognise(self, images: np.ndarray, described: Mapping[str, Sequence[str]]) -> np.ndarray:
        """The scene that CLIP recognises in each image, str [N], by zero-shot classification.

        A scene is represented by the mean of the unit embeddings of texts that describe it (Radford et al. 2021,
        section 3.1.4).

        Args:
            images: uint8 [N, H, W, 3].
            described: texts that describe each scene.
        """
        names = sorted(described)
        centres = torch.stack([self.text_embeddings(described[name]).mean(0) for name in names])
        result = self.image_embeddings(images) @ nn.functional.normalize(centres, dim=1).T
        return np.array(names)[result.argmax(1).cpu().numpy()]


def load_clip(
    folder: str, tokenizer: str, name: str, *, revision: str | None = None, plain: bool = False
) -> ClipScorer:
    """Load a CLIP model from a folder or the hub.

    Args:
        folder: folder or hub name of the model.
        tokenizer: folder or hub name of its tokenizer.
        name: name in metric names.
        revision: commit on the hub.
        plain: the model takes pixels in [-1, 1] without further preprocessing, like the model that this project trains;
            otherwise the preprocessing recipe of the model is used.
    Raises:
        one of `encoders.pixels.LOAD_ERRORS`: the model cannot be loaded.
    """
    from transformers import CLIPModel  # slow to import

    model = CLIPModel.from_pretrained(folder, revision=revision, use_safetensors=True).eval().requires_grad_(False)
    words = _tokenizer(tokenizer, revision)
    pixels = to_tensor if plain else PixelRecipe.of(folder, model.config.vision_config.image_size, revision)
    files = sorted(path for path in Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    key = fingerprint(weights=[file_digest(path) for path in files] or [folder, revision])
    return ClipScorer(name, model, words, key, pixels)


@lru_cache(maxsize=8)
def _tokenizer(path: str, revision: str | None) -> CLIPTokenizer:
    """A tokenizer from a folder or the hub; kept, because reading it takes longer than reading a small network."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(path, revision=revision)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Padded token ids, int64 [N, model_max_length]; longer texts are truncated."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
