"""The training stage of a task: a foundation's network, or a new one, to an image-conditioned pipeline.

Its fingerprint holds nothing of evaluation: other held-out images, encoders, solver steps or metrics never train again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import nn

from corpus.index import Corpus
from downstream.conditional import (
    Parts,
    conditional_pipeline,
    conditioned_network,
    encode_condition,
    load_parts,
    weights_digest,
)
from downstream.corpora import corpus_of, held_out_images, training_rows
from downstream.measured_task import measure_run
from downstream.task import Task
from runtime.artefacts import is_main_process, read_json, stage, write_json
from runtime.errors import UserError
from runtime.tracking import Tracker, track
from train.components import first_process_says, make_accelerator
from train.foundation import objective_of
from train.latents import cached_latents
from train.loop import Batch, ComputeLoss, DrawBatch, LoopOptions, Modules, train_loop
from train.measured_run import TRAINING
from train.networks import diffusion_loss
from train.objective import Objective
from train.text_encoder import encode_prompts

NETWORK = "unet"
CHECKPOINTS = "checkpoints"


def fine_tune(cfg: DictConfig, task: Task, foundation: Path | None, name: str) -> Path:
    """Train a task's network from a foundation run, or from nothing (None), and measure it on held-out images.

    Foundation and scratch share shape, data, steps, batches and all noise, but for `downstream.extra_steps`, which
    scratch alone gets.

    Args:
        name: of the foundation's pruning method, or `scratch`.
    Returns:
        runs/<task>/<fingerprint>/ with pipeline/, training.json and what measuring leaves: summary.json, samples/.
    Raises:
        UserError: the foundation is none, or does not fit the corpus.
    """
    objective_of(cfg)  # what does not go together is said before anything is computed
    corpus = corpus_of(cfg, "train")
    parts = load_parts(cfg, foundation, corpus)
    _check_sides(corpus, held_out_images(cfg).corpus)
    options = loop_options(cfg, foundation)

    def build(directory: Path) -> None:
        with track(cfg, task.name, name) as tracker:
            _train(_Run(cfg, task, name, corpus, parts, options, directory, tracker))
            measure_run(cfg, task, directory, tracker)
            if is_main_process():  # four times the network's size, and of no more use
                shutil.rmtree(directory / CHECKPOINTS)

    inputs = training_inputs(cfg, task, name, corpus, parts, options)
    directory = stage(
        cfg.runs,
        task.name,
        inputs,
        build,
        resumable=True,
        together=first_process_says(cfg),
        code="downstream",
    )
    # found in the cache just after the build; anew where what it is measured with has changed since
    measure_run(cfg, task, directory, Tracker())
    return directory


def loop_options(cfg: DictConfig, foundation: Path | None) -> LoopOptions:
    """How long and how fast a task is trained."""
    options = LoopOptions(**cfg.downstream.loop, seed=cfg.seed)
    extra = int(cfg.downstream.extra_steps) if foundation is None else 0
    return replace(options, steps=options.steps + extra)


def training_inputs(
    cfg: DictConfig, task: Task, name: str, corpus: Corpus, parts: Parts, options: LoopOptions
) -> dict[str, Any]:
    """All that the trained network depends on, for its fingerprint."""
    settings = cfg.downstream
    return {
        "condition": task.facts,
        "name": name,
        "network": weights_digest(parts.unet) if parts.unet is not None else cfg.model,
        "autoencoder": weights_digest(parts.autoencoder),
        "text_encoder": weights_digest(parts.text_encoder),
        "corpus": corpus.fingerprint,
        "settings": [settings.training_images, settings.condition_dropout, task.captioned],
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
    """What one training is made of."""

    cfg: DictConfig
    task: Task
    name: str
    corpus: Corpus
    parts: Parts
    options: LoopOptions
    directory: Path
    tracker: Tracker


def _train(run: _Run) -> None:
    """Train, and leave the pipeline and training.json in the run's directory."""
    cfg, objective = run.cfg, objective_of(run.cfg)
    accelerator = make_accelerator(cfg)
    for part in (run.parts.autoencoder, run.parts.text_encoder):
        part.to(accelerator.device)
    examples = _examples(run)
    unet = conditioned_network(cfg, run.parts, examples.latents.shape[1:], examples.prompts.shape[-1])
    training = {
        "method": run.name,
        "foundation": None if run.parts.foundation is None else str(run.parts.foundation),
        "steps": run.options.steps,
        "training_images": len(examples.latents),
        "images_seen": run.options.steps * run.options.batch_size,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "seed": cfg.seed,
    }
    best = train_loop(
        accelerator,
        {NETWORK: unet},
        conditioned_batches(examples, objective, run.options.batch_size, cfg.downstream.condition_dropout),
        conditioned_loss(objective),
        run.options,
        run.directory,
        label=f"{run.task.name} {run.name}",
        log=run.tracker.log,
    )
    if accelerator.is_main_process:
        _finish(run, accelerator, best[NETWORK], objective, training)
    accelerator.wait_for_everyone()  # all of them measure the pipeline that the first one has written


