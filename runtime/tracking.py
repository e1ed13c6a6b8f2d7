"""Experiment tracking: Weights & Biases (offline unless the user is logged in), TensorBoard, both, or none."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from runtime.artefacts import fingerprint, is_main_process, plain
from runtime.provenance import resolved
from runtime.redaction import SECRET, redacted

#: Seconds that W&B's own process may take to end after a failure.
STOP_SECONDS = 10
#: Modes of W&B that failed in this process; later stages and cells do not wait for them again.
_failed_modes: set[str] = set()


class Tracker:
    """Logs scalars, images, tables and files to a W&B run, to TensorBoard's event files, to both, or nowhere.

    If a service fails, one line reports it and nothing more is sent; the stage continues. Accelerate's `log_with` is
    not used: it has no artifacts, custom axes and tables for both services, and no tracker without an Accelerator, as
    in pruning.
    """

    def __init__(self, wandb_run: Any = None, events: Any = None) -> None:
        self._run = _Service("Weights & Biases", wandb_run)
        self._events = _Service("TensorBoard", events)

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        def scalars(events: Any) -> None:
            for name, value in values.items():
                events.add_scalar(name, value, step)

        self._tell(lambda run: run.log(dict(values), step=step), scalars)

    def image(self, name: str, path: Path, step: int | None = None, caption: str | None = None) -> None:
        """Log an image file."""

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
        """Store a file with the run; identical content is stored once for all runs (W&B)."""

        def uploaded(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"{kind}-{name}", type=kind)
            artifact.add_file(str(path))
            run.log_artifact(artifact)

        self._tell(uploaded)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._tell(lambda run: run.summary.update(plain(values)))

    def _tell(self, to_run: Callable[[Any], Any], to_events: Callable[[Any], Any] | None = None) -> None:
        self._run.tell(to_run)
        if to_events is not None:
            self._events.tell(to_events)

    def close(self) -> None:
        """End the run and the event files. A service that has already failed ends without a message."""
        self._events.close(lambda events: events.close())
        if self._run.client is not None:
            self._run.close(lambda run: run.finish())
            if self._run.failed:
                _failed_modes.add("online")
                _stop_wandb()


class _Service:
    """Sends data to a service until it fails."""

    def __init__(self, name: str, client: Any) -> None:
        self.name, self.client, self.failed = name, client, False

    def tell(self, action: Callable[[Any], Any]) -> None:
        if self.client is not None and not self.failed:
            self.close(action)

    def close(self, action: Callable[[Any], Any]) -> None:
        """Like `tell`, but also for a service that has failed; then without a message."""
        if self.client is None:
            return
        try:
            action(self.client)
        except Exception as error:  # any error of the service
            if not self.failed:
                _warn(self.name, error, "the stage goes on without it")
            self.failed = True


def _warn(service: str, error: Exception, then: str) -> None:
    """Report a service's failure in one line, without keys from the environment."""
    reason = " ".join(str(error).split()).partition(" Consider increasing")[0] or type(error).__name__
    for name, value in os.environ.items():
        if SECRET.search(name) and value:
            reason = reason.replace(value, "…")
    print(f"warning: {service} failed ({reason[:200]}): {then}", file=sys.stderr, flush=True)


def _stop_wandb() -> None:
    """End W&B's own process now; otherwise the end of this process would wait for it and print its failure."""

    def stop() -> None:
        with suppress(Exception):
            import wandb

            wandb.teardown()

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    thread.join(STOP_SECONDS)


@contextmanager
def track(cfg: DictConfig, stage: str, name: str) -> Iterator[Tracker]:
    """A tracker for one stage, by `tracker.kind` (wandb or none) and `tracker.tensorboard`.

    The runs of an experiment, or of a sweep (`-m`), share a W&B group, and so do those of a profile outside of sweeps.
    In a launch of several processes only the first one tracks.
    """
    if not is_main_process():
        yield Tracker()
        return
    events = None
    if cfg.tracker.tensorboard:
        try:
            events = _event_files(cfg, stage, name)
        except Exception as error:
            _warn("TensorBoard", error, "the stage goes on without it")
    run = _started(cfg, stage, name) if cfg.tracker.kind == "wandb" else None
    tracker = Tracker(run, events)
    try:
        yield tracker
    finally:
        tracker.close()


def _started(cfg: DictConfig, stage: str, name: str) -> Any:
    """A W&B run in the requested mode, else offline, else None. After one failure online, later runs are offline."""
    mode = cfg.tracker.mode or os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    modes = dict.fromkeys(("offline",) if mode in _failed_modes else (mode, "offline"))
    for choice in modes:
        try:
            return _wandb_run(cfg, stage, name, choice)
        except Exception as error:
            _failed_modes.add(choice)
            folder = Path(cfg.runs) / "wandb"
            offline = f"this and later runs are written to {folder}: upload them with `wandb sync`"
            _warn(
                f"Weights & Biases, {choice},",
                error,
                "the stage goes on without it" if choice == "offline" else offline,
            )
    _stop_wandb()
    return None


def _but_for_event_files(args: threading.ExceptHookArgs) -> None:
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


def _event_files(cfg: DictConfig, stage: str, name: str) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = _but_for_event_files  # its thread raises an error that the next call raises again
    return SummaryWriter(str(Path(cfg.runs) / "tensorboard" / f"{stage}-{name}-{fingerprint(cfg=resolved(cfg))[:8]}"))


def _wandb_run(cfg: DictConfig, stage: str, name: str, mode: str) -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or W&B waits for an unreachable server and reports it
    logging.raiseExceptions = False  # otherwise its log prints a traceback per line on a full disk
    import wandb

    Path(cfg.runs).mkdir(parents=True, exist_ok=True)
    seconds = float(cfg.tracker.timeout)
    patience = {"init_timeout": seconds, "login_timeout": seconds, "finish_timeout": seconds}
    patience = {**patience, "finish_timeout_raises": True} if mode == "online" else {}
    run = wandb.init(
        project=cfg.tracker.project,
        name=f"{stage}-{name}",
        group=cfg.tracker.group or OmegaConf.select(cfg, "experiment.name") or _sweep() or cfg.profile.name,
        job_type=stage,
        dir=str(cfg.runs),
        mode=mode,
        config=resolved(cfg),
        settings=wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=_names_secrets(), **patience
        ),
    )
    for metric in ("balanced_*", "natural_*"):  # this axis makes runs with other batch sizes comparable
        run.define_metric(metric, step_metric="images_seen")
    return run


def _names_secrets() -> bool:
    """Whether the command line, which wandb would store, contains credentials."""
    return any(redacted(argument) != argument for argument in sys.argv)


def _sweep() -> str | None:
    """A name for the sweep that this run belongs to; the same command gives the same name."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return f"sweep-{fingerprint(command=[redacted(argument) for argument in sys.argv[1:]])[:8]}"


def _logged_in() -> bool:
    netrc = Path.home() / ".netrc"
    known = netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
    return known or bool(os.environ.get("WANDB_API_KEY"))
