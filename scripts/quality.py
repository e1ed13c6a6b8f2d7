"""Every pruning method at every ratio, evaluated without training on the validation split: `make quality`."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from prune.measured_subset import measured_subset
from report.results import append_result, result_row
from report.tables import publish
from runtime.application import changed_config, run
from runtime.artefacts import read_json
from runtime.progress import progress


def main(cfg: DictConfig) -> None:
    results = Path(cfg.results) / cfg.profile.name / "quality"
    cells = [
        (method, ratio, seed)
        for method in cfg.quality.methods
        for ratio in ([0.0] if method == "full" else cfg.quality.ratios)
        for seed in cfg.profile.seeds
    ]
    for method, ratio, seed in progress(cells, f"quality of {len(cells)} subsets", unit="subset"):
        start = time.perf_counter()
        chosen = changed_config(f"prune={method}", f"ratio={ratio}", f"seed={seed}", f"eval.split={cfg.quality.split}")
        directory = measured_subset(chosen, method)
        metrics = read_json(directory / "metrics.json")
        append_result(results / "results.jsonl", result_row(chosen, "subset", method, ratio, metrics, directory))
        tqdm.write(f"{method} {ratio:g}, seed {seed}: {time.perf_counter() - start:.1f} s")  # above the bar
    publish(results, "subset_quality")


if __name__ == "__main__":
    run(main)
