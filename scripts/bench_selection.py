"""Selection on synthetic clustered embeddings of growing size: seconds, memory, quality of the choice. `make bench`."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pandas as pd
from omegaconf import DictConfig
from sklearn.cluster import MiniBatchKMeans

from eval.subsets import scene_entropy
from prune.library import select_from_arrays
from prune.methods.hierarchical import HierarchicalKMeans
from prune.methods.rsprune import RSPrune
from prune.methods.scene_random import SceneRandom
from prune.methods.semdedup import SemDeDup
from runtime.application import run
from runtime.artefacts import stage, write_json
from runtime.errors import UserError
from runtime.progress import progress

CHUNK = 50_000
RATIO = 0.85


@dataclass(frozen=True)
class Recipe:
    """Parameters of a synthetic set: kinds (0: twice the square root of the images) and classes; `known` come first."""

    kinds: int = 0
    classes: int = 30
    known: int = 30


#: A set whose reference covers 100 of 400 kinds.
UNKNOWN = Recipe(kinds=400, classes=80, known=20)


@dataclass(frozen=True)
class Synthetic:
    """Embeddings in `kinds` clusters with sizes that follow a power law; each cluster belongs to one class.

    Attributes:
        embeddings: float16 [N, D], memory-mapped.
        kinds: int64 [N], the true cluster of each row.
        reference: float32 [M, D], separate labelled rows.
        classes: int64 [M], their classes.
    """

    embeddings: np.ndarray
    kinds: np.ndarray
    reference: np.ndarray
    classes: np.ndarray


def make(cfg: DictConfig, size: int, recipe: Recipe) -> Path:
    """Write a synthetic set of `size` rows once."""
    dimensions = int(cfg.bench.dimensions)

    def build(directory: Path) -> None:
        generator = np.random.default_rng([cfg.seed, size])
        count = recipe.kinds or max(recipe.classes, int(2 * size**0.5))
        classes = np.arange(count) % recipe.classes
        centres = generator.standard_normal((recipe.classes, dimensions), dtype=np.float32)[classes]
        centres += 0.7 * generator.standard_normal((count, dimensions), dtype=np.float32)
        weights = np.arange(1, count + 1) ** -0.8
        kinds = generator.choice(count, size, p=weights / weights.sum())
        array = np.lib.format.open_memmap(
            directory / "embeddings.npy", mode="w+", dtype=np.float16, shape=(size, dimensions)
        )
        for start in progress(range(0, size, CHUNK), f"synthetic {size:,}", unit="chunk"):
            part = kinds[start : start + CHUNK]
            noise = generator.standard_normal((len(part), dimensions), dtype=np.float32)
            array[start : start + CHUNK] = centres[part] + 0.5 * noise
        array.flush()
        np.save(directory / "kinds.npy", kinds)
        known = generator.choice(np.flatnonzero(classes < recipe.known), 60 * recipe.known)
        noise = generator.standard_normal((len(known), dimensions), dtype=np.float32)
        np.save(directory / "reference.npy", centres[known] + 0.5 * noise)
        np.save(directory / "classes.npy", classes[known])

    return stage(cfg.runs, "bench", {"size": size, "dimensions": dimensions, "seed": cfg.seed, "recipe": recipe}, build)


def load(directory: Path) -> Synthetic:
    return Synthetic(
        np.load(directory / "embeddings.npy", mmap_mode="r"),
        *(np.load(directory / f"{name}.npy") for name in ("kinds", "reference", "classes")),
    )


def with_method(method) -> Callable[[Synthetic], np.ndarray]:
    def select(data: Synthetic) -> np.ndarray:
        return select_from_arrays(
            method, data.embeddings, ratio=RATIO, reference=data.reference, labels=data.classes
        ).kept

    return select


def one_faiss_kmeans(data: Synthetic) -> np.ndarray:
    """One flat k-means with as many clusters as RS-Prune makes; then the nearest images of all clusters in turn."""
    points = np.asarray(data.embeddings, dtype=np.float32)
    clusters = len(points) // RSPrune.images_per_cluster
    model = faiss.Kmeans(points.shape[1], clusters, niter=20, seed=0, max_points_per_centroid=1_000_000_000)
    model.train(points)
    distances, labels = model.index.search(points, 1)
    return nearest_in_turn(labels[:, 0], distances[:, 0])


def minibatch_kmeans(data: Synthetic) -> np.ndarray:
    """scikit-learn's MiniBatchKMeans with as many clusters; then the images nearest to each centre in turn."""
    points = np.asarray(data.embeddings, dtype=np.float32)
    clusters = len(points) // RSPrune.images_per_cluster
    model = MiniBatchKMeans(clusters, batch_size=4096, n_init=1, max_iter=5, random_state=0)
    labels = model.fit_predict(points)
    return nearest_in_turn(labels, np.linalg.norm(points - model.cluster_centers_[labels], axis=1))


