"""Scene prototypes from a labelled reference set, and each image's nearest one."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np

CHUNK = 65_536
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


def unit(embeddings: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Centred embeddings of unit length, float32 [N, D]; a zero vector stays zero."""
    centred = np.asarray(embeddings, dtype=np.float32) - centre
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.maximum(norms, 1e-12)


def kmeans(points: np.ndarray, clusters: int, seed: int, *, iterations: int = 20) -> np.ndarray:
    """Spherical k-means of unit vectors by faiss. Returns unit centroids float32 [min(clusters, n), D]."""
    points = np.ascontiguousarray(points, dtype=np.float32)
    clusters = min(clusters, len(points))
    if clusters == len(points):
        return points.copy()
    model = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=iterations,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=1_000_000_000,
    )
    model.train(points)
    return model.centroids


def fit_prototypes(
    embeddings: np.ndarray, labels: np.ndarray, per_class: int, floor_quantile: float, seed: int
) -> Prototypes:
    """Spherical k-means prototypes of every reference class.

    The floor is the `floor_quantile` of the reference images' own cosine to their nearest prototype: what is farther
    from every prototype than almost every labelled image is of no known scene.
    """
    centre = np.asarray(embeddings, dtype=np.float32).mean(axis=0)
    points = unit(embeddings, centre)
    names = tuple(sorted(set(labels.tolist())))
    groups = [kmeans(points[labels == name], per_class, seed) for name in names]
    vectors = np.concatenate(groups)
    classes = np.repeat(np.arange(len(names)), [len(group) for group in groups])
    floor = float(np.quantile((points @ vectors.T).max(axis=1), floor_quantile)) if floor_quantile > 0 else -np.inf
    return Prototypes(centre, vectors, classes, names, floor)


def assign_scenes(embeddings: np.ndarray, prototypes: Prototypes) -> tuple[np.ndarray, np.ndarray]:
    """Nearest prototype of every image, streamed.

    Returns:
        scene: int64 [N], index into `names`, or len(names) for the open scene.
        similarity: float32 [N], cosine to the nearest prototype.
    """
    scene = np.empty(len(embeddings), dtype=np.int64)
    similarity = np.empty(len(embeddings), dtype=np.float32)
    for start in range(0, len(embeddings), CHUNK):
        rows = slice(start, start + CHUNK)
        cosines = unit(embeddings[rows], prototypes.centre) @ prototypes.vectors.T
        nearest = cosines.argmax(axis=1)
        scene[rows] = prototypes.classes[nearest]
        similarity[rows] = np.take_along_axis(cosines, nearest[:, None], axis=1)[:, 0]
    scene[similarity < prototypes.floor] = len(prototypes.names)
    return scene, similarity
