"""CLIP as a judge: how well images fit their captions, and which scene it sees in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from encoders.pixels import PixelRecipe, to_tensor
from runtime.artefacts import file_digest, fingerprint

BATCH = 256


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP model with its tokenizer.

    Attributes:
        name: in metric names (`clip_<name>`).
        pixels: turns uint8 images [N, H, W, 3] into what the model sees.
        fingerprint: of the weights.
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
        """Unit embeddings float32 [T, D]; texts beyond the model's length are cut."""
        device = next(self.model.parameters()).device
        tokens = tokenize(self.tokenizer, list(texts)).split(BATCH)
        result = [self.model.get_text_features(input_ids=part.to(device)).pooler_output.float() for part in tokens]
        return nn.functional.normalize(torch.cat(result), dim=1)

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts have more tokens than the model reads."""
        most = self.tokenizer.model_max_length
        return sum(len(ids) > most for ids in self.tokenizer(list(texts), truncation=False, verbose=False).input_ids)

    def scores(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """100 times the cosine of each image's embedding and its caption's, float32 [N] (CLIPScore, Hessel et al.
        2021)."""
        distinct, position = np.unique(np.asarray(captions, dtype=str), return_inverse=True)
        texts = self.text_embeddings(distinct.tolist())[torch.from_numpy(position)]
        return 100 * (self.image_embeddings(images) * texts).sum(1).cpu().numpy()

    def recognise(self, images: np.ndarray, described: Mapping[str, Sequence[str]]) -> np.ndarray:
        """The scene that CLIP sees in each image, str [N]: zero-shot classification (Radford et al. 2021, section
        3.1.4).

        A scene is the mean of the unit embeddings of the texts that describe it.

        Args:
            described: texts of every scene.
        """
        names = sorted(described)
        centres = torch.stack([self.text_embeddings(described[name]).mean(0) for name in names])
        result = self.image_embeddings(images) @ nn.functional.normalize(centres, dim=1).T
        return np.array(names)[result.argmax(1).cpu().numpy()]


def load_clip(
    folder: str, tokenizer: str, name: str, *, revision: str | None = None, plain: bool = False
) -> ClipScorer:
    """A CLIP model of a folder or of the hub.

    Args:
        tokenizer: its tokenizer's folder or hub name.
        name: in metric names.
        revision: commit of the hub.
        plain: it sees pixels in [-1, 1] as they are, as the one that is trained here; others by their own recipe.
    Raises:
        one of `encoders.pixels.LOAD_ERRORS`: it is not there.
    """
    model = CLIPModel.from_pretrained(folder, revision=revision, use_safetensors=True).eval().requires_grad_(False)
    words = CLIPTokenizer.from_pretrained(tokenizer, revision=revision)
    pixels = to_tensor if plain else PixelRecipe.of(folder, model.config.vision_config.image_size, revision)
    files = sorted(path for path in Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    key = fingerprint(weights=[file_digest(path) for path in files] or [folder, revision])
    return ClipScorer(name, model, words, key, pixels)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Padded token ids int64 [N, model_max_length]; longer texts are cut."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
