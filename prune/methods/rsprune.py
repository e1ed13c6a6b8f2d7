"""RS-Prune (arXiv 2512.23239): entropy filter, scene-aware clustering and fine-grained selection."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from prune.allocation import allocate_distinct
from prune.clusters import Clustering, Points, members_of, normalise
from prune.pool import Pool, Selection, everywhere
from prune.ranks import ascending, below_quantile
from prune.scenes import OPEN_SCENE, SceneRule, Scenes
from runtime.engine import engine
from runtime.ranges import check_options


@dataclass(frozen=True)
class RSPrune:
    """The RS-Prune method; docs/method.md has every formula and says which ones are not from the paper.

    Args:
        entropy_quantile: fraction of the n readable images, those of the lowest local entropy, that step 1 removes:
            exactly ceil(entropy_quantile (n - 1)) images by rank; images of equal entropy are in a fixed random order.
        entropy_bits: absolute threshold in bits, used instead of the quantile (None: use the quantile); an image at the
            threshold is kept.
        entropy_otsu: use Otsu's threshold between the two modes of the corpus's entropies instead; an image at the
            threshold is kept.
        scenes: cluster inside the scenes of the reference set; if False or without a reference, cluster the whole
            corpus at once.
        prototypes_per_class: number of k-means prototypes of each reference class.
        threshold_quantile: images less similar to every prototype than this quantile of the reference form the open
            scene.
        scene_classifier: classifier of the other images; see `prune.scenes.SceneRule`.
        split_open: divide the open scene into strata; see `prune.scenes.SceneRule`.
        images_per_cluster: number of images per cluster; a scene gets its number of images divided by this value as its
            number of clusters, at least one.
        clusters_per_scene: fixed number of clusters for every scene, instead of `images_per_cluster`.
        max_clusters: largest number of clusters of one k-means. If a scene needs more, it is split level by level if
            `hierarchical`; otherwise it gets this number.
        hierarchical: see `max_clusters`.
        spherical: run k-means on unit vectors by cosine; False: on centred embeddings by Euclidean distance.
        sample_per_cluster: number of images per cluster that k-means is fitted to; the others are assigned afterwards.
        uniformity: 0 spreads the budget over scenes and clusters in proportion to their size, 1 evenly (water-filling).
        representativeness: fraction of a cluster's budget that is taken nearest to the centroid; the remaining images
            are chosen far from each other.
        duplicate_similarity: cosine above which an image counts as a duplicate of an image already taken.
        reference_duplicates: quantile of the cosine of a reference image to its nearest neighbour. The value at this
            quantile is the cosine from which an image of a known scene repeats another one, because images that are
            nearer to each other than images known to differ add nothing. Repetitions are kept only if no other images
            are left. None: no image counts as a repetition.
    """

    entropy_quantile: float = 0.2
    entropy_bits: float | None = None
    entropy_otsu: bool = False
    scenes: bool = True
    prototypes_per_class: int = 8
    threshold_quantile: float = 0.01
    scene_classifier: str = "prototypes"
    split_open: bool = True
    images_per_cluster: int = 40
    clusters_per_scene: int | None = None
    max_clusters: int = 64
    hierarchical: bool = True
    spherical: bool = True
    sample_per_cluster: int = 256
    uniformity: float = 1.0
    representativeness: float = 0.5
    duplicate_similarity: float = 0.98
    reference_duplicates: float | None = 0.99

    def __post_init__(self) -> None:
        _ = self._scene_rule  # raises an error for wrong options of the scenes
        check_options(
            self,
            "prune",
            counts=("images_per_cluster", "clusters_per_scene", "max_clusters", "sample_per_cluster"),
            fractions=("entropy_quantile", "uniformity", "representativeness", "reference_duplicates"),
            at_least_zero=("entropy_bits", "duplicate_similarity"),
        )

    @property
    def uses_reference(self) -> bool:
        return self.scenes

    @property
    def _scene_rule(self) -> SceneRule:
        return SceneRule(self.prototypes_per_class, self.threshold_quantile, self.scene_classifier, self.split_open)

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        budget = min(budget, int(pool.readable.sum()))
        step = self._entropy_step(pool, budget)
        scenes = self._scenes(pool, generator)
        clusters = self._clusters(pool, scenes, np.flatnonzero(step.informative), budget, generator)

        reason = everywhere(len(pool), "redundant")
        reason[~step.informative] = "low_entropy"
        scene_names = np.array(scenes.names, dtype=object)[scenes.scene]
        scene_names[~pool.readable] = ""
        return Selection.of(
            pool,
            clusters.kept,
            "redundant",
            reason=reason,
            scene=scene_names,
            scene_similarity=np.where(pool.readable, scenes.similarity, np.float32(np.nan)),
            cluster=clusters.cluster,
            centroid_distance=clusters.distance,
            diagnostics={
                "entropy_threshold": step.threshold,
                "dropped_by_entropy": step.dropped,
                "returned_by_entropy": step.returned,
                "skipped_as_duplicate": clusters.skipped,
                "repetitions": clusters.repetitions,
                "clusters": clusters.count,
                "open_threshold": scenes.threshold,
                "open_strata": scenes.open,
                "scene_accuracy": scenes.accuracy,
            },
        )

    def _entropy_step(self, pool: Pool, budget: int) -> _EntropyStep:
        """Step 1: remove the images of the lowest entropies, by rank for a quantile, otherwise below the threshold."""
        rows = np.flatnonzero(pool.readable)
        entropy = pool.entropy[rows]
        if len(rows) == 0 or np.isnan(entropy).all():
            return _EntropyStep(pool.readable.copy(), None, 0, 0)
        if self.entropy_bits is None and not self.entropy_otsu:
            threshold = np.quantile(entropy, self.entropy_quantile)
            dropped = below_quantile(len(rows), self.entropy_quantile)
        else:
            threshold = otsu(entropy) if self.entropy_bits is None else self.entropy_bits
            dropped = int((entropy < threshold).sum())
        returned = max(0, budget - (len(rows) - dropped))
        informative = pool.readable.copy()
        informative[rows[ascending(entropy)[: dropped - returned]]] = False
        return _EntropyStep(informative, float(threshold), dropped, returned)

    def _scenes(self, pool: Pool, generator: np.random.Generator) -> Scenes:
        """Step 2, first half: assign every image to a scene."""
        seed = int(generator.integers(2**31))
        if self.scenes and len(pool.reference_embeddings):
            return self._scene_rule(pool, seed)
        usable = np.flatnonzero(pool.readable)
        sample = np.sort(np.random.default_rng(seed).permutation(usable)[:10_000])
        centre = np.zeros(pool.embeddings.shape[1], np.float32)
        if len(sample):
            centre = np.asarray(pool.embeddings[sample], dtype=np.float32).mean(axis=0)
        nowhere = np.full(len(pool), np.nan, dtype=np.float32)
        return Scenes((OPEN_SCENE,), np.zeros(len(pool), dtype=np.int64), nowhere, centre)

    def _clusters(
        self, pool: Pool, scenes: Scenes, rows: np.ndarray, budget: int, generator: np.random.Generator
    ) -> _Clusters:
        """Step 2, second half, and step 3: cluster the part of `rows`, int64 [n], in each scene, and pick images."""
        points = Points(pool.embeddings, scenes.centre, self.spherical)
        similarities = self._repetition_similarities(pool, scenes)
        groups = [rows[group] for group in members_of(scenes.scene[rows], len(scenes.names))]
        # scenes run in parallel, each with its own generator: the result does not depend on the order of execution
        jobs = list(zip(groups, zip(generator.spawn(len(groups)), similarities, strict=True), strict=True))
        groups, own = [group for group, _ in jobs if len(group)], [own for group, own in jobs if len(group)]
        result = list(engine().map_rows(self._of_scene, points, groups, own))
        sizes = np.array([len(group) for group in groups])
        distinct = np.array([int(scene.distinct.sum()) for scene in result])
        budgets = allocate_distinct(distinct, sizes, budget, self.uniformity)
        given = [(scene, int(own)) for scene, own in zip(result, budgets, strict=True)]
        picks = list(engine().map_rows(self._pick, points, groups, given))

        cluster = np.full(len(pool), -1, dtype=np.int32)
        distance = np.full(len(pool), np.nan, dtype=np.float32)
        count = 0
        for group, scene in zip(groups, result, strict=True):
            cluster[group] = scene.labels + count
            distance[group] = scene.distances
            count += int(scene.labels.max()) + 1
        picked = [group[positions] for group, (positions, _) in zip(groups, picks, strict=True)]
        kept = np.concatenate([np.empty(0, dtype=np.int64), *picked])
        skipped = sum(passed_over for _, passed_over in picks)
        return _Clusters(kept, cluster, distance, count, skipped, int((sizes - distinct).sum()))

    def _repetition_similarities(self, pool: Pool, scenes: Scenes) -> list[float | None]:
        """For every scene the cosine from which an image repeats another one; None: no image counts as a repetition.

        The value is None for open scenes, because the similarity of different images of an open scene is not known.
        """
        unknown: list[float | None] = [None] * len(scenes.names)
        labels = pool.reference_labels.tolist()
        if self.reference_duplicates is None or not self.scenes or len(set(labels)) == len(labels):
            return unknown  # one row per scene, as for strata of the corpus: the rows are means, not images
        known = normalise(np.asarray(pool.reference_embeddings, dtype=np.float32) - scenes.centre)
        similarity = float(np.quantile(nearest_similarities(known), self.reference_duplicates))
        return [similarity] * (len(unknown) - scenes.open) + unknown[: scenes.open]

    def _of_scene(
        self, points: Points, rows: np.ndarray, generator: np.random.Generator, similarity: float | None
    ) -> _SceneClusters:
        """Cluster one scene and find the images that repeat no other image of their cluster."""
        requested = self.clusters_per_scene or max(1, round(len(rows) / self.images_per_cluster))
        clustering = Clustering(self.max_clusters, self.hierarchical, self.sample_per_cluster)
        labels, distances = clustering(points, rows, requested, generator)
        distinct = np.full(len(rows), similarity is None)
        for group in members_of(labels, int(labels.max()) + 1) if similarity is not None else ():
            if len(group):
                order = np.argsort(distances[group], kind="stable")
                distinct[group] = distinct_of(_unit(points, rows[group]), order, np.float32(similarity))
        return _SceneClusters(labels, distances, distinct)

    def _pick(self, points: Points, rows: np.ndarray, scene: _SceneClusters, budget: int) -> tuple[np.ndarray, int]:
        """Step 3: spread the budget over the clusters of a scene, then pick central and spread-out images of each.

        Returns:
            positions in the scene's `rows`, int64 [budget], and the number of near-duplicates that were passed over.
        """
        members = members_of(scene.labels, int(scene.labels.max()) + 1)
        sizes = np.array([len(group) for group in members])
        distinct = np.array([int(scene.distinct[group].sum()) for group in members])
        budgets = allocate_distinct(distinct, sizes, budget, self.uniformity)
        picks, skipped = [np.empty(0, dtype=np.int64)], 0
        for group, count, known in zip(members, budgets, distinct, strict=True):
            if count == 0:
                continue
            candidates = group[scene.distinct[group]]
            if count > known:  # add repetitions, the nearest to the centroid first
                repeated = group[~scene.distinct[group]]
                order = np.argsort(scene.distances[repeated], kind="stable")
                picks.append(np.concatenate([candidates, repeated[order[: count - known]]]))
            elif count == known:
                picks.append(candidates)
            else:
                vectors = _unit(points, rows[candidates])
                chosen, passed_over = pick_in_cluster(
                    vectors,
                    scene.distances[candidates],
                    int(count),
                    self.representativeness,
                    self.duplicate_similarity,
                )
                picks.append(candidates[chosen])
                skipped += passed_over
        return np.concatenate(picks), skipped


def _unit(points: Points, rows: np.ndarray) -> np.ndarray:
    """The rows scaled to unit length, float32 [n, D], contiguous."""
    vectors = points[rows]
    return np.ascontiguousarray(vectors if points.spherical else normalise(vectors))


@dataclass(frozen=True)
class _EntropyStep:
    """Result of step 1.

    Attributes:
        informative: bool [N], images that remain.
        threshold: entropy threshold in bits; None if no entropy is known.
        dropped: number of images that the rule removes.
        returned: number of removed images, those of the highest entropy, that were restored because the budget needs
            them.
    """

    informative: np.ndarray
    threshold: float | None
    dropped: int
    returned: int


@dataclass(frozen=True)
class _SceneClusters:
    """Clusters of the n images of one scene.

    The fields are labels int [n], distances to the centroid float32 [n], and whether an image repeats no other image of
    its cluster, bool [n].
    """

    labels: np.ndarray
    distances: np.ndarray
    distinct: np.ndarray


@dataclass(frozen=True)
class _Clusters:
    """Clusters of all scenes and the images that were picked from them.

    Attributes:
        kept: int64 [K], picked rows of the pool.
        cluster: int32 [N], cluster of each image, -1 where there is none.
        distance: float32 [N], distance to the centroid, NaN where there is none.
        count: number of clusters.
        skipped: number of near-duplicates that were passed over.
        repetitions: number of images that repeat another one.
    """

    kept: np.ndarray
    cluster: np.ndarray
    distance: np.ndarray
    count: int
    skipped: int
    repetitions: int


def otsu(values: np.ndarray) -> float:
    """Otsu's threshold (1979) of a sample, from 256 bins; values at or above it are the upper class."""
    from skimage.filters import threshold_otsu  # imported here: slow to import, rarely needed

    low, high = float(values.min()), float(values.max())
    return threshold_otsu(values, 256) + (high - low) / 512 if low < high else low  # upper edge of the bin


