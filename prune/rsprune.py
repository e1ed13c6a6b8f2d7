"""RS-Prune (arXiv 2512.23239): entropy, scene-aware clustering, fine-grained selection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.allocation import allocate
from prune.pool import Pool, Selection
from prune.scenes import OPEN_SCENE, assign_scenes, fit_prototypes, kmeans, unit


@dataclass(frozen=True)
class RSPrune:
    """The paper's method; docs/method.md gives every formula and says which are ours.

    Args:
        entropy_quantile: share of the readable corpus with the lowest local entropy that goes in step 1.
        entropy_bits: absolute threshold in bits instead (None: the quantile).
        prototypes_per_class: k-means prototypes of each reference class.
        floor_quantile: images less similar to every prototype than this quantile of the reference form the open scene.
        images_per_cluster: clusters of a scene = its images / this, within 1..max_clusters.
        max_clusters: most clusters of one scene.
        sample_per_cluster: images per cluster on which k-means runs; the rest is assigned.
        uniformity: 0 spreads the budget over scenes and clusters in proportion to size, 1 evenly (water-filling).
        representativeness: share of a cluster's budget taken nearest to the centroid; the rest is spread.
        duplicate_similarity: cosine above which an image counts as a duplicate of one already taken.
    """

    entropy_quantile: float = 0.2
    entropy_bits: float | None = None
    prototypes_per_class: int = 4
    floor_quantile: float = 0.01
    images_per_cluster: int = 40
    max_clusters: int = 64
    sample_per_cluster: int = 256
    uniformity: float = 1.0
    representativeness: float = 0.5
    duplicate_similarity: float = 0.98

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        budget = min(budget, int(pool.readable.sum()))
        informative, threshold, returned = self._informative(pool, budget)
        rows = np.flatnonzero(informative)
        seed = int(generator.integers(2**31))
        prototypes = fit_prototypes(
            pool.reference_embeddings, pool.reference_labels, self.prototypes_per_class, self.floor_quantile, seed
        )
        scene, similarity = assign_scenes(pool.embeddings, prototypes)

        cluster = np.full(len(pool), -1, dtype=np.int32)
        distance = np.full(len(pool), np.nan, dtype=np.float32)
        scene_rows = [rows[scene[rows] == index] for index in range(len(prototypes.names) + 1)]
        scene_budgets = allocate(np.array([len(group) for group in scene_rows]), budget, self.uniformity)
        kept, clusters = [], 0
        for group, scene_budget in zip(scene_rows, scene_budgets, strict=True):
            if len(group) == 0:
                continue
            points = unit(pool.embeddings[group], prototypes.centre)
            labels, distances = self._cluster(points, seed, generator)
            cluster[group] = labels + clusters
            distance[group] = distances
            clusters += int(labels.max()) + 1
            kept.append(group[self._pick(points, labels, distances, int(scene_budget))])

        reason = np.full(len(pool), "redundant", dtype=object)
        reason[~informative] = "low_entropy"
        names = np.array([*prototypes.names, OPEN_SCENE], dtype=object)
        scene_names = names[scene]
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
                "open_floor": prototypes.floor,
            },
        )

    def _informative(self, pool: Pool, budget: int) -> tuple[np.ndarray, float, int]:
        """Step 1: who stays, the threshold in bits, and how many came back because the budget needed them."""
        entropy = np.where(pool.readable, pool.entropy, -np.inf)
        threshold = self.entropy_bits
        if threshold is None:
            threshold = float(np.quantile(pool.entropy[pool.readable], self.entropy_quantile))
        informative = pool.readable & (entropy >= threshold)
        returned = max(0, budget - int(informative.sum()))
        if returned:
            outside = np.flatnonzero(pool.readable & ~informative)
            informative[outside[np.argsort(-entropy[outside], kind="stable")[:returned]]] = True
        return informative, float(threshold), returned

    def _cluster(self, points: np.ndarray, seed: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Step 2: k-means on a bounded sample of one scene; labels int64 [n] and cosine distances float32 [n]."""
        clusters = int(np.clip(round(len(points) / self.images_per_cluster), 1, self.max_clusters))
        sample = points
        if len(points) > clusters * self.sample_per_cluster:
            picked = generator.choice(len(points), clusters * self.sample_per_cluster, replace=False)
            sample = points[np.sort(picked)]
        cosines = points @ kmeans(sample, clusters, seed).T
        labels = cosines.argmax(axis=1)
        distances = 1 - np.take_along_axis(cosines, labels[:, None], axis=1)[:, 0]
        _, labels = np.unique(labels, return_inverse=True)
        return labels, distances.astype(np.float32)

    def _pick(self, points: np.ndarray, labels: np.ndarray, distances: np.ndarray, budget: int) -> np.ndarray:
        """Step 3: the budget over the scene's clusters, then representative and spread images of each."""
        members = [np.flatnonzero(labels == index) for index in range(int(labels.max()) + 1)]
        budgets = allocate(np.array([len(group) for group in members]), budget, self.uniformity)
        picks = [
            group[pick_in_cluster(points[group], distances[group], int(count), self.representativeness,
                                  self.duplicate_similarity)]
            for group, count in zip(members, budgets, strict=True)
        ]  # fmt: skip
        return np.concatenate(picks)


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
    nearest_taken = np.full(len(points), -np.inf, dtype=np.float32)  # cosine to the nearest image taken
    taken: list[int] = []

    def take(index: int) -> None:
        taken.append(index)
        np.maximum(nearest_taken, points @ points[index], out=nearest_taken)
        nearest_taken[index] = np.inf

    near = max(1, round(representativeness * budget)) if budget else 0
    for index in np.argsort(distances, kind="stable"):
        if len(taken) == near:
            break
        if nearest_taken[index] < duplicate_similarity:
            take(int(index))
    while len(taken) < budget:
        take(int(nearest_taken.argmin()))
    return np.array(taken, dtype=np.int64)
