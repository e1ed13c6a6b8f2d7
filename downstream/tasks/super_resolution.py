"""Super-resolution: a low-resolution image, enlarged bicubically, to the image it was reduced from."""

from __future__ import annotations

import numpy as np
from omegaconf import DictConfig

from corpus.index import Corpus
from downstream.corpora import corpus_of
from downstream.degradation import check_factor, low_resolution
from downstream.interpolation import enlarge
from downstream.task import Task
from eval.held_out import HeldOut


def make_task(cfg: DictConfig) -> Task:
    """The task by `downstream.super_resolution`.

    Raises:
        UserError: the factor does not divide the side of the images.
    """
    settings = cfg.downstream.super_resolution
    factor = int(settings.factor)
    side = corpus_of(cfg, "train").resolution
    check_factor(factor, side, side)

    def enlarged(images: np.ndarray) -> np.ndarray:
        return enlarge(low_resolution(images, factor), factor, "bicubic")

    def condition(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
        return enlarged(corpus.images[rows])

    def inputs(held: HeldOut) -> dict[str, np.ndarray]:
        small = low_resolution(held.images, factor)
        return {f"input, {small.shape[1]} px": small, "bicubic": enlarge(small, factor, "bicubic")}

    return Task(
        name="super_resolution",
        condition=condition,
        facts={"factor": factor},
        captioned=bool(settings.captioned),
        metrics=("fd", "kid_x1000", "psnr", "ssim"),
        inputs=inputs,
        baselines={"bicubic": lambda held: enlarged(held.images)},
    )
