"""Draw images from a text-to-image pipeline on disk; each depends only on its prompt, metadata, seed and number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline

from eval.generate import generate
from eval.models import TEXT_TO_IMAGE, UNLOADABLE
from runtime.artefacts import file_digest, fingerprint
from runtime.errors import UserError
from train.metadata import FOLDER, MetadataEncoder, MetadataField, prompt_embeddings


@dataclass(frozen=True)
class Sampler:
    """A text-to-image pipeline, ready to draw.

    Args:
        pipeline: of one of the classes TEXT_TO_IMAGE, on its device.
        folder: the folder that it was loaded from.
        encoder: metadata encoder, or None.
        batch_size: images drawn at once.
    """

    pipeline: DiffusionPipeline
    folder: Path
    encoder: MetadataEncoder | None = None
    batch_size: int = 8

    @property
    def fields(self) -> Mapping[str, MetadataField]:
        """The metadata fields that the model knows, by name; empty without metadata."""
        return {} if self.encoder is None else self.encoder.fields

    def known(self, metadata: Mapping[str, Any] | None) -> dict[str, float]:
        """Metadata as numbers.

        Raises:
            UserError: the model does not know a field, or a value is not a finite number.
        """
        if not metadata:
            return {}
        if not self.fields:
            raise UserError(
                f"metadata {', '.join(map(str, metadata))} given, but {self.folder} has no {FOLDER}: leave the "
                "metadata out, or give a model that was pretrained with it"
            )
        unknown = [str(name) for name in metadata if name not in self.fields]
        if unknown:
            raise UserError(f"{self.folder} has no field {', '.join(unknown)}: its fields are {', '.join(self.fields)}")
        numbers = {}
        for name, value in metadata.items():
            try:
                numbers[str(name)] = float(value)
            except (TypeError, ValueError):
                numbers[str(name)] = math.nan
            if not math.isfinite(numbers[str(name)]):
                raise UserError(f"metadata {name}={value}: give a number")
        return numbers

    def draw(
        self,
        prompt: str,
        count: int,
        *,
        seed: int,
        steps: int,
        guidance_scale: float,
        metadata: Mapping[str, Any] | None = None,
        label: str = "draw",
    ) -> np.ndarray:
        """Images of one prompt, uint8 [count, H, W, 3]; the noise of image i depends only on the seed and i.

        Every batch has the same size, because the last bits of a network's output depend on the batch size; surplus
        images of the last batch are dropped.

        Args:
            guidance_scale: classifier-free guidance; 1 switches it off.
            metadata: some of `fields`, in their own units.
        Raises:
            UserError: the prompt is empty, a number is out of range, or the model does not know the metadata.
        """
        check_prompt(prompt)
        check_settings(count=count, seed=seed, steps=steps, guidance_scale=guidance_scale)
        metadata = self.known(metadata)
        batches = -(-count // self.batch_size)
        prompts = [prompt] * self.batch_size
        embeddings = prompt_embeddings(self.pipeline, self.encoder, prompts, metadata) if metadata else {}
        return generate(
            self.pipeline,
            prompts * batches,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            batch_size=self.batch_size,
            label=label,
            **{name: embedding.repeat(batches, 1, 1) for name, embedding in embeddings.items()},
        )[:count]


def check_prompt(prompt: str) -> None:
    """Refuse an empty prompt.

    Raises:
        UserError: the prompt is empty.
    """
    if not prompt.strip():
        raise UserError('the prompt is empty: describe the image, e.g. prompt="a satellite image of desert"')


def check_settings(*, count: Any, seed: Any, steps: Any, guidance_scale: Any) -> None:
    """Refuse invalid settings of `Sampler.draw`.

    Raises:
        UserError: a value is not a number, not an integer where required, or too small.
    """
    for name, value, least in (("images", count, 1), ("seed", seed, 0), ("steps", steps, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name}={value}: give a whole number of at least {least}")
    number = isinstance(guidance_scale, int | float) and not isinstance(guidance_scale, bool)
    if not (number and 0 <= guidance_scale < math.inf):
        raise UserError(f"guidance_scale={guidance_scale}: give a number of at least 0; 1 switches guidance off")


def load_sampler(directory: Path, batch_size: int = 8) -> Sampler:
    """Load the sampler of a pretraining run or of a text-to-image pipeline's folder.

    Raises:
        UserError: the folder holds no such pipeline, it does not load, or the batch size is invalid.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size={batch_size}: give a whole number of at least 1")
    pipeline, folder = load_pipeline(directory, "foundation", TEXT_TO_IMAGE)
    encoder = None
    if (folder / FOLDER).is_dir() and not isinstance(pipeline, PixArtAlphaPipeline):
        try:
            encoder = MetadataEncoder.load(folder / FOLDER)
        except UNLOADABLE as error:
            raise UserError(f"{folder / FOLDER} does not load: {_one_line(error)}") from error
    return Sampler(pipeline, folder, encoder, batch_size)


def load_pipeline(directory: Path, option: str, kinds: Sequence[str]) -> tuple[DiffusionPipeline, Path]:
    """Load a pipeline from a run (`directory/pipeline`) or its own folder, on the GPU if there is one; also its folder.

    Args:
        option: the option that names the directory, for messages.
        kinds: names of the accepted pipeline classes.
    Raises:
        UserError: there is no such pipeline, or it does not load.
    """
    folders = [folder for folder in (directory / "pipeline", directory) if (folder / "model_index.json").is_file()]
    if not folders:
        raise UserError(
            f"{option}={directory} contains no pipeline (no model_index.json): give the directory that its training "
            "printed (run: DIR), or a diffusers pipeline's folder"
        )
    folder = folders[0]
    try:
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        if kind in kinds:
            # local files only: otherwise diffusers asks the hub for missing parts
            pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
            pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    except UNLOADABLE as error:
        raise UserError(f"{option}={directory} does not load: {_one_line(error)}") from error
    if kind not in kinds:
        raise UserError(f"{option}={directory} is a {kind}: give a {' or a '.join(kinds)}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder


def pipeline_fingerprint(folder: Path) -> str:
    """16 hex digits of the content of all files of a pipeline."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return fingerprint(files={path.relative_to(folder).as_posix(): file_digest(path) for path in files})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
