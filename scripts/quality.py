"""Every pruning method at every ratio, judged without training: `make quality`."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig

from prune.selection import select
from report.tables import append_result
from runtime.application import run
from runtime.artefacts import read_json
from scripts.cells import publish, result_row, subset, with_method


def main(cfg: DictConfig) -> None:
    results = Path(cfg.results) / cfg.profile.name / "quality"
    for method in cfg.quality.methods:
        for ratio in [0.0] if method == "full" else cfg.quality.ratios:
            chosen = with_method(method, ratio)
            start = time.perf_counter()
            selection, _ = select(chosen, method)
            directory = subset(chosen, method)
            seconds = read_json(selection / "summary.json")["seconds"].get("selection", 0.0)
            metrics = {**read_json(directory / "metrics.json"), "seconds": seconds}
            append_result(results / "results.jsonl", result_row(cfg, "subset", method, ratio, metrics, directory))
            print(f"{method} {ratio:g}: {time.perf_counter() - start:.1f} s", flush=True)
    publish(results, "subset_quality")


if __name__ == "__main__":
    run(main)
