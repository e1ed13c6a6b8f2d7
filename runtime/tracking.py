"""Experiment tracking: Weights & Biases (offline unless the user is logged in), TensorBoard, both, or nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from PIL import Image

from runtime.artefacts import fingerprint, is_main_process, plain


class Tracker:
    """Logs scalars, images, tables and files to a W&B run, to TensorBoard's event files, to both, or nowhere."""

    def __init__(self, wandb_run: Any = None, events: Any = None) -> None:
        self._run = wandb_run
        self._events = events

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        if self._run is not None:
            self._run.log(dict(values), step=step)
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def image(self, name: str, path: Path, step: int | None = None, caption: str | None = None) -> None:
        """Log a picture file."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(str(path), caption=caption)}, step=step)
        if self._events is not None:
            with Image.open(path) as picture:
                self._events.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def table(self, name: str, table: pd.DataFrame) -> None:
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Table(dataframe=table)})

    def artifact(self, kind: str, name: str, path: Path) -> None:
        """Keep a file with the run, once for all runs that name the same content (W&B)."""
        if self._run is not None:
            import wandb

            artifact = wandb.Artifact(f"{kind}-{name}", type=kind)
            artifact.add_file(str(path))
            self._run.log_artifact(artifact)

    def summary(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(plain(values))


@contextmanager
def track(cfg: DictConfig, stage: str, name: str) -> Iterator[Tracker]:
    """A tracker for one stage, by `tracker.kind` (wandb or none) and `tracker.tensorboard`.

    The runs of a sweep (`-m`) share a W&B group, and so do those of a profile outside of sweeps. In a launch of
    several processes only the first one tracks.
    """
    if not is_main_process():
        yield Tracker()
        return
    directory = Path(cfg.runs)
    events = run = None
    if cfg.tracker.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        key = fingerprint(cfg=cfg)[:8]
        events = SummaryWriter(str(directory / "tensorboard" / f"{stage}-{name}-{key}"))
    try:
        if cfg.tracker.kind == "wandb":
            run = _wandb_run(cfg, stage, name, directory)
        yield Tracker(run, events)
    finally:
        if events is not None:
            events.close()
        if run is not None:
            run.finish()


def _wandb_run(cfg: DictConfig, stage: str, name: str, directory: Path) -> Any:
    import wandb

    logged_in = bool(os.environ.get("WANDB_API_KEY")) or _has_netrc_key()
    directory.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=cfg.tracker.project,
        name=f"{stage}-{name}",
        group=cfg.tracker.group or _sweep() or cfg.profile.name,
        job_type=stage,
        dir=str(directory),
        mode=cfg.tracker.mode or os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline"),
        config=plain(cfg),
        settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
    )
    for metric in ("balanced_*", "natural_*"):  # curves of runs with other batches meet on this axis
        run.define_metric(metric, step_metric="images_seen")
    return run


def _sweep() -> str | None:
    """A name for the sweep that this run belongs to: the same command, the same sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return f"sweep-{fingerprint(command=sys.argv[1:])[:8]}"


def _has_netrc_key() -> bool:
    netrc = Path.home() / ".netrc"
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
