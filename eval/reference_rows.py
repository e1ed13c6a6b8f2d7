"""Reference rows: metrics of real images, and of real training images that were encoded and decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.index import Corpus
from eval.held_out import DRAWS, HeldOut
from eval.measuring import Evaluators, compare, embed_rows, judge_captions, with_set
from eval.memorisation import TrainingImages
from eval.metrics import METRICS, compute
from eval.reference_names import REFERENCE_ROWS
from runtime.artefacts import stage, write_json

#: Images of each kind that the report shows.
SHOWN = 12


@dataclass(frozen=True)
class Rebuild:
    """A function that encodes and decodes images, uint8 [N, R, R, 3], and everything that it depends on."""

    key: str
    function: Callable[[np.ndarray], np.ndarray]


def reference_rows(
    sets: Mapping[str, HeldOut],
    further: Mapping[str, HeldOut],
    corpus: Corpus,
    judges: Evaluators,
    rebuilds: Mapping[str, Rebuild],
    seed: int,
    runs: Path | str,
    training: TrainingImages | None = None,
) -> Path:
    """Measure every reference row on as many images as each held-out set has; cached.

    Args:
        sets: the held-out sets, by the prefix of their metrics' names; the report shows images of the first one.
        further: disjoint sets of the same size, for some of the held-out sets.
        corpus: corpus of the training images, not pruned.
        judges: the evaluating networks.
        rebuilds: the functions for the rows `reconstructed_train` and `pca`.
        seed: seed of the draw.
        runs: directory of the stages.
        training: all images of `corpus`, if their features exist.
    Returns:
        a directory with reference_rows.json (metrics by row), and a few training images and their reconstructions.
    """

    def build(directory: Path) -> None:
        rows: dict[str, dict] = {name: {} for name in REFERENCE_ROWS}
        for index, (prefix, held) in enumerate(sets.items()):
            if prefix in further:
                rows["real_held_out"] |= with_set(prefix, real_held_out(further[prefix], held, judges, training))
            generator = np.random.default_rng([seed, 200 + index])
            picked = DRAWS[held.name](corpus, corpus.readable, len(held), generator)
            scenes = corpus.manifest["scene"].to_numpy(dtype=str)[picked]
            images = {"real_train": np.array(corpus.images[picked])}
            images |= {name: rebuild.function(images["real_train"]) for name, rebuild in rebuilds.items()}
            for name, pixels in images.items():
                features = {encoder.name: embed_rows(encoder, pixels) for encoder in judges.encoders}
                result = compare(features, held, scenes=scenes, training=training)
                if name in rebuilds:
                    result |= compute({"images": pixels, "truth": images["real_train"]}, of={}, only=("psnr", "ssim"))
                rows[name] |= with_set(prefix, result)
            if index == 0:
                for name, pixels in images.items():
                    np.save(directory / f"{name}.npy", pixels[:SHOWN])
        write_json(directory / "reference_rows.json", {name: row for name, row in rows.items() if row})

    inputs = {
        "sets": [[prefix, held.key] for prefix, held in sets.items()],
        "further": [[prefix, held.key] for prefix, held in further.items()],
        "corpus": corpus.fingerprint,
        "judges": judges.key,
        "rebuilds": {name: rebuild.key for name, rebuild in rebuilds.items()},
        "seed": seed,
        "training": training and training.key,
        "metrics": sorted(METRICS),
    }
    return stage(runs, "reference_rows", inputs, build)


def real_held_out(
    further: HeldOut, held: HeldOut, judges: Evaluators, training: TrainingImages | None = None
) -> dict[str, float | None]:
    """Metrics of real images against a disjoint held-out set, and CLIP metrics with their captions."""
    metrics = compare(further.features, held, scenes=further.scenes, training=training)
    return metrics | judge_captions(further.images, further, judges)[0]
