"""Checkpoints of a training, written atomically: tensors in safetensors files, metadata in JSON."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from runtime.artefacts import read_json, write_json

Tensors = Mapping[str, torch.Tensor]
STATE = "state.json"


class Checkpoints:
    """The checkpoints `folder/<step>/` of one training. A folder with such a name is complete.

    Args:
        folder: need not exist.
        keep: number of newest checkpoints that are kept when another is saved.
        start: a checkpoint of another training, used as long as this training has none of its own.
    """

    def __init__(self, folder: Path, keep: int = 1, start: Path | None = None) -> None:
        self._folder, self._keep, self.start = folder, keep, start

    def latest(self) -> Path | None:
        """The newest checkpoint of this training, else `start`."""
        return self.newest() or self.start

    def newest(self) -> Path | None:
        """The newest complete checkpoint of this training, or None."""
        return max(self._whole(), default=None)

    def save(self, step: int, files: Mapping[str, Tensors], metadata: Mapping[str, Any]) -> None:
        """Write a checkpoint under a temporary name, rename it when complete, and remove all but the newest ones.

        Args:
            step: one-based step, the name of the checkpoint.
            files: for each file name, tensors on any device.
            metadata: JSON-ready values.
        """
        final = self._folder / f"{step:08d}"
        beside = final.with_suffix(".partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, tensors in files.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, _file(beside, name))
        write_json(beside / STATE, metadata)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(beside, final)
        for old in set(self._folder.iterdir()) - set(sorted(self._whole())[-self._keep :]):
            shutil.rmtree(old, ignore_errors=True)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a file of the latest checkpoint, on the CPU."""
        return load_file(_file(self.latest(), name))

    def names(self) -> set[str]:
        """Names of the tensor files of the latest checkpoint."""
        latest = self.latest()
        return set() if latest is None else {path.stem for path in latest.glob("*.safetensors")}

    def metadata(self) -> dict[str, Any]:
        """The metadata of the latest checkpoint; empty if there is none."""
        latest = self.latest()
        return {} if latest is None else read_json(latest / STATE)

    def _whole(self) -> list[Path]:
        return [path for path in self._folder.glob("*[0-9]") if (path / STATE).is_file()]


def _file(checkpoint: Path, name: str) -> Path:
    return checkpoint / f"{name}.safetensors"
