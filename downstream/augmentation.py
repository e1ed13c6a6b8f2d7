"""Generated images as training data: a segmenter trained on real images, on generated ones, and on both.

All trainings of one seed share everything except the data: the network and its initial weights, the number of steps,
the batch size and the held-out images. Generated images are drawn from masks of the real images that the same training
may use, so they add no further labels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import save_file

from corpus.index import Corpus
from downstream.conditional import resolve_foundation
from downstream.controlnet import one_hot
from downstream.corpora import corpus_of, held_out_images, training_rows
from downstream.fine_tuning import fine_tune
from downstream.measured_task import load_pipeline
from downstream.registry import TASKS
from downstream.segmenter import (
    WEIGHTS,
    LabelledImages,
    Segmenter,
    SegmenterOptions,
    labelled_batches,
    new_network,
    train_for,
)
from downstream.task import Task
from downstream.tasks.semantic_synthesis import NO_CLASS, by_value
from encoders.embedding import device, embed
from eval.generate import generate
from eval.held_out import HeldOut, balanced_rows
from eval.metrics import METRICS, compute
from eval.models import UNLOADABLE, Model
from prune.entropy import entropies
from prune.library import budget_of
from prune.pool import Pool
from prune.selection import REFERENCE, scene_source, with_reference
from runtime.artefacts import read_json, stage, write_json
from runtime.errors import UserError
from train.latents import symmetric

TASK = "semantic_synthesis"
#: Ways to choose the generated images to use from those that were drawn.
RANDOM, PRUNED = "random", "rsprune"
IMAGES, MASKS, KEPT = "images.npy", "masks.npy", "kept.npy"
TRAINING, MEASURED = "training.json", "metrics.json"
#: Number of images drawn between two writes.
CHUNK = 500


@dataclass(frozen=True)
class AugmentationOptions:
    """Options of the comparison.

    Attributes:
        run: directory of a semantic-synthesis run that draws images; None: the configured foundation is fine-tuned.
        real_images: number of training images with masks that count as 100 percent; every scene has the same chance.
        amounts: percentages of these images; a smaller amount is a subset of a larger one.
        pool: images drawn for each amount and seed.
        ratio: fraction of the pool that is not used.
        generated_fraction: fraction of generated images in a batch with real and generated images.
        steps: optimizer steps of every training.
        seeds: for each seed, images are chosen and drawn and the segmenters are trained again.
    Raises:
        UserError: an option is out of range.
    """

    run: str | None
    real_images: int
    amounts: tuple[float, ...]
    pool: int
    ratio: float
    generated_fraction: float
    steps: int
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("real_images", "pool", "steps"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"augmentation.{name}={value}: give at least 1")
        if not self.amounts or not all(0 < amount <= 100 for amount in self.amounts):
            raise UserError(f"augmentation.amounts={list(self.amounts)}: give percentages above 0, up to 100")
        if not self.seeds:
            raise UserError("augmentation.seeds=[]: give at least one seed")
        if not 0 < self.generated_fraction < 1:
            raise UserError(
                f"augmentation.generated_fraction={self.generated_fraction}: give a fraction between 0 and 1"
            )
        if not budget_of(self.pool, self.ratio):
            raise UserError(f"augmentation.ratio={self.ratio} keeps none of {self.pool} images: lower it")

    @classmethod
    def of(cls, cfg: DictConfig) -> AugmentationOptions:
        settings = cfg.augmentation
        real = cfg.downstream.training_images if settings.real_images is None else settings.real_images
        amounts = tuple(sorted({float(amount) for amount in settings.amounts}))
        seeds = tuple(dict.fromkeys(settings.seeds))
        return cls(**{**settings, "real_images": int(real), "amounts": amounts, "seeds": seeds})


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        amount: percentage of the real images with masks that are used.
        real: whether the images of these masks are used for training.
        choice: `RANDOM`, `PRUNED`, or None if no generated images are used.
        seed: one of `AugmentationOptions.seeds`.
    """

    amount: float
    real: bool
    choice: str | None
    seed: int


def grid(options: AugmentationOptions) -> list[Cell]:
    """All trainings of the comparison.

    For every amount: real images alone, and real images with generated ones of each choice. For the largest amount
    also: generated images alone, of each choice.
    """
    kinds = [(amount, True, choice) for amount in options.amounts for choice in (None, RANDOM, PRUNED)]
    kinds += [(options.amounts[-1], False, choice) for choice in (RANDOM, PRUNED)]
    return [Cell(*kind, seed) for seed in options.seeds for kind in kinds]


# ---------------------------------------------------------------- training data


