"""Continue a training from a checkpoint of another run, with other options or more steps: `train.resume=DIR`."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from eval.models import SNAPSHOT, SNAPSHOTS, snapshots_of
from runtime.artefacts import file_digest, fingerprint, plain, read_json
from runtime.errors import UserError
from train.checkpoint import STATE, Checkpoints

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Start:
    """The starting point of a training.

    Attributes:
        checkpoint: folder of a checkpoint of another run; None for a training from the beginning.
        step: steps done at the checkpoint.
        images: training images seen at the checkpoint.
    """

    checkpoint: Path | None = None
    step: int = 0
    images: int = 0

    def images_seen(self, step: int, batch_size: int) -> int:
        """Training images seen after a step, with this run's batch size since its start."""
        return self.images + (step - self.step) * batch_size


def start_of(cfg: DictConfig) -> Start:
    """The checkpoint that `train.resume` names: a run (its newest), one checkpoint, or a folder of checkpoints.

    Raises:
        UserError: there is none, or it is past the requested steps.
    """
    if cfg.train.get("resume") is None:
        return Start()
    named = Path(str(cfg.train.resume)).expanduser()
    choices = (named, Checkpoints(named / FOLDER).newest(), Checkpoints(named).newest())
    result = next((path for path in choices if path is not None and (path / STATE).is_file()), None)
    if result is None:
        raise UserError(
            f"train.resume={named} contains no checkpoint: give a directory of runs/pretrain, or a folder in its "
            f"{FOLDER}/ with {STATE}"
        )
    metadata = read_json(result / STATE)
    if metadata["step"] >= cfg.train.loop.steps:
        raise UserError(f"train.resume={result} has already {metadata['step']} steps: give a larger train.loop.steps")
    return Start(result, metadata["step"], metadata.get("images", metadata["step"] * cfg.train.loop.batch_size))


def training_inputs(cfg: DictConfig, start: Start) -> dict[str, Any]:
    """The inputs of a run's fingerprint from `cfg.train`; a checkpoint counts by its content, not its location."""
    train = {key: value for key, value in plain(cfg.train).items() if key != "resume"}
    if train["weighting"] == 0:  # as in runs from before this option existed
        del train["weighting"]
    if start.checkpoint is None:
        return {"train": train}
    files = {path.name: file_digest(path) for path in sorted(start.checkpoint.iterdir())}
    return {"train": train, "resume": fingerprint(files=files)}


def inherit_snapshots(start: Start, directory: Path) -> None:
    """Copy the snapshots that the other run kept before the checkpoint, so that the curve includes its history."""
    if start.checkpoint is None:
        return
    for snapshot in snapshots_of(start.checkpoint.parent.parent):
        target = directory / SNAPSHOTS / snapshot.name
        if target.exists() or read_json(snapshot / SNAPSHOT)["step"] > start.step:
            continue
        beside = target.with_name(target.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(snapshot, beside)
        os.rename(beside, target)


def take_up(cfg: DictConfig, checkpoint: Path) -> str:
    """Overrides with which the same command continues from a checkpoint, at a tenth of the learning rate."""
    rate = float(f"{cfg.train.loop.learning_rate / 10:.3g}")
    return f"train.resume={shlex.quote(str(checkpoint))} train.loop.learning_rate={rate}"
