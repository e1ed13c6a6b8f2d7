"""How good a subset is before anything is trained on it: distances, coverage, diversity, balance, waste."""

from __future__ import annotations

from collections.abc import Mapping

import faiss
import numpy as np

from eval.held_out import HeldOut
from eval.metrics import compare_features
from eval.waste import ImageRows, low_information_fraction, near_duplicate_fraction

#: Images of a subset on which the quadratic measures run.
SAMPLE = 2000


def subset_quality(
    rows: np.ndarray,
    sets: Mapping[str, HeldOut],
    embeddings: np.ndarray,
    encoder: str,
    *,
    images: np.ndarray | ImageRows,
    corpus_sample: np.ndarray | ImageRows,
    scenes: np.ndarray,
    seed: int,
) -> dict[str, float]:
    """Everything about the selected real images themselves, without training.

    Distances, density and coverage compare as many of them as a held-out set has; the rest is of the subset alone.

    Args:
        rows: int64 [K], the selection.
        sets: held-out sets, by name.
        embeddings: float [N, D] of the whole corpus, by the encoder of the held-out features.
        images: uint8 [K, H, W, 3], the selected images.
        corpus_sample: uint8 [M, H, W, 3], readable images of the whole corpus, drawn at random.
        scenes: str [N], the corpus's own labels, or "" where there are none.
    """
    metrics: dict[str, float] = {}
    for index, (name, held) in enumerate(sets.items()):
        picked = np.random.default_rng([seed, 300 + index]).permutation(rows)[: len(held.rows)]
        features = np.asarray(embeddings[np.sort(picked)], dtype=np.float32)
        density, coverage = density_coverage(features, held.features)
        found = {**compare_features(features, held.features, encoder), "density": density, "coverage": coverage}
        metrics |= {f"{name}_{key}": value for key, value in found.items()}
    sample = np.sort(np.random.default_rng([seed, 310]).permutation(rows)[:SAMPLE])
    centre = np.asarray(embeddings[:: max(1, len(embeddings) // SAMPLE)], dtype=np.float32).mean(axis=0)
    points = unit(np.asarray(embeddings[sample], dtype=np.float32) - centre)
    metrics["vendi"] = vendi_score(points)
    if (scenes != "").any():
        metrics["scene_entropy"] = scene_entropy(scenes[rows], len(set(scenes[scenes != ""].tolist())))
    metrics["near_duplicates"] = near_duplicate_fraction(images)
    metrics["low_information"] = low_information_fraction(images, corpus_sample)
    return metrics


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit length, float [n, D]; a zero row stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def density_coverage(features: np.ndarray, reference: np.ndarray, neighbours: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, equations 5 and 6) on the reference's k-NN balls.

    Density: how many reference balls an image lies in, over k; above 1 where images crowd the dense parts.
    Coverage: share of reference balls with at least one image inside.

    Args:
        features: float [N, D]; reference: float [M, D], M at least 2.
    """
    features, reference = (np.ascontiguousarray(x, dtype=np.float32) for x in (features, reference))
    neighbours = min(neighbours, len(reference) - 1)
    # with float64 sums, so that an image equal to a reference image lies at distance zero
    radius = np.sort(_squared_distances(reference, reference), axis=1)[:, neighbours]
    inside = _squared_distances(reference, features) <= radius[:, None]
    return float(inside.sum() / (neighbours * len(features))), float(inside.any(axis=1).mean())


def _squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = first.astype(np.float64), second.astype(np.float64)
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return np.maximum(squares, 0)


def vendi_score(points: np.ndarray) -> float:
    """Vendi score (Friedman and Dieng 2023, definition 3.1) with the cosine kernel: the effective number of images.

    The exponential of the entropy of the eigenvalues of K / n; 1 where all are alike, n where all are orthogonal.

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
    """Shannon entropy of the labels of a subset over that of `known` even scenes: 1 is perfectly balanced.

    Args:
        scenes: str [K]; "" (unlabelled) does not count.
    """
    counts = np.unique(scenes[scenes != ""], return_counts=True)[1]
    shares = counts / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum() / np.log(known)) if known > 1 else 1.0


def representation(points: np.ndarray, kept: np.ndarray, groups: np.ndarray) -> float:
    """Mean cosine of an image to its nearest kept one, averaged within each group first: all groups count alike.

    Args:
        points: float32 [n, D] of the corpus, unit length; kept: float32 [K, D], unit length; groups: [n] labels.
    """
    index = faiss.IndexFlatIP(points.shape[1])
    index.add(kept)
    nearest = index.search(points, 1)[0][:, 0]
    return float(np.mean([nearest[groups == name].mean() for name in sorted(set(groups.tolist()))]))


def knee(kept: np.ndarray, value: np.ndarray) -> int:
    """Index of the knee of a rising, flattening curve: the point farthest above the chord (Satopaa et al. 2011).

    Args:
        kept: float [n], ascending; value: float [n].
    """
    span = np.ptp(value) or 1.0
    x = (kept - kept[0]) / max(kept[-1] - kept[0], 1e-12)
    return int(np.argmax((value - value[0]) / span * np.sign(value[-1] - value[0] or 1) - x))
