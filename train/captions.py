"""Choice of the caption with which an image is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch


@dataclass(frozen=True)
class Captions:
    """The captions of K images.

    Attributes:
        texts: the distinct texts; the last one is the empty text, for classifier-free guidance.
        codes: int64 [M], positions in `texts` of all captions, grouped by image.
        starts: int64 [K + 1]; image i has the captions codes[starts[i] : starts[i + 1]], at least one.
    """

    texts: list[str]
    codes: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, manifest: pd.DataFrame) -> Captions:
        """All captions of a manifest's rows: `captions` if a row has several, else `caption`."""
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
        """Pick one caption of each image int64 [B] with equal chance; returns positions in `texts`."""
        counts = np.diff(self.starts)
        if counts.max(initial=1) == 1:
            return self.codes[self.starts[images]]
        return self.codes[self.starts[images] + random.integers(counts[images])]


def caption_mask(lengths: np.ndarray, width: int) -> torch.Tensor:
    """bool [B, width], true for the tokens before the padding."""
    return torch.arange(width)[None] < torch.from_numpy(lengths)[:, None]