@dataclass(frozen=True)
class Examples:
    """What a task's network learns from.

    Attributes:
        latents, conditions: float32 [K, C, h, w] of unit scale, of the images and of their condition images.
        prompts: [T + 1, L, D], hidden states of the captions' texts; the last row is the empty text.
        caption_of: int64 [K], row of an image's caption in `prompts`.
    """

    latents: np.ndarray
    conditions: np.ndarray
    prompts: torch.Tensor
    caption_of: np.ndarray


def _examples(run: _Run) -> Examples:
    cfg, corpus, parts = run.cfg, run.corpus, run.parts
    rows = training_rows(corpus, cfg.downstream.training_images, cfg.seed)
    latents, conditions = _encoded(cfg, run.task, corpus, rows, parts.autoencoder)
    captions = corpus.manifest["caption"].to_numpy(dtype=str)[rows] if run.task.captioned else np.full(len(rows), "")
    texts, caption_of = np.unique(captions, return_inverse=True)
    # the last row is the empty caption, for classifier-free guidance
    prompts = encode_prompts(parts.text_encoder, parts.tokenizer, [*texts, ""])
    return Examples(latents, conditions, prompts, caption_of)


def _encoded(
    cfg: DictConfig, task: Task, corpus: Corpus, rows: np.ndarray, autoencoder: nn.Module
) -> tuple[np.ndarray, np.ndarray]:
    """Unit-scale latents of images and of their condition images, float32 [K, C, h, w] each; kept on disk."""
    key = weights_digest(autoencoder)

    def build(directory: Path) -> None:
        raw = encode_condition(autoencoder, task.condition(corpus, rows))
        np.save(directory / "latents.npy", (raw * autoencoder.config.scaling_factor).numpy())

    inputs = {"corpus": corpus.fingerprint, "rows": rows.tolist(), "autoencoder": key, "of": [task.name, task.facts]}
    folder = stage(cfg.runs, "condition_latents", inputs, build)
    latents = cached_latents(autoencoder, key, corpus, rows, cfg.runs)[0]
    channels = autoencoder.config.latent_channels  # of a variational one, the means
    return latents[:, :channels], np.load(folder / "latents.npy")


def conditioned_batches(examples: Examples, objective: Objective, size: int, condition_dropout: float) -> DrawBatch:
    """Batches of `size` images for `train_loop`: latents, hidden states, noise, times, condition latents.

    Args:
        condition_dropout: chance of a condition to be blanked, so that images can be guided by their conditions.
    """
    shape, empty = examples.latents.shape[1:], len(examples.prompts) - 1

    def draw(random: np.random.Generator, part: slice) -> Batch:
        picked = random.integers(len(examples.latents), size=size)
        noise, times, dropped = objective.draw(random, (size, *shape))
        caption = torch.from_numpy(examples.caption_of[picked])
        caption[dropped] = empty
        blank = random.random(size) < condition_dropout
        rows = picked[part]
        condition = np.where(blank[part, None, None, None], np.float32(0), examples.conditions[rows])
        latents, text = torch.from_numpy(examples.latents[rows]), examples.prompts[caption[part]]
        return latents, text, noise[part], times[part], torch.from_numpy(condition)

    return draw


def conditioned_loss(objective: Objective) -> ComputeLoss:
    """The loss of such a batch."""

    def loss(modules: Modules, batch: Batch) -> torch.Tensor:
        *rest, condition = batch
        return diffusion_loss(modules[NETWORK], objective, *rest, condition=condition)

    return loss


def _finish(
    run: _Run, accelerator: Accelerator, network: nn.Module, objective: Objective, training: dict[str, Any]
) -> None:
    """Save the pipeline, the task's files and what the training was."""
    trained = accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    pipeline = conditional_pipeline(run.parts, trained, objective.scheduler(run.cfg.train.flow_shift))
    pipeline.save_pretrained(run.directory / "pipeline")
    for file, content in run.task.files.items():
        write_json(run.directory / file, content)
    last = read_json(run.directory / CHECKPOINTS / f"{run.options.steps:08d}" / "state.json")
    facts = {"seconds": round(last["seconds"], 2), "loss": float(np.mean(last["losses"]))}
    write_json(run.directory / TRAINING, {**training, **facts})
