"""Super-resolution: a low-resolution image, enlarged bicubically, to the image it was reduced from."""

from __future__ import annotations

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from corpus.index import Corpus
from downstream.corpora import corpus_of
from downstream.task import Task
from eval.held_out import HeldOut
from runtime.errors import UserError


def make_task(cfg: DictConfig) -> Task:
    """The task by `downstream.super_resolution`.

    Raises:
        UserError: the factor does not divide the side of the images.
    """
    settings = cfg.downstream.super_resolution
    factor = int(settings.factor)
    side = corpus_of(cfg, "train").resolution
    _check_factor(factor, side, side)

    def enlarged(images: np.ndarray) -> np.ndarray:
        return bicubic(low_resolution(images, factor), factor)

    def condition(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
        return enlarged(corpus.images[rows])

    def inputs(held: HeldOut) -> dict[str, np.ndarray]:
        small = low_resolution(held.images, factor)
        return {f"input, {small.shape[1]} px": small, "bicubic": bicubic(small, factor)}

    return Task(
        name="super_resolution",
        condition=condition,
        facts={"factor": factor},
        captioned=bool(settings.captioned),
        metrics=("fd", "kid_x1000", "psnr", "ssim"),
        inputs=inputs,
        baselines={"bicubic": lambda held: enlarged(held.images)},
    )


def _check_factor(factor: int, *sides: int) -> None:
    """Refuse (UserError) a factor that does not divide the sides of images."""
    if factor < 1 or any(side % factor for side in sides):
        raise UserError(
            f"downstream.super_resolution.factor={factor} does not divide {' x '.join(map(str, sides))} px: "
            "give a divisor"
        )


def low_resolution(images: np.ndarray, factor: int) -> np.ndarray:
    """Area means, uint8 [N, H, W, 3] to [N, H/factor, W/factor, 3], rounded half up.

    Raises:
        UserError: the sides are no multiples of the factor.
    """
    count, height, width, channels = images.shape
    _check_factor(factor, height, width)
    blocks = images.reshape(count, height // factor, factor, width // factor, factor, channels)
    area = factor**2
    return ((blocks.sum(axis=(2, 4), dtype=np.uint32) + area // 2) // area).astype(np.uint8)


def bicubic(images: np.ndarray, factor: int) -> np.ndarray:
    """PIL's bicubic enlargement, uint8 [N, H, W, 3] to [N, factor H, factor W, 3]."""
    size = (images.shape[2] * factor, images.shape[1] * factor)
    return np.stack([Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in images])
