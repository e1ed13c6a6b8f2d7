"""Image-conditioned latent diffusion, the part that both downstream tasks share.

The U-Net sees the condition picture's latents beside the noisy ones (Brooks et al. 2023, InstructPix2Pix, section 3.2)
and is saved as a StableDiffusionInstructPix2PixPipeline. That pipeline feeds the autoencoder's raw latents, not
multiplied by `scaling_factor`. Training feeds latents of unit scale, at which Adam's steps fit all inputs alike, and
the factor goes into the first convolution's weights when the pipeline is saved: the same function.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from corpus.index import Corpus, index_corpus
from encoders.pixels import to_tensor
from eval.generate import generate
from eval.held_out import HeldOut
from prune.selection import method_name
from report.figures import comparison_sheet
from runtime.artefacts import plain, read_json, stage, write_json
from runtime.errors import UserError
from runtime.progress import progress
from runtime.tracking import Tracker, track
from train.components import first_process_says, load_autoencoder, load_text_parts, make_accelerator
from train.foundation import held_out, objective_of, pretrain
from train.latents import cached_latents, scene_balanced_weights
from train.loop import Batch, LoopOptions, Modules, train_loop
from train.networks import diffusion_loss, new_unet
from train.objective import prediction_of
from train.text_encoder import encode_prompts

#: Columns of a sample sheet, and images kept for the report.
SHOWN = 12


@dataclass(frozen=True)
class Task:
    """What sets one image-conditioned task apart.

    Args:
        name: of the stage and of the table.
        facts: what the condition pictures depend on beside the corpus, for fingerprints.
        condition: (corpus, rows) -> the pictures the network is conditioned on, uint8 [K, R, R, 3].
        measure: (outputs uint8 [N, R, R, 3], held-out images) -> metrics.
        inputs: (held-out images) -> labelled rows of the sample sheet above the output; inputs.npy is the first.
        yardstick: what `measure` depends on, for fingerprints.
        files: further JSON files of the run, by name.
    """

    name: str
    facts: Mapping[str, Any]
    condition: Callable[[Corpus, np.ndarray], np.ndarray]
    measure: Callable[[np.ndarray, HeldOut], dict[str, float]]
    inputs: Callable[[HeldOut], dict[str, np.ndarray]]
    yardstick: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """A foundation model taken apart; `unet` is None where the network starts from nothing."""

    unet: UNet2DConditionModel | None
    autoencoder: nn.Module
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer


def resolve_foundation(cfg: DictConfig) -> tuple[Path | None, str]:
    """The run that `foundation` names and the method it stands for; null pretrains one, `scratch` is none.

    Raises:
        UserError: the folder is no pretraining run.
    """
    if cfg.foundation is None:
        name = method_name()
        return pretrain(cfg, name), name
    if str(cfg.foundation) == "scratch":
        return None, "scratch"
    directory = Path(cfg.foundation)
    _pipeline_folder(directory)
    summary = directory / "summary.json"
    return directory, read_json(summary)["method"] if summary.is_file() else directory.resolve().name


def _pipeline_folder(directory: Path) -> Path:
    """The text-to-image pipeline of a pretraining run, or the folder itself where it is such a pipeline."""
    for folder in (directory / "pipeline", directory):
        index = folder / "model_index.json"
        kind = json.loads(index.read_text()).get("_class_name") if index.is_file() else None
        if kind == "StableDiffusionPipeline":
            return folder
        if kind is not None:
            raise UserError(
                f"foundation={directory} is no pretraining run of a U-Net, but a {kind}: "
                "give a run of model=ldm_tiny, ldm_small or ldm_base"
            )
    raise UserError(
        f"foundation={directory} is no pretraining run: give the directory that `python train/pretrain.py` prints "
        "(run: DIR), foundation=null to pretrain one now, or foundation=scratch to start from nothing"
    )


def load_parts(cfg: DictConfig, foundation: Path | None, corpus: Corpus) -> Parts:
    """All of a foundation run's networks, or from scratch the configured frozen ones.

    Raises:
        UserError: the folder is no pretraining run, or its pipeline does not load.
    """
    if foundation is None:
        autoencoder, _ = load_autoencoder(cfg)
        text = load_text_parts(cfg, corpus)
        return Parts(None, autoencoder, text.text_encoder, text.tokenizer)
    folder = _pipeline_folder(foundation)
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"foundation={foundation} does not load: {reason}") from error
    learned = prediction_of(pipeline.scheduler)
    if learned != cfg.train.objective.prediction:
        raise UserError(
            f"foundation={foundation} predicts {learned}, train.objective.prediction={cfg.train.objective.prediction} "
            f"asks for another: give train.objective.prediction={learned}"
        )
    for part in (pipeline.vae, pipeline.text_encoder):
        part.eval().requires_grad_(False)
    return Parts(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)


def weights_digest(module: nn.Module) -> str:
    """16 hex digits of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def widen(unet: UNet2DConditionModel, condition_channels: int) -> UNet2DConditionModel:
    """The same network with further input channels, which it ignores until it has learned otherwise (zero weights)."""
    with torch.random.fork_rng():
        wide = UNet2DConditionModel.from_config(unet.config, in_channels=unet.config.in_channels + condition_channels)
    state = unet.state_dict()
    known = state["conv_in.weight"]
    added = known.new_zeros(len(known), condition_channels, *known.shape[2:])
    state["conv_in.weight"] = torch.cat([known, added], dim=1)
    wide.load_state_dict(state)
    return wide


