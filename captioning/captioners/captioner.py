"""What every captioner is given and gives back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from corpus.captions import encodable, words

#: A scene's words beyond these are cut: it is a name, not a text.
SCENE_WORDS = 8
SCENE_LETTERS = 60


@dataclass(frozen=True)
class ImageMetadata:
    """What is known of an image beside its pixels.

    Args:
        scene: words such as "baseball field"; "": unknown.
        mask: class numbers uint8 [H, W], 255 for none, of any size; None: no mask.
        classes: names of the mask's classes, by number.
    """

    scene: str = ""
    mask: np.ndarray | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Undescribed:
    """An image that cannot be described; it is quarantined with the reason."""

    reason: str


class Captioner(Protocol):
    """Describes images.

    Attributes:
        name: the source of its captions in captions.parquet.
        batch_size: images a call.
        attempts: how many different attempts it knows; later ones repeat them with other seeds.
    """

    name: str
    batch_size: int
    attempts: int

    def __call__(
        self, images: np.ndarray, metadata: Sequence[ImageMetadata], attempt: int, seeds: Sequence[int]
    ) -> list[str | Undescribed]:
        """A text, or the reason why there is none, for each image.

        Args:
            images: uint8 [B, H, W, 3].
            metadata: of each image.
            attempt: 0, 1, 2, ...: the round; each describes in another way.
            seeds: of each image, 0 or more; they alone decide what is random about its text.
        """
        ...


def scene_words(scene: str) -> str:
    """A scene's name as words for a text: `BaseballField` is "baseball field", "class 3" and "???" are none.

    Control characters and all punctuation but hyphens and apostrophes within words are dropped, and what is beyond
    `SCENE_WORDS` words or `SCENE_LETTERS` characters.
    """
    kept = re.sub(r"[^\w'’\- ]|(?<!\w)['’\-]+|['’\-]+(?!\w)", " ", encodable(scene[: 10 * SCENE_LETTERS]))
    named = words(kept)
    if re.fullmatch(r"class \d+", named) or not re.search(r"[^\W\d_]", named):
        return ""
    result = named.split()[:SCENE_WORDS]
    while len(result) > 1 and len(" ".join(result)) > SCENE_LETTERS:
        result.pop()
    return " ".join(result)[:SCENE_LETTERS].strip(" -'’")
