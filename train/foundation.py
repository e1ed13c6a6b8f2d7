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

from corpus.index import Corpus, index_corpus
from eval.convergence import summarise
from eval.generated import measure, place_sheet, sample_sheet, save_picture, scene_accuracy, scene_confusion
from eval.held_out import HeldOut, held_out_sets
from prune.selection import select
from report.figures import contact_sheet
from runtime.artefacts import is_main_process, plain, read_json, stage, write_json
from runtime.errors import UserError
from runtime.tracking import Tracker, track
from train.components import (
    TextParts,
    first_process_says,
    load_autoencoder,
    load_encoder,
    load_pretrained,
    load_text_parts,
    make_accelerator,
)
from train.data import NETWORK, Subset, encode_subset, subset_batches, subset_loss
from train.latents import Views
from train.loop import LoopOptions, Modules, train_loop
from train.metadata import FOLDER, MetadataField, metadata_values, new_encoder
from train.model_card import model_card
from train.networks import (
    LORA,
    add_lora,
    lora_facts,
    lora_weights,
    masks_padding,
    merge_lora,
    new_network,
    text_to_image_pipeline,
)
from train.objective import Objective
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
    frozen = _load_frozen(cfg)
    objective_of(cfg)
    selection, corpus = select(cfg, name)
    scorer = load_text_parts(cfg, corpus)
    fields = {key: MetadataField(**plain(field)) for key, field in cfg.metadata.fields.items()}
    metadata_values(corpus.manifest, fields)
    sets = held_out(cfg)
    _check_sides(cfg, frozen.autoencoder, corpus, sets["balanced"].corpus)
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
                cfg,
                name,
                selection,
                corpus,
                text,
                scorer,
                frozen,
                objective_of(cfg),
                fields,
                sets,
                directory,
                tracker,
            )
            _train(run)

    return stage(cfg.runs, "pretrain", inputs, build, resumable=True, together=first_process_says(cfg))


def _check_sides(cfg: DictConfig, autoencoder: nn.Module, corpus: Corpus, test: Corpus) -> None:
    """Refuse views that the autoencoder cannot encode, or that are of another size than what they are compared with.

    Raises:
        UserError: as said.
    """
    side = Views(**cfg.train.views).side(corpus.resolution)
    factor = 2 ** (len(getattr(autoencoder.config, "block_out_channels", [0] * 4)) - 1)
    if side % factor:
        raise UserError(
            f"images of {side} px do not divide by the autoencoder's {factor}: change corpus.train.resolution"
        )
    if test.resolution != side:
        raise UserError(
            f"train.views.crop={side}, but the held-out images have {test.resolution} px: "
            f"give corpus.test.resolution={side}"
        )


def objective_of(cfg: DictConfig) -> Objective:
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
    subset = encode_subset(
        run.corpus,
        rows,
        run.frozen.autoencoder,
        run.frozen.key,
        run.text,
        cfg.runs,
        views=Views(**cfg.train.views),
        fields=run.fields,
        seed=cfg.seed,
        half=str(cfg.train.mixed_precision) != "no",
    )
    modules = _modules(run, subset)
    hide = masks_padding(modules[NETWORK])
    text = torch.from_numpy(np.array(subset.prompts[:1])).float()
    flops = training_flops(modules[NETWORK], torch.zeros(1, *subset.latent_shape), text)
    best = train_loop(
        accelerator,
        modules,
        subset_batches(
            subset,
            run.objective,
            options.batch_size,
            hide_padding=hide,
            metadata_dropout=cfg.metadata.dropout,
        ),
        subset_loss(run.objective, hide_padding=hide),
        options,
        run.directory,
        label=f"pretrain {run.name}",
        snapshots=milestones(cfg, options),
        on_snapshot=partial(_milestone, run, options.batch_size),
        log=partial(_log, run, accelerator, flops),
    )
    if accelerator.is_main_process:
        best = {name: accelerator.unwrap_model(module, keep_fp32_wrapper=False) for name, module in best.items()}
        _finish(run, best, options, len(rows), flops)


def _modules(run: _Run, subset: Subset) -> Modules:
    """The networks to train: the configured one or the pipeline's, and the metadata's encoder if there are fields."""
    model, seed = run.cfg.model, run.cfg.seed
    channels, side, _ = subset.latent_shape
    width = subset.prompts.shape[-1]
    network = run.frozen.network
    if network is None:
        network = new_network(model, channels, side, width, seed)
    else:
        network.register_to_config(sample_size=side)
    network.train()
    if model.get("lora"):
        add_lora(network, model.lora.rank, model.lora.alpha, list(model.lora.targets), seed)
    if not run.fields:
        return {NETWORK: network}
    if masks_padding(network):
        raise UserError(
            "metadata needs a U-Net, whose pipeline takes further tokens: give metadata=none or model=ldm_tiny"
        )
    return {NETWORK: network, FOLDER: new_encoder(run.fields, width, seed)}