def nearest_similarities(points: np.ndarray) -> np.ndarray:
    """Cosine of each unit vector, float32 [n, D], to the nearest other one, float32 [n]."""
    nearest = np.empty(len(points), dtype=np.float32)
    for start in range(0, len(points), 1000):
        part = points[start : start + 1000] @ points.T
        part[np.arange(len(part)), np.arange(start, start + len(part))] = -np.inf
        nearest[start : start + len(part)] = part.max(axis=1)
    return nearest


@numba.njit(cache=True, nogil=True)
def distinct_of(points, order, similarity):
    """Mark the distinct images.

    An image is distinct if its cosine to every distinct image before it in `order` is below `similarity`.

    Args:
        points: float32 [n, D], unit length, contiguous.
        order: int64 [n], order in which the images are considered.
        similarity: float32, cosine from which an image repeats another one.
    Returns:
        bool [n].
    """
    count = len(points)
    distinct = np.zeros(count, dtype=np.bool_)
    repeats = np.zeros(count, dtype=np.bool_)
    for index in order:
        if repeats[index]:
            continue
        distinct[index] = True
        products = points @ points[index]
        for other in range(count):
            if products[other] >= similarity:
                repeats[other] = True
    return distinct


def pick_in_cluster(
    points: np.ndarray, distances: np.ndarray, budget: int, representativeness: float, duplicate_similarity: float
) -> tuple[np.ndarray, int]:
    """Pick `budget` members of one cluster: the first part near the centroid, the others far from all taken so far.

    The second part is picked by farthest-first traversal (Gonzalez 1985). In both parts, near-duplicates of taken
    images come last.

    Args:
        points: float32 [n, D], unit length.
        distances: float32 [n], distances to the centroid.
        budget: number of images to pick, at most n.
        representativeness: fraction of the budget for the first part.
        duplicate_similarity: cosine above which an image is a near-duplicate.
    Returns:
        int64 [budget], indices in the order of picking, and the number of near-duplicates that the first part passed
        over.
    """
    if budget >= len(points):
        return np.arange(len(points)), 0
    near = max(1, round(representativeness * budget)) if budget else 0
    order = np.argsort(distances, kind="stable")
    return near_then_far(np.ascontiguousarray(points), order, near, budget, np.float32(duplicate_similarity))


