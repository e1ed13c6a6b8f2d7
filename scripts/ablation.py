"""RS-Prune with one choice changed at a time, judged without training on the validation split: `make ablation`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from prune.measured_subset import measured_subset
from report.results import append_result, result_row
from report.tables import publish
from runtime.application import changed_config, run
from runtime.artefacts import read_json

METHOD = "rsprune"
DEFAULT = "none (default)"


def main(cfg: DictConfig) -> None:
    results = Path(cfg.results) / cfg.profile.name / "ablation"
    for seed in cfg.profile.seeds:
        for change in [None, *cfg.ablation.changes]:
            overrides = [f"prune={METHOD}", f"seed={seed}", f"eval.split={cfg.ablation.split}"]
            chosen = changed_config(*overrides, *([] if change is None else [change]))
            directory = measured_subset(chosen, METHOD)
            metrics = read_json(directory / "metrics.json")
            row = result_row(chosen, "ablation", METHOD, float(cfg.ratio), metrics, directory, change=change or DEFAULT)
            append_result(results / "results.jsonl", row)
            print(f"{row['change']}, seed {seed}: done", flush=True)
    publish(results, "ablation")


if __name__ == "__main__":
    run(main)
