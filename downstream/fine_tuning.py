"""The training stage of a task: train a foundation's network, or a new one, as an image-conditioned pipeline.

Its fingerprint contains nothing about evaluation, so other held-out images, encoders, solver steps or metrics never
require a new training.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import nn

from corpus.index import Corpus
from downstream.conditional import (
    NETWORK,
    Parts,
    condition_reader,
    conditional_pipeline,
    conditioned_network,
    encode_condition,
    for_raw_condition,
    load_parts,
    weights_digest,
)
from downstream.controlnet import CONTROLNET, new_controlnet, steered_loss, steered_pipeline
from downstream.corpora import corpus_of, held_out_images, training_rows
from downstream.measured_task import measure_run
from downstream.task import Task
from eval.models import SNAPSHOT, SNAPSHOTS
from runtime.artefacts import is_main_process, read_json, stage, write_json
from runtime.errors import UserError
from runtime.tracking import Tracker, track
from train.components import first_process_decides, make_accelerator
from train.foundation import objective_of
from train.latents import cached_latents
from train.loop import Batch, ComputeLoss, DrawBatch, LoopOptions, Modules, train_loop
from train.measured_run import TRAINING
from train.networks import diffusion_loss
from train.objective import Objective
from train.text_encoder import encode_prompts

CHECKPOINTS = "checkpoints"


def fine_tune(cfg: DictConfig, task: Task, foundation: Path | None, name: str) -> Path:
    """Train a task's network from a foundation run, or from scratch (None), and measure it on held-out images.

    Foundation and scratch have the same shape, data, steps, batches and noise. The only difference is
    `downstream.extra_steps`, which apply to scratch only.

    Args:
        name: name of the foundation's pruning method, or `scratch`.
    Returns:
        runs/<task>/<fingerprint>/ with pipeline/, training.json and the results of measuring: summary.json, samples/.
    Raises:
        UserError: the foundation is invalid or does not fit the corpus.
    """
    objective_of(cfg)  # contradictory options are reported before anything is computed
    corpus = corpus_of(cfg, "train")
    parts = load_parts(cfg, foundation, corpus)
    _check_sides(corpus, held_out_images(cfg).corpus)
    options = loop_options(cfg, foundation)

    def build(directory: Path) -> None:
        with track(cfg, task.name, name) as tracker:
            _train(_Run(cfg, task, name, corpus, parts, options, directory, tracker))
            measure_run(cfg, task, directory, tracker)
            if is_main_process():  # four times the network's size, and no longer needed
                shutil.rmtree(directory / CHECKPOINTS)

    inputs = training_inputs(cfg, task, name, corpus, parts, options)
    directory = stage(
        cfg.runs,
        task.name,
        inputs,
        build,
        resumable=True,
        together=first_process_decides(cfg),
        code="downstream",
    )
    # cached if just built; measured again if the evaluation options have changed since the build
    measure_run(cfg, task, directory, Tracker())
    return directory


def loop_options(cfg: DictConfig, foundation: Path | None) -> LoopOptions:
    """Length and speed of a task's training; `downstream.extra_steps` are added if there is no foundation."""
    options = LoopOptions(**cfg.downstream.loop, seed=cfg.seed)
    extra = int(cfg.downstream.extra_steps) if foundation is None else 0
    return replace(options, steps=options.steps + extra)


def training_inputs(
    cfg: DictConfig, task: Task, name: str, corpus: Corpus, parts: Parts, options: LoopOptions
) -> dict[str, Any]:
    """Everything that the trained network depends on, for its fingerprint."""
    settings = cfg.downstream
    return {
        "condition": task.metadata,
        "name": name,
        "network": weights_digest(parts.unet) if parts.unet is not None else cfg.model,
        "autoencoder": weights_digest(parts.autoencoder),
        "text_encoder": weights_digest(parts.text_encoder),
        "corpus": corpus.fingerprint,
        "settings": [settings.training_images, settings.condition_dropout, task.captioned],
        "lengths": snapshot_steps(cfg, options),
        "loop": {**settings.loop, "steps": options.steps},
        "train": [cfg.train.objective, cfg.train.flow_shift, cfg.train.mixed_precision],
        "seed": cfg.seed,
    }


