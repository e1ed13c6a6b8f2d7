"""What the entry points of the tasks share."""

from __future__ import annotations

import time

from omegaconf import DictConfig

from downstream.conditional import resolve_foundation
from downstream.fine_tuning import fine_tune
from downstream.measured_task import METRICS_FILE, measure_baselines
from downstream.registry import TASKS
from runtime.artefacts import read_json


def run_task(cfg: DictConfig, name: str) -> None:
    """Fine-tune the configured foundation for a task, measure it and the baselines; prints metrics and the run."""
    start = time.perf_counter()
    task = TASKS[name](cfg)  # what the corpus lacks is said before minutes go into a foundation
    directory = fine_tune(cfg, task, *resolve_foundation(cfg))
    for baseline, measured in measure_baselines(cfg, task).items():
        _print_metrics(read_json(measured / METRICS_FILE), f"{baseline} ")
    _print_metrics(read_json(directory / "summary.json")["metrics"])
    print(f"seconds: {time.perf_counter() - start:.0f}")
    print(f"run: {directory}")


def _print_metrics(metrics: dict[str, float | None], before: str = "") -> None:
    for key, value in sorted(metrics.items()):
        print(f"{before}{key}: {'undefined' if value is None else format(value, '.4g')}")
