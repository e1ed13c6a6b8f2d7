"""The pretraining stage: a selection to a text-conditioned latent diffusion model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from corpus.artefacts import plain, read_json, stage, write_json
from corpus.captions import words
from corpus.encoder import embed
from corpus.errors import UserError
from corpus.index import Corpus, index_corpus
from corpus.tracking import Tracker, track
from eval.convergence import summarise
from eval.figures import contact_sheet
from eval.generate import generate
from eval.heldout import HeldOut, held_out_sets
from eval.metrics import compare_features
from prune.selection import select
from train.captions import Captions, cached_prompts, caption_mask
from train.components import (
    TextParts,
    load_autoencoder,
    load_encoder,
    load_pretrained,
    load_text_parts,
    make_accelerator,
)
from train.diffusion import (
    LORA,
    add_lora,
    diffusion_loss,
    lora_weights,
    masks_padding,
    merge_lora,
    new_network,
    text_to_image_pipeline,
)
from train.latents import Views, cached_latents
from train.loop import Batch, ComputeLoss, DrawBatch, LoopOptions, Modules, train_loop
from train.metadata import (
    FOLDER,
    MetadataEncoder,
    MetadataField,
    drop,
    metadata_values,
    new_encoder,
    prompt_embeddings,
)
from train.model_card import model_card
from train.objective import Objective
from train.text_encoder import clip_score, scene_accuracy
from train.utilisation import compute_dtype, peak_flops, training_flops

CONVERGENCE = "convergence.jsonl"
#: Folder of a run with the features of the final images, `<held-out set>.npy`, for paired comparisons.
GENERATED = "generated_features"


def held_out(cfg: DictConfig) -> dict[str, HeldOut]:
    """Both held-out sets of a config's test corpus."""
    corpus = index_corpus(instantiate(cfg.corpus.test), cfg.runs)
    return held_out_sets(corpus, load_encoder(cfg), cfg.eval.images, cfg.seed, cfg.runs)


def pretrain(cfg: DictConfig, name: str) -> Path:
    """Prune with method `name` if not cached, then train the latent diffusion model on what is kept."""
    frozen = _load_frozen(cfg)  # first: what is missing is said before anything is computed
    _objective(cfg)
    selection, corpus = select(cfg, name)
    scorer = load_text_parts(cfg, corpus)
    fields = {key: MetadataField(**plain(field)) for key, field in cfg.metadata.fields.items()}
    metadata_values(corpus.manifest, fields)
    sets = held_out(cfg)
    inputs = {
        "selection": selection.name,
        "text_encoder": scorer.fingerprint,
        "autoencoder": frozen.key,
        "model": cfg.model,
        "train": cfg.train,
        "eval": cfg.eval,
        "held_out": sets["balanced"].corpus.fingerprint,
        "seed": cfg.seed,
        **({"metadata": cfg.metadata} if fields else {}),
    }

    def build(directory: Path) -> None:
        with track(cfg, "pretrain", f"{name}-{cfg.ratio}") as tracker:
            text = frozen.text or scorer
            run = _Run(
                cfg, name, selection, corpus, text, scorer, frozen, _objective(cfg), fields, sets, directory, tracker
            )
            _train(run)

    return stage(cfg.runs, "pretrain", inputs, build, resumable=True, together=True)


def _objective(cfg: DictConfig) -> Objective:
    """The objective of a config.

    Raises:
        UserError: its parts do not go together.
    """
    try:
        return Objective(**cfg.train.objective)
    except ValueError as error:
        raise UserError(f"train.{error}") from None


@dataclass(frozen=True)
class _Frozen:
    """What a run does not train, and, where it goes on from a pipeline, the network and the text encoder of that."""

    autoencoder: nn.Module
    key: str
    network: nn.Module | None = None
    text: TextParts | None = None


def _load_frozen(cfg: DictConfig) -> _Frozen:
    if cfg.model.get("pretrained"):
        found = load_pretrained(cfg)
        return _Frozen(found.autoencoder, found.fingerprint, found.network, found.text)
    return _Frozen(*load_autoencoder(cfg))


@dataclass(frozen=True)
class _Run:
    """What one pretraining run is made of. `text` conditions the network, `scorer` judges its images."""

    cfg: DictConfig
    name: str
    selection: Path
    corpus: Corpus
    text: TextParts
    scorer: TextParts
    frozen: _Frozen
    objective: Objective
    fields: Mapping[str, MetadataField]
    sets: dict[str, HeldOut]
    directory: Path
    tracker: Tracker

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        text, scheduler = self.text, self.objective.scheduler(self.cfg.train.flow_shift)
        return text_to_image_pipeline(self.frozen.autoencoder, text.text_encoder, text.tokenizer, network, scheduler)