def _check_sides(corpus: Corpus, held_out: Corpus) -> None:
    if corpus.resolution != held_out.resolution:
        raise UserError(
            f"images of {corpus.resolution} px are trained on, but the held-out ones have {held_out.resolution} px: "
            "give both splits of the corpus the same resolution"
        )


@dataclass(frozen=True)
class _Run:
    """The inputs of one training."""

    cfg: DictConfig
    task: Task
    name: str
    corpus: Corpus
    parts: Parts
    options: LoopOptions
    directory: Path
    tracker: Tracker


def _train(run: _Run) -> None:
    """Train, and write the pipeline and training.json to the run's directory."""
    cfg, objective = run.cfg, objective_of(run.cfg)
    accelerator = make_accelerator(cfg)
    for part in (run.parts.autoencoder, run.parts.text_encoder):
        part.to(accelerator.device)
    examples = _examples(run)
    name, network = _new_network(run, examples)
    training = {
        "method": run.name,
        "foundation": None if run.parts.foundation is None else str(run.parts.foundation),
        "steps": run.options.steps,
        "training_images": len(examples.latents),
        "images_seen": run.options.steps * run.options.batch_size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "seed": cfg.seed,
    }
    best = train_loop(
        accelerator,
        {name: network},
        _batches(run, examples, objective),
        _loss(run, objective, accelerator),
        run.options,
        run.directory,
        label=f"{run.task.name} {run.name}",
        snapshots=snapshot_steps(cfg, run.options),
        on_snapshot=partial(_keep_snapshot, run, accelerator),
        log=run.tracker.log,
    )
    if accelerator.is_main_process:
        _finish(run, accelerator, best[name], objective, training)
    accelerator.wait_for_everyone()  # all processes measure the pipeline that the first one writes


def _new_network(run: _Run, examples: Examples) -> tuple[str, nn.Module]:
    """The network to train, and its name in the pipeline."""
    cfg, parts = run.cfg, run.parts
    if run.task.controls:
        channels = [condition.shape[1] for condition in examples.conditions_of(np.arange(1))]
        return CONTROLNET, new_controlnet(parts, *channels, seed=cfg.seed)
    return NETWORK, conditioned_network(cfg, parts, examples.latents.shape[1:], examples.prompts.shape[-1])


def _batches(run: _Run, examples: Examples, objective: Objective) -> DrawBatch:
    if len(run.task.controls) > 1:
        return steered_batches(examples, objective, run.options.batch_size, run.task.control_dropout)
    return conditioned_batches(examples, objective, run.options.batch_size, _dropout(run))


def _loss(run: _Run, objective: Objective, accelerator: Accelerator) -> ComputeLoss:
    if not run.task.controls:
        return conditioned_loss(objective)
    frozen = run.parts.unet.to(accelerator.device).eval().requires_grad_(False)

    def loss(modules: Modules, batch: Batch) -> torch.Tensor:
        if len(run.task.controls) == 1:
            return steered_loss(modules[CONTROLNET], frozen, objective, *batch)
        *rest, scales = batch
        return steered_loss(modules[CONTROLNET], frozen, objective, *rest, scales=scales)

    return loss


@dataclass(frozen=True)
class Examples:
    """The training data of a task's network.

    Attributes:
        latents: float32 [K, C, h, w] of unit scale, of the images or of their difference to the conditions.
        conditions_of: (numbers of images, int64 [B]) -> their conditions, each float32 [B, C', h, w] or [B, C', H, W].
        prompts: [T + 1, L, D], hidden states of the captions' texts; the last row is the empty text.
        caption_of: int64 [K], row of an image's caption in `prompts`.
    """

    latents: np.ndarray
    conditions_of: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    prompts: torch.Tensor
    caption_of: np.ndarray


