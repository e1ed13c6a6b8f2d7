"""The pretraining stage: a selection to a text-conditioned latent diffusion model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.artefacts import plain, stage, write_json
from corpus.encoder import embed
from corpus.index import Corpus, index_corpus
from corpus.tracking import Tracker, track
from eval.figures import contact_sheet
from eval.generate import generate
from eval.heldout import HeldOut, held_out_sets
from eval.metrics import compare_features
from prune.selection import select
from train.components import TextParts, load_autoencoder, load_encoder, load_text_parts, make_accelerator
from train.diffusion import (
    FlowOptions,
    draw_noise,
    encode_latents,
    flow_matching_loss,
    new_unet,
    text_to_image_pipeline,
)
from train.loop import ComputeLoss, LoopOptions, Modules, train_loop
from train.text_encoder import clip_score, encode_prompts

CONVERGENCE = "convergence.jsonl"
#: Folder of a run with the features of the final images, `<held-out set>.npy`, for paired comparisons.
GENERATED = "generated_features"


def held_out(cfg: DictConfig) -> dict[str, HeldOut]:
    """Both held-out sets of a config's test corpus."""
    corpus = index_corpus(instantiate(cfg.corpus.test), cfg.runs)
    return held_out_sets(corpus, load_encoder(cfg), cfg.eval.images, cfg.seed, cfg.runs)


def pretrain(cfg: DictConfig, name: str) -> Path:
    """Prune with method `name` if not cached, then train the latent diffusion model on what is kept."""
    autoencoder, autoencoder_key = load_autoencoder(cfg)  # first: what is missing is said before anything is computed
    selection, corpus = select(cfg, name)
    text = load_text_parts(cfg, corpus)
    sets = held_out(cfg)
    inputs = {
        "selection": selection.name,
        "text_encoder": text.fingerprint,
        "autoencoder": autoencoder_key,
        "model": cfg.model,
        "train": cfg.train,
        "eval": cfg.eval,
        "held_out": sets["balanced"].corpus.fingerprint,
        "seed": cfg.seed,
    }

    def build(directory: Path) -> None:
        with track(cfg, "pretrain", f"{name}-{cfg.ratio}") as tracker:
            _train(_Run(cfg, name, selection, corpus, text, autoencoder, sets, directory, tracker))

    return stage(cfg.runs, "pretrain", inputs, build, resumable=True, together=True)


@dataclass(frozen=True)
class _Run:
    """What one pretraining run is made of."""

    cfg: DictConfig
    name: str
    selection: Path
    corpus: Corpus
    text: TextParts
    autoencoder: torch.nn.Module
    sets: dict[str, HeldOut]
    directory: Path
    tracker: Tracker

    def pipeline(self, unet: torch.nn.Module) -> StableDiffusionPipeline:
        text = self.text
        return text_to_image_pipeline(
            self.autoencoder, text.text_encoder, text.tokenizer, unet, self.cfg.train.flow_shift
        )


def _train(run: _Run) -> None:
    cfg = run.cfg
    accelerator = make_accelerator(cfg)
    for part in (run.autoencoder, run.text.text_encoder, run.text.clip):
        if part is not None:
            part.to(accelerator.device)
    rows = np.flatnonzero(pd.read_parquet(run.selection / "selection.parquet")["kept"].to_numpy())
    options = LoopOptions(**cfg.train.loop, seed=cfg.seed)
    unet, loss = _network_and_loss(run, rows, options, accelerator.device)
    points = cfg.eval.convergence_points
    best = train_loop(
        accelerator,
        {"unet": unet},
        loss,
        options,
        run.directory,
        label=f"pretrain {run.name}",
        milestones=sorted({round(options.steps * (index + 1) / points) for index in range(points)}),
        on_milestone=partial(_milestone, run, options.batch_size),
        log=run.tracker.log,
    )
    if accelerator.is_main_process:
        _finish(run, best["unet"], options, len(rows))


def _network_and_loss(
    run: _Run, rows: np.ndarray, options: LoopOptions, device: torch.device
) -> tuple[UNet2DConditionModel, ComputeLoss]:
    """The untrained network and its loss on the latents and captions of `rows`, encoded here, once."""
    cfg = run.cfg
    latents = encode_latents(run.autoencoder, run.corpus, rows, symmetries=cfg.train.symmetries)
    captions, caption_of = np.unique(run.corpus.manifest["caption"].to_numpy(dtype=str)[rows], return_inverse=True)
    # the last row is the empty caption, for classifier-free guidance
    prompts = encode_prompts(run.text.text_encoder, run.text.tokenizer, [*captions, ""])
    objective = FlowOptions(**cfg.train.objective)

    def loss(modules: Modules, random: np.random.Generator, part: slice) -> torch.Tensor:
        picked = random.integers(len(rows), size=options.batch_size)
        symmetry = random.integers(len(latents), size=options.batch_size)
        noise, times, dropped = draw_noise(random, (options.batch_size, *latents.shape[2:]), objective)
        caption = torch.from_numpy(caption_of[picked])
        caption[dropped] = len(captions)
        batch = (latents[symmetry[part], picked[part]], prompts[caption[part]], noise[part], times[part])
        return flow_matching_loss(modules["unet"], *(tensor.to(device) for tensor in batch))

    unet = new_unet(plain(cfg.model.unet), latents.shape[2], latents.shape[-1], prompts.shape[-1], seed=cfg.seed)
    return unet, loss


