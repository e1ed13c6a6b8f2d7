"""Self-supervised prototypes: keep the easy or the hard images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.clusters import cluster_diagnostics, corpus_clusters, ranked
from prune.pool import Pool, Selection


@dataclass(frozen=True)
class SSPPrototypes:
    """Self-supervised prototype metric (Sorscher et al. 2022, arXiv 2206.14486, section 4).

    An image's difficulty is its cosine distance to the nearest k-means centroid. Left out: the paper's optional
    balancing over labelled classes, since the corpus has no labels.

    Args:
        keep: "hard", the farthest from their centroids (right where data is plenty), or "easy", the nearest.
        clusters: k-means clusters; None: the square root of the number of images.
    Raises:
        ValueError: `keep` is something else.
    """

    keep: str = "hard"
    clusters: int | None = None

    def __post_init__(self) -> None:
        if self.keep not in ("hard", "easy"):
            raise ValueError(f"keep={self.keep}: give hard or easy")

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows, _, labels, distances = corpus_clusters(pool, self.clusters, generator)
        score = distances if self.keep == "hard" else -distances
        return ranked(pool, rows, score, budget, "redundant", **cluster_diagnostics(pool, rows, labels, distances))
