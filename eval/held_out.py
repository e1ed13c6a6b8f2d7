"""The two held-out sets: every scene alike, and as the world is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.index import Corpus
from encoders.efficientnet import EfficientNetLite0
from encoders.embedding import embed
from runtime.artefacts import stage
from runtime.errors import UserError

SETS = ("balanced", "natural")


@dataclass(frozen=True)
class HeldOut:
    """Held-out images of one set, with their features and captions.

    Attributes:
        name: balanced or natural.
        rows: int64 [N] into the test corpus; any leading part of `balanced` is balanced itself.
        features: float32 [N, D] of the evaluation encoder.
        captions: str [N].
    """

    name: str
    corpus: Corpus
    rows: np.ndarray
    features: np.ndarray
    captions: list[str]

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, R, R, 3]."""
        return self.corpus.images[self.rows]

    @property
    def masks(self) -> np.ndarray:
        """uint8 [N, R, R]."""
        return self.corpus.masks[self.rows]


def balanced_rows(corpus: Corpus, size: int, generator: np.random.Generator) -> np.ndarray:
    """`size` random rows, dealt round-robin over the scenes. A scene that runs out leaves its turns to the others."""
    scenes = corpus.manifest["scene"].to_numpy(dtype=object)
    decks = [
        list(generator.permutation(np.flatnonzero(corpus.readable & (scenes == name)))) for name in sorted(set(scenes))
    ]
    rows: list[int] = []
    while len(rows) < size and any(decks):
        rows += [deck.pop() for deck in decks if deck]
    return np.array(rows[:size], dtype=np.int64)


def natural_rows(corpus: Corpus, size: int, generator: np.random.Generator) -> np.ndarray:
    """`size` uniformly random readable rows."""
    return generator.permutation(np.flatnonzero(corpus.readable))[:size]


def held_out_sets(
    corpus: Corpus, encoder: EfficientNetLite0, size: int, seed: int, runs: Path | str
) -> dict[str, HeldOut]:
    """Draw both sets from a test corpus and embed them; features are cached.

    Raises:
        UserError: the test corpus is too small for the balanced set.
    """
    sets = {}
    for index, (name, draw) in enumerate(zip(SETS, (balanced_rows, natural_rows), strict=True)):
        rows = draw(corpus, size, np.random.default_rng([seed, 100 + index]))
        if len(rows) < size:
            raise UserError(
                f"the held-out corpus {corpus.name} has {len(rows)} usable images, eval.images={size} are asked for: "
                "lower eval.images or give a larger corpus.test"
            )

        def build(directory: Path, rows: np.ndarray = rows, name: str = name) -> None:
            features = embed(
                encoder, corpus.images[rows], batch_size=encoder.batch_size, label=f"embed held-out {name}"
            )
            np.save(directory / "features.npy", features)

        inputs = {"corpus": corpus.fingerprint, "encoder": encoder, "rows": rows.tolist()}
        directory = stage(runs, "held_out", inputs, build)
        captions = corpus.manifest["caption"].iloc[rows].tolist()
        sets[name] = HeldOut(name, corpus, rows, np.load(directory / "features.npy"), captions)
    return sets
