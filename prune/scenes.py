"""Scenes of images by a labelled reference (nearest prototype or classifier), and strata of images of unknown scene."""

from __future__ import annotations

from collections.abc import Callable
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
from runtime.engine import engine
from runtime.errors import UserError
from runtime.ranges import check_options

OPEN_SCENE = "open"
#: Number of images per task of a worker that assigns scenes.
BLOCK = 16 * CHUNK
CLASSIFIERS = ("prototypes", "lda", "logistic")
#: Largest number of strata of a corpus without labels; docs/method.md has the results of other numbers.
MOST_STRATA = 12
#: Largest number of strata of the open scene, smallest mean number of images per stratum, and size of the sample by
#: which the number of strata is found.
MOST_OPEN_STRATA, OPEN_STRATUM_IMAGES, OPEN_SAMPLE = 256, 40, 16_384


@dataclass(frozen=True)
class Scenes:
    """The scenes of a corpus.

    Attributes:
        names: names of the scenes; the open scenes come last.
        scene: int64 [N], index into `names`.
        similarity: float32 [N], cosine to the nearest prototype; NaN where there are no prototypes.
        centre: float32 [D], centre of the embedding space.
        threshold: cosine below which an image is in an open scene; None if there are no prototypes.
        accuracy: fraction of labelled images that are assigned to their class, by two-fold cross-validation; None if no
            class has two images.
        open: number of open scenes.
    """

    names: tuple[str, ...]
    scene: np.ndarray
    similarity: np.ndarray
    centre: np.ndarray
    threshold: float | None = None
    accuracy: float | None = None
    open: int = 1


@dataclass(frozen=True)
class SceneRule:
    """Rule that assigns scenes to images by a reference.

    Args:
        prototypes_per_class: number of k-means prototypes of each reference class.
        threshold_quantile: quantile of the reference's similarities to prototypes; images less similar than it to every
            prototype are in the open scene.
        classifier: classifier of the images above the threshold: "prototypes" (class of the nearest prototype), "lda"
            (linear discriminant analysis with Ledoit-Wolf shrinkage and equal class priors) or "logistic"
            (L2-regularised logistic regression).
        split_open: split the open scene into strata that are as tight as the known scenes.
    """

    prototypes_per_class: int = 8
    threshold_quantile: float = 0.01
    classifier: str = "prototypes"
    split_open: bool = False

    def __post_init__(self) -> None:
        check_options(self, "prune", counts=("prototypes_per_class",), fractions=("threshold_quantile",))
        if self.classifier not in CLASSIFIERS:
            raise UserError(f"prune.scene_classifier={self.classifier} is unknown: take {', '.join(CLASSIFIERS)}")

    def __call__(self, pool: Pool, seed: int) -> Scenes:
        """The scenes of a pool with a reference."""
        reference, labels = pool.reference_embeddings, pool.reference_labels
        prototypes = fit_prototypes(reference, labels, self.prototypes_per_class, self.threshold_quantile, seed)
        names, accuracy = prototypes.names, prototypes.accuracy
        classify = None
        if self.classifier != "prototypes" and len(names) > 1:
            points, classes = Points(reference, prototypes.centre)[:], np.searchsorted(names, labels.astype(str))
            classify = fit_classifier(points, classes, self.classifier)
            accuracy = held_out_accuracy(points, classes, self.classifier, seed)
        scene, similarity = assign_scenes(pool.embeddings, prototypes, classify)
        strata = (OPEN_SCENE,)
        is_open = np.flatnonzero((scene == len(names)) & pool.readable)
        if self.split_open and len(is_open):
            points = Points(pool.embeddings, prototypes.centre)
            target = tightness(Points(reference, prototypes.centre)[:], len(names), seed)
            labels_of_open = open_strata(points, is_open, target, np.random.default_rng([seed, 2]))
            scene[is_open] += labels_of_open
            count = int(labels_of_open.max()) + 1
            strata = tuple(f"{OPEN_SCENE} {number:03d}" for number in range(count)) if count > 1 else strata
        return Scenes(
            (*names, *strata), scene, similarity, prototypes.centre, prototypes.threshold, accuracy, len(strata)
        )


@dataclass(frozen=True)
class Prototypes:
    """Unit prototypes of the reference classes in a centred embedding space.

    Attributes:
        centre: float32 [D], subtracted before embeddings are normalised.
        vectors: float32 [P, D], prototypes of unit length.
        classes: int64 [P], class of each prototype as an index into `names`.
        names: class names, sorted.
        threshold: cosine below which an image belongs to no known scene.
        accuracy: accuracy of the nearest prototype, as in `Scenes`.
    """

    centre: np.ndarray
    vectors: np.ndarray
    classes: np.ndarray
    names: tuple[str, ...]
    threshold: float
    accuracy: float | None = None


