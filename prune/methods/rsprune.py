"""RS-Prune (arXiv 2512.23239): entropy, scene-aware clustering, fine-grained selection."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from skimage.filters import threshold_otsu

from prune.allocation import allocate
from prune.clusters import Clustering, Points, members_of, normalise
from prune.pool import Pool, Selection
from prune.ranks import ascending, below_quantile
from prune.scenes import OPEN_SCENE, SceneRule, Scenes
from runtime.parallel import cores, in_threads


@dataclass(frozen=True)
class RSPrune:
    """The paper's method; docs/method.md gives every formula and says which are ours.

    Args:
        entropy_quantile: share of the n readable images that goes in step 1, those of the lowest local entropy:
            exactly ceil(entropy_quantile (n - 1)) of them by rank, images of equal entropy in a fixed random order.
        entropy_bits: absolute threshold in bits instead (None: the quantile); an image at the threshold stays.
        entropy_otsu: Otsu's threshold instead, between the two modes of the corpus's entropies; the same holds.
        scenes: cluster inside the scenes of the reference set; False, or an empty reference: in the whole corpus.
        prototypes_per_class: k-means prototypes of each reference class.
        floor_quantile: images less similar to every prototype than this quantile of the reference form the open scene.
        scene_classifier: of the other images, and `split_open`: strata in the open scene; see `prune.scenes.SceneRule`.
        images_per_cluster: clusters of a scene = its images / this, at least one.
        clusters_per_scene: a number of clusters for every scene instead of the rule.
        max_clusters: most clusters of one k-means; beyond it a scene is split level by level if `hierarchical`,
            otherwise this is the most it gets.
        hierarchical: see `max_clusters`.
        spherical: k-means on unit vectors by cosine; False: on centred embeddings by Euclidean distance.
        sample_per_cluster: images per cluster on which k-means runs; the rest is assigned.
        uniformity: 0 spreads the budget over scenes and clusters in proportion to size, 1 evenly (water-filling).
        representativeness: share of a cluster's budget taken nearest to the centroid; the rest is spread.
        duplicate_similarity: cosine above which an image counts as a duplicate of one already taken.
    """

    entropy_quantile: float = 0.2
    entropy_bits: float | None = None
    entropy_otsu: bool = False
    scenes: bool = True
    prototypes_per_class: int = 8
    floor_quantile: float = 0.01
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

    def __post_init__(self) -> None:
        _ = self._scene_rule  # refuses what it does not know

    @property
    def uses_reference(self) -> bool:
        return self.scenes

    @property
    def _scene_rule(self) -> SceneRule:
        return SceneRule(self.prototypes_per_class, self.floor_quantile, self.scene_classifier, self.split_open)

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        budget = min(budget, int(pool.readable.sum()))
        step = self._entropy_step(pool, budget)
        scenes = self._scenes(pool, generator)
        clusters = self._clusters(pool, scenes, np.flatnonzero(step.informative), budget, generator)

        reason = np.full(len(pool), "redundant", dtype=object)
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
            facts={
                "entropy_threshold": step.threshold,
                "dropped_by_entropy": step.dropped,
                "returned_by_entropy": step.returned,
                "skipped_as_duplicate": clusters.skipped,
                "clusters": clusters.count,
                "open_floor": scenes.floor,
                "open_strata": scenes.open,
                "scene_accuracy": scenes.accuracy,
            },
        )

    def _entropy_step(self, pool: Pool, budget: int) -> _EntropyStep:
        """Step 1: the lowest entropies go, by rank for a quantile, otherwise all below the threshold."""
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
        """Step 2, first half: every image's scene."""
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
        """Step 2, second half, and step 3: clusters of each scene's share of `rows`, int64 [n], and picks in them."""
        points = Points(pool.embeddings, scenes.centre, self.spherical)
        scene_rows = [rows[group] for group in members_of(scenes.scene[rows], len(scenes.names))]
        budgets = allocate(np.array([len(group) for group in scene_rows]), budget, self.uniformity)

        # scenes side by side, each with randomness of its own: the result does not depend on who is first
        jobs = list(zip(scene_rows, budgets, generator.spawn(len(scene_rows)), strict=True))
        jobs = [job for job in jobs if len(job[0])]
        found = in_threads(lambda job: self._of_scene(points, *job), jobs, min(cores(), len(jobs)))
        cluster = np.full(len(pool), -1, dtype=np.int32)
        distance = np.full(len(pool), np.nan, dtype=np.float32)
        kept, count, skipped = [np.empty(0, dtype=np.int64)], 0, 0
        for (group, _, _), (labels, distances, picked, passed_over) in zip(jobs, found, strict=True):
            cluster[group] = labels + count
            distance[group] = distances
            kept.append(group[picked])
            count += int(labels.max()) + 1
            skipped += passed_over
        return _Clusters(np.concatenate(kept), cluster, distance, count, skipped)

    def _of_scene(
        self, points: Points, rows: np.ndarray, budget: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Clusters of one scene: labels and distances of its rows, positions picked, and duplicates passed over."""
        wanted = self.clusters_per_scene or max(1, round(len(rows) / self.images_per_cluster))
        clustering = Clustering(self.max_clusters, self.hierarchical, self.sample_per_cluster)
        labels, distances = clustering(points, rows, wanted, generator)
        return labels, distances, *self._pick(points, rows, labels, distances, int(budget))

    def _pick(
        self, points: Points, rows: np.ndarray, labels: np.ndarray, distances: np.ndarray, budget: int
    ) -> tuple[np.ndarray, int]:
        """Step 3: the budget over a scene's clusters, then representative and spread images of each.

        Returns:
            int64 [budget] positions in `rows`, and how many near-duplicates were passed over.
        """
        members = members_of(labels, int(labels.max()) + 1)
        budgets = allocate(np.array([len(group) for group in members]), budget, self.uniformity)
        picks, skipped = [np.empty(0, dtype=np.int64)], 0
        for group, count in zip(members, budgets, strict=True):
            if count == len(group):
                picks.append(group)
            elif count:
                vectors = points[rows[group]]
                if not points.spherical:
                    vectors = normalise(vectors)
                chosen, passed_over = pick_in_cluster(
                    vectors, distances[group], int(count), self.representativeness, self.duplicate_similarity
                )
                picks.append(group[chosen])
                skipped += passed_over
        return np.concatenate(picks), skipped


@dataclass(frozen=True)
class _EntropyStep:
    """What step 1 leaves.

    Attributes:
        informative: bool [N], who stays.
        threshold: bits; None where no entropy is known.
        dropped: images that the rule removes.
        returned: how many of them, those of the highest entropy, came back because the budget needed them.
    """

    informative: np.ndarray
    threshold: float | None
    dropped: int
    returned: int


@dataclass(frozen=True)
class _Clusters:
    """Clusters of all scenes and what was picked in them.

    Attributes:
        kept: int64 [K], rows of the pool.
        cluster: int32 [N], -1 where there is none.
        distance: float32 [N] to the centroid, NaN where there is none.
        count: clusters.
        skipped: near-duplicates that were passed over.
    """

    kept: np.ndarray
    cluster: np.ndarray
    distance: np.ndarray
    count: int
    skipped: int


def otsu(values: np.ndarray) -> float:
    """Otsu's (1979) threshold of a sample, from 256 bins; values from it on are the upper class."""
    low, high = float(values.min()), float(values.max())
    return threshold_otsu(values, 256) + (high - low) / 512 if low < high else low  # of the bin, its upper edge


def pick_in_cluster(
    points: np.ndarray, distances: np.ndarray, budget: int, representativeness: float, duplicate_similarity: float
) -> tuple[np.ndarray, int]:
    """Pick `budget` members of one cluster: some near the centroid, the rest far from all taken so far.

    Near-duplicates of what is taken come last in both parts. Farthest-first traversal (Gonzalez 1985) does the spread.

    Args:
        points: float32 [n, D], unit length.
        distances: float32 [n] to the centroid.
        budget: at most n.
    Returns:
        int64 [budget] indices in the order of picking, and how many near-duplicates the first part passed over.
    """
    if budget >= len(points):
        return np.arange(len(points)), 0
    near = max(1, round(representativeness * budget)) if budget else 0
    order = np.argsort(distances, kind="stable")
    return near_then_far(np.ascontiguousarray(points), order, near, budget, np.float32(duplicate_similarity))


@numba.njit(cache=True, nogil=True)
def near_then_far(points, order, near, budget, duplicate_similarity):
    """The first `near` of `order` that are no near-duplicates, then farthest-first.

    Returns int64 [budget], and how many images were passed over because they are near-duplicates of one taken before:
    each was next in `order` and would have been taken. The second part may still take them.

    Args:
        points: float32 [n, D], unit length, contiguous.
        order: int64 [k], at least one.
        near, budget: near <= budget <= n.
        duplicate_similarity: float32 cosine.
    """
    count = len(points)
    nearest_taken = np.full(count, -np.inf, dtype=np.float32)  # cosine to the nearest image taken
    taken = np.empty(budget, dtype=np.int64)
    size = 0
    position = 0
    skipped = 0
    while size < budget:
        index = -1
        if size < near:
            while position < count and nearest_taken[order[position]] >= duplicate_similarity:
                skipped += nearest_taken[order[position]] < np.inf  # infinite: this one is taken
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
