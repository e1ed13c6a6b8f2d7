"""All stages from tar shards to selection.parquet at growing sizes: time, memory, cost model. `make bench-scale`."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import queue
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from corpus.index import CHUNK, Corpus, Scan, index_corpus, open_corpus
from corpus.sources.webdataset import WebDataset
from encoders.efficientnet import EfficientNetLite0
from prune.entropy import LocalEntropy, entropies
from prune.features import corpus_embeddings, corpus_entropy
from prune.library import budget_of, select_from_arrays
from prune.methods.rsprune import RSPrune
from prune.pool import Pool, Selection
from prune.scenes import corpus_strata
from prune.selection import selection_table
from prune.weights import images_represented
from report.figures import scale_figure
from report.scale import ALONE, DEFAULT, STAGES, SYNTHETIC, TILES, models, write_scale
from runtime.application import run
from runtime.artefacts import COMPLETE, fingerprint, stage_fingerprint, write_json
from runtime.errors import UserError
from runtime.machine import machine
from runtime.parallel import cores
from runtime.progress import progress
from scripts import bench_selection

RATIO = 0.85
#: Largest shift of a repeated tile in pixels, range of its brightness factor, and its noise in grey levels.
SHIFT, BRIGHTNESS, NOISE = 8, (0.8, 1.2), 6.0
#: Seconds between two measurements of a process's memory.
INTERVAL = 0.05


@dataclass(frozen=True)
class Plan:
    """The task of one measured process.

    Attributes:
        part: `TILES` or `SYNTHETIC`.
        work: folder with the results of the preceding stages.
    """

    part: str
    images: int
    work: str
    resolution: int
    input_size: int
    default_images: int
    dimensions: int
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.work)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"


# ---------------------------------------------------------------- measured code: one function per stage


def source_of(plan: Plan) -> WebDataset:
    return WebDataset(urls=str(plan.folder / "shards"), resolution=plan.resolution, split="all")


def corpus_of(plan: Plan) -> Corpus:
    (result,) = (plan.runs / "corpus").glob(f"*/{COMPLETE}")
    return open_corpus(result.parent)


def read_manifest(plan: Plan) -> None:
    assert len(source_of(plan).manifest()) == plan.images


def index(plan: Plan) -> None:
    measure = LocalEntropy()
    key = stage_fingerprint("entropy", {"measure": measure})
    scan = Scan(key, partial(entropies, measure), CHUNK, np.float32, by_worker=True)
    index_corpus(source_of(plan), plan.runs, [scan])


def embed(plan: Plan) -> None:
    corpus_embeddings(corpus_of(plan), EfficientNetLite0(input_size=plan.input_size), plan.runs)


def embed_by_default(plan: Plan) -> None:
    encoder, images = EfficientNetLite0(), corpus_of(plan).images
    for start in range(0, min(plan.images, plan.default_images), encoder.batch_size):
        encoder(images[start : min(start + encoder.batch_size, plan.default_images)])


def select(plan: Plan) -> Callable[[], None]:
    """Run the selection; returns a function that writes it, which is not measured."""
    if plan.part == SYNTHETIC:
        data = bench_selection.load(plan.folder)
        selection = select_from_arrays(
            RSPrune(), data.embeddings, ratio=RATIO, seed=plan.seed, reference=data.reference, labels=data.classes
        )
    else:
        pool = pool_of(plan)
        means, names = corpus_strata(pool, np.random.default_rng([plan.seed, 4]))
        pool = replace(pool, reference_embeddings=means, reference_labels=names)
        selection = RSPrune().select(pool, budget_of(len(pool), RATIO), np.random.default_rng([plan.seed, 2]))
    return partial(_write_selection, plan.folder / "selection.npz", selection)


def weigh(plan: Plan) -> Callable[[], None]:
    pool, kept = pool_of(plan), np.load(plan.folder / "selection.npz")["kept"]
    weights = images_represented(pool.embeddings, pool.readable, kept, np.random.default_rng([plan.seed, 5]))
    return partial(np.save, plan.folder / "weights.npy", weights)


def tabulate(plan: Plan) -> None:
    selection, weights = _read_selection(plan.folder / "selection.npz"), np.load(plan.folder / "weights.npy")
    table = selection_table(pool_of(plan), selection, weights)
    table.to_parquet(plan.folder / "selection.parquet", index=False)


def pool_of(plan: Plan) -> Pool:
    """The pool of the existing embeddings, without a reference."""
    if plan.part == SYNTHETIC:
        embeddings = np.load(plan.folder / "embeddings.npy", mmap_mode="r")
        ids = np.arange(plan.images).astype(f"U{len(str(plan.images))}")
        readable, entropy = np.ones(plan.images, bool), np.full(plan.images, np.nan, np.float32)
    else:
        corpus = corpus_of(plan)
        embeddings = corpus_embeddings(corpus, EfficientNetLite0(input_size=plan.input_size), plan.runs)
        ids, readable = corpus.manifest["id"].to_numpy(), corpus.readable
        entropy = corpus_entropy(corpus, LocalEntropy(), plan.runs)
    nothing = np.empty((0, embeddings.shape[1]), np.float32)
    return Pool(ids, readable, entropy, embeddings, nothing, np.empty(0, dtype=object))


def _write_selection(path: Path, selection: Selection) -> None:
    """Write a selection as numeric arrays; texts as their codes."""
    texts = {}
    for name in ("reason", "scene"):
        names, codes = np.unique(getattr(selection, name).astype(str), return_inverse=True)
        texts |= {f"{name}_names": names, f"{name}_codes": codes.astype(np.int32)}
    numbers = {name: getattr(selection, name) for name in ("kept", "scene_similarity", "cluster", "centroid_distance")}
    np.savez(path, **numbers, **texts)


def _read_selection(path: Path) -> Selection:
    result = np.load(path)
    texts = {name: result[f"{name}_names"].astype(object)[result[f"{name}_codes"]] for name in ("reason", "scene")}
    names = ("kept", "scene_similarity", "cluster", "centroid_distance")
    return Selection(**{name: result[name] for name in names}, **texts)


WORK: dict[str, Callable[[Plan], Callable[[], None] | None]] = {
    "manifest": read_manifest,
    "index": index,
    "embedding": embed,
    DEFAULT: embed_by_default,
    "selection": select,
    "weights": weigh,
    "table": tabulate,
}

# ---------------------------------------------------------------- measuring


def child(name: str, plan: Plan, results: multiprocessing.Queue) -> None:
    """Run one stage in this new process; puts its wall-clock seconds and its own CPU seconds into the queue."""
    start, own = time.perf_counter(), time.process_time()
    leave = WORK[name](plan)
    results.put((time.perf_counter() - start, time.process_time() - own))
    if leave is not None:
        leave()
    results.close()
    results.join_thread()
    os._exit(0)  # otherwise idle decoders would keep this process alive for a minute


def measured(name: str, plan: Plan) -> dict[str, Any]:
    """Run a stage in a separate process: wall-clock seconds, CPU seconds, and peak memory of the process and its
    workers.

    Raises:
        UserError: it ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=child, args=(name, plan, results))
    process.start()
    watched, peaks, cpu, result = psutil.Process(process.pid), [0, 0], {}, None
    while process.is_alive() or result is None:
        try:
            result = results.get(timeout=INTERVAL)
            break
        except queue.Empty:
            if process.exitcode is not None and results.empty():
                raise UserError(
                    f"bench-scale: {name} of {plan.images:,} images ended with {process.exitcode}"
                ) from None
            usage = _usage(watched, cpu)
            peaks = [max(pair) for pair in zip(peaks, usage, strict=True)]
    process.join()
    seconds, own = result
    images = min(plan.images, plan.default_images) if name == DEFAULT else plan.images
    row = {"part": plan.part, "stage": name, "images": images, "seconds": seconds}
    row["cpu_seconds"] = own + sum(spent for pid, spent in cpu.items() if pid != process.pid)
    row |= {"peak_rss_gb": peaks[0] / 1e9, "peak_anonymous_gb": peaks[1] / 1e9}
    line = "{part:10s} {stage:26s} {images:>11,d} {seconds:9.2f} s {cpu_seconds:9.2f} s of cores"
    line += " {peak_anonymous_gb:6.2f} GB"
    print(line.format(**row), flush=True)
    return row


