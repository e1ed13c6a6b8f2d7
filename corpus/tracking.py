"""Experiment tracking: Weights & Biases for every stage, offline unless the user is logged in, or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from corpus.artefacts import is_main_process, plain


class Tracker:
    """Logs scalars, images and tables to a W&B run; does nothing without one."""

    def __init__(self, wandb_run: Any = None) -> None:
        self._run = wandb_run

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        if self._run is not None:
            self._run.log(dict(values), step=step)

    def image(self, name: str, path: Path, step: int | None = None) -> None:
        """Log a picture file."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(str(path))}, step=step)

    def table(self, name: str, table: pd.DataFrame) -> None:
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Table(dataframe=table)})

    def summary(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(plain(values))


@contextmanager
def track(cfg: DictConfig, stage: str, name: str) -> Iterator[Tracker]:
    """A tracker for one stage, by `tracker`: wandb or none. Runs of one profile share a W&B group.

    In a launch of several processes only the first one tracks.
    """
    if cfg.tracker.kind == "none" or not is_main_process():
        yield Tracker()
        return
    import wandb

    logged_in = bool(os.environ.get("WANDB_API_KEY")) or _has_netrc_key()
    directory = Path(cfg.runs)
    directory.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=cfg.tracker.project,
        name=f"{stage}-{name}",
        group=cfg.profile.name,
        job_type=stage,
        dir=str(directory),
        mode=cfg.tracker.mode or os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline"),
        config=plain(cfg),
        settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
    )
    try:
        yield Tracker(run)
    finally:
        run.finish()


def _has_netrc_key() -> bool:
    netrc = Path.home() / ".netrc"
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