def _train(run: _Run) -> None:
    cfg = run.cfg
    accelerator = make_accelerator(cfg)
    for part in (run.frozen.autoencoder, run.text.text_encoder, run.scorer.clip):
        if part is not None:
            part.to(accelerator.device)
    rows = np.flatnonzero(pd.read_parquet(run.selection / "selection.parquet")["kept"].to_numpy())
    run.tracker.artifact("selection", run.selection.name, run.selection / "selection.parquet")
    options = LoopOptions(**cfg.train.loop, seed=cfg.seed)
    data = _encode(run, rows)
    modules = _modules(run, data)
    flops = training_flops(
        modules["network"], torch.zeros(1, *data.latent_shape), torch.from_numpy(np.array(data.prompts[:1])).float()
    )
    best = train_loop(
        accelerator,
        modules,
        _draw(run, data, options),
        _loss(run),
        options,
        run.directory,
        label=f"pretrain {run.name}",
        milestones=_milestones(cfg, options),
        on_milestone=partial(_milestone, run, options.batch_size),
        log=partial(_log, run, accelerator, flops),
    )
    if accelerator.is_main_process:
        best = {name: accelerator.unwrap_model(module, keep_fp32_wrapper=False) for name, module in best.items()}
        _finish(run, best, options, len(rows), flops)


@dataclass(frozen=True)
class _Data:
    """A subset as the loop reads it: memory-mapped, nothing to decode.

    Attributes:
        latents: [V, K, C or 2 C, h, w]; latent_shape: (C, h, w); captions: of the K images;
        prompts: [T, L, D] hidden states of the captions' texts; lengths: int64 [T]; metadata: float32 [K, F].
    """

    latents: np.ndarray
    latent_shape: tuple[int, int, int]
    captions: Captions
    prompts: np.ndarray
    lengths: np.ndarray
    metadata: np.ndarray


def _encode(run: _Run, rows: np.ndarray) -> _Data:
    """Latents and captions of a subset, encoded once."""
    cfg, frozen = run.cfg, run.frozen
    half = str(cfg.train.mixed_precision) != "no"
    views = Views(**cfg.train.views)
    latents = cached_latents(
        frozen.autoencoder, frozen.key, run.corpus, rows, cfg.runs, views=views, seed=cfg.seed, half=half
    )
    kept = run.corpus.manifest.iloc[rows]
    captions = Captions.of(kept)
    prompts, lengths = cached_prompts(
        run.text.text_encoder, run.text.tokenizer, run.text.fingerprint, captions.texts, cfg.runs, half=half
    )
    shape = (frozen.autoencoder.config.latent_channels, *latents.shape[3:])
    return _Data(latents, shape, captions, prompts, lengths, metadata_values(kept, run.fields))


def _modules(run: _Run, data: _Data) -> Modules:
    """The networks to train: the configured one or the pipeline's, and the metadata's encoder if there are fields."""
    model, seed = run.cfg.model, run.cfg.seed
    channels, side, _ = data.latent_shape
    width = data.prompts.shape[-1]
    network = run.frozen.network
    if network is None:
        network = new_network(model, channels, side, width, seed)
    else:
        network.register_to_config(sample_size=side)
    network.train()
    if model.get("lora"):
        add_lora(network, model.lora.rank, model.lora.alpha, list(model.lora.targets), seed)
    if not run.fields:
        return {"network": network}
    if masks_padding(network):
        raise UserError(
            "metadata needs a U-Net, whose pipeline takes further tokens: give metadata=none or model=ldm_tiny"
        )
    return {"network": network, FOLDER: new_encoder(run.fields, width, seed)}


def _draw(run: _Run, data: _Data, options: LoopOptions) -> DrawBatch:
    """A batch: latents, hidden states, which of them count, metadata, noise, times."""
    size, width = options.batch_size, data.prompts.shape[1]
    hides = run.cfg.model.get("transformer") is not None
    varies = data.latents.shape[2] > data.latent_shape[0]

    def draw(random: np.random.Generator, part: slice) -> Batch:
        picked = random.integers(data.latents.shape[1], size=size)
        view = random.integers(len(data.latents), size=size)
        noise, times, dropped = run.objective.draw(random, (size, *data.latent_shape))
        caption = data.captions.pick(picked, random)
        caption[dropped.numpy()] = data.captions.empty
        latents = torch.from_numpy(data.latents[view[part], picked[part]]).float()
        if varies:  # a variational autoencoder's: drawn anew every time
            mean, deviation = latents.chunk(2, dim=1)
            eps = random.standard_normal((size, *data.latent_shape), dtype=np.float32)
            latents = mean + deviation * torch.from_numpy(eps[part])
        metadata = data.metadata[picked]
        if run.fields:
            metadata = drop(metadata, random, run.cfg.metadata.dropout)
        text = torch.from_numpy(data.prompts[caption[part]]).float()
        lengths = data.lengths[caption[part]] if hides else np.full(len(text), width)
        mask = caption_mask(lengths, width)
        return latents, text, mask, torch.from_numpy(metadata[part]), noise[part], times[part]

    return draw