def _examples(run: _Run) -> Examples:
    cfg, corpus, parts = run.cfg, run.corpus, run.parts
    rows = training_rows(corpus, cfg.downstream.training_images, cfg.seed)
    latents = _latents(cfg, corpus, rows, parts.autoencoder)
    if controls := run.task.controls:
        captions = run.task.texts(corpus, rows)

        def conditions_of(numbers: np.ndarray) -> tuple[np.ndarray, ...]:
            return tuple(control(corpus, rows[numbers]) for control in controls.values())
    else:
        pictures, captions = run.task.training_examples(corpus, rows)
        conditions = _conditions(cfg, run.task, corpus, rows, pictures, parts.autoencoder)
        latents = latents - conditions if run.task.relative else latents

        def conditions_of(numbers: np.ndarray) -> tuple[np.ndarray, ...]:
            return (conditions[numbers],)

    texts, caption_of = np.unique(np.asarray(captions, dtype=str), return_inverse=True)
    # the last row is the empty caption, for classifier-free guidance
    prompts = encode_prompts(parts.text_encoder, parts.tokenizer, [*texts, ""])
    return Examples(latents, conditions_of, prompts, caption_of)


def _latents(cfg: DictConfig, corpus: Corpus, rows: np.ndarray, autoencoder: nn.Module) -> np.ndarray:
    """Unit-scale latents of images, float32 [K, C, h, w]; the means for a variational autoencoder. Cached on disk."""
    result = cached_latents(autoencoder, weights_digest(autoencoder), corpus, rows, cfg.runs)[0]
    return result[:, : autoencoder.config.latent_channels]


def _conditions(
    cfg: DictConfig, task: Task, corpus: Corpus, rows: np.ndarray, pictures: np.ndarray, autoencoder: nn.Module
) -> np.ndarray:
    """Unit-scale latents of condition pictures, float32 [K, C, h, w]; cached on disk."""

    def build(directory: Path) -> None:
        reader, scale = condition_reader(autoencoder, task.encoder)
        np.save(directory / "latents.npy", (encode_condition(reader, pictures) * scale).numpy())

    inputs = {
        "corpus": corpus.fingerprint,
        "rows": rows.tolist(),
        "autoencoder": weights_digest(autoencoder),
        "of": [task.name, task.metadata],
    }
    return np.load(stage(cfg.runs, "condition_latents", inputs, build) / "latents.npy")


@dataclass(frozen=True)
class Dropout:
    """The inputs that are hidden from the network in training.

    Attributes:
        condition: probability that a whole condition is blanked; half of these images lose their caption too, so that
            classifier-free guidance by the condition is possible.
        channel: probability that each channel of a condition is blanked.
        mean_fraction: fraction of the images that are pure noise.
    """

    condition: float = 0.0
    channel: float = 0.0
    mean_fraction: float = 0.0


def conditioned_batches(examples: Examples, objective: Objective, size: int, dropout: Dropout) -> DrawBatch:
    """Batches of `size` images for `train_loop`: latents, hidden states, noise, times, condition latents.

    The shapes are [B, C, h, w], [B, L, D], [B, C, h, w], [B] and [B, C', h, w].
    """
    shape, empty = examples.latents.shape[1:], len(examples.prompts) - 1
    channels = examples.conditions_of(np.arange(1))[0].shape[1]

    def draw(random: np.random.Generator, part: slice) -> Batch:
        picked = random.integers(len(examples.latents), size=size)
        noise, times, dropped = objective.draw(random, (size, *shape))
        times[torch.from_numpy(random.random(size) < dropout.mean_fraction)] = objective.last_time
        chance = random.random(size)
        caption = torch.from_numpy(examples.caption_of[picked])
        caption[dropped | torch.from_numpy(chance < dropout.condition / 2)] = empty
        shown = (chance >= dropout.condition)[:, None] & (random.random((size, channels)) >= dropout.channel)
        rows = picked[part]
        condition = examples.conditions_of(rows)[0] * shown[part, :, None, None].astype(np.float32)
        latents, text = torch.from_numpy(examples.latents[rows]), examples.prompts[caption[part]]
        return latents, text, noise[part], times[part], torch.from_numpy(condition)

    return draw


