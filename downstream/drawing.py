"""What draws the tiles of an image of any size: two protocols, and the pipelines of fine-tuned runs behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from corpus.masks import IGNORED
from downstream.tasks.semantic_synthesis import NO_CLASS, by_value
from downstream.tasks.super_resolution import bicubic
from runtime.artefacts import COMPLETE, read_json
from runtime.errors import UserError
from train.sampler import load_pipeline

PALETTE = "palette.json"
_KINDS = ("StableDiffusionInstructPix2PixPipeline",)


class Restorer(Protocol):
    """Draws images from images reduced by a factor.

    Attributes:
        factor: by which it enlarges.
        side: of a tile that it draws, in pixels; a multiple of the factor.
        latent_shape: of a tile's noise, (C, h, w).
    """

    factor: int
    side: int
    latent_shape: tuple[int, int, int]

    def __call__(self, low: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Images float32 in 0..255 or uint8 [N, side, side, 3] of uint8 [N, side/factor, side/factor, 3].

        Args:
            noise: standard normal float32 [N, C, h, w] to start from.
        """
        ...


class Synthesizer(Protocol):
    """Draws images from masks.

    Attributes:
        side: of a tile, in pixels.
        latent_shape: of a tile's noise, (C, h, w).
        classes: their names, by the number in a mask.
    """

    side: int
    latent_shape: tuple[int, int, int]
    classes: tuple[str, ...]

    def __call__(self, masks: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Images uint8 [N, side, side, 3] of class numbers uint8 [N, side, side], 255 where there is none.

        Args:
            noise: standard normal float32 [N, C, h, w] to start from.
        """
        ...


# ---------------------------------------------------------------- pipelines of today's runs


@dataclass(frozen=True)
class _Drawing:
    """An image-conditioned pipeline.

    Attributes:
        steps: of the solver.
        prompt: of all tiles; may be empty.
    """

    pipeline: StableDiffusionInstructPix2PixPipeline
    steps: int
    prompt: str = ""

    @property
    def side(self) -> int:
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.pipeline.unet.config.sample_size
        return self.pipeline.vae.config.latent_channels, size, size

    @torch.inference_mode()
    def drawn(self, pictures: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Images float32 [N, side, side, 3] in 0..255 of condition pictures uint8 of that shape."""
        output = self.pipeline(
            prompt=[self.prompt] * len(pictures),
            image=[Image.fromarray(picture) for picture in pictures],
            latents=torch.from_numpy(noise).to(self.pipeline.unet.device),
            num_inference_steps=self.steps,
            guidance_scale=1.0,
            output_type="np",
        )
        return np.asarray(output.images, dtype=np.float32) * 255


@dataclass(frozen=True)
class PipelineRestorer(_Drawing):
    """A run of super-resolution, conditioned on the bicubically enlarged picture, as a `Restorer`."""

    factor: int = 4

    def __call__(self, low: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return self.drawn(bicubic(low, self.factor), noise)


@dataclass(frozen=True)
class PipelineSynthesizer(_Drawing):
    """A run of semantic synthesis, conditioned on the mask in the palette's colours, as a `Synthesizer`.

    Attributes:
        palette: colour [r, g, b] of every class by its name, and of what has none as NO_CLASS.
    """

    palette: Mapping[str, list[int]] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return class_names(self.palette)

    def __call__(self, masks: np.ndarray, noise: np.ndarray) -> np.ndarray:
        colours = by_value(np.array(list(self.palette.values()), np.uint8), len(self.classes))
        return self.drawn(colours[masks], noise).round().astype(np.uint8)


Drawing = TypeVar("Drawing", Restorer, Synthesizer)


def with_settings(model: Drawing, **settings: Any) -> Drawing:
    """The same model with another number of solver `steps`, or another `prompt`."""
    return replace(model, **settings)


def load_restorer(run: Path, option: str, *, steps: int, factor: int) -> Restorer:
    """The restorer of a super-resolution run, or of its pipeline.

    Args:
        option: that names the run, for messages.
        factor: by which it enlarges where the run does not say so.
    Raises:
        UserError: there is none, it is of another task, or it does not load.
    """
    pipeline, _ = load_pipeline(run, option, _KINDS)
    facts = _facts(run, option, "super_resolution")
    known = int(facts.get("condition", {}).get("factor", factor))
    restorer = PipelineRestorer(pipeline, steps, factor=known)
    if known < 1 or restorer.side % known:
        raise UserError(f"{option}={run} draws {restorer.side} px, which the factor {known} does not divide")
    return restorer


def load_synthesizer(run: Path, option: str, *, steps: int, prompt: str = "") -> Synthesizer:
    """The synthesizer of a run of semantic synthesis.

    Args:
        option: that names the run, for messages.
        prompt: of all tiles.
    Raises:
        UserError: there is none, it is of another task, or it does not load.
    """
    palette = palette_of(run, option)
    pipeline, _ = load_pipeline(run, option, _KINDS)
    _facts(run, option, "semantic_synthesis")
    return PipelineSynthesizer(pipeline, steps, prompt, palette=palette)


def palette_of(run: Path, option: str) -> dict[str, list[int]]:
    """The colours of a run's masks: [r, g, b] of every class by its name, and of what has none as NO_CLASS.

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
    """The class number of every colour 0xRRGGBB of a palette; 255 of what has no class."""
    names = class_names(palette)
    numbers = {}
    for name, (red, green, blue) in palette.items():
        numbers[red << 16 | green << 8 | blue] = IGNORED if name == NO_CLASS else names.index(name)
    return numbers


def _facts(run: Path, option: str, task: str) -> dict[str, Any]:
    """The inputs that a run's training had, {} where it does not say.

    Raises:
        UserError: it was a training for another task.
    """
    facts = read_json(run / COMPLETE) if (run / COMPLETE).is_file() else {}
    if facts.get("stage", task) != task:
        raise UserError(f"{option}={run} is a run of {facts['stage']}: give one of {task}")
    return facts.get("inputs", {})
