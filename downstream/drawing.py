"""Models of fine-tuned runs that draw the tiles of an image of any size (`downstream.any_size`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from corpus.masks import IGNORED
from downstream.controlnet import one_hot
from downstream.restoration import Restoration, Restorer
from downstream.task import Guidance
from downstream.tasks.semantic_synthesis import NO_CLASS, by_value
from downstream.tasks.super_resolution import with_level
from runtime.artefacts import COMPLETE, read_json
from runtime.errors import UserError
from train.sampler import load_pipeline

PALETTE = "palette.json"
UNGUIDED = Guidance()
_CONCATENATED = "StableDiffusionInstructPix2PixPipeline"
_STEERED = "StableDiffusionControlNetPipeline"


@dataclass(frozen=True)
class Synthesizer:
    """The model of a semantic-synthesis run.

    Attributes:
        pipeline: conditioned on the mask in the palette's colours, or with a ControlNet.
        palette: colour [r, g, b] of every class by its name, and of pixels without a class as NO_CLASS.
        steps: number of solver steps.
        prompt: prompt of all tiles; may be empty.
        guidance: scales of classifier-free guidance.
    """

    pipeline: DiffusionPipeline
    palette: Mapping[str, list[int]]
    steps: int
    prompt: str = ""
    guidance: Guidance = UNGUIDED

    @property
    def side(self) -> int:
        """Side of a tile in pixels."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of a tile's noise."""
        size = self.pipeline.unet.config.sample_size
        return self.pipeline.vae.config.latent_channels, size, size

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, indexed by the number in a mask."""
        return class_names(self.palette)

    @torch.inference_mode()
    def __call__(self, masks: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Images uint8 [N, side, side, 3] of class numbers uint8 [N, side, side]; 255: no class.

        Args:
            noise: initial noise, standard normal float32 [N, C, h, w].
        """
        steered = type(self.pipeline).__name__ == _STEERED
        if steered:
            images = torch.from_numpy(one_hot(masks, len(self.classes)))
        else:
            colours = by_value(np.array(list(self.palette.values()), np.uint8), len(self.classes))
            images = [Image.fromarray(picture) for picture in colours[masks]]
        output = self.pipeline(
            prompt=[self.prompt] * len(masks),
            image=images,
            latents=torch.from_numpy(noise).to(self.pipeline.unet.device),
            num_inference_steps=self.steps,
            output_type="np",
            **self.guidance.arguments(steered),
        )
        return (np.asarray(output.images) * 255).round().astype(np.uint8)


def with_settings(model: Any, **settings: Any) -> Any:
    """The same model with another number of solver `steps`, or another `prompt`."""
    return replace(model, **settings)


def with_dial(restorer: Restorer, dial: float) -> Restorer:
    """The same model with another dial."""
    return replace(restorer, options=replace(restorer.options, dial=dial))


def load_restorer(
    run: Path, option: str, *, steps: int, factor: int, options: Restoration, noise_level: int = 0
) -> Restorer:
    """Load the model of a super-resolution run, or its pipeline.

    Args:
        option: the option that names the run, for messages.
        steps: number of solver steps.
        factor: enlargement factor, used if the run does not store one.
        options: how outputs are computed; `relative` and `kind` are taken from the run if it stores them.
        noise_level: noise of the inputs in grey levels; the network gets the nearest level that it was trained with.
    Raises:
        UserError: the folder holds no such pipeline, the run is of another task, the pipeline does not load, or the
        factor does not divide its side.
    """
    pipeline, _ = load_pipeline(run, option, (_CONCATENATED,))
    metadata = _metadata(run, option, "super_resolution").get("condition", {})
    factor = int(metadata.get("factor", factor))
    levels = metadata.get("noise_levels", [0])
    nearest = min(levels, key=lambda level: abs(level - noise_level))
    relative = metadata["target"] == "difference" if "target" in metadata else options.relative
    kind = metadata.get("degradation", {}).get("kind", options.kind)
    options = replace(options, relative=relative, kind=kind if kind in ("area", "bicubic") else "area")
    restorer = Restorer(pipeline, factor, steps, options, with_level("", levels, nearest))
    if factor < 1 or restorer.side % factor:
        raise UserError(f"{option}={run} draws images of {restorer.side} px, which the factor {factor} does not divide")
    return restorer


def load_synthesizer(
    run: Path, option: str, *, steps: int, prompt: str = "", guidance: Guidance | None = None
) -> Synthesizer:
    """Load the model of a semantic-synthesis run.

    Args:
        option: the option that names the run, for messages.
        steps: number of solver steps.
        prompt: prompt of all tiles.
        guidance: scales of classifier-free guidance; None: no guidance.
    Raises:
        UserError: the folder holds no such pipeline or no palette, the run is of another task, or the pipeline does not
        load.
    """
    palette = palette_of(run, option)
    pipeline, _ = load_pipeline(run, option, (_CONCATENATED, _STEERED))
    _metadata(run, option, "semantic_synthesis")
    return Synthesizer(pipeline, palette, steps, prompt, guidance or UNGUIDED)


def palette_of(run: Path, option: str) -> dict[str, list[int]]:
    """The colours of a run's masks: [r, g, b] of every class by its name, and of pixels without a class as NO_CLASS.

    Raises:
        UserError: the run has no palette.json.
    """
    if not (run / PALETTE).is_file():
        raise UserError(
            f"{option}={run} has no {PALETTE}: give the whole run (run: DIR) that "
            "`python downstream/semantic_synthesis.py` prints"
        )
    return read_json(run / PALETTE)


def class_names(palette: Mapping[str, list[int]]) -> tuple[str, ...]:
    """The names of a palette's classes, in the order of their numbers."""
    return tuple(name for name in palette if name != NO_CLASS)


def colour_numbers(palette: Mapping[str, list[int]]) -> dict[int, int]:
    """The class number of every colour 0xRRGGBB of a palette; 255 for pixels without a class."""
    names = class_names(palette)
    numbers = {}
    for name, (red, green, blue) in palette.items():
        numbers[red << 16 | green << 8 | blue] = IGNORED if name == NO_CLASS else names.index(name)
    return numbers


def _metadata(run: Path, option: str, task: str) -> dict[str, Any]:
    """The inputs of a run's training; {} if the run does not store them.

    Raises:
        UserError: the training was for another task.
    """
    metadata = read_json(run / COMPLETE) if (run / COMPLETE).is_file() else {}
    if metadata.get("stage", task) != task:
        raise UserError(f"{option}={run} is a run of {metadata['stage']}: give a run of {task}")
    return metadata.get("inputs", {})
