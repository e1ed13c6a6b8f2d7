"""The pretraining stage: a selection to a text-conditioned latent diffusion model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
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
from train.loop import LoopOptions, Modules, train_loop
from train.text_encoder import clip_score, encode_prompts

CONVERGENCE = "convergence.jsonl"


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
            _train(cfg, name, selection, corpus, text, autoencoder, sets, directory, tracker)

    return stage(cfg.runs, "pretrain", inputs, build, resumable=True, together=True)


def _train(
    cfg: DictConfig,
    name: str,
    selection: Path,
    corpus: Corpus,
    text: TextParts,
    autoencoder: torch.nn.Module,
    sets: dict[str, HeldOut],
    directory: Path,
    tracker: Tracker,
) -> None:
    accelerator = make_accelerator(cfg)
    for part in (autoencoder, text.text_encoder, text.clip):
        if part is not None:
            part.to(accelerator.device)
    rows = np.flatnonzero(pd.read_parquet(selection / "selection.parquet")["kept"].to_numpy())
    latents = encode_latents(autoencoder, corpus, rows, symmetries=cfg.train.symmetries)
    captions, caption_of = np.unique(corpus.manifest["caption"].to_numpy(dtype=str)[rows], return_inverse=True)
    # the last row is the empty caption, for classifier-free guidance
    prompts = encode_prompts(text.text_encoder, text.tokenizer, [*captions, ""])

    options = LoopOptions(**cfg.train.loop, seed=cfg.seed)
    objective = FlowOptions(**cfg.train.objective)
    unet = new_unet(plain(cfg.model.unet), latents.shape[2], latents.shape[-1], prompts.shape[-1], seed=cfg.seed)

    def loss(modules: Modules, random: np.random.Generator, part: slice) -> torch.Tensor:
        picked = random.integers(len(rows), size=options.batch_size)
        symmetry = random.integers(len(latents), size=options.batch_size)
        noise, times, dropped = draw_noise(random, (options.batch_size, *latents.shape[2:]), objective)
        caption = torch.from_numpy(caption_of[picked])
        caption[dropped] = len(captions)
        batch = (latents[symmetry[part], picked[part]], prompts[caption[part]], noise[part], times[part])
        return flow_matching_loss(modules["unet"], *(tensor.to(accelerator.device) for tensor in batch))

    def pipeline_of(modules: Modules) -> StableDiffusionPipeline:
        return text_to_image_pipeline(
            autoencoder, text.text_encoder, text.tokenizer, modules["unet"], cfg.train.flow_shift
        )

    def on_milestone(step: int, mean_loss: float, seconds: float, modules: Modules) -> None:
        metrics = measure(cfg, pipeline_of(modules), text, sets["balanced"], cfg.eval.convergence_images)[0]
        line = {
            "step": step,
            "images_seen": step * options.batch_size,
            "seconds": round(seconds, 2),
            "loss": mean_loss,
            **{f"balanced_{key}": value for key, value in metrics.items()},
        }
        _put_line(directory / CONVERGENCE, line)
        tracker.log({key: value for key, value in line.items() if key != "step"}, step)
        sheet = _sample_sheet(cfg, pipeline_of(modules), corpus, directory / "samples" / f"step_{step:06d}.png")
        tracker.image("samples", sheet, step)

    points = cfg.eval.convergence_points
    milestones = sorted({round(options.steps * (index + 1) / points) for index in range(points)})
    best = train_loop(
        accelerator,
        {"unet": unet},
        loss,
        options,
        directory,
        label=f"pretrain {name}",
        milestones=milestones,
        on_milestone=on_milestone,
        log=tracker.log,
    )
    if not accelerator.is_main_process:
        return
    pipeline = pipeline_of({"unet": best["unet"]})
    pipeline.save_pretrained(directory / "pipeline")
    metrics = {}
    for held in sets.values():
        measured, images = measure(cfg, pipeline, text, held, len(held.rows))
        metrics |= {f"{held.name}_{key}": value for key, value in measured.items()}
        labels = [caption.removeprefix("a satellite image of ") for caption in held.captions[:64]]
        _save(contact_sheet(images[:64], 8, labels), directory / "samples" / f"{held.name}.png")
    convergence = [json.loads(line) for line in (directory / CONVERGENCE).read_text().splitlines()]
    summary = {
        "method": name,
        "ratio": cfg.ratio,
        "images": len(rows),
        "steps": options.steps,
        "images_seen": options.steps * options.batch_size,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "seconds": convergence[-1]["seconds"],
        "loss": convergence[-1]["loss"],
        "metrics": metrics,
        "selection": selection.name,
        "seed": cfg.seed,
    }
    write_json(directory / "summary.json", summary)
    tracker.summary(metrics)


def measure(
    cfg: DictConfig, pipeline: StableDiffusionPipeline, text: TextParts, held: HeldOut, count: int
) -> tuple[dict[str, float], np.ndarray]:
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
    metrics = compare_features(embed(encoder, images), held.features[:count], encoder.name)
    if text.clip is not None:
        score = clip_score(text.clip, text.tokenizer, images, prompts, text.clip_pixels)
        metrics[f"clip_{cfg.text_encoder.score_name}"] = float(score.mean())
    return metrics, images


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
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    os.replace(partial, path)
