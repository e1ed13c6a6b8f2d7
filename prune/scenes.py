"""Scene prototypes from a labelled reference set, and each image's nearest one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import CHUNK, Points, kmeans, nearest_centroid

OPEN_SCENE = "open"


@dataclass(frozen=True)
class Prototypes:
    """Unit prototypes of the reference classes in a centred embedding space.

    Attributes:
        centre: float32 [D], subtracted before normalising.
        vectors: float32 [P, D], unit length.
        classes: int64 [P], index into `names`.
        names: class names, sorted.
        floor: cosine below which an image belongs to no known scene.
    """

    centre: np.ndarray
    vectors: np.ndarray
    classes: np.ndarray
    names: tuple[str, ...]
    floor: float


def fit_prototypes(
    embeddings: np.ndarray, labels: np.ndarray, per_class: int, floor_quantile: float, seed: int
) -> Prototypes:
    """Spherical k-means prototypes of every reference class, and the floor below which an image is of none.

    The floor is the `floor_quantile` of the cosine of labelled images to their nearest prototype: what is farther from
    every prototype than almost every labelled image is of no known scene. Each half of the reference is measured on
    prototypes fitted to the other half, since images lie nearer to prototypes fitted to themselves.

    Args:
        embeddings: float [M, D], M at least 1; labels: str [M].
    """
    centre = np.asarray(embeddings, dtype=np.float32).mean(axis=0)
    points = Points(embeddings, centre)[:]
    names = tuple(sorted(set(labels.tolist())))
    groups = [np.flatnonzero(labels == name) for name in names]
    fitted = [kmeans(points[rows], per_class, seed) for rows in groups]
    vectors = np.concatenate(fitted)
    classes = np.repeat(np.arange(len(names)), [len(part) for part in fitted])
    floor = _open_floor(points, groups, per_class, floor_quantile, seed) if floor_quantile > 0 else -np.inf
    return Prototypes(centre, vectors, classes, names, floor)


def _open_floor(points: np.ndarray, groups: list[np.ndarray], per_class: int, quantile: float, seed: int) -> float:
    """Quantile of every image's cosine to the prototypes of the half it is not in; -inf where no class has two."""
    generator = np.random.default_rng([seed, 1])
    halves = [np.array_split(generator.permutation(rows), 2) for rows in groups if len(rows) > 1]
    nearest = []
    for fit, measure in ((0, 1), (1, 0)):
        vectors = [kmeans(points[half[fit]], per_class, seed) for half in halves]
        nearest += [(points[half[measure]] @ np.concatenate(vectors).T).max(axis=1) for half in halves]
    return float(np.quantile(np.concatenate(nearest), quantile)) if nearest else -np.inf


def assign_scenes(embeddings: np.ndarray, prototypes: Prototypes) -> tuple[np.ndarray, np.ndarray]:
    """Nearest prototype of every image, streamed.

    Returns:
        scene: int64 [N], index into `names`, or len(names) for the open scene.
        similarity: float32 [N], cosine to the nearest prototype.
    """
    scene = np.empty(len(embeddings), dtype=np.int64)
    similarity = np.empty(len(embeddings), dtype=np.float32)
    points = Points(embeddings, prototypes.centre)
    for start in range(0, len(embeddings), CHUNK):
        rows = slice(start, start + CHUNK)
        nearest, distance = nearest_centroid(points[rows], prototypes.vectors)
        scene[rows], similarity[rows] = prototypes.classes[nearest], 1 - distance
    scene[similarity < prototypes.floor] = len(prototypes.names)
    return scene, similarity
