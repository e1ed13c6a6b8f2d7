"""The two loops of DLDC: score captions, describe images without a good caption again, keep the best caption.

DLDC (Dual Loop Data Cleaning, JSTARS 2025) defines the loops; its models, thresholds and search are not public. This
implementation uses models and thresholds of this project: docs/method.md, section 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from captioning.captioners.captioner import Captioner
from captioning.describing import describe
from captioning.pairs import GIVEN, SCENE_NAME, Pairs, given_pairs
from captioning.scorers import Material, PairScorer
from captioning.scoring import SHUFFLED, Scored, score_pairs
from corpus.index import Corpus
from runtime.artefacts import fingerprint, read_json, stage, write_json
from runtime.errors import UserError
from runtime.notices import notice

CAPTIONS, REFUSED, SUMMARY = "captions.parquet", "quarantine.parquet", "summary.json"
#: Which images are described again: none, those without a caption or with a mismatched best caption, or all.
DESCRIBE = ("none", "mismatched", "all")
#: Fraction of mismatched captions above which the cause is probably another error in the captions.
SUSPICIOUS = 0.8


@dataclass(frozen=True)
class Loops:
    """Settings for cleaning and repairing captions.

    Args:
        scorers: scorers by name; their statistics are averaged.
        captioner: writes new captions.
        describe: one of `DESCRIBE`.
        rounds: largest number of times that an image is described.
        most_mismatch: mismatch probability above which a caption is not a candidate.
        seed: seed of the folds, of shuffled pairs and of captions.
    """

    scorers: tuple[PairScorer, ...]
    captioner: Captioner
    describe: str = "mismatched"
    rounds: int = 2
    most_mismatch: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.describe not in DESCRIBE:
            raise UserError(f"captioning.describe={self.describe} is unknown: give {', '.join(DESCRIBE)}")
        if not 0 < self.most_mismatch < 1:
            raise UserError(f"captioning.most_mismatch={self.most_mismatch}: give a probability between 0 and 1")
        if not self.scorers:
            raise UserError(
                "captioning.scorers is empty: give a scorer, for example +scorer@captioning.scorers.fitted=fitted"
            )


def material_of(
    corpus: Corpus, features: np.ndarray, features_key: str, scenes: np.ndarray, labelled: bool, folds: int, seed: int
) -> Material:
    """Make the data that scorers may use.

    Args:
        corpus: the images.
        features: float [N, F], features of a frozen image encoder.
        features_key: fingerprint of the encoder.
        scenes: str [N].
        labelled: whether the scenes are labels of the corpus.
        folds: number of folds that the images are divided into at random.
        seed: seed of the folds.
    """
    names, scene = np.unique(scenes.astype(str), return_inverse=True)
    fold = np.random.default_rng([seed, 630]).permutation(len(corpus)) % folds
    return Material(corpus, features, features_key, scene.astype(np.int64), tuple(names.tolist()), labelled, fold)


def clean_captions(material: Material, loops: Loops, runs: Path | str) -> Path:
    """Run both loops; returns a directory with the files `CAPTIONS`, `REFUSED` and `SUMMARY`.

    `CAPTIONS` has one row per candidate: image (row of the corpus), id, scene, caption, source, round, the columns of
    `captioning.scoring.Scored`, and `chosen`, which marks the best caption of an image.

    Raises:
        UserError: no image has a caption, and no image is to be described.
    """
    given, refused = given_pairs(material.corpus.manifest)
    tried = [refused]
    if len(given) == 0:
        if loops.describe == "none":
            raise UserError(
                f"corpus {material.corpus.name} has no captions: give captions (docs/corpora.md), or let a captioner "
                "describe the images with captioning.describe=mismatched"
            )
        notice(f"no image of {material.corpus.name} has a caption: {loops.captioner.name} describes all of them")
        given, failed = describe(material, _readable(material), loops.captioner, 0, loops.seed, runs)
        tried.append(failed)
        if len(given) == 0:
            raise UserError(
                f"no image of {material.corpus.name} can be described ({failed['reason'].iloc[0]}): give captions "
                "(docs/corpora.md), or take another captioner"
            )
    if len(set(given.text.tolist())) == 1:
        notice("captions: all are the same, so mismatched captions cannot be detected")
    pairs, scored = given, score_pairs(material, given, given, loops.scorers, loops.seed, runs)
    for attempt in range(loops.rounds if loops.describe != "none" else 0):
        rows = images_to_describe(material, pairs, scored, loops)
        if len(rows) == 0 or (attempt == 0 and not (given.round == 0).any()):
            continue
        written, failed = describe(material, rows, loops.captioner, attempt, loops.seed, runs)
        tried.append(failed)
        pairs = pairs.joined(written)
        scored = score_pairs(material, given, pairs, loops.scorers, loops.seed, runs)

    failed = pd.concat(tried, ignore_index=True).drop_duplicates(ignore_index=True)

    def build(directory: Path) -> None:
        table = captions_table(material, pairs, scored, loops.most_mismatch)
        table.to_parquet(directory / CAPTIONS, index=False)
        failed.to_parquet(directory / REFUSED, index=False)
        for name in SHUFFLED.values():
            np.save(directory / name, np.load(scored.directory / name))
        write_json(directory / SUMMARY, summarise(table, failed, scored, loops))

    inputs = {
        "scores": scored.directory.name, "failed": fingerprint(of=failed.to_dict("list")),
        "sources": fingerprint(of=pairs.source.tolist()), "captioner": loops.captioner.name,
        "most_mismatch": loops.most_mismatch,
    }  # fmt: skip
    directory = stage(runs, "captions", inputs, build)
    _announce(read_json(directory / SUMMARY))
    return directory


def _readable(material: Material) -> np.ndarray:
    return np.flatnonzero(material.corpus.readable)


def images_to_describe(material: Material, pairs: Pairs, scored: Scored, loops: Loops) -> np.ndarray:
    """Rows of the images without a good caption, or of all images; int64, ascending."""
    rows = _readable(material)
    if loops.describe == "all":
        return rows
    good = np.zeros(len(material.corpus), bool)
    good[pairs.image[scored.table["mismatch"].to_numpy() <= loops.most_mismatch]] = True
    return rows[~good[rows]]


def captions_table(material: Material, pairs: Pairs, scored: Scored, most_mismatch: float) -> pd.DataFrame:
    """All candidates with their scores; `chosen` marks the best of each image."""
    ids = material.corpus.manifest["id"].to_numpy(dtype=object)
    names = np.array(material.scenes, dtype=object)
    table = pd.DataFrame(
        {
            "image": pairs.image, "id": ids[pairs.image], "scene": names[material.scene[pairs.image]],
            "caption": pairs.text, "source": pairs.source, "round": pairs.round,
        }
    )  # fmt: skip
    table = pd.concat([table, scored.table], axis=1)
    return table.assign(chosen=best_of_images(pairs.image, scored.table, most_mismatch))


def best_of_images(image: np.ndarray, scores: pd.DataFrame, most_mismatch: float) -> np.ndarray:
    """Mark the best candidate of each image, bool [P].

    The best candidate is the not mismatched one that fits its image best among images of the same scene. If all
    candidates of an image are mismatched, it is the least mismatched one.
    """
    mismatch, fit = scores["mismatch"].to_numpy(), scores["fit"].to_numpy()
    good = mismatch <= most_mismatch
    rank = np.where(good, -fit, mismatch)
    order = np.lexsort((rank, ~good, image))
    first = np.r_[True, np.diff(image[order]) != 0] if len(order) else np.empty(0, bool)
    chosen = np.zeros(len(image), bool)
    chosen[order[first]] = True
    return chosen


def summarise(table: pd.DataFrame, refused: pd.DataFrame, scored: Scored, loops: Loops) -> dict[str, Any]:
    """Counts and means, over all and by scene."""
    bad = table["mismatch"] > loops.most_mismatch
    chosen = table[table["chosen"]]
    fractions = scored.fractions
    scenes = {
        name: {
            "images": len(rows),
            "mismatched_fraction": fractions.get(name),
            "mismatched": int((rows["mismatch"] > loops.most_mismatch).sum()),
            "repaired": int((rows["round"] > 0).sum()),
        }
        for name, rows in chosen.groupby("scene")
    }
    return {
        "pairs": len(table),
        "images": len(chosen),
        "sources": {str(name): int(count) for name, count in table["source"].value_counts().items()},
        "chosen": {str(name): int(count) for name, count in chosen["source"].value_counts().items()},
        "mismatched_fraction": read_json(scored.directory / "scenes.json")["fraction"],
        "mismatched_given": int((bad & (table["round"] == 0)).sum()),
        "mismatched_images": int((chosen["mismatch"] > loops.most_mismatch).sum()),
        "most_mismatch": loops.most_mismatch,
        "refused": {str(name): int(count) for name, count in refused["reason"].value_counts().items()},
        "scenes": scenes,
        "scorers": [scorer.name for scorer in loops.scorers],
        "captioner": loops.captioner.name,
    }


def _announce(summary: dict[str, Any]) -> None:
    if len(summary["scenes"]) < 2:
        notice(
            "captions: all images are of one scene, so captions of other scenes cannot be detected and no caption is "
            "marked as mismatched: give scenes in sub-folders, or another reference"
        )
    elif summary["mismatched_fraction"] > SUSPICIOUS:
        notice(
            f"captions: {summary['mismatched_fraction']:.0%} seem to belong to other images: are the captions nearly "
            "equal, or in a different order than the images?"
        )
    own = {GIVEN, SCENE_NAME} & set(summary["sources"])
    repaired = summary["images"] - sum(summary["chosen"].get(source, 0) for source in own)
    line = (
        f"captions: {summary['pairs']:,} candidates for {summary['images']:,} images; "
        f"{summary['mismatched_fraction']:.1%} of the {'given' if own else 'first'} captions are of another scene; "
        f"{repaired:,} images have a new caption, {summary['mismatched_images']:,} have no good caption"
    )
    refused = ", ".join(f"{count:,} {reason}" for reason, count in summary["refused"].items())
    notice(line + (f"; rejected as candidates: {refused}" if refused else ""))


def with_captions(corpus: Corpus, directory: Path, most_mismatch: float) -> Corpus:
    """The corpus with the captions of the loops.

    An image gets its good candidates, the best one first, or only the best one if none is good. Images without a
    candidate keep their captions.
    """
    table = pd.read_parquet(directory / CAPTIONS, columns=["image", "caption", "mismatch", "chosen"])
    table = table[(table["mismatch"] <= most_mismatch) | table["chosen"]]
    table = table.sort_values(["image", "chosen"], ascending=[True, False], kind="stable")
    lists = table.groupby("image")["caption"].agg(list)
    first = corpus.manifest["caption"].to_numpy(dtype=object).copy()
    manifest = corpus.manifest
    several = manifest["captions"].tolist() if "captions" in manifest else [[text] if text else None for text in first]
    for row, texts in lists.items():
        first[row], several[row] = texts[0], texts
    manifest = manifest.assign(caption=first, captions=pd.Series(several, index=corpus.manifest.index))
    return replace(corpus, manifest=manifest, captions=directory.name)


def scores_of_images(corpus: Corpus, directory: Path) -> dict[str, np.ndarray]:
    """`mismatch`, `fit` and `cosine` (mean over scorers) of the best caption of each image, float32 [N] each.

    The values are NaN for an image without a candidate.
    """
    table = pd.read_parquet(directory / CAPTIONS)
    table = table[table["chosen"]]
    cosines: Sequence[str] = [name for name in table if name.startswith("cosine_")]
    columns = {"mismatch": table["mismatch"], "fit": table["fit"], "cosine": table[cosines].mean(axis=1)}
    result = {name: np.full(len(corpus), np.nan, np.float32) for name in columns}
    for name, values in columns.items():
        result[name][table["image"]] = values
    return result
