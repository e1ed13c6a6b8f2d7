"""Semantic image synthesis: a mask to an image.

The pipeline is given the mask as a picture in the colours of a palette; the network sees class fractions of latent
cells (`downstream.mask_condition`).
"""

from __future__ import annotations

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from corpus.index import Corpus
from corpus.masks import IGNORED
from downstream.controlnet import one_hot
from downstream.corpora import corpus_of, training_rows
from downstream.mask_condition import class_codes, mask_autoencoder
from downstream.task import Guidance, Task, Unsuited
from eval.held_out import HeldOut
from runtime.errors import UserError

#: Training images whose pixels make the palette.
PALETTE_IMAGES = 2000
#: What palette.json calls pixels that have no class.
NO_CLASS = "no class"
#: Level of the colour of what never occurs in training.
GREY = 128.0
METRICS = (
    *("fd", "kid_x1000", "precision", "recall", "density", "coverage"),  # between the sets
    *("feature_distance", "miou", "pixel_accuracy"),  # image by image
    "diversity",  # among several images of one mask
)
#: How a mask enters: class fractions as further input channels, or a ControlNet on the frozen foundation.
NETWORKS = ("fractions", "controlnet")
#: Name of the row of training images whose masks are most like the held-out ones.
NEAREST = "nearest_mask"


def make_task(cfg: DictConfig) -> Task:
    """The task by `downstream.semantic_synthesis`.

    Raises:
        UserError: there is no such network.
        Unsuited: a split of the corpus has no masks.
    """
    settings = cfg.downstream.semantic_synthesis
    if reason := unsuited(cfg):
        raise Unsuited(reason)
    if settings.network not in NETWORKS:
        raise UserError(f"downstream.semantic_synthesis.network={settings.network}: give one of {', '.join(NETWORKS)}")
    corpus = corpus_of(cfg, "train")
    classes = len(corpus.mask_classes)
    palette = natural_palette(corpus, cfg.seed, settings.colour_distance)
    colours = by_value(palette, classes)

    def control(source: Corpus, rows: np.ndarray) -> np.ndarray:
        return one_hot(np.asarray(source.masks[rows]), classes)

    def encoder(autoencoder: nn.Module) -> nn.Module:
        codes = class_codes(classes, autoencoder.config.latent_channels)
        return mask_autoencoder(autoencoder, palette, codes)

    return Task(
        name="semantic_synthesis",
        condition=lambda source, rows: colours[source.masks[rows]],
        metadata={
            "palette": palette.tolist(),
            "unknown_fraction": float(settings.unknown_fraction),
            "network": str(settings.network),
        },
        captioned=bool(settings.captioned),
        metrics=METRICS,
        curve=("kid_x1000", "feature_distance", "miou", "pixel_accuracy"),
        inputs=lambda held: {"input": colours[held.masks]},
        files={"palette.json": dict(zip((*corpus.mask_classes, NO_CLASS), palette.tolist(), strict=True))},
        baselines={NEAREST: lambda held: nearest_masks(corpus, held, int(cfg.seed), cfg.downstream.training_images)},
        encoder=encoder,
        controls={"mask": control} if settings.network == "controlnet" else {},
        channel_dropout=float(settings.unknown_fraction),
        guidance=guidance_of(cfg),
    )


def guidance_of(cfg: DictConfig) -> Guidance:
    """How outputs are guided, by `downstream.semantic_synthesis`.

    Raises:
        UserError: a scale is below 1.
    """
    settings = cfg.downstream.semantic_synthesis
    for name in ("guidance_scale", "mask_guidance_scale"):
        if settings[name] < 1:
            raise UserError(f"downstream.semantic_synthesis.{name}={settings[name]}: give at least 1, which is none")
    return Guidance(float(settings.guidance_scale), float(settings.mask_guidance_scale))


def nearest_masks(corpus: Corpus, held: HeldOut, seed: int, images: int) -> np.ndarray:
    """For each held-out mask the training image whose mask agrees with it in most pixels, uint8 [N, R, R, 3].

    Args:
        images: how many training images are looked through: those that networks are trained on.
    """
    rows = training_rows(corpus, images, seed)
    known = np.asarray(corpus.masks[rows])
    best = np.zeros(len(held), np.int64)
    flat = torch.from_numpy(known.reshape(len(known), -1))
    for number, mask in enumerate(held.masks.reshape(len(held), -1)):
        best[number] = int((flat == torch.from_numpy(mask)).sum(1).argmax())
    return np.asarray(corpus.images[rows[best]])


def unsuited(cfg: DictConfig) -> str | None:
    """What keeps the corpus of a config from the task: a split that the task uses has no masks."""
    missing = masks_missing(cfg)
    return missing and f"{missing}, semantic synthesis needs them: try corpus=bluemarble"


def masks_missing(cfg: DictConfig) -> str | None:
    """Which of the splits that tasks use has no masks, in words; None: all of them have."""
    for split in ("train", "val", str(cfg.eval.split)):
        source = instantiate(cfg.corpus[split])
        if not source.mask_classes:
            return f"corpus {source.name} has no masks in its split {split}"
    return None


def spread_colours(colours: np.ndarray, distance: float) -> np.ndarray:
    """Push colours apart until any two are `distance` apart, moving only those that are too close.

    Args:
        colours: float [K, 3] in 0..255.
    Returns:
        float64 [K, 3] in 0..255; the nearest found where the colour cube is too small for the distance.
    """
    points = np.asarray(colours, dtype=np.float64).copy()
    generator = np.random.default_rng(0)
    for _ in range(2000):
        between = points[:, None] - points[None]
        length = np.linalg.norm(between, axis=2)
        close = (length < distance) & ~np.eye(len(points), dtype=bool)
        if not close.any():
            break
        step = np.where(close, (distance + 1 - length) / np.maximum(length, 1e-9), 0)[..., None] * between / 4
        # a little noise, for colours that coincide or were pushed into one corner
        step = step.sum(1) + close.any(1)[:, None] * generator.normal(scale=0.3, size=points.shape)
        points = (points + step).clip(0, 255)
    return points


def natural_palette(corpus: Corpus, seed: int, distance: float, images: int = PALETTE_IMAGES) -> np.ndarray:
    """Each class's mean colour over training pixels, distinguished, and a colour for pixels without a class: uint8
    [K + 1, 3]. What never occurs is grey, or nearly so."""
    rows = training_rows(corpus, images, seed)
    pixels, masks = corpus.images[rows], corpus.masks[rows]
    values = [*range(len(corpus.mask_classes)), IGNORED]
    means = [pixels[masks == value].mean(0) if (masks == value).any() else np.full(3, GREY) for value in values]
    return spread_colours(np.stack(means), distance).round().astype(np.uint8)


def by_value(palette: np.ndarray, classes: int) -> np.ndarray:
    """The colour of every mask value, uint8 [256, 3]: of a class, or that of pixels without one.

    Args:
        palette: uint8 [K + 1, 3] of the `classes`, with the colour of pixels without a class at the end; grey without.
    """
    colours = np.empty((256, 3), np.uint8)
    colours[:] = palette[classes] if len(palette) > classes else GREY
    colours[:classes] = palette[:classes]
    return colours
