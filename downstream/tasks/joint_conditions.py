"""Images from several conditions: a mask, edges and a low resolution, each with a separate ControlNet.

All ControlNets steer the same frozen foundation and are trained together. For each training image, each of them is
switched off with some probability, so that any condition can be left out when an image is drawn. CRS-Diff (Tang et al.
2024, arXiv 2403.11614) also draws from several image conditions at once, with another network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig

from corpus.index import Corpus
from downstream.conditional import SCRATCH
from downstream.controlnet import one_hot
from downstream.corpora import corpus_of
from downstream.degradation import low_resolution, reduce
from downstream.edges import Canny, edge_agreement, edges
from downstream.interpolation import enlarge
from downstream.task import Task
from downstream.tasks.semantic_synthesis import by_value, masks_missing, natural_palette
from eval.held_out import HeldOut
from runtime.artefacts import plain
from runtime.errors import UserError
from runtime.notices import notice

NAME = "joint_conditions"
#: `make reproduce` compares foundations with networks from scratch; this task cannot start from scratch.
IN_CHAIN = False
MASK, EDGES, LOW = "mask", "edges", "low_resolution"
METRICS = ("fd", "kid_x1000", "feature_distance")


@dataclass(frozen=True)
class Condition:
    """One of the conditions.

    Attributes:
        control: (corpus, rows) -> the input of its ControlNet, float32 [K, C, R, R] in 0..1.
        shown: (corpus, rows) -> pictures of the condition for sample sheets, uint8 [K, R, R, 3].
        metadata: how the condition is made, for fingerprints and for conditions.json.
        metrics: keys of `eval.metrics.METRICS` that measure whether an output follows the condition.
    """

    control: Callable[[Corpus, np.ndarray], np.ndarray]
    shown: Callable[[Corpus, np.ndarray], np.ndarray]
    metadata: dict[str, Any]
    metrics: tuple[str, ...] = ()


def make_task(cfg: DictConfig) -> Task:
    """Make the task from the options `downstream.joint_conditions`.

    Raises:
        UserError: there is no foundation to steer, fewer than two conditions are left, or an option is out of range.
    """
    settings = cfg.downstream[NAME]
    if str(cfg.foundation) == SCRATCH:
        raise UserError(
            f"{NAME} steers a trained foundation, foundation={SCRATCH} has none: give foundation=shipped or DIR"
        )
    if not 0 <= settings.dropout < 1:
        raise UserError(f"downstream.{NAME}.dropout={settings.dropout}: give at least 0 and less than 1")
    makers = {MASK: _mask, EDGES: _edges, LOW: _low}
    names = _chosen_names(cfg, tuple(makers))
    conditions = {name: makers[name](cfg) for name in names}
    metadata = {name: condition.metadata for name, condition in conditions.items()}
    factor = int(settings.factor)

    def inputs(held: HeldOut) -> dict[str, np.ndarray]:
        shown = {name: condition.shown(held.corpus, held.rows) for name, condition in conditions.items()}
        return {name.replace("_", " "): pictures for name, pictures in shown.items()}

    def measured(held: HeldOut, outputs: np.ndarray) -> dict[str, np.ndarray]:
        degraded = reduce(np.asarray(outputs, dtype=np.float32), factor, "area")
        return {"low": low_resolution(held.images, factor), "degraded": degraded}

    def agreement(held: HeldOut, outputs: np.ndarray) -> dict[str, float]:
        detector = _detector(cfg)
        return {"edge_agreement": edge_agreement(edges(outputs, detector), edges(held.images, detector))}

    return Task(
        name=NAME,
        condition=None,
        metadata={"version": 1, "conditions": list(metadata.items()), "dropout": float(settings.dropout)},
        captioned=bool(settings.captioned),
        metrics=(*METRICS, *(key for condition in conditions.values() for key in condition.metrics)),
        curve=("kid_x1000", "feature_distance"),
        inputs=inputs,
        baselines={"bicubic": lambda held: conditions[LOW].shown(held.corpus, held.rows)} if LOW in names else {},
        files={"conditions.json": metadata},
        controls={name: condition.control for name, condition in conditions.items()},
        control_dropout=float(settings.dropout),
        scales=(1.0,) * len(names),
        measured=measured if LOW in names else None,
        own_metrics=agreement if EDGES in names else None,
    )


def _chosen_names(cfg: DictConfig, known: tuple[str, ...]) -> list[str]:
    """The names in `downstream.joint_conditions.conditions`; without the mask if the corpus has no masks.

    A mask that is left out is reported on stderr.

    Raises:
        UserError: a condition is unknown or named twice, or fewer than two are left.
    """
    names = [str(name) for name in cfg.downstream[NAME].conditions]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"downstream.{NAME}.conditions names {unknown[0]}: choose from {', '.join(known)}")
    if MASK in names and (missing := masks_missing(cfg)):
        names = [name for name in names if name != MASK]
        notice(f"{NAME}: the condition {MASK} is left out: {missing}")
    if len(set(names)) < max(2, len(names)):
        raise UserError(
            f"downstream.{NAME}.conditions={','.join(names)}: give two or more different ones of {', '.join(known)}; "
            "for a mask alone use downstream/semantic_synthesis.py, for a low resolution alone "
            "downstream/super_resolution.py"
        )
    return names


def _mask(cfg: DictConfig) -> Condition:
    corpus = corpus_of(cfg, "train")
    classes = len(corpus.mask_classes)

    def shown(source: Corpus, rows: np.ndarray) -> np.ndarray:
        palette = natural_palette(corpus, cfg.seed, cfg.downstream.semantic_synthesis.colour_distance)
        return by_value(palette, classes)[source.masks[rows]]

    return Condition(
        control=lambda source, rows: one_hot(np.asarray(source.masks[rows]), classes),
        shown=shown,
        metadata={"classes": list(corpus.mask_classes)},
        metrics=("miou", "pixel_accuracy"),
    )


def _edges(cfg: DictConfig) -> Condition:
    detector = _detector(cfg)

    def shown(source: Corpus, rows: np.ndarray) -> np.ndarray:
        result = edges(source.images[rows], detector)
        return np.where(result, np.uint8(255), np.uint8(0))[..., None].repeat(3, axis=3)

    return Condition(lambda source, rows: _as_control(shown(source, rows)), shown, {"canny": plain(detector)})


def _detector(cfg: DictConfig) -> Canny:
    options = cfg.downstream[NAME].canny
    try:
        return Canny(**{name: float(value) for name, value in options.items()})
    except ValueError as error:
        raise UserError(f"downstream.{NAME}.canny: {error}") from error


def _low(cfg: DictConfig) -> Condition:
    factor, side = int(cfg.downstream[NAME].factor), corpus_of(cfg, "train").resolution
    if factor < 2 or side % factor:
        raise UserError(f"downstream.{NAME}.factor={factor}: give a divisor above 1 of the images' side, {side} px")

    def shown(source: Corpus, rows: np.ndarray) -> np.ndarray:
        return enlarge(low_resolution(source.images[rows], factor), factor, "bicubic")

    return Condition(
        lambda source, rows: _as_control(shown(source, rows)), shown, {"factor": factor}, ("psnr", "consistency")
    )


def _as_control(pictures: np.ndarray) -> np.ndarray:
    """Convert pictures as a pipeline does for a ControlNet, uint8 [K, R, R, 3] to float32 [K, 3, R, R] in 0..1."""
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), dtype=np.float32) / 255
