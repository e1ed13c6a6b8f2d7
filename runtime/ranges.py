"""Types and ranges of options and arrays: a wrong one ends a command in one line, before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from omegaconf import DictConfig

#: Options that may be below 0 although their default is not.
SIGNED = ("train.objective.time_mean",)
#: Options without a dataclass that checks them, which must be integers from 1.
COUNTS = (
    *("eval.images", "eval.convergence_images", "eval.steps", "train.snapshots", "reference.per_scene"),
    *("downstream.images", "downstream.training_images", "downstream.steps", "sample.steps", "images"),
    *("encoder.input_size", "encoder.batch_size", "evaluation_encoder.input_size", "evaluation_encoder.batch_size"),
    *("text_encoder.width", "text_encoder.layers", "text_encoder.patch", "text_encoder.max_length"),
    "corpus.train.resolution",
)
#: Options that may be null, or integers from the given number.
NULL_OR_COUNTS = {"corpus.workers": 0, "corpus.train.limit": 1, "corpus.val.limit": 1, "corpus.test.limit": 1}


def check_options(
    owner: Any,
    prefix: str,
    *,
    counts: Sequence[str] = (),
    counts_or_zero: Sequence[str] = (),
    fractions: Sequence[str] = (),
    at_least_zero: Sequence[str] = (),
    above_zero: Sequence[str] = (),
    probabilities: Sequence[str] = (),
) -> None:
    """Check fields of a dataclass; None is allowed where the type of the field says so.

    Args:
        owner: the dataclass, whose annotations are strings (`from __future__ import annotations`).
        prefix: group of the options, for the message, for example "prune".
        counts: fields that must be integers from 1.
        counts_or_zero: fields that must be integers from 0.
        fractions: fields that must be numbers from 0 to 1.
        at_least_zero: fields that must be finite numbers from 0.
        above_zero: fields that must be numbers above 0; infinity is allowed.
        probabilities: fields that must be numbers between 0 and 1, but neither 0 nor 1.
    Raises:
        UserError: a value is out of its range.
    """
    optional = {field.name for field in dataclasses.fields(owner) if "None" in str(field.type)}
    rules = [
        (counts, lambda value: isinstance(value, Integral) and value >= 1, "an integer from 1"),
        (counts_or_zero, lambda value: isinstance(value, Integral) and value >= 0, "an integer from 0"),
        (fractions, lambda value: isinstance(value, Real) and 0 <= value <= 1, "a number from 0 to 1"),
        (at_least_zero, lambda value: isinstance(value, Real) and 0 <= value < math.inf, "a number from 0"),
        (above_zero, lambda value: isinstance(value, Real) and value > 0, "a number above 0"),
        (probabilities, lambda value: isinstance(value, Real) and 0 < value < 1, "a probability between 0 and 1"),
    ]
    for names, allowed, description in rules:
        for name in names:
            value = getattr(owner, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not allowed(value):
                null = ", or null" if name in optional else ""
                raise UserError(f"{prefix}.{name}={value}: give {description}{null}")


def check_seed(seed: Any) -> None:
    """Check a random seed.

    Raises:
        UserError: the seed is not an integer from 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise UserError(f"seed={seed}: give an integer from 0")


def check_images(images: np.ndarray) -> None:
    """Check an array of images.

    Raises:
        UserError: the array is not uint8 [N, H, W, 3].
    """
    if images.dtype != "uint8" or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"images must be uint8 of shape [images, height, width, 3], not {images.dtype} {images.shape}")


def check_overrides(cfg: DictConfig, keys: Iterable[str], defaults: Callable[[], DictConfig]) -> None:
    """Check options that the user has set against their defaults: a number stays a number, and is not negative.

    Args:
        cfg: the composed configuration.
        keys: dotted keys of the options, without those of paths.
        defaults: makes the configuration without overrides; it is called only if a value needs to be compared.
    Raises:
        UserError: a number, or true or false, was expected; or a number is below 0 or, for `COUNTS`, below 1.
    """
    from omegaconf import OmegaConf

    for key in keys:
        value = OmegaConf.select(cfg, key)
        if key in COUNTS and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise UserError(f"{key}={value}: give an integer from 1")
        least = NULL_OR_COUNTS.get(key)
        if least is not None and value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{key}={value}: give an integer from {least}, or null")
            continue
        if not (isinstance(value, (str, bool)) or (isinstance(value, Real) and not value >= 0)):
            continue
        default = OmegaConf.select(defaults(), key, throw_on_missing=False)
        if isinstance(default, bool):
            if isinstance(value, str):
                raise UserError(f"{key}={value}: give true or false")
        elif isinstance(default, (int, float)):
            if isinstance(value, (str, bool)):
                raise UserError(f"{key}={value}: give a number, for example {default}")
            if default >= 0 and key not in SIGNED:
                raise UserError(f"{key}={value}: give a number from 0, for example {default}")