@torch.no_grad()
def for_raw_condition(unet: UNet2DConditionModel, scaling_factor: float) -> UNet2DConditionModel:
    """A copy that takes the condition's raw latents where the given network took them at unit scale."""
    unet = copy.deepcopy(unet)
    unet.conv_in.weight[:, unet.config.out_channels :] *= scaling_factor
    return unet


@torch.no_grad()
def encode_condition(autoencoder: nn.Module, pictures: np.ndarray) -> torch.Tensor:
    """Raw latents float32 [N, C, h, w] of uint8 [N, H, W, 3], as the pipeline computes them: the mode, unscaled."""
    device = next(autoencoder.parameters()).device
    parts = []
    for start in progress(range(0, len(pictures), 128), "encode conditions", unit="batch"):
        output = autoencoder.encode(to_tensor(pictures[start : start + 128]).to(device))
        raw = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
        parts.append(raw.float().cpu())
    return torch.cat(parts)


def conditional_pipeline(
    parts: Parts, unet: UNet2DConditionModel, scheduler: SchedulerMixin
) -> StableDiffusionInstructPix2PixPipeline:
    """The parts and a network trained on unit-scale conditions, as a pipeline that loads without any code of ours.

    Call it with `image=` (PIL, or [0, 1] arrays) and guidance_scale=1; larger ones also guide by the image.
    """
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=parts.autoencoder,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=for_raw_condition(unet, parts.autoencoder.config.scaling_factor),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def training_corpus(cfg: DictConfig) -> Corpus:
    return index_corpus(instantiate(cfg.corpus.train), cfg.runs)


def training_rows(corpus: Corpus, size: int, seed: int) -> np.ndarray:
    """Up to `size` different readable rows, every scene with the same chance; int64, ascending."""
    weights = scene_balanced_weights(corpus)
    size = min(size, np.count_nonzero(weights))
    return np.sort(np.random.default_rng([seed, 10]).choice(len(corpus), size, replace=False, p=weights))


def held_out_part(cfg: DictConfig) -> HeldOut:
    """The first `downstream.images` of the balanced held-out set."""
    held, size = held_out(cfg)["balanced"], cfg.downstream.images
    return replace(held, rows=held.rows[:size], features=held.features[:size], captions=held.captions[:size])


