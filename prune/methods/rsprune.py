"""RS-Prune (arXiv 2512.23239): entropy, scene-aware clustering, fine-grained selection."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from skimage.filters import threshold_otsu

from prune.allocation import allocate
from prune.clusters import Clustering, Points, members_of, normalise
from prune.pool import Pool, Selection
from prune.scenes import OPEN_SCENE, assign_scenes, fit_prototypes
from runtime.parallel import cores, in_threads


@dataclass(frozen=True)
class RSPrune:
    """The paper's method; docs/method.md gives every formula and says which are ours.

    Args:
        entropy_quantile: share of the readable corpus with the lowest local entropy that goes in step 1.
        entropy_bits: absolute threshold in bits instead (None: the quantile).
        entropy_otsu: Otsu's threshold instead, between the two modes of the corpus's entropies.
        scenes: cluster inside the scenes of the reference set; False, or an empty reference: in the whole corpus.
        prototypes_per_class: k-means prototypes of each reference class.
        floor_quantile: images less similar to every prototype than this quantile of the reference form the open scene.
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
    images_per_cluster: int = 40
    clusters_per_scene: int | None = None
    max_clusters: int = 64
    hierarchical: bool = True
    spherical: bool = True
    sample_per_cluster: int = 256
    uniformity: float = 1.0
    representativeness: float = 0.5
    duplicate_similarity: float = 0.98

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        budget = min(budget, int(pool.readable.sum()))
        informative, threshold, returned = self._informative(pool, budget)
        rows = np.flatnonzero(informative)
        names, scene, similarity, centre, floor = self._scenes(pool, generator)
        points = Points(pool.embeddings, centre, self.spherical)

        groups = members_of(scene[rows], len(names))
        scene_rows = [rows[group] for group in groups]
        scene_budgets = allocate(np.array([len(group) for group in scene_rows]), budget, self.uniformity)
        clustering = Clustering(self.max_clusters, self.hierarchical, self.sample_per_cluster)
        cluster = np.full(len(pool), -1, dtype=np.int32)
        distance = np.full(len(pool), np.nan, dtype=np.float32)

        def of_scene(job: tuple[np.ndarray, int, np.random.Generator]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            group, scene_budget, scene_generator = job
            wanted = self.clusters_per_scene or max(1, round(len(group) / self.images_per_cluster))
            labels, distances = clustering(points, group, wanted, scene_generator)
            return labels, distances, self._pick(points, group, labels, distances, int(scene_budget))

        # scenes side by side, each with randomness of its own: the result does not depend on who is first
        jobs = list(zip(scene_rows, scene_budgets, generator.spawn(len(scene_rows)), strict=True))
        jobs = [job for job in jobs if len(job[0])]
        kept, clusters = [], 0
        for (group, _, _), (labels, distances, picked) in zip(
            jobs, in_threads(of_scene, jobs, min(cores(), len(jobs))), strict=True
        ):
            cluster[group] = labels + clusters
            distance[group] = distances
            clusters += int(labels.max()) + 1
            kept.append(group[picked])

        reason = np.full(len(pool), "redundant", dtype=object)
        reason[~informative] = "low_entropy"
        scene_names = np.array(names, dtype=object)[scene]
        scene_names[~pool.readable] = ""
        similarity[~pool.readable] = np.nan
        return Selection.of(
            pool,
            np.concatenate(kept) if kept else np.empty(0, dtype=np.int64),
            "redundant",
            reason=reason,
            scene=scene_names,
            scene_similarity=similarity,
            cluster=cluster,
            centroid_distance=distance,
            facts={
                "entropy_threshold": threshold,
                "returned_by_entropy": returned,
                "clusters": clusters,
                "open_floor": floor,
            },
        )

    def _informative(self, pool: Pool, budget: int) -> tuple[np.ndarray, float | None, int]:
        """Step 1: who stays, the threshold in bits, and how many came back because the budget needed them."""
        known = pool.entropy[pool.readable]
        if len(known) == 0 or np.isnan(known).all():
            return pool.readable.copy(), None, 0
        threshold = self.entropy_bits
        if threshold is None and self.entropy_otsu:
            threshold = otsu(known)
        if threshold is None:
            threshold = np.quantile(known, self.entropy_quantile)
        entropy = np.where(pool.readable, pool.entropy, -np.inf)
        informative = pool.readable & (entropy >= threshold)
        returned = max(0, budget - int(informative.sum()))
        if returned:
            outside = np.flatnonzero(pool.readable & ~informative)
            informative[outside[np.argsort(-entropy[outside], kind="stable")[:returned]]] = True
        return informative, float(threshold), returned

    def _scenes(
        self, pool: Pool, generator: np.random.Generator
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, float | None]:
        """Step 2: scene names, every image's scene and its similarity, the centre of the space and the open floor."""
        seed = int(generator.integers(2**31))
        if self.scenes and len(pool.reference_embeddings):
            prototypes = fit_prototypes(
                pool.reference_embeddings, pool.reference_labels, self.prototypes_per_class, self.floor_quantile, seed
            )
            scene, similarity = assign_scenes(pool.embeddings, prototypes)
            return (*prototypes.names, OPEN_SCENE), scene, similarity, prototypes.centre, prototypes.floor
        usable = np.flatnonzero(pool.readable)
        sample = np.sort(np.random.default_rng(seed).permutation(usable)[:10_000])
        centre = np.zeros(pool.embeddings.shape[1], np.float32)
        if len(sample):
            centre = np.asarray(pool.embeddings[sample], dtype=np.float32).mean(axis=0)
        nowhere = np.full(len(pool), np.nan, dtype=np.float32)
        return (OPEN_SCENE,), np.zeros(len(pool), dtype=np.int64), nowhere, centre, None

    def _pick(
        self, points: Points, rows: np.ndarray, labels: np.ndarray, distances: np.ndarray, budget: int
    ) -> np.ndarray:
        """Step 3: the budget over a scene's clusters, then representative and spread images of each."""
        members = members_of(labels, int(labels.max()) + 1)
        budgets = allocate(np.array([len(group) for group in members]), budget, self.uniformity)
        picks = [np.empty(0, dtype=np.int64)]
        for group, count in zip(members, budgets, strict=True):
            if count == len(group):
                picks.append(group)
            elif count:
                vectors = points[rows[group]]
                if not points.spherical:
                    vectors = normalise(vectors)
                chosen = pick_in_cluster(
                    vectors, distances[group], int(count), self.representativeness, self.duplicate_similarity
                )
                picks.append(group[chosen])
        return np.concatenate(picks)


def otsu(values: np.ndarray) -> float:
    """Otsu's (1979) threshold of a sample, from 256 bins; values from it on are the upper class."""
    low, high = float(values.min()), float(values.max())
    return threshold_otsu(values, 256) + (high - low) / 512 if low < high else low  # of the bin, its upper edge


def pick_in_cluster(
    points: np.ndarray, distances: np.ndarray, budget: int, representativeness: float, duplicate_similarity: float
) -> np.ndarray:
    """Pick `budget` members of one cluster: some near the centroid, the rest far from all taken so far.

    Near-duplicates of what is taken come last in both parts. Farthest-first traversal (Gonzalez 1985) does the spread.

    Args:
        points: float32 [n, D], unit length.
        distances: float32 [n] to the centroid.
        budget: at most n.
    Returns:
        int64 [budget] indices, in the order of picking.
    """
    if budget >= len(points):
        return np.arange(len(points))
    near = max(1, round(representativeness * budget)) if budget else 0
    order = np.argsort(distances, kind="stable")
    return near_then_far(np.ascontiguousarray(points), order, near, budget, np.float32(duplicate_similarity))


@numba.njit(cache=True, nogil=True)
def near_then_far(points, order, near, budget, duplicate_similarity):
    """The first `near` of `order` that are no near-duplicates, then farthest-first; int64 [budget].

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
    while size < budget:
        index = -1
        if size < near:
            while position < count and nearest_taken[order[position]] >= duplicate_similarity:
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
    return taken