def nearest_in_turn(labels: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """The nearest image of every cluster, then the second nearest of every cluster, and so on up to the budget."""
    order = np.lexsort((distances, labels))
    starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) > 0])
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return order[np.argsort(rank, kind="stable")[: len(order) - round(RATIO * len(order))]]


#: name -> (method, largest size at which it is run)
RIVALS: dict[str, tuple[Callable[[Synthetic], np.ndarray], int]] = {
    "rsprune": (with_method(RSPrune()), 10**9),
    "semdedup": (with_method(SemDeDup()), 10**6),
    "hierarchical": (with_method(HierarchicalKMeans()), 10**5),
    "minibatch_kmeans": (minibatch_kmeans, 10**5),
    "one_faiss_kmeans": (one_faiss_kmeans, 10**5),
}
#: Methods for the set in which the reference knows a quarter of the kinds.
WITH_UNKNOWN: dict[str, Callable[[Synthetic], np.ndarray]] = {
    "rsprune": with_method(RSPrune()),
    "rsprune, one open scene": with_method(RSPrune(split_open=False)),
    "scene_random": with_method(SceneRandom()),
    "one_faiss_kmeans": one_faiss_kmeans,
}


def measure(name: str, directory: str, unknown: bool, results: multiprocessing.Queue) -> None:
    """Run one method in this new process; puts seconds, peak resident GB and the choice into the queue."""
    select = WITH_UNKNOWN[name] if unknown else RIVALS[name][0]
    data = load(Path(directory))
    warm = Synthetic(data.embeddings[:2000], data.kinds[:2000], data.reference, data.classes)
    if "kmeans" not in name:
        select(warm)  # warm-up, so that compilation and a cold page cache are not measured
    start = time.perf_counter()
    kept = select(data)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    kinds = data.kinds[kept].astype(str).astype(object)
    results.put(
        {
            "method": name,
            "images": len(data.kinds),
            "seconds": seconds,
            "peak_gb": peak,
            "kinds_kept": len(set(kinds)) / len(set(data.kinds.tolist())),
            "evenness": scene_entropy(kinds, len(set(data.kinds.tolist()))),
        }
    )


def measured(name: str, directory: Path, unknown: bool = False) -> dict[str, Any]:
    """`measure` in a separate process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(name, str(directory), unknown, queue))
    process.start()
    row = queue.get()
    process.join()
    print("{method:40s} {images:>9,d} {seconds:8.2f} s {peak_gb:6.2f} GB".format(**row), flush=True)
    return row


def main(cfg: DictConfig) -> None:
    rows = []
    for size in cfg.bench.sizes:
        directory = make(cfg, int(size), Recipe())
        for name in cfg.bench.methods:
            if name not in RIVALS:
                raise UserError(f"bench.methods: {name} is unknown: choose from {', '.join(RIVALS)}")
            if size <= RIVALS[name][1]:
                rows.append(measured(name, directory))
    size = int(cfg.bench.unknown)
    unknown = [measured(name, make(cfg, size, UNKNOWN), True) for name in (WITH_UNKNOWN if size else ())]
    table = pd.DataFrame(rows)
    exponents = {}
    for name, group in table.groupby("method"):
        if len(group) > 1:
            last = group.sort_values("images").iloc[-2:]
            exponents[name] = float(np.diff(np.log(last["seconds"]))[0] / np.diff(np.log(last["images"]))[0])
    for part in (table, pd.DataFrame(unknown)):
        print(part.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    for name, exponent in exponents.items():
        print(f"growth of {name}: seconds ~ images^{exponent:.2f}")
    results = Path(cfg.results)
    results.mkdir(parents=True, exist_ok=True)
    write_json(
        results / "bench_selection.json",
        {"dimensions": int(cfg.bench.dimensions), "rows": rows, "exponents": exponents, "unknown": unknown},
    )
    print(f"results: {results}")


if __name__ == "__main__":
    run(main)