def rows_of_amount(corpus: Corpus, rows: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Choose a percentage of `rows`, spread over the scenes; int64, at least one row.

    With the same seed, the rows of a larger percentage include those of a smaller one.
    """
    usable = np.zeros(len(corpus), dtype=bool)
    usable[rows] = True
    dealt = balanced_rows(corpus, usable, len(rows), np.random.default_rng([seed, 60]))
    return dealt[: max(1, round(len(dealt) * percent / 100))]


def scene_weights(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """Weights float64 [N] of sum 1: every scene among `rows` has the same total, all other rows have 0."""
    codes, _ = pd.factorize(corpus.manifest["scene"].to_numpy(dtype=object)[rows])
    weights = np.zeros(len(corpus))
    weights[rows] = 1 / np.bincount(codes)[codes]
    return weights / weights.sum()


def deal(weights: np.ndarray, size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Choose the masks to draw from, and one of the eight symmetries for each.

    Systematic sampling: each mask occurs `size * weight` times, rounded up or down. The repetitions of a mask start at
    a random symmetry and use all eight before one is repeated.

    Args:
        weights: float64 [N] of sum 1.
    Returns:
        int64 [size] rows, ascending, and int64 [size] symmetries of `train.latents.symmetric`.
    """
    positions = (np.arange(size) + generator.random()) / size
    upto = np.cumsum(weights)
    last = int(np.flatnonzero(weights)[-1])  # because of rounding, the sum may be below the last position
    rows = np.minimum(np.searchsorted(upto, positions, side="right"), last)
    use = np.arange(size) - np.searchsorted(rows, rows)
    return rows, (generator.integers(8, size=len(weights))[rows] + use) % 8


def turned(masks: np.ndarray, symmetries: np.ndarray) -> np.ndarray:
    """Masks uint8 [K, R, R], each transformed by its symmetry."""
    result = np.empty_like(masks)
    for symmetry in np.unique(symmetries):
        rows = symmetries == symmetry
        result[rows] = symmetric(torch.from_numpy(masks[rows])[:, None], int(symmetry))[:, 0].numpy()
    return result


def sources_of(
    real: LabelledImages | None, generated: LabelledImages | None, batch_size: int, generated_fraction: float
) -> list[tuple[LabelledImages, int]]:
    """The data sources of a training's batches, with the number of images from each.

    Raises:
        UserError: a mixed batch is too small for both sources.
    """
    if real is None or generated is None:
        return [(source, batch_size) for source in (real, generated) if source is not None]
    count = round(generated_fraction * batch_size)
    if not 0 < count < batch_size:
        raise UserError(
            f"augmentation.generated_fraction={generated_fraction} of downstream.segmenter.batch_size={batch_size} "
            "leaves no place for real or for generated images: give a larger batch or a fraction nearer to 0.5"
        )
    return [(real, batch_size - count), (generated, count)]


# ---------------------------------------------------------------- the study


@dataclass(frozen=True)
class Study:
    """Inputs that all trainings share.

    Attributes:
        cfg: config of corpus, encoder, entropy, reference and segmenter.
        pruning: a config; its `prune` is the pruning method that chooses generated images.
        task: semantic synthesis.
        run: directory of the run that draws images.
        rows: int64, the training images that count as 100 percent.
        held: the held-out real images.
        colours: uint8 [256, 3], the run's colour of every mask value.
    """

    cfg: DictConfig
    pruning: DictConfig
    options: AugmentationOptions
    task: Task
    run: Path
    corpus: Corpus
    rows: np.ndarray
    held: HeldOut
    colours: np.ndarray

    @classmethod
    def of(cls, cfg: DictConfig, pruning: DictConfig) -> Study:
        """Make a study from a config; if it names no run, its foundation is fine-tuned.

        Raises:
            Unsuited: the corpus has no masks.
            UserError: an option is out of range, the run is of another task or corpus, or the held-out images are
            training images.
        """
        options = AugmentationOptions.of(cfg)
        task = TASKS[TASK](cfg)
        corpus, held = corpus_of(cfg, "train"), held_out_images(cfg)
        if held.corpus.fingerprint == corpus.fingerprint:
            raise UserError(f"eval.split={cfg.eval.split} is the split that is trained on: give eval.split=test or val")
        run = fine_tune(cfg, task, *resolve_foundation(cfg)) if options.run is None else _checked_run(options.run)
        rows = training_rows(corpus, options.real_images, int(cfg.seed))
        return cls(cfg, pruning, options, task, run, corpus, rows, held, run_colours(run, corpus))

    @cached_property
    def model_key(self) -> str:
        """Fingerprint of the run's weights."""
        return Model(self.run / "pipeline").key


def _checked_run(path: str) -> Path:
    directory = Path(path)
    if not all((directory / file).is_file() for file in ("pipeline/model_index.json", "palette.json")):
        raise UserError(
            f"augmentation.run={path} is no run of semantic synthesis: give the directory that "
            "`python downstream/semantic_synthesis.py` prints (run: DIR), or null to fine-tune one now"
        )
    return directory


def run_colours(run: Path, corpus: Corpus) -> np.ndarray:
    """The colour of every mask value in a run's training, uint8 [256, 3].

    Raises:
        UserError: the classes of its palette differ from those of the corpus.
    """
    palette = read_json(run / "palette.json")
    names = [name for name in palette if name != NO_CLASS]
    if names != list(corpus.mask_classes):
        raise UserError(
            f"augmentation.run={run} was trained on the classes {', '.join(names)}, the masks of {corpus.name} have "
            f"{', '.join(corpus.mask_classes)}: give a run of this corpus"
        )
    return by_value(np.array(list(palette.values()), dtype=np.uint8), len(names))


# ---------------------------------------------------------------- drawing and choosing


def drawn_pool(study: Study, amount: float, seed: int) -> Path:
    """Images drawn from the masks of an amount's real images: a stage's directory with images.npy and masks.npy.

    The noise of image i depends only on the seed and i; guidance is that of the task's outputs.
    """
    corpus, options = study.corpus, study.options
    rows = rows_of_amount(corpus, study.rows, amount, seed)
    picked, symmetries = deal(scene_weights(corpus, rows), options.pool, np.random.default_rng([seed, 61]))
    captions = np.full(len(picked), "")
    if study.task.captioned:
        captions = corpus.manifest["caption"].to_numpy(dtype=str)[picked]

    steered = bool(study.task.controls)

    def conditions(masks: np.ndarray) -> torch.Tensor | list[Image.Image]:
        if steered:
            return torch.from_numpy(one_hot(masks, len(corpus.mask_classes)))
        return [Image.fromarray(picture) for picture in study.colours[masks]]

    def build(directory: Path) -> None:
        pipeline = _pipeline(study)
        guidance = study.task.guidance.arguments(steered)
        masks = turned(corpus.masks[picked], symmetries)
        np.save(directory / MASKS, masks)
        shape = (len(masks), corpus.resolution, corpus.resolution, 3)
        images = np.lib.format.open_memmap(directory / IMAGES, mode="w+", dtype=np.uint8, shape=shape)
        for start in range(0, len(masks), CHUNK):
            part = np.arange(start, min(start + CHUNK, len(masks)))
            images[part] = generate(
                pipeline,
                captions[part].tolist(),
                steps=int(study.cfg.downstream.steps),
                guidance_scale=guidance["guidance_scale"],
                options={key: value for key, value in guidance.items() if key != "guidance_scale"},
                seed=seed,
                label=f"draw {part[-1] + 1} of {len(masks)}",
                noise_of=part,
                image=conditions(masks[part]),
            )
        images.flush()

    inputs = {
        "model": study.model_key,
        "colours": study.colours.tolist(),
        "corpus": corpus.fingerprint,
        "masks": [picked.tolist(), symmetries.tolist()],
        "captions": captions.tolist(),
        "steps": int(study.cfg.downstream.steps),
        "guidance": study.task.guidance,
        "seed": seed,
    }
    return stage(study.cfg.runs, "augmentation_pool", inputs, build)


def _pipeline(study: Study) -> DiffusionPipeline:
    """Load the study's pipeline.

    Raises:
        UserError: it does not load, or its image side differs from the corpus's.
    """
    try:
        pipeline = load_pipeline(study.run / "pipeline")
    except UNLOADABLE as error:
        raise UserError(f"{study.run / 'pipeline'} does not load: {' '.join(str(error).split())[:200]}") from error
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if side != study.corpus.resolution:
        raise UserError(
            f"augmentation.run={study.run} draws images of {side} px, those of {study.corpus.name} have "
            f"{study.corpus.resolution} px: give corpus.train.resolution={side} or a run of this corpus"
        )
    return pipeline


def chosen(study: Study, pool: Path, choice: str, seed: int) -> np.ndarray:
    """Numbers of the images of a pool that are used, int64, ascending; every choice uses the same number of images."""
    budget = budget_of(study.options.pool, study.options.ratio)
    if choice == RANDOM:
        return np.sort(np.random.default_rng([seed, 62]).permutation(study.options.pool)[:budget])
    cfg, method = study.cfg, instantiate(study.pruning.prune, _convert_="all")
    scenes = scene_source(cfg, study.corpus, method)

    def build(directory: Path) -> None:
        selection = method.select(_pool(study, pool, scenes), budget, np.random.default_rng([seed, 2]))
        np.save(directory / KEPT, selection.kept)
        reasons = pd.Series(selection.reason.astype(str)).value_counts()
        write_json(directory / "summary.json", {"reasons": reasons.to_dict(), "diagnostics": selection.diagnostics})

    inputs = {
        "pool": pool.name,
        "method": method,
        "budget": budget,
        "seed": seed,
        "entropy": cfg.entropy,
        "encoder": cfg.encoder,
        "reference": [scenes, cfg.reference if scenes == REFERENCE else None, int(cfg.seed)],
    }
    return np.load(stage(cfg.runs, "augmentation_choice", inputs, build) / KEPT)


def _pool(study: Study, pool: Path, scenes: str | None) -> Pool:
    """Generated images in the form that a pruning method reads, with the reference set of the corpus."""
    cfg, images = study.cfg, np.load(pool / IMAGES, mmap_mode="r")
    encoder = instantiate(cfg.encoder)
    embeddings = embed(encoder, images, batch_size=encoder.batch_size, label="embed generated images")
    result = Pool(
        ids=np.arange(len(images)).astype(str),
        readable=np.ones(len(images), dtype=bool),
        entropy=entropies(instantiate(cfg.entropy), images),
        embeddings=embeddings,
        reference_embeddings=np.empty((0, embeddings.shape[1]), np.float32),
        reference_labels=np.empty(0, dtype=object),
    )
    return result if scenes is None else with_reference(cfg, result, scenes, encoder)


# ---------------------------------------------------------------- training and measuring


def trained_cell(study: Study, cell: Cell) -> Path:
    """The segmenter of a cell: a stage's directory with its weights and training.json (its training data)."""
    settings = replace(SegmenterOptions.of(study.cfg), seed=cell.seed)
    corpus, options = study.corpus, study.options
    rows = rows_of_amount(corpus, study.rows, cell.amount, cell.seed)
    pool = None if cell.choice is None else drawn_pool(study, cell.amount, cell.seed)
    kept = None if pool is None else chosen(study, pool, cell.choice, cell.seed)

    def build(directory: Path) -> None:
        start = time.perf_counter()
        real = LabelledImages(corpus.images, corpus.masks, scene_weights(corpus, rows)) if cell.real else None
        generated = None if pool is None else generated_images(pool, kept)
        sources = sources_of(real, generated, settings.batch_size, options.generated_fraction)
        network = new_network(settings, len(corpus.mask_classes)).to(device())
        batches = labelled_batches(sources, np.random.default_rng([cell.seed, 63]))
        state, losses = train_for(network, batches, settings, options.steps)
        save_file(state, directory / WEIGHTS)
        metadata = {"steps": options.steps, "loss": float(np.mean(losses[-max(1, len(losses) // 10) :]))}
        seconds = round(time.perf_counter() - start, 1)
        write_json(directory / TRAINING, {**metadata, **images_of(study, cell), "seconds": seconds})

    inputs: dict[str, Any] = {
        "classes": list(corpus.mask_classes),
        "real": [corpus.fingerprint, rows.tolist()] if cell.real else None,
        "generated": None if pool is None else [pool.name, kept.tolist()],
        "fraction": options.generated_fraction if cell.real and pool is not None else None,
        "network": [settings.encoder, settings.channels, settings.seed],
        "optimizer": [settings.batch_size, settings.learning_rate, settings.weight_decay, settings.ema_decay],
        "steps": options.steps,
    }
    return stage(study.cfg.runs, "augmentation", inputs, build)


def generated_images(pool: Path, kept: Sequence[int]) -> LabelledImages:
    """The images of a pool with the numbers `kept`; all have the same probability of being drawn."""
    images, masks = (np.load(pool / file, mmap_mode="r") for file in (IMAGES, MASKS))
    weights = np.zeros(len(images))
    weights[kept] = 1.0
    return LabelledImages(images, masks, weights)


def images_of(study: Study, cell: Cell) -> dict[str, int]:
    """The numbers of `real_images`, `generated_images` and `masks` of real images in a cell's training."""
    masks = len(rows_of_amount(study.corpus, study.rows, cell.amount, cell.seed))
    used = 0 if cell.choice is None else budget_of(study.options.pool, study.options.ratio)
    return {"real_images": masks if cell.real else 0, "generated_images": used, "masks": masks}


def measured_cell(study: Study, cell: Cell) -> Path:
    """`miou` and `pixel_accuracy` of a cell's segmenter on real held-out images: a directory with metrics.json."""
    trained, held, classes = trained_cell(study, cell), study.held, len(study.corpus.mask_classes)

    def build(directory: Path) -> None:
        segmenter = Segmenter(trained, SegmenterOptions.of(study.cfg), classes)
        inputs = {"segmentation": segmenter(held.images), "masks": held.masks, "classes": classes}
        write_json(directory / MEASURED, compute(inputs, of={}))

    inputs = {"segmenter": trained.name, "held_out": held.key, "metrics": sorted(METRICS)}
    return stage(study.cfg.runs, "augmentation_measured", inputs, build)