def _loss(run: _Run) -> ComputeLoss:
    masked = bool(run.fields) or run.cfg.model.get("transformer") is not None

    def loss(modules: Modules, batch: Batch) -> torch.Tensor:
        latents, text, mask, values, noise, time = batch
        if FOLDER in modules:
            tokens, known = modules[FOLDER](values)
            text, mask = torch.cat([text, tokens.to(text.dtype)], dim=1), torch.cat([mask, known], dim=1)
        return diffusion_loss(
            modules["network"], run.objective, latents, text, noise, time, mask=mask if masked else None
        )

    return loss


def _milestones(cfg: DictConfig, options: LoopOptions) -> list[int]:
    """Steps after which the model is measured, the last one among them."""
    if cfg.eval.every_images is None:
        points = cfg.eval.convergence_points
        return sorted({round(options.steps * (index + 1) / points) for index in range(points)} - {0})
    every = max(1, round(cfg.eval.every_images / options.batch_size))
    return sorted({*range(every, options.steps, every), options.steps})


def _log(run: _Run, accelerator: Accelerator, flops: float, values: dict[str, float], step: int) -> None:
    """Loss and speed to the tracker, the latter also as a share of what the devices could do."""
    peak = peak_flops(accelerator.device, compute_dtype(str(run.cfg.train.mixed_precision)))
    used = values["images_per_second"] * flops / (peak * accelerator.num_processes)
    run.tracker.log({**values, "model_flops_utilisation": used}, step)


def _milestone(run: _Run, batch_size: int, step: int, mean_loss: float, seconds: float, modules: Modules) -> None:
    """Measure the averaged network in the middle of its training, and draw its sample sheet."""
    pipeline, cfg = run.pipeline(modules["network"]), run.cfg
    metrics = measure(cfg, pipeline, run.scorer, run.sets["balanced"], cfg.eval.convergence_images).metrics
    line = {
        "step": step,
        "images_seen": step * batch_size,
        "seconds": round(seconds, 2),
        "loss": mean_loss,
        **{f"balanced_{key}": value for key, value in metrics.items()},
    }
    _put_line(run.directory / CONVERGENCE, line)
    run.tracker.log({key: value for key, value in line.items() if key != "step"}, step)
    sheet, prompts = _sample_sheet(cfg, pipeline, run.corpus, run.directory / "samples" / f"step_{step:06d}.png")
    run.tracker.image("samples", sheet, step, caption=" | ".join(prompts))
    if FOLDER in modules and {"lon", "lat"} <= set(run.fields):
        sheet = _place_sheet(run, pipeline, modules[FOLDER], run.directory / "samples" / f"places_{step:06d}.png")
        run.tracker.image("places", sheet, step, caption="the same prompt and noise, another place")


def _finish(run: _Run, modules: Modules, options: LoopOptions, images: int, flops: float) -> None:
    """Save the pipeline, measure it on both held-out sets and write the summary."""
    cfg = run.cfg
    network = modules["network"]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if updates := lora_weights(network):
        StableDiffusionPipeline.save_lora_weights(run.directory / LORA, unet_lora_layers=updates)
    pipeline = run.pipeline(merge_lora(network))
    pipeline.save_pretrained(run.directory / "pipeline")
    if FOLDER in modules:
        modules[FOLDER].save(run.directory / "pipeline" / FOLDER)
    (run.directory / GENERATED).mkdir(exist_ok=True)
    metrics = {}
    for held in run.sets.values():
        measured = measure(cfg, pipeline, run.scorer, held, len(held.rows))
        metrics |= {f"{held.name}_{key}": value for key, value in measured.metrics.items()}
        np.save(run.directory / GENERATED / f"{held.name}.npy", measured.features)
        labels = [caption.removeprefix("a satellite image of ") for caption in held.captions[:64]]
        _save(contact_sheet(measured.images[:64], 8, labels), run.directory / "samples" / f"{held.name}.png")
    convergence = [json.loads(line) for line in (run.directory / CONVERGENCE).read_text().splitlines()]
    summary = {
        "method": run.name,
        "ratio": cfg.ratio,
        "images": images,
        "steps": options.steps,
        "images_seen": options.steps * options.batch_size,
        "parameters": parameters,
        "training_flops_per_image": flops,
        "seconds": convergence[-1]["seconds"],
        "loss": convergence[-1]["loss"],
        "metrics": metrics,
        "convergence": summarise(convergence, plain(cfg.eval.targets)),
        "scene_accuracy_real": _real_scene_accuracy(run),
        "selection": run.selection.name,
        "seed": cfg.seed,
    }
    card = model_card(cfg, summary, read_json(run.selection / "summary.json"), type(pipeline).__name__, run.fields)
    (run.directory / "pipeline" / "README.md").write_text(card, encoding="utf-8")
    write_json(run.directory / "summary.json", summary)
    run.tracker.summary(metrics)


