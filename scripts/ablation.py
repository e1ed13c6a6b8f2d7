"""RS-Prune with one choice changed at a time, judged without training: `make ablation`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from report.tables import append_result
from runtime.application import run
from runtime.artefacts import read_json
from scripts.cells import publish, result_row, subset, with_method

METHOD = "rsprune"
DEFAULT = "none (default)"


def main(cfg: DictConfig) -> None:
    results = Path(cfg.results) / cfg.profile.name / "ablation"
    for change in [None, *cfg.ablation.changes]:
        directory = subset(with_method(METHOD, overrides=[] if change is None else [change]), METHOD)
        metrics = read_json(directory / "metrics.json")
        row = result_row(cfg, "ablation", METHOD, float(cfg.ratio), metrics, directory, change=change or DEFAULT)
        append_result(results / "results.jsonl", row)
        print(f"{row['change']}: done", flush=True)
    publish(results, "ablation")


if __name__ == "__main__":
    run(main)
