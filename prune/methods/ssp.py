"""Self-supervised prototypes: keep the easiest or the hardest images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import cluster_diagnostics, corpus_clusters, ranked
from prune.pool import Pool, Selection
from runtime.errors import UserError
from runtime.ranges import check_options


@dataclass(frozen=True)
class SSPPrototypes:
    """Self-supervised prototype metric (Sorscher et al. 2022, arXiv 2206.14486, section 4).

    The difficulty of an image is its cosine distance to the nearest k-means centroid. The paper's optional balancing
    over labelled classes is left out, because the corpus has no labels.

    Args:
        keep: "hard" keeps the images farthest from their centroids (better if data are abundant), "easy" the nearest.
        clusters: number of k-means clusters; None: the square root of the number of images.
    Raises:
        ValueError: `keep` has another value.
    """

    keep: str = "hard"
    clusters: int | None = None

    def __post_init__(self) -> None:
        check_options(self, "prune", counts=("clusters",))
        if self.keep not in ("hard", "easy"):
            raise UserError(f"prune.keep={self.keep}: give hard or easy")

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows, _, labels, distances = corpus_clusters(pool, self.clusters, generator)
        score = distances if self.keep == "hard" else -distances
        return ranked(pool, rows, score, budget, "redundant", **cluster_diagnostics(pool, rows, labels, distances))
