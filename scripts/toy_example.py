"""Prune points in the plane, two rings and a cloud of outliers: the example at the start of docs/method.md.

`python scripts/toy_example.py` prints how many points of each kind every method keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.library import RSPrune, select_from_arrays
from prune.methods.baselines import Random

#: Points of each kind: a frequent scene, a rare one, and images that belong to neither.
COUNTS = {"outer ring": 1600, "inner ring": 200, "outliers": 60}
RATIO = 0.85
#: Labelled points per ring, and spread of the frequencies in `lifted`: the larger, the narrower the neighbourhoods.
LABELLED, SPREAD = 100, 1.5


@dataclass(frozen=True)
class Toy:
    """Points float32 [n, 2], their kinds str [n], and for each method a mask of the kept points, bool [n]."""

    points: np.ndarray
    classes: np.ndarray
    kept: dict[str, np.ndarray]


def two_rings(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A large dense ring, a small sparse ring at its centre, and a cloud next to them: float32 [n, 2], str [n]."""
    angles = generator.uniform(0, 2 * np.pi, COUNTS["outer ring"] + COUNTS["inner ring"])
    radii = np.repeat([3.0, 1.0], [COUNTS["outer ring"], COUNTS["inner ring"]])
    radii = radii + generator.normal(0, 0.12, len(radii))
    rings = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    cloud = generator.normal((5.2, 3.4), 0.35, (COUNTS["outliers"], 2))
    return np.concatenate([rings, cloud]).astype(np.float32), np.repeat(list(COUNTS), list(COUNTS.values()))


def lifted(points: np.ndarray) -> np.ndarray:
    """Features float32 [n, 256] in which a distance in the plane becomes a cosine.

    They are random Fourier features (Rahimi and Recht 2007). RS-Prune compares directions, as of an image encoder's
    embeddings; in the plane, a ring and a smaller ring inside it have the same directions.
    """
    generator = np.random.default_rng(0)
    waves, phases = generator.normal(0, SPREAD, (2, 256)), generator.uniform(0, 2 * np.pi, 256)
    return np.cos(points @ waves + phases).astype(np.float32)


def toy_example(seed: int = 0) -> Toy:
    """Prune the points to 15 %, at random and by RS-Prune; RS-Prune gets labels of both rings and none of the cloud."""
    generator = np.random.default_rng(seed)
    points, classes = two_rings(generator)
    features = lifted(points)
    rings = [np.flatnonzero(classes == name)[:LABELLED] for name in ("outer ring", "inner ring")]
    known = np.concatenate(rings)
    kept = {
        "random": select_from_arrays(Random(), features, ratio=RATIO, seed=seed).kept,
        "rsprune": RSPrune(ratio=RATIO, seed=seed)
        .select(features, reference=features[known], labels=classes[known])
        .kept,
    }
    return Toy(points, classes, {name: np.isin(np.arange(len(points)), rows) for name, rows in kept.items()})


def main() -> None:
    example = toy_example()
    for method, kept in {"before": np.ones(len(example.points), dtype=bool), **example.kept}.items():
        counts = {name: int((kept & (example.classes == name)).sum()) for name in COUNTS}
        print(f"{method:8} " + "  ".join(f"{name} {count:5,}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
