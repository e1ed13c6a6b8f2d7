"""What no method can beat: the floors of every table of distances."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from corpus.index import Corpus
from encoders.efficientnet import EfficientNetLite0
from encoders.embedding import embed
from eval.held_out import HeldOut, balanced_rows, natural_rows
from eval.metrics import compare_features

DRAWS = {"balanced": balanced_rows, "natural": natural_rows}


def prefixed(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics under the name of their held-out set; those of the set called "" keep their own names."""
    return {f"{name}_{key}" if name else key: value for key, value in metrics.items()}


def real_train(
    sets: Mapping[str, HeldOut], corpus: Corpus, embeddings: np.ndarray, encoder: EfficientNetLite0, seed: int
) -> dict[str, float]:
    """Real training images, drawn as each held-out set was, against it: what a perfect generator would score."""
    metrics = {}
    for index, (name, held) in enumerate(sets.items()):
        rows = DRAWS[held.name](corpus, len(held.rows), np.random.default_rng([seed, 200 + index]))
        features = embeddings[rows].astype(np.float32)
        metrics |= prefixed(name, compare_features(features, held.features, encoder.name))
    return metrics


def halves(sets: Mapping[str, HeldOut], encoder: EfficientNetLite0) -> dict[str, float]:
    """Two halves of each held-out set against each other."""
    metrics = {}
    for name, held in sets.items():
        # shuffled, since the balanced set deals its scenes in turn
        order = np.random.default_rng(0).permutation(len(held.rows))
        middle = len(order) // 2
        first, second = held.features[order[:middle]], held.features[order[middle : 2 * middle]]
        metrics |= prefixed(name, compare_features(first, second, encoder.name))
    return metrics


def against_itself(
    sets: Mapping[str, HeldOut], reconstructions: Mapping[str, np.ndarray], encoder: EfficientNetLite0
) -> dict[str, float]:
    """Reconstructions uint8 [N, R, R, 3] of each held-out set against the set, with their PSNR in dB."""
    metrics = {}
    for name, held in sets.items():
        features = embed(encoder, reconstructions[name])
        metrics |= prefixed(name, compare_features(features, held.features, encoder.name))
        error = np.mean((reconstructions[name].astype(np.float64) - held.images) ** 2)
        metrics |= prefixed(name, {"psnr": float(10 * np.log10(255**2 / error))})
    return metrics