def _milestone(run: _Run, batch_size: int, step: int, mean_loss: float, seconds: float, modules: Modules) -> None:
    """Measure the averaged network in the middle of its training, and draw its sample sheet."""
    pipeline, cfg = run.pipeline(modules["unet"]), run.cfg
    metrics = measure(cfg, pipeline, run.text, run.sets["balanced"], cfg.eval.convergence_images).metrics
    line = {
        "step": step,
        "images_seen": step * batch_size,
        "seconds": round(seconds, 2),
        "loss": mean_loss,
        **{f"balanced_{key}": value for key, value in metrics.items()},
    }
    _put_line(run.directory / CONVERGENCE, line)
    run.tracker.log({key: value for key, value in line.items() if key != "step"}, step)
    sheet = _sample_sheet(cfg, pipeline, run.corpus, run.directory / "samples" / f"step_{step:06d}.png")
    run.tracker.image("samples", sheet, step)


def _finish(run: _Run, unet: torch.nn.Module, options: LoopOptions, images: int) -> None:
    """Save the pipeline, measure it on both held-out sets and write the summary."""
    pipeline = run.pipeline(unet)
    pipeline.save_pretrained(run.directory / "pipeline")
    (run.directory / GENERATED).mkdir(exist_ok=True)
    metrics = {}
    for held in run.sets.values():
        measured = measure(run.cfg, pipeline, run.text, held, len(held.rows))
        metrics |= {f"{held.name}_{key}": value for key, value in measured.metrics.items()}
        np.save(run.directory / GENERATED / f"{held.name}.npy", measured.features)
        labels = [caption.removeprefix("a satellite image of ") for caption in held.captions[:64]]
        _save(contact_sheet(measured.images[:64], 8, labels), run.directory / "samples" / f"{held.name}.png")
    convergence = [json.loads(line) for line in (run.directory / CONVERGENCE).read_text().splitlines()]
    summary = {
        "method": run.name,
        "ratio": run.cfg.ratio,
        "images": images,
        "steps": options.steps,
        "images_seen": options.steps * options.batch_size,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "seconds": convergence[-1]["seconds"],
        "loss": convergence[-1]["loss"],
        "metrics": metrics,
        "selection": run.selection.name,
        "seed": run.cfg.seed,
    }
    write_json(run.directory / "summary.json", summary)
    run.tracker.summary(metrics)


@dataclass(frozen=True)
class Measured:
    """Generated images uint8 [N, R, R, 3], their features float32 [N, D] and their distances to the held-out ones."""

    images: np.ndarray
    features: np.ndarray
    metrics: dict[str, float]


def measure(cfg: DictConfig, pipeline: StableDiffusionPipeline, text: TextParts, held: HeldOut, count: int) -> Measured:
    """Generate from the captions of the first `count` held-out images and compare with them."""
    prompts = held.captions[:count]
    images = generate(
        pipeline,
        prompts,
        steps=cfg.eval.steps,
        guidance_scale=cfg.eval.guidance_scale,
        seed=cfg.eval.seed,
        label=f"generate {held.name}",
    )
    encoder = load_encoder(cfg)
    features = embed(encoder, images)
    metrics = compare_features(features, held.features[:count], encoder.name)
    if text.clip is not None:
        score = clip_score(text.clip, text.tokenizer, images, prompts, text.clip_pixels)
        metrics[f"clip_{cfg.text_encoder.score_name}"] = float(score.mean())
    return Measured(images, features, metrics)


def _sample_sheet(cfg: DictConfig, pipeline: StableDiffusionPipeline, corpus: Corpus, path: Path) -> Path:
    """Eight samples of the most common caption of each scene, one row a scene, the same noise at every step."""
    manifest = corpus.manifest[corpus.manifest["caption"] != ""]
    prompts = manifest.groupby("scene")["caption"].agg(lambda column: column.value_counts().index[0])
    prompts = [prompt for prompt in prompts.iloc[:10] for _ in range(8)]
    images = generate(
        pipeline,
        prompts,
        steps=cfg.eval.steps,
        guidance_scale=cfg.eval.guidance_scale,
        seed=cfg.eval.seed + 1,
        label="sample sheet",
    )
    labels = [prompt.removeprefix("a satellite image of ") for prompt in prompts]
    _save(contact_sheet(images, 8, labels), path)
    return path


def _save(image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _put_line(path: Path, line: dict) -> None:
    """Add a line to a JSON-lines file, replacing those of this step and later (a resumed run repeats them)."""
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    lines = [old for old in lines if old["step"] < line["step"]] + [plain(line)]
    beside = path.with_suffix(".partial")
    beside.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    os.replace(beside, path)