def fit_prototypes(
    embeddings: np.ndarray, labels: np.ndarray, per_class: int, threshold_quantile: float, seed: int
) -> Prototypes:
    """Fit spherical k-means prototypes of every reference class, and the threshold of known scenes.

    The threshold is the `threshold_quantile` of the cosine of labelled images to their nearest prototype. An image that
    is farther from every prototype than almost every labelled image belongs to no known scene. Each half of the
    reference is measured on prototypes fitted to the other half, because images lie nearer to prototypes that were
    fitted to them.

    Args:
        embeddings: float [M, D], M at least 1.
        labels: str [M], class of each row.
        per_class: number of prototypes of each class.
        threshold_quantile: quantile in [0, 1] that defines the threshold.
        seed: seed of k-means and of the two halves.
    """
    centre = np.asarray(embeddings, dtype=np.float32).mean(axis=0)
    points = Points(embeddings, centre)[:]
    names = tuple(sorted(set(labels.tolist())))
    groups = [np.flatnonzero(labels == name) for name in names]
    fitted = [kmeans(points[rows], per_class, seed) for rows in groups]
    vectors = np.concatenate(fitted)
    classes = np.repeat(np.arange(len(names)), [len(part) for part in fitted])
    nearest, right = _across_halves(points, groups, per_class, seed)
    threshold = float(np.quantile(nearest, threshold_quantile)) if threshold_quantile > 0 and len(nearest) else -np.inf
    return Prototypes(centre, vectors, classes, names, threshold, float(right.mean()) if len(right) else None)


