"""Captions and pair scores of the corpus to prune: in which scenes pairs are compared, and which captions are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.index import Corpus
from prune.pool import Method, PairScores, Pool
from prune.scenes import SceneRule
from runtime.artefacts import fingerprint, read_json
from runtime.errors import UserError

if TYPE_CHECKING:
    from captioning.loop import Loops
    from captioning.scorers import Material

# The captioning packages import networks and take seconds: most commands need none of them.

#: Captions that training reads. GIVEN: those of the corpus; BEST: the best ones that the captioning loops found; AUTO:
#: the best ones if the pruning method uses captions, otherwise the given ones.
GIVEN, BEST, AUTO = CHOICES = ("given", "best", "auto")
#: Number of folds that the images are dealt into if no scorer is fitted.
FOLDS = 5


@dataclass(frozen=True)
class CleanedPairs:
    """The directory of the captioning loops' stage, and the images and captions that it compared."""

    directory: Path
    material: Material

    def scores(self, corpus: Corpus) -> PairScores:
        """The scores that pruning methods see."""
        from captioning.loop import scores_of_images

        scenes = np.array(self.material.scenes, object)[self.material.scene]
        return PairScores(**scores_of_images(corpus, self.directory), scene=scenes)


def loops_of(cfg: DictConfig) -> Loops:
    """The two loops of `cfg.captioning`.

    Raises:
        UserError: an option that must be a number is not one, or an option has an invalid value.
    """
    from captioning.loop import Loops

    options = cfg.captioning
    for name, kind in (("rounds", int), ("most_mismatch", float), ("seed", int)):
        try:
            kind(options[name])
        except (TypeError, ValueError):
            raise UserError(f"captioning.{name}={options[name]}: give a number") from None
    return Loops(
        scorers=tuple(instantiate(scorer, _convert_="all") for scorer in options.scorers.values() if scorer),
        captioner=instantiate(options.captioner, _convert_="all"),
        describe=str(options.describe),
        rounds=int(options.rounds),
        most_mismatch=float(options.most_mismatch),
        seed=int(options.seed),
    )


def given_captions(cfg: DictConfig, corpus: Corpus) -> Corpus:
    """The corpus, with the fraction `captioning.swapped.fraction` of its captions exchanged between images."""
    options = cfg.captioning.swapped
    if options.fraction is None:
        return corpus
    from captioning.swaps import Swaps, swapped_corpus

    return swapped_corpus(corpus, Swaps(**options))[0]


def method_of(cfg: DictConfig) -> Method:
    """The pruning method of the configuration; if `cleaning_ratio` names a file, the ratios are read from that file.

    Raises:
        UserError: the file does not exist or does not hold ratios by scene.
    """
    given = cfg.prune.get("cleaning_ratio")
    if not isinstance(given, str):
        return instantiate(cfg.prune, _convert_="all")
    try:
        ratios = {str(name): float(ratio) for name, ratio in read_json(Path(given).expanduser()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"prune.cleaning_ratio={given} cannot be read ({type(error).__name__}): give a number, or a file that "
            "scripts/cleaning_probe.py wrote"
        ) from error
    return instantiate(cfg.prune, _convert_="all", cleaning_ratio=ratios)


def requested(cfg: DictConfig, method: Method) -> tuple[bool, bool]:
    """Two flags: whether pairs must be scored, and whether the captions of the loops are to be read.

    Raises:
        UserError: `captioning.captions` is not one of `CHOICES`.
    """
    choice = str(cfg.captioning.captions)
    if choice not in CHOICES:
        raise UserError(f"captioning.captions={choice} is unknown: give {', '.join(CHOICES)}")
    uses = bool(getattr(method, "uses_captions", False))
    return uses or choice == BEST, choice == BEST or (choice == AUTO and uses)


def cleaned(cfg: DictConfig, pool: Pool, corpus: Corpus, scene_pool: Callable[[], Pool]) -> CleanedPairs:
    """Run the captioning loops, or find them done.

    Args:
        pool: the corpus's pool, with embeddings.
        scene_pool: function that returns the pool with a reference; called for a corpus that has no labels.
    """
    loops = loops_of(cfg)
    labels = corpus.manifest["scene"].to_numpy(dtype=object)
    labelled = bool((labels[corpus.readable] != "").any())
    scenes = labels if labelled else _estimated_scenes(scene_pool(), int(cfg.captioning.seed))
    options = [getattr(scorer, "options", None) for scorer in loops.scorers]
    folds = max((option.folds for option in options if option is not None), default=FOLDS)
    key = fingerprint(encoder=cfg.encoder)
    from captioning.loop import clean_captions, material_of

    material = material_of(corpus, pool.embeddings, key, scenes, labelled, folds, loops.seed)
    return CleanedPairs(clean_captions(material, loops, cfg.runs), material)


def _estimated_scenes(pool: Pool, seed: int) -> np.ndarray:
    """Scene of each image by the prototypes of the pool's reference, str [N]; "" where the image is unreadable."""
    result = SceneRule()(pool, seed)
    return np.where(pool.readable, np.array(result.names, dtype=object)[result.scene], "")


def read_captions(cfg: DictConfig, corpus: Corpus, directory: Path) -> Corpus:
    """The corpus with the captions that the loops found."""
    from captioning.loop import with_captions

    return with_captions(corpus, directory, float(cfg.captioning.most_mismatch))
