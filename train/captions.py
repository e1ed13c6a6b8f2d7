"""Which caption an image is trained with, and the text encoder's hidden states of all of them, computed once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from corpus.artefacts import stage
from corpus.progress import progress
from train.text_encoder import encode_prompts

PROMPT_BATCH = 256


@dataclass(frozen=True)
class Captions:
    """The captions of some images.

    Attributes:
        texts: the distinct ones, and last the empty one, for classifier-free guidance.
        codes: int64 [M], image after image the positions of its captions in `texts`.
        starts: int64 [K + 1]; image i has codes[starts[i] : starts[i + 1]], one at least.
    """

    texts: list[str]
    codes: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, manifest: pd.DataFrame) -> Captions:
        """All captions of a manifest's rows: `captions` where a row has several, else `caption`."""
        first = manifest["caption"].to_numpy(dtype=str)
        lists = manifest["captions"].tolist() if "captions" in manifest else [None] * len(manifest)
        several = [
            [str(text) for text in texts] if isinstance(texts, (list, tuple, np.ndarray)) and len(texts) else [one]
            for texts, one in zip(lists, first, strict=True)
        ]
        texts, codes = np.unique([text for texts in several for text in texts], return_inverse=True)
        starts = np.concatenate([[0], np.cumsum([len(texts) for texts in several])])
        return cls([*map(str, texts), ""], codes.astype(np.int64), starts.astype(np.int64))

    @property
    def empty(self) -> int:
        """Position of the empty caption."""
        return len(self.texts) - 1

    def pick(self, images: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The position of one caption of each image int64 [B], every caption of an image with the same chance."""
        counts = np.diff(self.starts)
        if counts.max(initial=1) == 1:
            return self.codes[self.starts[images]]
        return self.codes[self.starts[images] + random.integers(counts[images])]


def cached_prompts(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    key: str,
    texts: list[str],
    runs: Path | str,
    *,
    half: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of texts, encoded once, memory-mapped.

    Args:
        key: fingerprint of the text encoder; half: store float16 in place of float32.
    Returns:
        [T, L, D], and the number of tokens before the padding, int64 [T].
    """

    def build(directory: Path) -> None:
        array = None
        for start in progress(range(0, len(texts), PROMPT_BATCH), "encode captions", unit="batch"):
            states = encode_prompts(text_encoder, tokenizer, texts[start : start + PROMPT_BATCH]).numpy()
            if array is None:
                dtype = np.float16 if half else np.float32
                shape = (len(texts), *states.shape[1:])
                array = np.lib.format.open_memmap(directory / "prompts.npy", mode="w+", dtype=dtype, shape=shape)
            array[start : start + len(states)] = states
        array.flush()
        np.save(directory / "lengths.npy", caption_lengths(tokenizer, texts))

    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    directory = stage(runs, "prompts", {"text_encoder": key, "texts": digest, "half": half}, build)
    return np.load(directory / "prompts.npy", mmap_mode="r"), np.load(directory / "lengths.npy")


def caption_lengths(tokenizer: CLIPTokenizer, texts: list[str]) -> np.ndarray:
    """Tokens of each text with its start and end marks, int64 [T]: all that is no padding."""
    encoded = tokenizer(texts, max_length=tokenizer.model_max_length, truncation=True).input_ids
    return np.array([len(ids) for ids in encoded], dtype=np.int64)


def caption_mask(lengths: np.ndarray, width: int) -> torch.Tensor:
    """bool [B, width], true for the tokens before the padding."""
    return torch.arange(width)[None] < torch.from_numpy(lengths)[:, None]