def _usage(process: psutil.Process, cpu: dict[int, float]) -> tuple[int, int]:
    """Current bytes of a process and its children: resident and anonymous. Records their CPU seconds in `cpu`."""
    resident = anonymous = 0
    for one in _family(process):
        try:
            memory, times = one.memory_info(), one.cpu_times()
            cpu[one.pid] = times.user + times.system
            resident += memory.rss
            anonymous += _anonymous(one.pid, memory.rss)
        except (psutil.Error, OSError):
            continue  # the process has just ended
    return resident, anonymous


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _anonymous(pid: int, resident: int) -> int:
    """Bytes without a backing file if Linux reports them, otherwise all resident bytes."""
    path = Path(f"/proc/{pid}/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    result = next((line for line in lines if line.startswith("RssAnon:")), None)
    return 1024 * int(result.split()[1]) if result else resident


# ---------------------------------------------------------------- generated data


def make_shards(cfg: DictConfig, plan: Plan) -> None:
    """Write tar shards of `plan.images` JPEGs: tiles of the corpus with jitter, seeded per shard.

    Existing shards are kept.
    """
    own = OmegaConf.merge(cfg.corpus.train, {"resolution": plan.resolution})
    tiles = index_corpus(instantiate(own), cfg.runs).images
    folder, size = plan.folder / "shards", int(cfg.bench_scale.shard_images)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, plan.images, size)
    for number, start in enumerate(progress(starts, f"shards of {plan.images:,}", unit="shard")):
        path = folder / f"{number:06d}.tar"
        if path.is_file():
            continue
        generator = np.random.default_rng([plan.seed, 30, number])
        rows = np.arange(start, min(start + size, plan.images))
        partial_file = path.with_suffix(".partial")
        with tarfile.open(partial_file, "w") as tar:
            for row, image in zip(rows, jittered(tiles, rows, generator), strict=True):
                data = io.BytesIO()
                Image.fromarray(image).save(data, "JPEG", quality=int(cfg.bench_scale.quality))
                member = tarfile.TarInfo(f"{row:010d}.jpg")
                member.size = data.tell()
                data.seek(0)
                tar.addfile(member, data)
        partial_file.rename(path)


