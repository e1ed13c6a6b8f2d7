"""Models that can be measured: a pretraining run, one of its snapshots, or a diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from eval.generate import generate
from runtime.artefacts import file_digest, fingerprint
from runtime.errors import UserError

INDEX = "model_index.json"
#: File in a snapshot's folder with step, images_seen, seconds and loss.
SNAPSHOT = "snapshot.json"
#: Folder in a run with one folder per snapshot, named by the number of images seen.
SNAPSHOTS = "snapshots"
#: Parts of a pipeline that are trained; a snapshot contains one of them.
NETWORKS = ("unet", "transformer")
TEXT_TO_IMAGE = ("StableDiffusionPipeline", "PixArtAlphaPipeline")
#: Exceptions of diffusers, transformers and safetensors for files that are missing, broken or of another shape.
UNLOADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Model:
    """A text-to-image pipeline on disk; if a snapshot is given, its network replaces that of the pipeline.

    Attributes:
        pipeline: folder with model_index.json.
        snapshot: folder with `unet/` or `transformer/`, or None.
    """

    pipeline: Path
    snapshot: Path | None = None

    @property
    def network(self) -> Path:
        """Folder of the network's weights."""
        base = self.snapshot or self.pipeline
        return next((base / name for name in NETWORKS if (base / name).is_dir()), base / NETWORKS[0])

    @cached_property
    def key(self) -> str:
        """16 hex digits of the network's weights and all other parts."""
        others = [path for path in self.pipeline.iterdir() if path.is_dir() and path.name not in NETWORKS]
        files = [path for folder in (*others, self.network) for path in folder.rglob("*") if path.is_file()]
        names = {f"{path.parent.name}/{path.name}": file_digest(path) for path in sorted(files)}
        return fingerprint(files=names)

    def load(self) -> DiffusionPipeline:
        """The pipeline on this machine's accelerator.

        Raises:
            UserError: it is not a text-to-image pipeline, or it cannot be loaded.
        """
        try:
            kind = json.loads((self.pipeline / INDEX).read_text(encoding="utf-8"))["_class_name"]
            if kind not in TEXT_TO_IMAGE:
                raise UserError(f"{self.pipeline} is a {kind}: give a {' or a '.join(TEXT_TO_IMAGE)}")
            parts = {}
            if self.snapshot is not None:
                network = self.network
                of = json.loads((network / "config.json").read_text(encoding="utf-8"))["_class_name"]
                parts[network.name] = getattr(diffusers, of).from_pretrained(network, use_safetensors=True)
            # only local files: otherwise diffusers requests missing parts from the hub
            pipeline = DiffusionPipeline.from_pretrained(
                self.pipeline, use_safetensors=True, local_files_only=True, **parts
            )
            pipeline.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
        except UNLOADABLE as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.snapshot or self.pipeline} does not load: {reason}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def conditions(self, captions: Sequence[str], rows: pd.DataFrame) -> dict[str, Any]:
        """Everything besides the captions that the images depend on: nothing."""
        return {}

    def draw(
        self,
        loaded: DiffusionPipeline,
        captions: Sequence[str],
        rows: pd.DataFrame,
        numbers: np.ndarray,
        **sampling: Any,
    ) -> np.ndarray:
        """Images of some captions, uint8 [K, H, W, 3]; the noise of image i depends on the seed and on i only.

        Args:
            loaded: the loaded pipeline.
            captions: captions of the whole held-out set.
            rows: rows of the manifest, one per caption.
            numbers: int64 [K], positions of the captions to draw.
            sampling: steps, guidance_scale, seed and label of `eval.generate.generate`.
        """
        return generate(loaded, [captions[number] for number in numbers], noise_of=numbers, **sampling)


def find_model(folder: Path) -> Model | None:
    """The model in the folder of a run, a snapshot or a pipeline; None if the folder is none of these.

    Raises:
        UserError: the folder does not exist, or a snapshot is not inside its run.
    """
    if not folder.is_dir():
        raise UserError(
            f"of={folder} is not a folder: give a run, a snapshot, a diffusers pipeline or a folder of images"
        )
    if (folder / SNAPSHOT).is_file():
        pipeline = folder.parent.parent / "pipeline"
        if not (pipeline / INDEX).is_file():
            raise UserError(
                f"of={folder} is a snapshot, but there is no pipeline in {pipeline}: keep the snapshot inside its run"
            )
        return Model(pipeline, folder)
    for place in (folder / "pipeline", folder):
        if (place / INDEX).is_file():
            return Model(place)
    return None


def snapshots_of(run: Path) -> list[Path]:
    """Folders of a run's snapshots, the earliest first."""
    return sorted(path.parent for path in (run / SNAPSHOTS).glob(f"*/{SNAPSHOT}"))
