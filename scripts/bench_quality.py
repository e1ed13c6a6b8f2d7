"""Effect of single changes on the generator for equal training time, on the validation split.

`make bench-quality`. Every change trains for as many steps as fit into `bench_quality.seconds`, at the speed of a short
training of the same kind, so a slower variant gets fewer steps. Finished cells are not computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from report.results import append_result, result_row
from report.tables import publish
from runtime.application import changed_config, run
from runtime.artefacts import read_json
from train.foundation import pretrain

METHOD = "rsprune"
DEFAULT = "none (default)"
#: Options that reduce the evaluation of a probe to a minimum.
QUICK = (
    "eval.images=16",
    "eval.convergence_images=16",
    "eval.steps=2",
    "eval.while_training=false",
    "train.snapshots=1",
)


def steps_within(seconds: float, probe_steps: int, probe_seconds: float) -> int:
    """Number of steps that fit into some seconds, rounded to two digits to suppress the noise of the probe."""
    steps = seconds * probe_steps / probe_seconds
    unit = 10 ** max(0, math.floor(math.log10(steps)) - 1)
    return max(1, int(steps // unit * unit))


def trained(cfg: DictConfig, change: Sequence[str], seed: int) -> tuple[DictConfig, Path]:
    """The config and the run of a change with one seed, trained for `bench_quality.seconds`."""
    options = cfg.bench_quality
    common = [f"prune={METHOD}", f"eval.split={cfg.ablation.split}", *change]
    # one probe, with the first seed, for all seeds: all train for the same number of steps
    probe = changed_config(*common, f"seed={options.seeds[0]}", f"train.loop.steps={options.probe}", *QUICK)
    seconds = read_json(pretrain(probe, METHOD) / "summary.json")["seconds"]
    steps = steps_within(float(options.seconds), int(options.probe), float(seconds))
    chosen = changed_config(*common, f"seed={seed}", f"train.loop.steps={steps}", "train.snapshots=1")
    return chosen, pretrain(chosen, METHOD)


def main(cfg: DictConfig) -> None:
    results = Path(cfg.results) / cfg.profile.name / "generator"
    cells = [(list(change), int(seed)) for change in cfg.bench_quality.changes for seed in cfg.bench_quality.seeds]
    for number, (change, seed) in enumerate(cells, start=1):
        chosen, directory = trained(cfg, change, seed)
        summary = read_json(directory / "summary.json")
        fields = {"change": " ".join(change) or DEFAULT, "steps": f"{summary['steps']:,}"}
        row = result_row(chosen, "generator", METHOD, float(cfg.ratio), summary["metrics"], directory, **fields)
        append_result(results / "results.jsonl", {**row, "seconds": summary["seconds"]})
        print(f"{number} of {len(cells)}: {fields['change']}, seed {seed}, {summary['steps']} steps", flush=True)
    publish(results, "generator")


if __name__ == "__main__":
    run(main)