def _across_halves(
    points: np.ndarray, groups: list[np.ndarray], per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measure labelled images on prototypes that were fitted to the other half of the reference.

    Returns:
        the cosine of each image to the nearest prototype, and whether this prototype is of the image's class; both are
        empty if no class has two images.
    """
    halves = _halves(groups, seed)
    nearest, right = [np.empty(0, np.float32)], [np.empty(0, bool)]
    for fit, measure in ((0, 1), (1, 0)):
        vectors = [kmeans(points[half[fit]], per_class, seed) for half in halves]
        classes = np.repeat(np.arange(len(vectors)), [len(part) for part in vectors])
        for number, half in enumerate(halves):
            cosines = points[half[measure]] @ np.concatenate(vectors).T
            nearest.append(cosines.max(axis=1))
            right.append(classes[cosines.argmax(axis=1)] == number)
    return np.concatenate(nearest), np.concatenate(right)


def _halves(groups: list[np.ndarray], seed: int) -> list[list[np.ndarray]]:
    """Two random halves of every class that has at least two images."""
    generator = np.random.default_rng([seed, 1])
    return [np.array_split(generator.permutation(rows), 2) for rows in groups if len(rows) > 1]


def fit_classifier(points: np.ndarray, classes: np.ndarray, kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a linear classifier to unit vectors float32 [M, D]; returns a function (float32 [n, D]) -> int64 [n]."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # imported here: slow to import, rarely needed
    from sklearn.linear_model import LogisticRegression

    if kind == "lda":
        count = int(classes.max()) + 1
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=np.full(count, 1 / count))
    else:
        model = LogisticRegression(C=100.0, max_iter=200, class_weight="balanced")
    return model.fit(points, classes).predict


def held_out_accuracy(points: np.ndarray, classes: np.ndarray, kind: str, seed: int) -> float | None:
    """Accuracy of a classifier on the labelled images by two-fold cross-validation; None if no class has two images."""
    groups = [np.flatnonzero(classes == number) for number in range(int(classes.max()) + 1)]
    halves = _halves(groups, seed)
    if len(halves) < 2:
        return None
    right = []
    for fit, measure in ((0, 1), (1, 0)):
        codes = [np.repeat(np.arange(len(halves)), [len(half[part]) for half in halves]) for part in (fit, measure)]
        rows = [np.concatenate([half[part] for half in halves]) for part in (fit, measure)]
        right.append(fit_classifier(points[rows[0]], codes[0], kind)(points[rows[1]]) == codes[1])
    return float(np.concatenate(right).mean())


def tightness(points: np.ndarray, scenes: int, seed: int) -> float:
    """Mean cosine of an image to its centroid, for k-means with as many clusters as there are known scenes.

    The value is the target for the tightness of the strata of the open scene. It is computed on clusters rather than
    on the scenes, because the strata are clusters as well, and because one scene may hold several kinds of images that
    have nothing in common. Each half of the images is measured with the centroids of the other half.

    Args:
        points: float32 [M, D], unit length.
        scenes: number of known scenes.
        seed: seed of k-means and of the halves.
    Returns:
        the cosine; 1 if there are fewer than four images per scene.
    """
    if len(points) < 4 * scenes:
        return 1.0
    first, second = np.array_split(np.random.default_rng([seed, 3]).permutation(len(points)), 2)
    cosines = [
        1 - nearest_centroid(points[measure], kmeans(points[fit], scenes, seed))[1]
        for fit, measure in ((first, second), (second, first))
    ]
    return float(np.concatenate(cosines).mean())


def open_strata(points: Points, rows: np.ndarray, target: float, generator: np.random.Generator) -> np.ndarray:
    """Divide images of no known scene into strata: the smallest number of clusters that are as tight as a known scene.

    The number of clusters is found by bisection with k-means on a sample. There are at most `MOST_OPEN_STRATA` strata,
    and on average at least `OPEN_STRATUM_IMAGES` images in each.

    Args:
        points: unit vectors.
        rows: int64 [n], at least one row.
        target: mean cosine of an image to the mean of its stratum (`tightness` of the known scenes).
        generator: source of randomness.
    Returns:
        int64 [n], stratum 0..s-1 of each row; no stratum is empty.
    """
    sample = rows[np.sort(generator.permutation(len(rows))[:OPEN_SAMPLE])]
    vectors, seed = points[sample], int(generator.integers(2**31))

    def fitted(count: int) -> tuple[np.ndarray, float]:
        centroids = kmeans(vectors, count, seed, iterations=10)
        return centroids, float(1 - nearest_centroid(vectors, centroids)[1].mean())

    low, high = 1, max(1, min(MOST_OPEN_STRATA, len(rows) // OPEN_STRATUM_IMAGES))
    centroids, cosine = fitted(low)
    if cosine >= target:
        return np.zeros(len(rows), np.int64)
    while cosine < target and low < high:  # double the number, then bisect the last step
        step = min(2 * low, high)
        result, cosine = fitted(step)
        if cosine >= target:
            high = step
            break
        low, centroids = step, result
    while cosine >= target and high - low > max(1, low // 8):
        middle = (low + high) // 2
        result = fitted(middle)
        low, high = (low, middle) if result[1] >= target else (middle, high)
    if low < high:
        centroids, _ = fitted(high)
    labels = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        labels[part] = nearest_centroid(points[rows[part]], centroids)[0]
    return np.unique(labels, return_inverse=True)[1]


def assign_scenes(
    embeddings: np.ndarray, prototypes: Prototypes, classify: Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Assign every image to a scene by its nearest prototype or, above the threshold, by a classifier; streamed.

    Returns:
        scene: int64 [N], index into `names`, or len(names) for the open scene.
        similarity: float32 [N], cosine to the nearest prototype.
    """
    blocks = [np.arange(at, min(at + BLOCK, len(embeddings))) for at in range(0, len(embeddings), BLOCK)]
    points = Points(embeddings, prototypes.centre)
    result = engine().map_rows(_nearest_scenes, points, blocks, [(prototypes, classify)] * len(blocks))
    scene, similarity = np.empty(len(embeddings), dtype=np.int64), np.empty(len(embeddings), dtype=np.float32)
    for rows, (of_block, cosine) in zip(blocks, result, strict=True):
        scene[rows], similarity[rows] = of_block, cosine
    scene[similarity < prototypes.threshold] = len(prototypes.names)
    return scene, similarity


def _nearest_scenes(
    points: Points, rows: np.ndarray, prototypes: Prototypes, classify: Callable[[np.ndarray], np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """`assign_scenes` for some rows, without the threshold."""
    scene, similarity = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        vectors = points[rows[part]]
        nearest, distance = nearest_centroid(vectors, prototypes.vectors)
        scene[part] = prototypes.classes[nearest] if classify is None else classify(vectors)
        similarity[part] = 1 - distance
    return scene, similarity


def corpus_strata(pool: Pool, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Reference for a corpus without labels: the mean embedding of each k-means cluster, and the names of the clusters.

    The n readable images are divided into min(`MOST_STRATA`, sqrt(n / 2)) clusters, at least one (sqrt(n / 2): Mardia,
    Kent and Bibby 1979, p. 365). As the reference has one embedding per class, the prototypes are these means, and no
    image is of an unknown scene.

    Returns:
        embeddings float32 [S, D], not centred, and names "stratum 00", ... as object [S]; both are empty if no image is
        readable.
    """
    rows, points = corpus_points(pool)
    if len(rows) == 0:
        return np.empty((0, pool.embeddings.shape[1]), np.float32), np.empty(0, dtype=object)
    requested = max(1, min(MOST_STRATA, round((len(rows) / 2) ** 0.5)))
    labels, _ = Clustering(requested, hierarchical=False)(points, rows, requested, generator)
    groups = [rows[group] for group in members_of(labels, int(labels.max()) + 1)]
    means = np.stack([mean_embedding(pool.embeddings, group) for group in groups])
    return means, np.array([f"stratum {number:02d}" for number in range(len(groups))], dtype=object)