@numba.njit(cache=True, nogil=True)
def near_then_far(points, order, near, budget, duplicate_similarity):
    """Take the first `near` images of `order` that are not near-duplicates, then the others farthest-first.

    Args:
        points: float32 [n, D], unit length, contiguous.
        order: int64 [k], k at least 1.
        near: number of images of the first part, at most `budget`.
        budget: number of images to take, at most n.
        duplicate_similarity: float32, cosine above which an image is a near-duplicate.
    Returns:
        int64 [budget], and the number of images that were passed over: each was next in `order` but is a near-duplicate
        of an image taken before. The second part may still take them.
    """
    count = len(points)
    nearest_taken = np.full(count, -np.inf, dtype=np.float32)  # cosine to the nearest taken image
    taken = np.empty(budget, dtype=np.int64)
    size = 0
    position = 0
    skipped = 0
    while size < budget:
        index = -1
        if size < near:
            while position < count and nearest_taken[order[position]] >= duplicate_similarity:
                skipped += nearest_taken[order[position]] < np.inf  # infinite: this image itself is taken
                position += 1
            if position < count:
                index = order[position]
            else:
                near = size
        if index < 0:
            index = nearest_taken.argmin()
        taken[size] = index
        size += 1
        products = points @ points[index]
        for other in range(count):
            if products[other] > nearest_taken[other]:
                nearest_taken[other] = products[other]
        nearest_taken[index] = np.inf
    return taken, skipped
