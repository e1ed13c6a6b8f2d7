"""The internal loop: score how well every caption fits its image, by all scorers, and find mismatched pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from captioning.evidence import Evidence, fit_mismatch, learn_evidence
from captioning.pair_statistics import PairStatistics, pair_statistics
from captioning.pairs import Pairs
from captioning.scorers import Material, PairScorer
from eval.processes import first_process_decides
from runtime.artefacts import fingerprint, is_main_process, read_json, stage, write_json

SCORES, SCENES = "scores.parquet", "scenes.json"
#: Files with the evidence of shuffled pairs, float32, ascending: with captions of other scenes, and of the same scene.
SHUFFLED = {"other": "shuffled_other.npy", "same": "shuffled_same.npy"}
#: Statistics that are used for each kind of shuffled pairs. The detection of captions of other scenes must not depend
#: on the number of such captions in the image's scene.
USED = {"other": slice(0, 2), "same": slice(0, 4)}
#: Largest number of pairs that the densities are fitted to; if there are more, they are drawn at random.
FITTED = 200_000


@dataclass(frozen=True)
class Scored:
    """Scores of pairs.

    Attributes:
        table: one row per pair: `cosine_<scorer>`; `evidence` against a caption of another scene; `fit`, evidence
            against a caption of another image of the same scene; and `mismatch`, the probability that the caption is
            of another scene.
        directory: directory of the stage, with `SHUFFLED` and `SCENES`.
    """

    table: pd.DataFrame
    directory: Path

    @property
    def fractions(self) -> dict[str, float]:
        """Fraction of mismatched pairs among the given pairs, by scene."""
        return read_json(self.directory / SCENES)["by_scene"]


def score_pairs(
    material: Material, given: Pairs, pairs: Pairs, scorers: Sequence[PairScorer], seed: int, runs: Path | str
) -> Scored:
    """Score pairs by all scorers; cached.

    Args:
        material: the images and their features.
        given: the pairs that scorers learn from and that others are compared with; a subset of `pairs`.
        pairs: the pairs to score.
        scorers: the scorers.
        seed: seed of the shuffling.
        runs: directory of the stages.
    """
    embedded = [_embedded(material, given, pairs, scorer, runs) for scorer in scorers]
    inputs = {"embeddings": [path.name for path in embedded], "scorers": [scorer.name for scorer in scorers]}
    inputs |= {"pairs": _digest(pairs), "given": _digest(given), "material": material.key, "seed": seed}

    def build(directory: Path) -> None:
        partner = _part_of(given, pairs)
        result = [_statistics(path, material, pairs, partner, seed) for path in embedded]
        averages = {
            name: sum(getattr(one, name) for one in result) / len(result) for name in ("observed", "same", "other")
        }
        table = {f"cosine_{scorer.name}": one.cosine for scorer, one in zip(scorers, result, strict=True)}
        scores, metadata, shuffled = _judged(averages, material, pairs, partner, np.random.default_rng([seed, 620]))
        for name, values in shuffled.items():
            np.save(directory / SHUFFLED[name], values.astype(np.float32))
        pd.DataFrame({**table, **scores}).to_parquet(directory / SCORES, index=False)
        write_json(directory / SCENES, metadata)

    directory = stage(runs, "pair_scores", inputs, build)
    return Scored(pd.read_parquet(directory / SCORES), directory)


def _embedded(material: Material, given: Pairs, pairs: Pairs, scorer: PairScorer, runs: Path | str) -> Path:
    def build(directory: Path) -> None:
        images, texts = scorer.embed(material, given, pairs)
        if is_main_process():
            np.save(directory / "images.npy", images.astype(np.float16))
            np.save(directory / "texts.npy", texts.astype(np.float16))

    inputs = {"material": material.key, "pairs": _digest(pairs), "given": _digest(given), "scorer": scorer}
    inputs["weights"] = scorer.key
    return stage(runs, "pair_embeddings", inputs, build, together=first_process_decides if scorer.joint else None)


def _digest(pairs: Pairs) -> str:
    return fingerprint(image=pairs.image.tolist(), text=pairs.text.tolist(), round=pairs.round.tolist())


def _part_of(given: Pairs, pairs: Pairs) -> np.ndarray:
    """Which of the pairs are given, bool [P]."""
    known = set(zip(given.image.tolist(), given.text.tolist(), strict=True))
    return np.array([pair in known for pair in zip(pairs.image.tolist(), pairs.text.tolist(), strict=True)], bool)


def _statistics(path: Path, material: Material, pairs: Pairs, partner: np.ndarray, seed: int) -> PairStatistics:
    """Statistics of one scorer; with the same seed, the pairs are shuffled in the same way for all scorers."""
    images, texts = (np.load(path / f"{name}.npy", mmap_mode="r") for name in ("images", "texts"))
    generator = np.random.default_rng([seed, 610])
    return pair_statistics(images, texts, pairs.image, material.fold, material.scene, partner, generator)


def _judged(
    statistics: Mapping[str, np.ndarray],
    material: Material,
    pairs: Pairs,
    partner: np.ndarray,
    generator: np.random.Generator,
) -> tuple[dict[str, np.ndarray], dict, dict[str, np.ndarray]]:
    """Scores by column, metadata, and the evidence of the shuffled pairs."""
    observed = statistics["observed"]
    scene = material.scene[pairs.image]
    sample = np.sort(generator.permutation(np.flatnonzero(partner))[:FITTED])
    learned: dict[str, Evidence | None] = {
        name: learn_evidence(observed[sample][:, used], statistics[name][sample][:, used], pairs.image[sample])
        for name, used in USED.items()
    }
    values = {
        name: result(observed[:, USED[name]]) if result else np.zeros(len(pairs)) for name, result in learned.items()
    }
    metadata: dict = {"fraction": 0.0, "by_scene": dict.fromkeys(material.scenes, 0.0)}
    mismatch = np.zeros(len(pairs))
    if other := learned["other"]:
        kept = ~np.isnan(statistics["other"][sample]).any(axis=1)
        own, shuffled_pairs = other.cross_fitted
        fitted = fit_mismatch(own, scene[sample], shuffled_pairs, scene[sample][kept], len(material.scenes))
        mismatch = fitted.probability(values["other"], scene)
        by_scene = dict(zip(material.scenes, fitted.by_scene.tolist(), strict=True))
        metadata = {"fraction": fitted.fraction, "by_scene": by_scene}
    scores = {"evidence": values["other"], "fit": values["same"], "mismatch": mismatch}
    shuffled = {name: np.sort(result.shuffled) if result else np.empty(0) for name, result in learned.items()}
    return {name: value.astype(np.float32) for name, value in scores.items()}, metadata, shuffled
