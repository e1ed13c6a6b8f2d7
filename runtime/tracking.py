"""Experiment tracking: Weights & Biases (offline unless the user is logged in), TensorBoard, both, or nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
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
    """Logs scalars, images, tables and files to a W&B run, to TensorBoard's event files, to both, or nowhere.

    A service that fails says so in one line and is told nothing more; the stage goes on. Accelerate's `log_with` has no
    artifacts, axes and tables of both kinds, nor a tracker where there is no Accelerator, as in pruning.
    """

    def __init__(self, wandb_run: Any = None, events: Any = None) -> None:
        self._run = wandb_run
        self._events = events

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        def scalars(events: Any) -> None:
            for name, value in values.items():
                events.add_scalar(name, value, step)

        self._tell(lambda run: run.log(dict(values), step=step), scalars)

    def image(self, name: str, path: Path, step: int | None = None, caption: str | None = None) -> None:
        """Log a picture file."""

        def uploaded(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path), caption=caption)}, step=step)

        def drawn(events: Any) -> None:
            with Image.open(path) as picture:
                events.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

        self._tell(uploaded, drawn)

    def table(self, name: str, table: pd.DataFrame) -> None:
        def uploaded(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(dataframe=table)})

        self._tell(uploaded)

    def artifact(self, kind: str, name: str, path: Path) -> None:
        """Keep a file with the run, once for all runs that name the same content (W&B)."""

        def uploaded(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"{kind}-{name}", type=kind)
            artifact.add_file(str(path))
            run.log_artifact(artifact)

        self._tell(uploaded)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._tell(lambda run: run.summary.update(plain(values)))

    def _tell(self, to_run: Callable[[Any], Any], to_events: Callable[[Any], Any] | None = None) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            with _spared("Weights & Biases"):
                to_run(run)
                self._run = run
        if self._events is not None and to_events is not None:
            events, self._events = self._events, None
            with _spared("TensorBoard"):
                to_events(events)
                self._events = events


@contextmanager
def _spared(service: str) -> Iterator[None]:
    """A service's failure becomes one line."""
    try:
        yield
    except Exception as error:  # whatever it comes up with
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"warning: {service} failed ({reason}): the stage goes on without it", file=sys.stderr, flush=True)


@contextmanager
def track(cfg: DictConfig, stage: str, name: str) -> Iterator[Tracker]:
    """A tracker for one stage, by `tracker.kind` (wandb or none) and `tracker.tensorboard`.

    The runs of a sweep (`-m`) share a W&B group, and so do those of a profile outside of sweeps. In a launch of
    several processes only the first one tracks.
    """
    if not is_main_process():
        yield Tracker()
        return
    events = run = None
    if cfg.tracker.tensorboard:
        with _spared("TensorBoard"):
            events = _event_files(cfg, stage, name)
    if cfg.tracker.kind == "wandb":
        mode = cfg.tracker.mode or os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        for choice in dict.fromkeys((mode, "offline")):
            with _spared(f"Weights & Biases, {choice},"):
                run = _wandb_run(cfg, stage, name, choice)
                break
    try:
        yield Tracker(run, events)
    finally:
        if events is not None:
            with _spared("TensorBoard"):
                events.close()
        if run is not None:
            with _spared("Weights & Biases"):
                run.finish()


def _event_files(cfg: DictConfig, stage: str, name: str) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(Path(cfg.runs) / "tensorboard" / f"{stage}-{name}-{fingerprint(cfg=cfg)[:8]}"))


def _wandb_run(cfg: DictConfig, stage: str, name: str, mode: str) -> Any:
    import wandb

    Path(cfg.runs).mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=cfg.tracker.project,
        name=f"{stage}-{name}",
        group=cfg.tracker.group or _sweep() or cfg.profile.name,
        job_type=stage,
        dir=str(cfg.runs),
        mode=mode,
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


def _logged_in() -> bool:
    netrc = Path.home() / ".netrc"
    known = netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
    return known or bool(os.environ.get("WANDB_API_KEY"))