def milestones(cfg: DictConfig, options: LoopOptions) -> list[int]:
    """Steps after which the model is measured, the last one among them."""
    if cfg.eval.every_images is None:
        points = cfg.eval.convergence_points
        return sorted({*(round(options.steps * (index + 1) / points) for index in range(points)), options.steps} - {0})
    every = max(1, round(cfg.eval.every_images / options.batch_size))
    return sorted({*range(every, options.steps, every), options.steps})


def _log(run: _Run, accelerator: Accelerator, flops: float, values: dict[str, float], step: int) -> None:
    """Loss and speed to the tracker, the latter also as a share of what the devices could do."""
    peak = peak_flops(accelerator.device, compute_dtype(str(run.cfg.train.mixed_precision)))
    used = values["images_per_second"] * flops / (peak * accelerator.num_processes)
    run.tracker.log({**values, "model_flops_utilisation": used}, step)


def _milestone(run: _Run, batch_size: int, step: int, mean_loss: float, seconds: float, modules: Modules) -> None:
    """Measure the averaged network in the middle of its training, and draw its sample sheet."""
    if not is_main_process():
        return
    pipeline, cfg = run.pipeline(modules[NETWORK]), run.cfg
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
    sheet, prompts = sample_sheet(cfg, pipeline, run.corpus, run.directory / "samples" / f"step_{step:06d}.png")
    run.tracker.image("samples", sheet, step, caption=" | ".join(prompts))
    if FOLDER in modules and {"lon", "lat"} <= set(run.fields):
        sheet = place_sheet(cfg, pipeline, modules[FOLDER], run.directory / "samples" / f"places_{step:06d}.png")
        run.tracker.image("places", sheet, step, caption="the same prompt and noise, another place")


def _finish(run: _Run, modules: Modules, options: LoopOptions, images: int, flops: float) -> None:
    """Save the pipeline, measure it on both held-out sets and write the summary."""
    cfg = run.cfg
    network = modules[NETWORK]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if updates := lora_weights(network):
        StableDiffusionPipeline.save_lora_weights(
            run.directory / LORA, unet_lora_layers=updates, unet_lora_adapter_metadata=lora_facts(network)
        )
    pipeline = run.pipeline(merge_lora(network))
    pipeline.save_pretrained(run.directory / "pipeline")
    if FOLDER in modules:
        modules[FOLDER].save(run.directory / "pipeline" / FOLDER)
    (run.directory / GENERATED).mkdir(exist_ok=True)
    metrics, scenes = {}, {}
    for held in run.sets.values():
        measured = measure(cfg, pipeline, run.scorer, held, len(held.rows))
        metrics |= {f"{held.name}_{key}": value for key, value in measured.metrics.items()}
        scenes[held.name] = measured.scenes
        np.save(run.directory / GENERATED / f"{held.name}.npy", measured.features)
        labels = [caption.removeprefix("a satellite image of ") for caption in held.captions[:64]]
        save_picture(contact_sheet(measured.images[:64], 8, labels), run.directory / "samples" / f"{held.name}.png")
    convergence = [json.loads(line) for line in (run.directory / CONVERGENCE).read_text().splitlines()]
    real = scene_confusion(run.scorer, run.sets["balanced"], run.sets["balanced"].images)
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
        "scenes": {"real": real, "generated": scenes["balanced"]},
        "scene_accuracy_real": None if real is None else scene_accuracy(real),
        "selection": run.selection.name,
        "seed": cfg.seed,
    }
    card = model_card(cfg, summary, read_json(run.selection / "summary.json"), type(pipeline).__name__, run.fields)
    (run.directory / "pipeline" / "README.md").write_text(card, encoding="utf-8")
    write_json(run.directory / "summary.json", summary)
    run.tracker.summary(metrics)


def _put_line(path: Path, line: dict) -> None:
    """Add a line to a JSON-lines file, replacing those of this step and later (a resumed run repeats them)."""
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    lines = [old for old in lines if old["step"] < line["step"]] + [plain(line)]
    beside = path.with_suffix(".partial")
    beside.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    os.replace(beside, path)
