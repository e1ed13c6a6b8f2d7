"""Shared code of the tasks' entry points."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from downstream.conditional import resolve_foundation
from downstream.fine_tuning import fine_tune
from downstream.measured_task import METRICS_FILE, measure_baselines
from downstream.registry import TASKS
from downstream.shipping import shipped_network
from report.results import append_result, result_row
from report.tables import publish
from runtime.artefacts import NotBuilt, is_main_process, nothing_built, read_json
from runtime.notices import notice
from train.shipped import SHIPPED


def run_task(cfg: DictConfig, name: str) -> None:
    """Fine-tune the configured foundation for a task, measure it and the baselines; print metrics and the run."""
    start = time.perf_counter()
    task = TASKS[name](cfg)  # a corpus that lacks data is refused before a foundation is trained
    directory = fine_tune(cfg, task, *resolve_foundation(cfg))
    for baseline, measured in measure_baselines(cfg, task).items():
        _print_metrics(read_json(measured / METRICS_FILE), f"{baseline} ")
    _print_metrics(read_json(directory / "summary.json")["metrics"])
    if task.combinations() and is_main_process():
        _publish_combinations(cfg, name, directory)
    print(f"seconds: {time.perf_counter() - start:.0f}")
    print(f"run: {directory}")


def _publish_combinations(cfg: DictConfig, name: str, directory: Path) -> None:
    """Add a run's combinations of conditions to its task's table in the folder of results, and print the table."""
    summary, results = read_json(directory / "summary.json"), Path(cfg.results) / cfg.profile.name / name
    for conditions, metrics in summary["combinations"].items():
        fields = {"conditions": conditions, "split": summary["split"], "images": str(summary["images"])}
        row = result_row(cfg, name, summary["method"], None, metrics, directory, step=summary["steps"], **fields)
        append_result(results / "results.jsonl", row)
    publish(results, name)


def run_or_fine_tuned(cfg: DictConfig, name: str) -> Path:
    """The run that `run` names; if null, the task's shipped network, or `foundation` fine-tuned for it (cached).

    Raises:
        UserError: the foundation does not exist or does not fit the corpus.
    """
    if cfg.run is not None:
        return Path(str(cfg.run)).expanduser()
    if cfg.foundation is None and (network := shipped_network(cfg, name)) is not None:
        notice(f"using the shipped network {network}; run=DIR names another")
        return network
    if cfg.foundation is None:
        cfg = OmegaConf.merge(cfg, {"foundation": SHIPPED})

    def fine_tuned() -> Path:
        return fine_tune(cfg, TASKS[name](cfg), *resolve_foundation(cfg))

    try:
        with nothing_built():
            return fine_tuned()
    except NotBuilt:
        notice(
            f"no run=DIR: foundation={cfg.foundation} is fine-tuned and measured for {name} first, "
            f"{cfg.downstream.loop.steps} steps, some minutes on two CPU cores; the result is kept in {cfg.runs}"
        )
    start = time.perf_counter()
    directory = fine_tuned()
    notice(f"fine-tuning and measuring took {time.perf_counter() - start:.0f} s; run={directory}")
    return directory


def _print_metrics(metrics: dict[str, float | None], before: str = "") -> None:
    for key, value in sorted(metrics.items()):
        print(f"{before}{key}: {'undefined' if value is None else format(value, '.4g')}")
