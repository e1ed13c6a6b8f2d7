"""The interface of captioners: their input and output."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from corpus.captions import encodable, words

#: Largest number of words of a scene's name; further words are removed.
SCENE_WORDS = 8
SCENE_LETTERS = 60


@dataclass(frozen=True)
class ImageMetadata:
    """Known data about an image besides its pixels.

    Args:
        scene: words such as "baseball field"; "": unknown.
        mask: class numbers uint8 [H, W] of any size, 255: no class; None: no mask.
        classes: names of the classes of the mask, by number.
    """

    scene: str = ""
    mask: np.ndarray | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Undescribed:
    """Result for an image that cannot be described; the image is quarantined with the reason."""

    reason: str


class Captioner(Protocol):
    """Describes images.

    Attributes:
        name: the source of its captions in captions.parquet.
        batch_size: images per call.
        attempts: number of different attempts; later attempts repeat them with other seeds.
    """

    name: str
    batch_size: int
    attempts: int

    def __call__(
        self, images: np.ndarray, metadata: Sequence[ImageMetadata], attempt: int, seeds: Sequence[int]
    ) -> list[str | Undescribed]:
        """Describe images: a text for each image, or the reason why there is none.

        Args:
            images: uint8 [B, H, W, 3].
            metadata: metadata of each image.
            attempt: number of the round, from 0; each attempt describes images in a different way.
            seeds: seed of each image, at least 0; all randomness of its text depends on this seed only.
        """
        ...


def scene_words(scene: str) -> str:
    """A scene's name as words for a text: `BaseballField` gives "baseball field", "class 3" and "???" give "".

    Control characters and punctuation are removed, except hyphens and apostrophes within words. The result is limited
    to `SCENE_WORDS` words and `SCENE_LETTERS` characters.
    """
    kept = re.sub(r"[^\w'’\- ]|(?<!\w)['’\-]+|['’\-]+(?!\w)", " ", encodable(scene[: 10 * SCENE_LETTERS]))
    named = words(kept)
    if re.fullmatch(r"class \d+", named) or not re.search(r"[^\W\d_]", named):
        return ""
    result = named.split()[:SCENE_WORDS]
    while len(result) > 1 and len(" ".join(result)) > SCENE_LETTERS:
        result.pop()
    return " ".join(result)[:SCENE_LETTERS].strip(" -'’")