def jittered(tiles: np.ndarray, rows: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Tiles uint8 [R, R, 3], repeated cyclically: turned, shifted with mirrored edges, brighter or darker, noisy."""
    side = tiles.shape[1]
    for row in rows:
        tile = np.rot90(tiles[row % len(tiles)], generator.integers(4))
        padded = np.pad(tile, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="reflect")
        y, x = generator.integers(2 * SHIFT + 1, size=2)
        values = padded[y : y + side, x : x + side] * generator.uniform(*BRIGHTNESS)
        values += generator.uniform(0, NOISE) * generator.standard_normal(values.shape, dtype=np.float32)
        yield values.clip(0, 255).astype(np.uint8)


def make_embeddings(cfg: DictConfig, plan: Plan) -> None:
    """The synthetic embeddings of scripts/bench_selection.py in the plan's folder."""
    settings = OmegaConf.merge(cfg, {"bench": {"dimensions": plan.dimensions}, "runs": str(plan.runs)})
    made = bench_selection.make(settings, plan.images, bench_selection.Recipe())
    for path in made.glob("*.npy"):
        target = plan.folder / path.name
        if not target.exists():
            target.symlink_to(path.resolve())


# ---------------------------------------------------------------- the complete benchmark


def plans(cfg: DictConfig) -> Iterator[Plan]:
    """All measurements, small sizes first."""
    settings = cfg.bench_scale
    own = {name: int(settings[name]) for name in ("resolution", "input_size", "default_images", "dimensions")}
    for part, sizes in ((TILES, settings.sizes), (SYNTHETIC, settings.synthetic_sizes)):
        for size in sorted(int(size) for size in sizes):
            work = Path(cfg.runs) / "bench_scale" / f"{part}_{size}_{fingerprint(seed=cfg.seed, **own)}"
            yield Plan(part, size, str(work), **own, seed=int(cfg.seed))


def known_rows(path: Path, settings: str) -> list[dict[str, Any]]:
    """Results of earlier runs with these settings; if a stage and size were repeated, the last one is used."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [row for line in lines if (row := json.loads(line)).pop("settings") == settings]
    return list({(row["part"], row["stage"], row["images"]): row for row in rows}.values())


def measure_all(cfg: DictConfig, noted: Path) -> list[dict[str, Any]]:
    """Measure everything that is not recorded yet, and record every row immediately."""
    metadata = ("resolution", "input_size", "default_images", "dimensions", "quality", "shard_images")
    settings = fingerprint(seed=cfg.seed, corpus=cfg.corpus.train, **{name: cfg.bench_scale[name] for name in metadata})
    for number, plan in enumerate(plans(cfg)):
        names = [name for name in WORK if name != DEFAULT or number == 0]
        names = [name for name in names if plan.part == TILES or name in ALONE]
        known = {(row["part"], row["stage"]) for row in known_rows(noted, settings) if row["images"] == plan.images}
        known |= {(row["part"], DEFAULT) for row in known_rows(noted, settings) if row["stage"] == DEFAULT}
        if all((plan.part, name) in known for name in names):
            continue
        (make_shards if plan.part == TILES else make_embeddings)(cfg, plan)
        size = _bytes_per_image(plan)
        for name in names:
            done = plan.folder / f"{name}.done"
            if (plan.part, name) in known and done.is_file():
                continue
            row = measured(name, plan) | ({"input_size": EfficientNetLite0().input_size} if name == DEFAULT else {})
            with noted.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "bytes_per_image": size, "settings": settings}) + "\n")
            done.touch()
        if not cfg.bench_scale.keep:
            shutil.rmtree(plan.folder)
    return known_rows(noted, settings)


def _bytes_per_image(plan: Plan) -> float | None:
    """Mean bytes per image of the shards, headers included; None without shards."""
    shards = list((plan.folder / "shards").glob("*.tar"))
    return sum(path.stat().st_size for path in shards) / plan.images if shards else None


def main(cfg: DictConfig) -> None:
    if len(cfg.bench_scale.sizes) == 0:
        raise UserError("bench_scale.sizes is empty: give at least one number of tiles")
    results = Path(cfg.results) / cfg.profile.name
    results.mkdir(parents=True, exist_ok=True)
    rows = measure_all(cfg, results / "bench_scale.jsonl")
    order = list(WORK)
    rows.sort(key=lambda row: (row["part"] != TILES, order.index(row["stage"]), row["images"]))
    fit_from = int(cfg.bench_scale.fit_from)
    fitted = {part: models(rows, part, fit_from) for part in (TILES, SYNTHETIC)}
    settings = ("resolution", "input_size", "dimensions")
    result = {
        "machine": machine(),
        "cores": cores(),
        "fit_from": fit_from,
        "settings": {name: int(cfg.bench_scale[name]) for name in settings},
        "bytes_per_image": next(row["bytes_per_image"] for row in reversed(rows) if row["bytes_per_image"]),
        "cluster": OmegaConf.to_container(cfg.bench_scale.cluster),
        "rows": rows,
        "models": {part: {name: asdict(model) for name, model in some.items()} for part, some in fitted.items()},
    }
    write_json(results / "bench_scale.json", result)
    scale_figure(rows, tuple(STAGES)).savefig(results / "bench_scale.png", dpi=150)
    if cfg.bench_scale.document:
        write_scale(results / "bench_scale.json", Path(cfg.bench_scale.document))
    for part, some in fitted.items():
        for name, model in some.items():
            print(f"{part} {name}: {model.a:.3g} N^{model.b:.2f} s, off by {model.residual:.0%} at most")
    print(f"results: {results}")


if __name__ == "__main__":
    run(main)
