"""Example of an own method: a frozen dataclass with one method `select`; see CONTRIBUTING.md for the command line."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsprune import Pool, RSPrune, Selection, select_from_arrays


@dataclass(frozen=True)
class FarFromMean:
    """Keep the images that are least similar to the mean image.

    Args:
        jitter: noise on the distances, as a fraction of their standard deviation; 0: strict order.
    """

    jitter: float = 0.0

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        rows = np.flatnonzero(pool.readable)  # the others are never kept
        if not len(rows):
            return Selection.of(pool, rows, "not_drawn")
        vectors = np.asarray(pool.embeddings[rows], dtype=np.float32)
        distance = np.linalg.norm(vectors - vectors.mean(axis=0), axis=1)
        score = distance + self.jitter * distance.std() * generator.standard_normal(len(rows))
        kept = rows[np.argsort(-score, kind="stable")[:budget]]
        return Selection.of(pool, kept, "not_drawn", diagnostics={"mean_distance": float(distance.mean())})


def main() -> None:
    random = np.random.default_rng(0)
    embeddings = random.standard_normal((500, 32)).astype(np.float32)
    mine = select_from_arrays(FarFromMean(jitter=0.1), embeddings, ratio=0.9, seed=0)
    theirs = RSPrune(ratio=0.9).select(embeddings)
    print(f"{len(mine.kept)} kept, {len(np.intersect1d(mine.kept, theirs.kept))} of them by RS-Prune as well")


if __name__ == "__main__":
    main()
