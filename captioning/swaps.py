"""Seeded exchange of captions between images, which gives pairs that are known to be mismatched."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from captioning.pairs import has_words
from corpus.index import Corpus
from runtime.artefacts import fingerprint
from runtime.errors import UserError

#: Largest number of times that partners of the same scene are drawn again.
TRIES = 1000


@dataclass(frozen=True)
class Swaps:
    """Settings of the exchange.

    Args:
        fraction: fraction, in [0, 1], of the images with a caption that exchange their captions.
        within_scene: exchange only between images of one scene; otherwise only between scenes.
        uneven: draw the fraction of each scene between 0 and twice `fraction`.
        seed: seed of the exchange.
    """

    fraction: float
    within_scene: bool = False
    uneven: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.fraction, (int, float)) or not 0 <= self.fraction <= 1:
            raise UserError(f"captioning.swapped.fraction={self.fraction}: give a fraction in [0, 1], or null for none")


def swapped_corpus(corpus: Corpus, swaps: Swaps) -> tuple[Corpus, np.ndarray]:
    """The corpus with the first caption of each image, of which a fraction is exchanged.

    Returns:
        the corpus, and bool [N], whether the text of an image has changed.
    """
    own = corpus.manifest["caption"].to_numpy(dtype=object)
    scene = corpus.manifest["scene"].to_numpy(dtype=str)
    usable = np.flatnonzero(corpus.readable & np.array([has_words(text) for text in own], bool))
    generator = np.random.default_rng([swaps.seed, 640])
    givers = exchanged(usable, scene, swaps, generator)
    captions = own.copy()
    captions[usable] = own[givers]
    manifest = corpus.manifest.drop(columns="captions", errors="ignore").assign(caption=captions)
    return replace(corpus, manifest=manifest, captions=fingerprint(swaps=swaps)), captions != own


def exchanged(rows: np.ndarray, scene: np.ndarray, swaps: Swaps, generator: np.random.Generator) -> np.ndarray:
    """For each of `rows`, the row whose caption it gets, int64 [n]: itself, a row of its scene, or of another scene."""
    givers = rows.copy()
    names, code = np.unique(scene[rows], return_inverse=True)
    fractions = np.full(len(names), swaps.fraction)
    if swaps.uneven:
        fractions = np.minimum(2 * swaps.fraction * generator.random(len(names)), 1)
    groups = [np.flatnonzero(code == number) for number in range(len(names))]
    drawn = [
        generator.permutation(group)[: round(fraction * len(group))]
        for group, fraction in zip(groups, fractions, strict=True)
    ]
    if swaps.within_scene:
        for chosen in drawn:
            givers[chosen] = rows[np.roll(chosen, 1)]
        return givers
    chosen = np.concatenate([np.empty(0, np.int64), *drawn])
    partner = generator.permutation(chosen)
    for _ in range(TRIES):
        clash = np.flatnonzero(code[partner] == code[chosen])
        if len(clash) == 0:
            break
        for place, other in zip(clash, generator.integers(len(chosen), size=len(clash)), strict=True):
            partner[[place, other]] = partner[[other, place]]
    givers[chosen] = rows[partner]
    return givers
