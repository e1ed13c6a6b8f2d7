"""The pretraining stage: train a text-conditioned latent diffusion model on a selection, and measure it."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from omegaconf import DictConfig
from torch import nn

from corpus.index import Corpus
from eval.models import INDEX, SNAPSHOT, SNAPSHOTS, snapshots_of
from prune.selection import select
from runtime.artefacts import plain, read_json, stage, stage_fingerprint, write_json
from runtime.errors import UserError
from runtime.tracking import Tracker, track
from train.components import (
    TextParts,
    first_process_decides,
    load_autoencoder,
    load_pretrained,
    load_text_parts,
    make_accelerator,
)
from train.data import NETWORK, Subset, encode_subset, sampling_fractions, subset_batches, subset_loss
from train.latents import Views
from train.loop import LoopOptions, Modules, train_loop
from train.measured_run import TRAINING, Evaluation, measure_run, measure_snapshot
from train.metadata import FOLDER, MetadataField, metadata_values, new_encoder
from train.networks import (
    LORA,
    add_lora,
    lora_metadata,
    lora_weights,
    masks_padding,
    merge_lora,
    new_network,
    text_to_image_pipeline,
)
from train.objective import Objective
from train.resume import Start, inherit_snapshots, start_of, take_up, training_inputs
from train.utilisation import compute_dtype, peak_flops, training_flops


def pretrain(cfg: DictConfig, name: str) -> Path:
    """Prune with method `name` if not cached, train the latent diffusion model on the kept images, and measure it.

    Training and measuring are separate stages. The training's directory depends on nothing in `cfg.eval`. Once it is
    complete, measuring adds its files to it (convergence.jsonl, summary.json, samples/).
    """
    given = _given(cfg, name)
    frozen, start, selection, corpus, scorer, fields = given
    evaluation = Evaluation.of(cfg, corpus, selection, scorer)  # missing parts are reported before anything is trained
    _check_sides(cfg, frozen.autoencoder, corpus, evaluation.while_training.corpus)

    def build(directory: Path) -> None:
        with track(cfg, "pretrain", f"{name}-{cfg.ratio}") as tracker:
            text = frozen.text or scorer
            _train(_Run(cfg, name, selection, corpus, text, frozen, fields, evaluation, directory, tracker, start))
            measure_run(cfg, directory, corpus, scorer, evaluation, tracker)

    inputs = given.inputs(cfg)
    directory = stage(cfg.runs, "pretrain", inputs, build, resumable=True, together=first_process_decides(cfg))
    # cached if just built; measured again if `eval` has changed since the build
    measure_run(cfg, directory, corpus, scorer, evaluation, Tracker())
    return directory


def run_directory(cfg: DictConfig, name: str) -> Path:
    """The directory of the run of `pretrain`, whether it exists or not. Prunes if the selection is not cached."""
    return Path(cfg.runs) / "pretrain" / stage_fingerprint("pretrain", _given(cfg, name).inputs(cfg))


class _Given(NamedTuple):
    """All inputs of a run except those for measuring it."""

    frozen: _Frozen
    start: Start
    selection: Path
    corpus: Corpus
    scorer: TextParts
    fields: Mapping[str, MetadataField]

    def inputs(self, cfg: DictConfig) -> dict[str, Any]:
        """Everything that the trained network depends on, for its fingerprint."""
        return {
            "selection": self.selection.name,
            "text_encoder": (self.frozen.text or self.scorer).fingerprint,
            "autoencoder": self.frozen.key,
            "model": cfg.model,
            **training_inputs(cfg, self.start),
            "seed": cfg.seed,
            **({"metadata": cfg.metadata} if self.fields else {}),
            **({"captions": self.corpus.captions} if self.corpus.captions else {}),
        }


def _given(cfg: DictConfig, name: str) -> _Given:
    frozen = _load_frozen(cfg)
    objective_of(cfg)
    sampling_fractions(np.ones(1), cfg.train.weighting)
    start = start_of(cfg)
    selection, corpus = select(cfg, name)
    scorer = load_text_parts(cfg, corpus)
    fields = {key: MetadataField(**plain(field)) for key, field in cfg.metadata.fields.items()}
    metadata_values(corpus.manifest, fields)
    return _Given(frozen, start, selection, corpus, scorer, fields)


def _check_sides(cfg: DictConfig, autoencoder: nn.Module, corpus: Corpus, test: Corpus) -> None:
    """Refuse views that the autoencoder cannot encode, or with a size different from the images for comparison.

    Raises:
        UserError: as described.
    """
    side = Views(**cfg.train.views).side(corpus.resolution)
    factor = 2 ** (len(getattr(autoencoder.config, "block_out_channels", [0] * 4)) - 1)
    if side % factor:
        raise UserError(
            f"image side {side} px is not a multiple of the autoencoder's {factor}: change corpus.train.resolution"
        )
    if test.resolution != side:
        raise UserError(
            f"train.views.crop={side}, but the held-out images have {test.resolution} px: "
            f"give corpus.test.resolution={side}"
        )


def objective_of(cfg: DictConfig) -> Objective:
    """The objective of a config.

    Raises:
        UserError: its options contradict each other, or one is out of its range.
    """
    return Objective(**cfg.train.objective)


@dataclass(frozen=True)
class _Frozen:
    """The frozen parts of a run and, if it continues from a pipeline, the network and text encoder of that pipeline."""

    autoencoder: nn.Module
    key: str
    network: nn.Module | None = None
    text: TextParts | None = None


def _load_frozen(cfg: DictConfig) -> _Frozen:
    if cfg.model.get("pretrained"):
        result = load_pretrained(cfg)
        return _Frozen(result.autoencoder, result.fingerprint, result.network, result.text)
    return _Frozen(*load_autoencoder(cfg))


@dataclass(frozen=True)
class _Run:
    """The inputs of one pretraining run. `text` conditions the network."""

    cfg: DictConfig
    name: str
    selection: Path
    corpus: Corpus
    text: TextParts
    frozen: _Frozen
    fields: Mapping[str, MetadataField]
    evaluation: Evaluation
    directory: Path
    tracker: Tracker
    start: Start

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        text, scheduler = self.text, objective_of(self.cfg).scheduler(self.cfg.train.flow_shift)
        return text_to_image_pipeline(self.frozen.autoencoder, text.text_encoder, text.tokenizer, network, scheduler)


def _train(run: _Run) -> None:
    cfg, objective = run.cfg, objective_of(run.cfg)
    accelerator = make_accelerator(cfg)
    for part in (run.frozen.autoencoder, run.text.text_encoder, run.evaluation.judges.clip):
        if part is not None:
            getattr(part, "model", part).to(accelerator.device)
    table = pd.read_parquet(run.selection / "selection.parquet", columns=["kept", "weight"])
    rows = np.flatnonzero(table["kept"].to_numpy())
    fractions = sampling_fractions(table["weight"].to_numpy()[rows], cfg.train.weighting)
    run.tracker.artifact("selection", run.selection.name, run.selection / "selection.parquet")
    options = LoopOptions(**cfg.train.loop, seed=cfg.seed)
    if accelerator.is_main_process:
        inherit_snapshots(run.start, run.directory)
    subset = _encoded(run, rows, fractions)
    modules = _modules(run, subset, accelerator)
    hide = masks_padding(modules[NETWORK])
    text = torch.from_numpy(np.array(subset.prompts[:1])).float()
    flops = training_flops(modules[NETWORK], torch.zeros(1, *subset.latent_shape), text)
    training = {
        "method": run.name,
        "ratio": read_json(run.selection / "summary.json")["ratio"] if cfg.ratio is None else cfg.ratio,
        "images": len(rows),
        "parameters": sum(parameter.numel() for parameter in modules[NETWORK].parameters()),
        "training_flops_per_image": flops,
        "selection": run.selection.name,
        "seed": cfg.seed,
    }
    if run.start.checkpoint is not None:
        training["resumed"] = {"checkpoint": str(run.start.checkpoint), "step": run.start.step}
    best = train_loop(
        accelerator,
        modules,
        subset_batches(subset, objective, options.batch_size, hide_padding=hide, metadata_dropout=cfg.metadata.dropout),
        subset_loss(objective, hide_padding=hide),
        options,
        run.directory,
        label=f"pretrain {run.name}",
        snapshots=snapshot_steps(cfg, options),
        on_snapshot=partial(_on_snapshot, run, options.batch_size, accelerator),
        log=partial(_log, run, accelerator, flops),
        start=run.start.checkpoint,
        take_up=partial(take_up, cfg),
    )
    if accelerator.is_main_process:
        _finish(run, best, training)


def _encoded(run: _Run, rows: np.ndarray, fractions: np.ndarray | None) -> Subset:
    cfg = run.cfg
    return encode_subset(
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
        fractions=fractions,
    )


def _modules(run: _Run, subset: Subset, accelerator: Accelerator) -> Modules:
    """The networks to train: the configured one or the pipeline's, and a metadata encoder if there are fields.

    Also writes `pipeline/` with the untrained network, so that snapshots can be measured while the training continues.
    """
    model, seed = run.cfg.model, run.cfg.seed
    channels, side, _ = subset.latent_shape
    width = subset.prompts.shape[-1]
    network = run.frozen.network
    if network is None:
        network = new_network(model, channels, side, width, seed)
    else:
        network.register_to_config(sample_size=side)
    if run.fields and masks_padding(network):
        raise UserError(
            "metadata needs a U-Net, whose pipeline accepts additional tokens: give metadata=none or model=ldm_tiny"
        )
    if accelerator.is_main_process and not (run.directory / "pipeline" / INDEX).is_file():
        run.pipeline(network).save_pretrained(run.directory / "pipeline")
    network.train()
    if model.get("lora"):
        add_lora(network, model.lora.rank, model.lora.alpha, list(model.lora.targets), seed)
    if not run.fields:
        return {NETWORK: network}
    return {NETWORK: network, FOLDER: new_encoder(run.fields, width, seed)}


def snapshot_steps(cfg: DictConfig, options: LoopOptions) -> list[int]:
    """Steps after which a snapshot is kept, including the last step."""
    every = cfg.train.snapshot_every_images
    if every is None:
        count = cfg.train.snapshots
        return sorted({*(round(options.steps * (index + 1) / count) for index in range(count)), options.steps} - {0})
    every = max(1, round(every / options.batch_size))
    return sorted({*range(every, options.steps, every), options.steps})


def _log(run: _Run, accelerator: Accelerator, flops: float, values: dict[str, float], step: int) -> None:
    """Send loss and speed to the tracker; also the speed as a fraction of the peak performance of the devices."""
    peak = peak_flops(accelerator.device, compute_dtype(str(run.cfg.train.mixed_precision)))
    used = values["images_per_second"] * flops / (peak * accelerator.num_processes)
    run.tracker.log({**values, "model_flops_utilisation": used}, step)


def _on_snapshot(
    run: _Run, batch_size: int, accelerator: Accelerator, step: int, mean_loss: float, seconds: float, modules: Modules
) -> None:
    """Save the averaged networks as a snapshot, and measure it immediately if `eval.while_training`."""
    images_seen = run.start.images_seen(step, batch_size)
    folder = run.directory / SNAPSHOTS / f"{images_seen:012d}"
    if accelerator.is_main_process:
        progress = {"step": step, "images_seen": images_seen, "seconds": round(seconds, 2), "loss": mean_loss}
        save_snapshot(folder, modules, progress)
    accelerator.wait_for_everyone()
    if run.cfg.eval.while_training:
        measure_snapshot(run.cfg, run.directory, folder, run.corpus, run.evaluation, run.tracker)


def save_snapshot(folder: Path, modules: Modules, progress: Mapping[str, float]) -> None:
    """Write a snapshot to a temporary folder and rename it when complete.

    It holds `unet/` or `transformer/` (safetensors, with low-rank updates merged), the metadata encoder if there is
    one, and snapshot.json.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    network = modules[NETWORK]
    if lora_weights(network):
        network = merge_lora(copy.deepcopy(network))
    network.save_pretrained(partial / network_folder(network))
    if FOLDER in modules:
        modules[FOLDER].save(partial / FOLDER)
    write_json(partial / SNAPSHOT, progress)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def network_folder(network: nn.Module) -> str:
    """The name of the folder in which a pipeline stores its network."""
    return "transformer" if masks_padding(network) else "unet"


def _finish(run: _Run, modules: Modules, training: dict) -> None:
    """Save the pipeline with the trained network, and the facts about the training."""
    network = modules[NETWORK]
    if updates := lora_weights(network):
        StableDiffusionPipeline.save_lora_weights(
            run.directory / LORA, unet_lora_layers=updates, unet_lora_adapter_metadata=lora_metadata(network)
        )
    network = merge_lora(network)
    pipeline = run.pipeline(network)
    # the files of the other parts are left unchanged, so that images drawn with them stay cached
    network.save_pretrained(run.directory / "pipeline" / network_folder(network))
    if FOLDER in modules:
        modules[FOLDER].save(run.directory / "pipeline" / FOLDER)
    last = read_json(snapshots_of(run.directory)[-1] / SNAPSHOT)
    last["steps"] = last.pop("step")
    write_json(run.directory / TRAINING, {**training, **last, "pipeline": type(pipeline).__name__})
