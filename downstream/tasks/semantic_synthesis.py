"""Semantic image synthesis: images from masks.

The pipeline takes a mask as a picture in the colours of a palette. The network receives the fraction of each class in
every latent cell (`downstream.mask_condition`).
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

#: Number of training images from which the colours of the palette are computed.
PALETTE_IMAGES = 2000
#: Name in palette.json of pixels that have no class.
NO_CLASS = "no class"
#: Grey level of the colour of a class, or of pixels without a class, that do not occur in these images.
GREY = 128.0
METRICS = (
    *("fd", "kid_x1000", "precision", "recall", "density", "coverage"),  # between the sets
    *("feature_distance", "miou", "pixel_accuracy"),  # image by image
    "diversity",  # among several images of one mask
)
#: How the network gets the mask: class fractions as further input channels, or a ControlNet on the frozen foundation.
NETWORKS = ("fractions", "controlnet")
#: Name of the baseline that shows the training images whose masks are most similar to the held-out masks.
NEAREST = "nearest_mask"


def make_task(cfg: DictConfig) -> Task:
    """Make the task from the options `downstream.semantic_synthesis`.

    Raises:
        UserError: there is no such network, or a guidance scale is below 1.
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
    """The guidance scales in the options `downstream.semantic_synthesis`.

    Raises:
        UserError: a scale is below 1.
    """
    settings = cfg.downstream.semantic_synthesis
    for name in ("guidance_scale", "mask_guidance_scale"):
        if settings[name] < 1:
            raise UserError(
                f"downstream.semantic_synthesis.{name}={settings[name]}: give at least 1, which means no guidance"
            )
    return Guidance(float(settings.guidance_scale), float(settings.mask_guidance_scale))


def nearest_masks(corpus: Corpus, held: HeldOut, seed: int, images: int) -> np.ndarray:
    """For each held-out mask, the training image whose mask agrees with it in most pixels; uint8 [N, R, R, 3].

    Args:
        images: number of training images that are searched: the same ones that networks are trained on.
    """
    rows = training_rows(corpus, images, seed)
    known = np.asarray(corpus.masks[rows])
    best = np.zeros(len(held), np.int64)
    flat = torch.from_numpy(known.reshape(len(known), -1))
    for number, mask in enumerate(held.masks.reshape(len(held), -1)):
        best[number] = int((flat == torch.from_numpy(mask)).sum(1).argmax())
    return np.asarray(corpus.images[rows[best]])


def unsuited(cfg: DictConfig) -> str | None:
    """Why the corpus of a config cannot be used for the task: a split has no masks. None: it can be used."""
    missing = masks_missing(cfg)
    return missing and f"{missing}, but semantic synthesis needs masks: try corpus=bluemarble"


def masks_missing(cfg: DictConfig) -> str | None:
    """A message about the first split without masks, of the splits that tasks use; None: all of them have masks."""
    for split in ("train", "val", str(cfg.eval.split)):
        source = instantiate(cfg.corpus[split])
        if not source.mask_classes:
            return f"corpus {source.name} has no masks in its split {split}"
    return None


def spread_colours(colours: np.ndarray, distance: float) -> np.ndarray:
    """Move colours apart until every two are at least `distance` apart; only colours that are too close are moved.

    Args:
        colours: float [K, 3] in 0..255.
        distance: smallest Euclidean distance in red, green and blue.
    Returns:
        float64 [K, 3] in 0..255. If the colour cube is too small for the distance, the colours after the last of 2,000
        rounds.
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
        # a little noise separates colours that are equal or were moved into the same corner
        step = step.sum(1) + close.any(1)[:, None] * generator.normal(scale=0.3, size=points.shape)
        points = (points + step).clip(0, 255)
    return points


def natural_palette(corpus: Corpus, seed: int, distance: float, images: int = PALETTE_IMAGES) -> np.ndarray:
    """The colours of the classes and, as the last one, of pixels without a class; uint8 [K + 1, 3].

    A colour is the mean over the pixels of its class in `images` training images, or grey if there are none. Similar
    colours are then moved apart by `spread_colours`.
    """
    rows = training_rows(corpus, images, seed)
    pixels, masks = corpus.images[rows], corpus.masks[rows]
    values = [*range(len(corpus.mask_classes)), IGNORED]
    means = [pixels[masks == value].mean(0) if (masks == value).any() else np.full(3, GREY) for value in values]
    return spread_colours(np.stack(means), distance).round().astype(np.uint8)


def by_value(palette: np.ndarray, classes: int) -> np.ndarray:
    """The colour of every mask value, uint8 [256, 3]; values that are no class get the colour of pixels without one.

    Args:
        palette: uint8 [K + 1, 3], the colours of the classes and of pixels without a class; or uint8 [K, 3], then
            pixels without a class are grey.
        classes: number K of classes.
    """
    colours = np.empty((256, 3), np.uint8)
    colours[:] = palette[classes] if len(palette) > classes else GREY
    colours[:classes] = palette[:classes]
    return colours