def fine_tune(cfg: DictConfig, task: Task, foundation: Path | None, name: str) -> Path:
    """Train a task's network from a foundation run, or from nothing (None), and measure it on held-out images.

    Foundation and scratch share shape, data, steps, batches and all noise.

    Args:
        name: of the foundation's pruning method, or `scratch`.
    Returns:
        runs/<task>/<fingerprint>/ with pipeline/, summary.json, samples/.
    Raises:
        UserError: the foundation is none, or does not fit the corpus.
    """
    objective_of(cfg)  # what does not go together is said before anything is computed
    corpus = training_corpus(cfg)
    parts = load_parts(cfg, foundation, corpus)
    held = held_out_part(cfg)
    settings = cfg.downstream
    inputs = {
        "condition": task.facts,
        "yardstick": task.yardstick,
        "name": name,
        "network": weights_digest(parts.unet) if parts.unet is not None else cfg.model,
        "autoencoder": weights_digest(parts.autoencoder),
        "text_encoder": weights_digest(parts.text_encoder),
        "corpus": corpus.fingerprint,
        "settings": [
            settings.training_images,
            settings.steps,
            settings.condition_dropout,
            settings.captions[task.name],
        ],
        "loop": settings.loop,
        "train": [cfg.train.objective, cfg.train.flow_shift, cfg.train.mixed_precision],
        "held_out": [held.corpus.fingerprint, held.rows.tolist()],
        "noise": cfg.eval.seed,
        "encoder": cfg.eval.encoder,
        "seed": cfg.seed,
    }

    def build(directory: Path) -> None:
        with track(cfg, task.name, name) as tracker:
            _train(cfg, task, name, foundation, corpus, parts, held, directory, tracker)

    together = first_process_says(cfg)
    return stage(cfg.runs, task.name, inputs, build, resumable=True, together=together, code="downstream")


def _cached_latents(
    cfg: DictConfig, task: Task, corpus: Corpus, rows: np.ndarray, autoencoder: nn.Module
) -> tuple[np.ndarray, np.ndarray]:
    """Unit-scale latents of images and of their condition pictures, float32 [K, C, h, w] each; kept on disk."""
    key = weights_digest(autoencoder)

    def conditions(directory: Path) -> None:
        raw = encode_condition(autoencoder, task.condition(corpus, rows))
        np.save(directory / "latents.npy", (raw * autoencoder.config.scaling_factor).numpy())

    inputs = {"corpus": corpus.fingerprint, "rows": rows.tolist(), "autoencoder": key, "of": [task.name, task.facts]}
    folder = stage(cfg.runs, "condition_latents", inputs, conditions)
    latents = cached_latents(autoencoder, key, corpus, rows, cfg.runs)[0]
    channels = autoencoder.config.latent_channels  # of a variational one, the means
    return latents[:, :channels], np.load(folder / "latents.npy")


def _train(
    cfg: DictConfig,
    task: Task,
    name: str,
    foundation: Path | None,
    corpus: Corpus,
    parts: Parts,
    held: HeldOut,
    directory: Path,
    tracker: Tracker,
) -> None:
    settings = cfg.downstream
    accelerator = make_accelerator(cfg)
    for part in (parts.autoencoder, parts.text_encoder):
        part.to(accelerator.device)
    rows = training_rows(corpus, settings.training_images, cfg.seed)
    latents, conditions = _cached_latents(cfg, task, corpus, rows, parts.autoencoder)
    captioned = bool(settings.captions[task.name])
    written = corpus.manifest["caption"].to_numpy(dtype=str)[rows] if captioned else np.full(len(rows), "")
    captions, caption_of = np.unique(written, return_inverse=True)
    # the last row is the empty caption, for classifier-free guidance
    prompts = encode_prompts(parts.text_encoder, parts.tokenizer, [*captions, ""])

    unet = _network(cfg, parts.unet, foundation, latents.shape[1:], prompts.shape[-1], conditions.shape[1])
    options = LoopOptions(**settings.loop, seed=cfg.seed)
    objective = objective_of(cfg)

    def draw_batch(random: np.random.Generator, part: slice) -> Batch:
        picked = random.integers(len(rows), size=options.batch_size)
        noise, times, dropped = objective.draw(random, (options.batch_size, *latents.shape[1:]))
        caption = torch.from_numpy(caption_of[picked])
        caption[dropped] = len(captions)
        blank = random.random(options.batch_size) < settings.condition_dropout
        condition = torch.from_numpy(np.where(blank[part, None, None, None], np.float32(0), conditions[picked[part]]))
        return torch.from_numpy(latents[picked[part]]), prompts[caption[part]], noise[part], times[part], condition

    def loss(modules: Modules, batch: Batch) -> torch.Tensor:
        *rest, condition = batch
        return diffusion_loss(modules["unet"], objective, *rest, condition=condition)

    best = train_loop(
        accelerator, {"unet": unet}, draw_batch, loss, options, directory, label=f"{task.name} {name}", log=tracker.log
    )
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(best["unet"], keep_fp32_wrapper=False)
        pipeline = conditional_pipeline(parts, trained, objective.scheduler(cfg.train.flow_shift))
        pipeline.save_pretrained(directory / "pipeline")
        outputs = draw(cfg, task, pipeline, held, captioned)
        facts = {
            "method": name,
            "foundation": None if foundation is None else str(foundation),
            "steps": options.steps,
            "training_images": len(rows),
            "images_seen": options.steps * options.batch_size,
            "parameters": sum(parameter.numel() for parameter in unet.parameters()),
            "seed": cfg.seed,
        }
        _finish(task, held, outputs, facts, directory, tracker)


