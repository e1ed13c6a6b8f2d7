"""Complete pruning with `engine=local` and `engine=ray` on one machine, alternating: `make bench-engines`."""

from __future__ import annotations

import hashlib
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from runtime.application import run
from runtime.artefacts import write_json
from runtime.errors import UserError
from runtime.machine import machine
from runtime.progress import progress
from scripts.bench_scale import Plan, make_shards, plans
from train.components import REPOSITORY

ENGINES = ("local", "ray")


def prune(shards: Path, engine: str, runs: Path) -> tuple[float, str]:
    """Run `prune/run.py` with an empty run directory; returns its seconds and a digest of its selection.

    Raises:
        UserError: the command failed.
    """
    shutil.rmtree(runs, ignore_errors=True)
    command = [
        sys.executable, str(REPOSITORY / "prune" / "run.py"), "corpus=webdataset", f"corpus.urls={shards}",
        "corpus.train.split=all", "reference=none", "leaks=0", f"engine={engine}", f"runs={runs}", "tracker=none",
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=runs.parent)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"engine={engine}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}")
    (selection,) = (runs / "selection").glob("*/selection.parquet")
    return seconds, hashlib.sha256(selection.read_bytes()).hexdigest()


def main(cfg: DictConfig) -> None:
    settings = cfg.bench_engines
    template = next(plans(cfg))
    work = Path(cfg.runs).resolve() / "bench_engines"
    plan: Plan = replace(template, images=int(settings.images), work=str(work))
    make_shards(cfg, plan)
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    digests = set()
    turns = [engine for _ in range(int(settings.rounds)) for engine in ENGINES]
    for engine in progress(turns, f"prune {plan.images:,} tiles", unit="run"):
        taken, digest = prune(plan.folder / "shards", engine, work / "runs")
        seconds[engine].append(taken)
        digests.add(digest)
        print(f"{engine:6s} {taken:8.1f} s", flush=True)
    shutil.rmtree(work)
    medians = {engine: statistics.median(values) for engine, values in seconds.items()}
    result = {
        "machine": machine(),
        "images": plan.images,
        "seconds": seconds,
        "ray of local": medians["ray"] / medians["local"],
        "selections are equal": len(digests) == 1,
    }
    path = Path(cfg.results) / cfg.profile.name / "bench_engines.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"ray of local: {result['ray of local']:.2f}, selections are equal: {result['selections are equal']}")
    print(f"results: {path.parent}")


if __name__ == "__main__":
    run(main)