def steered_batches(examples: Examples, objective: Objective, size: int, dropout: float) -> DrawBatch:
    """Batches for several ControlNets: latents, hidden states, noise, times, every condition, and their scales [B, n].

    Args:
        dropout: probability that each scale is 0, independently of the others; otherwise it is 1.
    """
    shape, empty = examples.latents.shape[1:], len(examples.prompts) - 1
    count = len(examples.conditions_of(np.arange(1)))

    def draw(random: np.random.Generator, part: slice) -> Batch:
        picked = random.integers(len(examples.latents), size=size)
        noise, times, dropped = objective.draw(random, (size, *shape))
        caption = torch.from_numpy(examples.caption_of[picked])
        caption[dropped] = empty
        scales = torch.from_numpy((random.random((size, count)) >= dropout).astype(np.float32))
        rows = picked[part]
        conditions = map(torch.from_numpy, examples.conditions_of(rows))
        latents, text = torch.from_numpy(examples.latents[rows]), examples.prompts[caption[part]]
        return latents, text, noise[part], times[part], *conditions, scales[part]

    return draw


def conditioned_loss(objective: Objective) -> ComputeLoss:
    """The loss of a batch of `conditioned_batches`."""

    def loss(modules: Modules, batch: Batch) -> torch.Tensor:
        *rest, condition = batch
        return diffusion_loss(modules[NETWORK], objective, *rest, condition=condition)

    return loss


def _dropout(run: _Run) -> Dropout:
    return Dropout(float(run.cfg.downstream.condition_dropout), run.task.channel_dropout, run.task.mean_fraction)


def snapshot_steps(cfg: DictConfig, options: LoopOptions) -> list[int]:
    """Steps of `downstream.lengths` below the last one; the averaged network is kept after each."""
    return sorted({int(step) for step in cfg.downstream.lengths if 0 < step < options.steps})


def _keep_snapshot(
    run: _Run, accelerator: Accelerator, step: int, mean_loss: float, seconds: float, modules: Modules
) -> None:
    """Save the averaged network in the pipeline's format in its own folder, renamed when complete."""
    if accelerator.is_main_process:
        images_seen = step * run.options.batch_size
        folder = run.directory / SNAPSHOTS / f"{images_seen:012d}"
        partial_folder = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        if not run.task.controls:
            _, scale = condition_reader(run.parts.autoencoder, run.task.encoder)
            for_raw_condition(modules[NETWORK], scale).save_pretrained(partial_folder / NETWORK)
        else:
            modules[CONTROLNET].save_pretrained(str(partial_folder / CONTROLNET))
        metadata = {"step": step, "images_seen": images_seen, "seconds": round(seconds, 2), "loss": mean_loss}
        write_json(partial_folder / SNAPSHOT, metadata)
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)
    accelerator.wait_for_everyone()


def _finish(
    run: _Run, accelerator: Accelerator, network: nn.Module, objective: Objective, training: dict[str, Any]
) -> None:
    """Save the pipeline, the task's files and facts about the training."""
    trained = accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    scheduler = objective.scheduler(run.cfg.train.flow_shift)
    if not run.task.controls:
        pipeline = conditional_pipeline(run.parts, trained, scheduler, run.task.encoder)
    else:
        pipeline = steered_pipeline(run.parts, trained, scheduler)
    pipeline.save_pretrained(run.directory / "pipeline")
    for file, content in run.task.files.items():
        write_json(run.directory / file, content)
    last = read_json(run.directory / CHECKPOINTS / f"{run.options.steps:08d}" / "state.json")
    metadata = {"seconds": round(last["seconds"], 2), "loss": float(np.mean(last["losses"]))}
    write_json(run.directory / TRAINING, {**training, **metadata})
