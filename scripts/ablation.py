"""RS-Prune with one option changed at a time, evaluated without training on the validation split: `make ablation`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from prune.measured_subset import measured_subset
from prune.selection import select
from report.results import append_result, result_row
from report.tables import publish
from runtime.application import changed_config, run
from runtime.artefacts import read_json

METHOD = "rsprune"
DEFAULT = "none (default)"


def kept_by(cfg: DictConfig) -> np.ndarray:
    """Mask of the images that the method keeps, bool [N]."""
    directory, _ = select(cfg, METHOD)
    return pd.read_parquet(directory / "selection.parquet", columns=["kept"])["kept"].to_numpy()


def selection_note(kept: np.ndarray, default: np.ndarray) -> str:
    """A note if a change has no effect: if the same images are kept, its row repeats the default's."""
    return "same as default" if np.array_equal(kept, default) else "different"


def main(cfg: DictConfig) -> None:
    results = Path(cfg.results) / cfg.profile.name / "ablation"
    for seed in cfg.profile.seeds:
        overrides = [f"prune={METHOD}", f"seed={seed}", f"eval.split={cfg.ablation.split}"]
        default = kept_by(changed_config(*overrides))
        for change in [None, *cfg.ablation.changes]:
            chosen = changed_config(*overrides, *([] if change is None else [change]))
            directory = measured_subset(chosen, METHOD)
            metrics = read_json(directory / "metrics.json")
            fields = {"change": change or DEFAULT, "selection": selection_note(kept_by(chosen), default)}
            row = result_row(chosen, "ablation", METHOD, float(cfg.ratio), metrics, directory, **fields)
            append_result(results / "results.jsonl", row)
            print(f"{row['change']}, seed {seed}: {row['selection']}", flush=True)
    publish(results, "ablation")


if __name__ == "__main__":
    run(main)
