"""Quality of a subset before any training: all metrics of real images, computed on the selected images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from corpus.index import Corpus
from eval.held_out import HeldOut
from eval.measuring import compare, with_set
from eval.metrics import compute
from eval.subsets import unit
from eval.waste import ImageRows

#: Number of images of a subset, and of the corpus that it is compared with, for measures of quadratic cost.
SAMPLE = 2000
#: Number of images for weighted distances; it is larger because weights reduce the effective number of images.
WEIGHTED_SAMPLE = 4000


def subset_quality(
    rows: np.ndarray,
    weights: np.ndarray,
    sets: Mapping[str, HeldOut],
    corpus: Corpus,
    embeddings: Mapping[str, np.ndarray],
    seed: int,
) -> dict[str, float | None]:
    """All metrics of the selected real images themselves, without training.

    Distances compare as many selected images as a held-out set has. The other metrics are about the subset alone, by
    the evaluation encoder.

    Args:
        rows: int64 [K], rows of the selected images.
        weights: float32 [K], number of images of the corpus that each selected image represents.
        sets: held-out sets, by name.
        corpus: the corpus.
        embeddings: float [N, D] of the whole corpus by encoder, the evaluation encoder first.
        seed: seed of the samples.
    """
    metrics: dict[str, float | None] = {}
    scenes = corpus.manifest["scene"].to_numpy(dtype=str)
    for index, (name, held) in enumerate(sets.items()):
        picked = np.sort(np.random.default_rng([seed, 300 + index]).permutation(rows)[: len(held)])
        features = {encoder: np.asarray(values[picked], dtype=np.float32) for encoder, values in embeddings.items()}
        metrics |= with_set(name, compare(features, held, scenes=scenes[picked]))
    metrics |= _weighted_distances(rows, weights, sets, embeddings, seed)
    encoder, values = next(iter(embeddings.items()))
    sample = np.sort(np.random.default_rng([seed, 310]).permutation(rows)[:SAMPLE])
    readable = np.flatnonzero(corpus.readable)
    everywhere = np.sort(np.random.default_rng([seed, 311]).permutation(readable)[:SAMPLE])
    centre = np.asarray(values[everywhere], dtype=np.float32).mean(axis=0)
    inputs = {
        "subset_features": unit(np.asarray(values[sample], dtype=np.float32) - centre),
        "subset_images": ImageRows(corpus.images, np.sort(rows)),
        "corpus_images": ImageRows(corpus.images, everywhere),
    }
    if (scenes != "").any():
        inputs |= {"subset_scenes": scenes[rows], "scene_count": len(set(scenes[scenes != ""].tolist()))}
    return metrics | compute(inputs, of={"encoder": encoder})


def _weighted_distances(
    rows: np.ndarray,
    weights: np.ndarray,
    sets: Mapping[str, HeldOut],
    embeddings: Mapping[str, np.ndarray],
    seed: int,
) -> dict[str, float | None]:
    """The weighted distance of the selection to every held-out set, by every encoder."""
    picked = np.sort(np.random.default_rng([seed, 312]).permutation(len(rows))[:WEIGHTED_SAMPLE])
    metrics: dict[str, float | None] = {}
    for name, held in sets.items():
        for encoder, values in embeddings.items():
            features = np.asarray(values[rows[picked]], dtype=np.float32)
            inputs = {"weighted_features": features, "weights": weights[picked], "reference": held.features[encoder]}
            metrics |= with_set(name, compute(inputs, of={"encoder": encoder}))
    return metrics