def _real_scene_accuracy(run: _Run) -> float | None:
    """What the CLIP model makes of the held-out images themselves: the most that generated ones can be asked for."""
    held = run.sets["balanced"]
    return _scene_accuracy(run.scorer, held, held.images)


def _scene_accuracy(text: TextParts, held: HeldOut, images: np.ndarray) -> float | None:
    """Share of images whose scene the CLIP model tells among those of the held-out set; None where there is but one."""
    if text.clip is None:
        return None
    scenes = held.corpus.manifest["scene"].to_numpy(dtype=str)
    captions = held.corpus.manifest["caption"].to_numpy(dtype=str)
    known = [name for name in sorted(set(scenes[held.corpus.readable])) if name]
    if len(known) < 2:
        return None
    described = {
        name: sorted({f"a satellite image of {words(name)}", *captions[scenes == name][:SCENE_CAPTIONS]})
        for name in known
    }
    return scene_accuracy(
        text.clip, text.tokenizer, images, scenes[held.rows[: len(images)]], described, text.clip_pixels
    )


#: Captions of a scene whose mean embedding stands for it when images are classified.
SCENE_CAPTIONS = 64


@dataclass(frozen=True)
class Measured:
    """Generated images uint8 [N, R, R, 3], their features float32 [N, D] and their distances to the held-out ones."""

    images: np.ndarray
    features: np.ndarray
    metrics: dict[str, float]


def measure(cfg: DictConfig, pipeline: DiffusionPipeline, text: TextParts, held: HeldOut, count: int) -> Measured:
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
        accuracy = _scene_accuracy(text, held, images)
        if accuracy is not None:
            metrics[f"scene_accuracy_{cfg.text_encoder.score_name}"] = accuracy
    return Measured(images, features, metrics)


def _sample_sheet(cfg: DictConfig, pipeline: DiffusionPipeline, corpus: Corpus, path: Path) -> tuple[Path, list[str]]:
    """Eight samples of the most common caption of each scene, one row a scene, the same noise at every step.

    Returns the picture and the rows' captions.
    """
    manifest = corpus.manifest[corpus.manifest["caption"] != ""]
    prompts = manifest.groupby("scene")["caption"].agg(lambda column: column.value_counts().index[0])
    rows = list(prompts.iloc[:10])
    prompts = [prompt for prompt in rows for _ in range(8)]
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
    return path, rows


#: Places of a sheet of "same prompt, different place": name, longitude, latitude in degrees.
PLACES = (
    ("Amazon", -62.0, -4.0),
    ("Sahara", 12.0, 24.0),
    ("Siberia", 100.0, 62.0),
    ("Greenland", -42.0, 73.0),
    ("central Europe", 12.0, 50.0),
    ("Australia", 134.0, -25.0),
    ("Pacific", -150.0, 0.0),
    ("Antarctica", 60.0, -78.0),
)


def _place_sheet(run: _Run, pipeline: DiffusionPipeline, encoder: MetadataEncoder, path: Path) -> Path:
    """The empty prompt at eight places, a column each, with the same noise in a row."""
    count = 4
    noise_of = [row for row in range(count) for _ in PLACES]
    places = [place for _ in range(count) for place in PLACES]
    facts = {"lon": [place[1] for place in places], "lat": [place[2] for place in places]}
    embeddings = prompt_embeddings(pipeline, encoder, [""] * len(places), facts)
    images = generate(
        pipeline,
        [""] * len(places),
        steps=run.cfg.eval.steps,
        guidance_scale=1.0,
        seed=run.cfg.eval.seed + 2,
        label="places",
        noise_of=noise_of,
        **embeddings,
    )
    _save(contact_sheet(images, len(PLACES), [place[0] for place in places]), path)
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