def _network(
    cfg: DictConfig,
    trained: UNet2DConditionModel | None,
    foundation: Path | None,
    latent_shape: tuple[int, int, int],
    width: int,
    condition_channels: int,
) -> UNet2DConditionModel:
    """The foundation's network, widened by the condition's channels, or a new one of that shape.

    Raises:
        UserError: the foundation's latents have another side than these.
    """
    channels, size, _ = latent_shape
    if trained is None:
        return new_unet(plain(cfg.model.unet), channels, size, width, cfg.seed, condition_channels)
    if trained.config.sample_size != size:
        raise UserError(
            f"foundation={foundation} was trained on latents of side {trained.config.sample_size}, this corpus' "
            f"have {size}: give the foundation's corpus.train.resolution"
        )
    return widen(trained, condition_channels)


def _finish(
    task: Task, held: HeldOut, outputs: np.ndarray, facts: dict[str, Any], directory: Path, tracker: Tracker
) -> None:
    """Measure the outputs, save samples and the task's files, write the summary and drop the checkpoints."""
    history = read_json(directory / "checkpoints" / f"{facts['steps']:08d}" / "state.json")
    metrics = task.measure(outputs, held)
    shown = replace(held, rows=held.rows[:SHOWN], features=held.features[:SHOWN], captions=held.captions[:SHOWN])
    sheet = save_samples(directory / "samples", task.inputs(shown), outputs[:SHOWN], shown.images)
    tracker.image("samples", sheet, facts["steps"])
    for file, content in task.files.items():
        write_json(directory / file, content)
    summary = {
        "task": task.name,
        **facts,
        "metrics": metrics,
        "images": len(held.rows),
        "seconds": round(history["seconds"], 2),
        "loss": float(np.mean(history["losses"])),
    }
    write_json(directory / "summary.json", summary)
    tracker.summary(metrics)
    shutil.rmtree(directory / "checkpoints")  # four times the network's size, and of no more use


def draw(
    cfg: DictConfig, task: Task, pipeline: StableDiffusionInstructPix2PixPipeline, held: HeldOut, captioned: bool
) -> np.ndarray:
    """One output per held-out image, uint8 [N, R, R, 3], without guidance, from noise that every method shares."""
    return generate(
        pipeline,
        held.captions if captioned else [""] * len(held.rows),
        steps=cfg.downstream.steps,
        guidance_scale=1.0,
        seed=cfg.eval.seed,
        label=f"generate {task.name}",
        image=[Image.fromarray(picture) for picture in task.condition(held.corpus, held.rows)],
    )


def save_samples(folder: Path, inputs: Mapping[str, np.ndarray], outputs: np.ndarray, truth: np.ndarray) -> Path:
    """The sheet (input, output, truth) and its images as arrays, uint8 [N, H, W, 3] each. Returns the sheet's path."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"inputs": next(iter(inputs.values())), "outputs": outputs, "truth": truth}
    for name, images in arrays.items():
        np.save(folder / f"{name}.npy", images)
    path = folder / "comparison.png"
    comparison_sheet({**inputs, "output": outputs, "truth": truth}).save(path)
    return path


def print_result(directory: Path, start: float) -> None:
    """Metrics, seconds since `start` (time.perf_counter) and, last, the run."""
    metrics = read_json(directory / "summary.json")["metrics"]
    for key in sorted(metrics):
        print(f"{key}: {metrics[key]:.4g}")
    print(f"seconds: {time.perf_counter() - start:.0f}")
    print(f"run: {directory}")
