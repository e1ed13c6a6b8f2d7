"""Held-out sets of a split: all scenes equally frequent (balanced), or in the proportions of the corpus (natural)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from corpus.index import Corpus
from encoders.embedding import Encoder, embed
from eval.distances import FEWEST
from eval.metrics import SETS
from runtime.artefacts import stage
from runtime.errors import UserError

#: Column of a manifest: images with different values share no pixel; "": the image lies in more than one cell.
GROUND = "ground"


@dataclass(frozen=True)
class HeldOut:
    """Held-out images of one set, with their features and captions.

    Attributes:
        name: "balanced" or "natural".
        rows: int64 [N], rows of the corpus; any leading part of the balanced set is balanced as well.
        features: float32 [N, D] for every evaluating encoder, by name.
        captions: str [N].
    """

    name: str
    corpus: Corpus
    rows: np.ndarray
    features: Mapping[str, np.ndarray]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, R, R, 3]."""
        return self.corpus.images[self.rows]

    @property
    def scenes(self) -> np.ndarray:
        """str [N]; "" where it is not known."""
        return self.corpus.manifest["scene"].to_numpy(dtype=str)[self.rows]

    @property
    def masks(self) -> np.ndarray:
        """uint8 [N, R, R]."""
        return self.corpus.masks[self.rows]

    def first(self, count: int) -> HeldOut:
        """The first `count` images."""
        features = {name: values[:count] for name, values in self.features.items()}
        return replace(self, rows=self.rows[:count], features=features, captions=self.captions[:count])

    @property
    def key(self) -> dict[str, object]:
        """Identity of the images, for fingerprints."""
        return {"corpus": self.corpus.fingerprint, "rows": self.rows.tolist()}


def balanced_rows(corpus: Corpus, usable: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """`size` random rows, dealt round-robin over the scenes. A scene that runs out leaves its turns to the others.

    Args:
        usable: bool [N].
    """
    scenes = corpus.manifest["scene"].to_numpy(dtype=object)
    decks = [list(generator.permutation(np.flatnonzero(usable & (scenes == name)))) for name in sorted(set(scenes))]
    rows: list[int] = []
    while len(rows) < size and any(decks):
        rows += [deck.pop() for deck in decks if deck]
    return np.array(rows[:size], dtype=np.int64)


def natural_rows(corpus: Corpus, usable: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """`size` uniformly random usable rows."""
    return generator.permutation(np.flatnonzero(usable))[:size]


DRAWS = dict(zip(SETS, (balanced_rows, natural_rows), strict=True))


def halves(corpus: Corpus, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint halves of the readable images of a corpus, bool [N] each, which share no ground where it is known.

    With a column `ground`, every second value belongs to the second half, and images across a border to neither.
    Without it, every second image of each scene belongs to the second half, in a seeded random order.
    """
    readable = corpus.readable
    if GROUND in corpus.manifest:
        ground = corpus.manifest[GROUND].to_numpy(dtype=str)
        names = sorted(set(ground) - {""})
        odd = np.isin(ground, names[1::2])
        return readable & (ground != "") & ~odd, readable & odd
    scenes = corpus.manifest["scene"].to_numpy(dtype=object)
    generator = np.random.default_rng([seed, 99])
    second = np.zeros(len(corpus), dtype=bool)
    for name in sorted(set(scenes)):
        second[generator.permutation(np.flatnonzero(readable & (scenes == name)))[1::2]] = True
    return readable & ~second, second


def usable_images(corpus: Corpus, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The images that a held-out set of `size` images and a second such set are drawn from, bool [N] each.

    These are the two halves; if the first half is too small, they are all images and none.
    """
    first, second = halves(corpus, seed)
    if np.count_nonzero(first) >= size:
        return first, second
    return corpus.readable.copy(), np.zeros(len(corpus), dtype=bool)


def held_out_sets(
    corpus: Corpus, encoders: Sequence[Encoder], size: int, seed: int, runs: Path | str, *, half: int = 0
) -> dict[str, HeldOut]:
    """Draw both sets from one half of a split (see `usable_images`) and embed them; features are cached.

    Args:
        corpus: corpus of the split.
        encoders: encoders to embed with.
        size: number of images of each set.
        seed: seed of the draw.
        runs: directory of the stages.
        half: 0, or 1 for the second set of `real_held_out`, which may be smaller or empty.
    Raises:
        UserError: the split is too small, or `size` is below `FEWEST`.
    """
    if size < FEWEST:
        raise UserError(f"eval.images={size} (or eval.convergence_images) is too few: give at least {FEWEST}")
    usable = usable_images(corpus, size, seed)[half]
    sets = {}
    for index, (name, draw) in enumerate(DRAWS.items()):
        rows = draw(corpus, usable, size, np.random.default_rng([seed, 100 + index, half]))
        if len(rows) < size and half == 0:
            raise UserError(
                f"the held-out corpus {corpus.name} has {len(rows)} usable images, eval.images={size} needs more: "
                "lower eval.images (eval.convergence_images of snapshots) or hold out more images "
                "(corpus.test_fraction, corpus.val_fraction)"
            )
        features = {encoder.name: _features(corpus, rows, encoder, name, runs) for encoder in encoders}
        captions = corpus.manifest["caption"].iloc[rows].tolist()
        sets[name] = HeldOut(name, corpus, rows, features, captions)
    return sets


def second_sets(
    corpus: Corpus, encoders: Sequence[Encoder], size: int, seed: int, runs: Path | str
) -> dict[str, HeldOut]:
    """Further held-out sets of the same size, disjoint from `held_out_sets`; one that is too small is left out."""
    sets = held_out_sets(corpus, encoders, size, seed, runs, half=1)
    for name, held in sets.items():
        if len(held) < size:
            print(
                f"no row real_held_out for the {name} set: {corpus.name} has {len(held)} further held-out images, but "
                f"{size} are needed: lower eval.images or hold out more images",
                file=sys.stderr,
            )
    return {name: held for name, held in sets.items() if len(held) == size}


def _features(corpus: Corpus, rows: np.ndarray, encoder: Encoder, name: str, runs: Path | str) -> np.ndarray:
    """float32 [N, D] of some rows of a corpus; cached."""

    def build(directory: Path) -> None:
        label = f"embed held-out {name}, {encoder.name}"
        features = embed(encoder, corpus.images[rows], batch_size=encoder.batch_size, label=label)
        np.save(directory / "features.npy", features)

    inputs = {"corpus": corpus.fingerprint, "encoder": encoder, "rows": rows.tolist()}
    return np.load(stage(runs, "held_out", inputs, build) / "features.npy")
