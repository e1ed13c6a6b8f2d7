"""Memorisation: distances of a model's images to the nearest of its training images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.distances import too_few
from eval.subsets import unit

#: Training images read at a time.
BLOCK = 8192
#: Distance between two copies that is due to rounding, if one has float16 features.
ROUNDING = 1e-5


@dataclass(frozen=True)
class TrainingImages:
    """The images that a model was trained on, as rows of an embedded corpus.

    Attributes:
        key: identity of the images, for fingerprints.
        rows: int64 [K], rows of the corpus.
        embeddings: function from the name of an encoder to the embeddings of the whole corpus, float [N, D], usually a
            memory map.
    """

    key: Mapping[str, Any]
    rows: np.ndarray
    embeddings: Callable[[str], np.ndarray]


def nearest_distances(features: np.ndarray, embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """1 - cosine of each image and its nearest training image, float32 [N], after centring on the training images.

    Args:
        features: float [N, D].
        embeddings: float [M, D], read block by block.
        rows: int64 [K], rows of the training images.
    """
    centre = np.zeros(embeddings.shape[1])
    for block in _blocks(embeddings, rows):
        centre += block.sum(axis=0, dtype=np.float64) / len(rows)
    centre = centre.astype(np.float32)
    images = unit(np.asarray(features, dtype=np.float32) - centre)
    nearest = np.full(len(images), -1, dtype=np.float32)
    for block in _blocks(embeddings, rows):
        np.maximum(nearest, (images @ unit(block - centre).T).max(axis=1), out=nearest)
    return np.maximum(1 - nearest, 0)


def nearest_training(features: np.ndarray, reference: np.ndarray, embeddings: np.ndarray, rows: np.ndarray) -> float:
    """Median distance of images to their nearest training images, divided by that of real held-out images.

    The value is 1 if the images are no nearer to the training images than unseen photographs are, and 0 for copies.

    Args:
        features: float [N, D], features of the images.
        reference: float [M, D], features of the held-out images.
        embeddings, rows: as in `nearest_distances`.
    Returns:
        the ratio; NaN for too few images, or if half of the held-out images are copies of training images.
    """
    if too_few(features, reference, rows):
        return float("nan")
    distances = nearest_distances(np.concatenate([features, reference]), embeddings, rows)
    generated, real = np.median(distances[: len(features)]), np.median(distances[len(features) :])
    return float(generated / real) if real > ROUNDING else float("nan")


def _blocks(embeddings: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """float32 [at most BLOCK, D]."""
    for start in range(0, len(rows), BLOCK):
        yield np.asarray(embeddings[rows[start : start + BLOCK]], dtype=np.float32)
