"""Image-text pairs: every caption of an image is a candidate, from any source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from corpus.captions import scene_caption

#: Sources of the captions that come with a corpus: a written caption, or only the name of the scene.
GIVEN, SCENE_NAME = "given", "scene name"
#: Reasons why a caption of the corpus is not a candidate.
EMPTY, NO_WORDS = "empty caption", "caption without words"
#: Letters of scripts that put no spaces between words, as a class of a regular expression: Thai, Lao, Burmese, Khmer,
#: Japanese and Chinese. One of them can be a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[^\W\d_]{{2,}}|[{UNSPACED}]")


@dataclass(frozen=True)
class Pairs:
    """Candidates, sorted by image.

    Attributes:
        image: int64 [P], ascending rows of the corpus.
        text: object [P].
        source: object [P], `GIVEN`, `SCENE_NAME` or a captioner's name.
        round: int64 [P], round in which a caption was written; 0: it came with the corpus.
    """

    image: np.ndarray
    text: np.ndarray
    source: np.ndarray
    round: np.ndarray

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def of(cls, image: Sequence[int], text: Sequence[str], source: Sequence[str], made_in: int) -> Pairs:
        texts = np.empty(len(text), dtype=object)
        texts[:] = list(text)
        sources = np.empty(len(text), dtype=object)
        sources[:] = list(source)
        return cls(np.asarray(image, np.int64), texts, sources, np.full(len(text), made_in, np.int64))

    def joined(self, other: Pairs) -> Pairs:
        """All candidates of both, sorted by image, without duplicates; for one image, those of `self` come first."""
        parts = [np.concatenate([getattr(self, name), getattr(other, name)]) for name in vars(self)]
        order = np.argsort(parts[0], kind="stable")
        both = Pairs(*(part[order] for part in parts))
        twice = pd.DataFrame({"image": both.image, "text": both.text}).duplicated().to_numpy()
        return Pairs(*(getattr(both, name)[~twice] for name in vars(both)))


def has_words(text: str) -> bool:
    """Whether a text has a word: two letters in a row, or one of `UNSPACED`."""
    return _WORD.search(text) is not None


def given_pairs(manifest: pd.DataFrame) -> tuple[Pairs, pd.DataFrame]:
    """The captions that came with the readable images of a corpus, and the captions that are not candidates.

    Returns:
        the pairs, and a table of the other captions with id, caption and reason (`EMPTY`, `NO_WORDS`).
    """
    first = manifest["caption"].to_numpy(dtype=object)
    lists = manifest["captions"].tolist() if "captions" in manifest else [None] * len(manifest)
    scenes = manifest["scene"].to_numpy(dtype=object)
    result: list[tuple[int, str, str]] = []
    refused: list[tuple[str, str, str]] = []
    for row in np.flatnonzero(manifest["readable"].to_numpy()):
        several = lists[row]
        texts = list(several) if isinstance(several, (list, tuple, np.ndarray)) and len(several) else [first[row]]
        named = scene_caption(scenes[row])
        for text in dict.fromkeys(str(text).strip() for text in texts):
            if has_words(text):
                result.append((row, text, SCENE_NAME if text == named else GIVEN))
            else:
                refused.append((manifest["id"].iloc[row], text, NO_WORDS if text else EMPTY))
    columns = list(zip(*result, strict=True)) if result else [(), (), ()]
    return Pairs.of(*columns, made_in=0), pd.DataFrame(refused, columns=["id", "caption", "reason"])
