"""Scene prototypes from a labelled reference set, and each image's nearest one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import (
    CHUNK,
    Clustering,
    Points,
    corpus_points,
    kmeans,
    mean_embedding,
    members_of,
    nearest_centroid,
)
from prune.pool import Pool

OPEN_SCENE = "open"
#: Most strata of a corpus without labels; docs/method.md says what other numbers gave.
MOST_STRATA = 12


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


def corpus_strata(pool: Pool, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A reference for a corpus without labels: one mean embedding for each of its k-means clusters, and their names.

    There are min(`MOST_STRATA`, sqrt(n / 2)) clusters of the n readable images, at least one (sqrt(n / 2): Mardia, Kent
    and Bibby 1979, p. 365). With one embedding a class the prototypes are these means, and no image is of an unknown
    scene.

    Returns:
        float32 [S, D], not centred, and "stratum 00", ... as object [S]; both empty where no image is readable.
    """
    rows, points = corpus_points(pool)
    if len(rows) == 0:
        return np.empty((0, pool.embeddings.shape[1]), np.float32), np.empty(0, dtype=object)
    wanted = max(1, min(MOST_STRATA, round((len(rows) / 2) ** 0.5)))
    labels, _ = Clustering(wanted, hierarchical=False)(points, rows, wanted, generator)
    groups = [rows[group] for group in members_of(labels, int(labels.max()) + 1)]
    means = np.stack([mean_embedding(pool.embeddings, group) for group in groups])
    return means, np.array([f"stratum {number:02d}" for number in range(len(groups))], dtype=object)
