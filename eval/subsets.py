"""Metrics of the selected images alone: diversity, balance, and representation of the corpus."""

from __future__ import annotations

import faiss
import numpy as np

#: Number of images of a subset for measures of quadratic cost.
SAMPLE = 2000


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale each row to unit length, float [n, D]; a zero row stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def vendi_score(points: np.ndarray) -> float:
    """Vendi score (Friedman and Dieng 2023, definition 3.1) with the cosine kernel: the effective number of images.

    The score is the exponential of the entropy of the eigenvalues of K / n: 1 if all images are equal, n if all are
    orthogonal.

    Args:
        points: float [n, D], unit length.
    """
    points = np.asarray(points, dtype=np.float64)
    gram = points @ points.T if len(points) <= points.shape[1] else points.T @ points
    values = np.linalg.eigvalsh(gram / len(points))
    values = values[values > 1e-12]
    values /= values.sum() if len(values) else 1
    return float(np.exp(-(values * np.log(values)).sum()))


def scene_entropy(scenes: np.ndarray, known: int) -> float:
    """Shannon entropy of the labels of a subset, divided by that of `known` equally frequent scenes; 1: balanced.

    Args:
        scenes: str [K]; "" (unlabelled) does not count.
        known: number of scenes.
    """
    counts = np.unique(scenes[scenes != ""], return_counts=True)[1]
    fractions = counts / max(counts.sum(), 1)
    return float(-(fractions * np.log(fractions)).sum() / np.log(known)) if known > 1 else 1.0


def representation(points: np.ndarray, kept: np.ndarray, groups: np.ndarray) -> float:
    """Mean cosine of an image to its nearest kept image, averaged within each group and then over the groups.

    Args:
        points: float32 [n, D], unit length, images of the corpus.
        kept: float32 [K, D], unit length, kept images.
        groups: labels [n].
    """
    index = faiss.IndexFlatIP(points.shape[1])
    index.add(kept)
    nearest = index.search(points, 1)[0][:, 0]
    return float(np.mean([nearest[groups == name].mean() for name in sorted(set(groups.tolist()))]))


def knee(kept: np.ndarray, value: np.ndarray) -> int:
    """Index of the knee of a rising and flattening curve: the point farthest above the chord (Satopaa et al. 2011).

    Args:
        kept: float [n], ascending.
        value: float [n].
    """
    span = np.ptp(value) or 1.0
    x = (kept - kept[0]) / max(kept[-1] - kept[0], 1e-12)
    return int(np.argmax((value - value[0]) / span * np.sign(value[-1] - value[0] or 1) - x))
