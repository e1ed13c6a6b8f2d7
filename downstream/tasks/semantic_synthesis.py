"""Semantic image synthesis: a mask, drawn in the colours of a palette, to an image."""

from __future__ import annotations

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.index import Corpus
from corpus.masks import IGNORED
from downstream.corpora import corpus_of, training_rows
from downstream.task import Task, Unsuited

#: Training images whose pixels make the palette.
PALETTE_IMAGES = 2000
#: What palette.json calls pixels that have no class.
NO_CLASS = "no class"
#: Level of the colour of what never occurs in training.
GREY = 128.0
METRICS = (
    *("fd", "kid_x1000", "precision", "recall", "density", "coverage"),  # between the sets
    *("feature_distance", "miou", "pixel_accuracy"),  # image by image
)


def make_task(cfg: DictConfig) -> Task:
    """The task by `downstream.semantic_synthesis`.

    Raises:
        Unsuited: a split of the corpus has no masks.
    """
    settings = cfg.downstream.semantic_synthesis
    if reason := unsuited(cfg):
        raise Unsuited(reason)
    corpus = corpus_of(cfg, "train")
    palette = natural_palette(corpus, cfg.seed, settings.colour_distance)
    names = (*corpus.mask_classes, *[NO_CLASS] * (len(palette) - len(corpus.mask_classes)))
    colours = by_value(palette, len(corpus.mask_classes))
    return Task(
        name="semantic_synthesis",
        condition=lambda source, rows: colours[source.masks[rows]],
        facts={"palette": palette.tolist()},
        captioned=bool(settings.captioned),
        metrics=METRICS,
        inputs=lambda held: {"input": colours[held.masks]},
        files={"palette.json": dict(zip(names, palette.tolist(), strict=True))},
    )


def unsuited(cfg: DictConfig) -> str | None:
    """What keeps the corpus of a config from the task: a split that the task uses has no masks."""
    for split in ("train", "val", str(cfg.eval.split)):
        source = instantiate(cfg.corpus[split])
        if not source.mask_classes:
            return (
                f"corpus {source.name} has no masks in its split {split}, semantic synthesis needs them: "
                "try corpus=bluemarble"
            )
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
    """Each class's mean colour over training pixels, told apart: uint8 [K, 3]. A class that never occurs is grey.

    The autoencoder knows such colours, while it would blur the line between two forests of the same green. Where
    there are pixels without a class, they have a colour of their own as well, the last of K + 1.
    """
    rows = training_rows(corpus, images, seed)
    pixels, masks = corpus.images[rows], corpus.masks[rows]
    values = [*range(len(corpus.mask_classes)), *[IGNORED] * bool((masks == IGNORED).any())]
    means = [pixels[masks == value].mean(0) if (masks == value).any() else np.full(3, GREY) for value in values]
    return spread_colours(np.stack(means), distance).round().astype(np.uint8)


def by_value(palette: np.ndarray, classes: int) -> np.ndarray:
    """The colour of every mask value, uint8 [256, 3]: of a class, of what has none, and grey where neither is known.

    Args:
        palette: uint8 [K, 3] of the `classes`, or [K + 1, 3] with the colour of pixels without a class at the end.
    """
    colours = np.full((256, 3), GREY, np.uint8)
    colours[:classes] = palette[:classes]
    colours[IGNORED] = palette[classes] if len(palette) > classes else GREY
    return colours
