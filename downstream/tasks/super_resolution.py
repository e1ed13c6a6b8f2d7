"""Super-resolution: from a low-resolution image, enlarged bicubically, to the image from which it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from omegaconf import DictConfig
from torch import nn

from corpus.index import Corpus
from downstream.conditional import weights_digest
from downstream.corpora import corpus_of
from downstream.degradation import Degradation, add_noise, check_factor, degradation_of, degrade, reduce
from downstream.interpolation import enlarge
from downstream.restoration import Restoration, Restorer, rebuilt_inputs
from downstream.task import Task
from eval.held_out import HeldOut
from eval.restoration import correctness_maps
from report.figures import CORRECTNESS, correctness_pictures
from runtime.artefacts import plain, process_count, stage
from runtime.errors import UserError

#: What the network draws: the difference between the image's latents and those of the interpolated input, or the
#: image's latents.
TARGETS = ("difference", "image")
#: Methods without a network.
BASELINES = ("nearest", "bicubic", "lanczos")
METRICS = (
    *("fd", "kid_x1000", "feature_distance", "lpips", "niqe"),
    *("psnr", "ssim", "psnr_y", "ssim_y"),
    *("consistency", "colour_error", "reflectance", "spectral", "spatial"),
    *("synthesis", "hallucination", "omission", "improvement", "spread"),
)
#: Second part of the seed of the noise on training images.
NOISE_STREAM = 41


def make_task(cfg: DictConfig) -> Task:
    """Make the task from the options `downstream.super_resolution`.

    Raises:
        UserError: the factor does not divide the side of the images, or an option is out of its range.
    """
    settings = cfg.downstream.super_resolution
    factor, degradation = int(settings.factor), degradation_of(cfg)
    side = corpus_of(cfg, "train").resolution
    check_factor(factor, side, side)
    options, levels = restoration_of(cfg), _noise_levels(settings.noise_levels)

    def low(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
        return degrade(corpus.images[rows], factor, degradation, rows)

    def held_low(held: HeldOut) -> np.ndarray:
        return low(held.corpus, held.rows)

    def condition(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
        return enlarge(low(corpus, rows), factor, "bicubic")

    def inputs(held: HeldOut) -> dict[str, np.ndarray]:
        small = held_low(held)
        return {f"input, {small.shape[1]} px": small, "bicubic": enlarge(small, factor, "bicubic")}

    def examples(corpus: Corpus, rows: np.ndarray) -> tuple[np.ndarray, Sequence[str]]:
        return _examples(low(corpus, rows), rows, levels, factor, task.texts(corpus, rows), int(cfg.seed))

    def draw(pipeline: DiffusionPipeline, corpus: Corpus, rows: np.ndarray, noise: np.ndarray) -> np.ndarray:
        restorer = Restorer(pipeline, factor, int(cfg.downstream.steps), options)
        texts = [with_level(text, levels, 0) for text in task.texts(corpus, rows)]
        small = low(corpus, rows)
        key = {"corpus": corpus.fingerprint, "rows": rows.tolist(), "degradation": plain(degradation)}
        cached = options.residual and process_count() == 1  # several processes draw different rows
        rebuilt = _rebuilt(pipeline.vae, enlarge(small, factor, "bicubic"), key, cfg.runs) if cached else None
        return restorer(small, noise, texts, "draw super_resolution", rebuilt).round().astype(np.uint8)

    task = Task(
        name="super_resolution",
        condition=condition,
        metadata=_metadata(cfg, degradation, levels),
        captioned=bool(settings.captioned),
        metrics=METRICS,
        curve=("kid_x1000", "feature_distance", "psnr"),
        inputs=inputs,
        baselines={kind: lambda held, kind=kind: enlarge(held_low(held), factor, kind) for kind in BASELINES},
        examples=examples if levels != (0,) else None,
        mean_fraction=float(settings.mean_fraction),
        draw=draw,
        draw_metadata={"restoration": options},
        samples=options.noises,
        relative=options.relative,
        measured=partial(_measured, held_low, factor, options.kind),
        maps=partial(_maps, held_low, factor),
        legend=CORRECTNESS,
    )
    return task


def _rebuilt(vae: nn.Module, enlarged: np.ndarray, key: Mapping[str, Any], runs: str) -> np.ndarray:
    """The result of `rebuilt_inputs`; cached, because it is the same for all networks with one autoencoder."""

    def build(directory: Path) -> None:
        np.save(directory / "images.npy", rebuilt_inputs(vae, enlarged))

    inputs = {"autoencoder": weights_digest(vae), "side": enlarged.shape[1], **key}
    return np.load(stage(runs, "rebuilt_inputs", inputs, build) / "images.npy", mmap_mode="r")


def _metadata(cfg: DictConfig, degradation: Degradation, levels: Sequence[int]) -> dict[str, Any]:
    return {
        "factor": int(cfg.downstream.super_resolution.factor),
        "degradation": plain(degradation),
        "noise_levels": list(levels),
        "mean_fraction": float(cfg.downstream.super_resolution.mean_fraction),
        "target": str(cfg.downstream.super_resolution.target),
    }


def restoration_of(cfg: DictConfig) -> Restoration:
    """How outputs are computed, from the options `downstream.super_resolution`.

    The consistency step needs a known reduction. For the blind degradation it assumes area means, as of a sensor with
    larger pixels.

    Raises:
        UserError: an option is out of its range.
    """
    settings = cfg.downstream.super_resolution
    kind = "area" if settings.degradation == "blind" else str(settings.degradation)
    rounds = settings.consistency
    if rounds is None:
        rounds = 0 if settings.degradation == "blind" else 3
    if settings.target not in TARGETS:
        raise UserError(f"downstream.super_resolution.target={settings.target}: give one of {', '.join(TARGETS)}")
    return Restoration(
        dial=float(settings.dial),
        samples=int(settings.samples),
        mean_draws=int(settings.mean_draws),
        residual=bool(settings.residual),
        consistency=int(rounds),
        kind=kind,
        relative=settings.target == "difference",
    )


def _noise_levels(levels: Any) -> tuple[int, ...]:
    """Standard deviations of the noise on training inputs in grey levels, ascending, without repetitions.

    Raises:
        UserError: `levels` is not a list of whole numbers of at least 0.
    """
    result = plain(levels)
    if not isinstance(result, list) or not result or not all(isinstance(level, int) and level >= 0 for level in result):
        raise UserError(
            f"downstream.super_resolution.noise_levels={result}: give a list of grey levels, such as [0,4,8]"
        )
    return tuple(sorted(set(result)))


def with_level(text: str, levels: Sequence[int], level: int) -> str:
    """The text with the noise level of its image; unchanged for a network that was trained without noise."""
    return text if tuple(levels) == (0,) else f"noise {level} {text}".strip()


def _examples(
    low: np.ndarray, rows: np.ndarray, levels: Sequence[int], factor: int, texts: Sequence[str], seed: int
) -> tuple[np.ndarray, Sequence[str]]:
    """Condition pictures and texts of training images, with noise-level augmentation.

    Each image gets noise of a random level, and its text names the level (Ho et al. 2022, Cascaded Diffusion Models,
    section 4.2).
    """
    generator = np.random.default_rng([seed, NOISE_STREAM, len(rows)])
    chosen = np.asarray(levels)[generator.integers(len(levels), size=len(rows))]
    noisy = add_noise(low, chosen, generator)
    given = [with_level(text, levels, level) for text, level in zip(texts, chosen.tolist(), strict=True)]
    return enlarge(noisy, factor, "bicubic"), given


def _measured(held_low: Any, factor: int, kind: str, held: HeldOut, outputs: np.ndarray) -> Mapping[str, np.ndarray]:
    """Inputs of the metrics that compare an output with its low-resolution input."""
    small = held_low(held)
    degraded = reduce(np.asarray(outputs, dtype=np.float32), factor, kind)
    return {"low": small, "degraded": degraded, "enlarged": enlarge(small, factor, "bicubic")}


def _maps(held_low: Any, factor: int, held: HeldOut, outputs: np.ndarray) -> dict[str, np.ndarray]:
    """Pictures that show where detail is invented, missing or correct."""
    fractions = correctness_maps(outputs, held.images, enlarge(held_low(held), factor, "bicubic"))
    return {"correctness": correctness_pictures(fractions)}
