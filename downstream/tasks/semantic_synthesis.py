"""Semantic image synthesis: a mask, drawn in the colours of a palette, to an image."""

from __future__ import annotations

import numpy as np
from omegaconf import DictConfig

from corpus.index import Corpus
from downstream.corpora import corpus_of, training_rows
from downstream.task import Task, Unsuited

#: Training images whose pixels make the palette.
PALETTE_IMAGES = 2000
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
    corpus = _training_corpus(cfg)
    palette = natural_palette(corpus, cfg.seed, settings.colour_distance)
    return Task(
        name="semantic_synthesis",
        condition=lambda source, rows: palette[source.masks[rows]],
        facts={"palette": palette.tolist()},
        captioned=bool(settings.captioned),
        metrics=METRICS,
        inputs=lambda held: {"input": palette[held.masks]},
        files={"palette.json": dict(zip(corpus.mask_classes, palette.tolist(), strict=True))},
    )


def _training_corpus(cfg: DictConfig) -> Corpus:
    """The training corpus; `Unsuited` unless every split that the task uses has masks."""
    for split in ("train", "val", str(cfg.eval.split)):
        if (corpus := corpus_of(cfg, split)).masks is None:
            raise Unsuited(
                f"corpus {corpus.name} has no masks in its split {split}, semantic synthesis needs them: "
                "try corpus=bluemarble"
            )
    return corpus_of(cfg, "train")


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

    The autoencoder knows such colours, while it would blur the line between two forests of the same green.
    """
    rows = training_rows(corpus, images, seed)
    pixels, masks = corpus.images[rows], corpus.masks[rows]
    means = [
        pixels[masks == index].mean(0) if (masks == index).any() else np.full(3, 128.0)
        for index in range(len(corpus.mask_classes))
    ]
    return spread_colours(np.stack(means), distance).round().astype(np.uint8)
