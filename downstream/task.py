"""What sets one image-conditioned task apart from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from corpus.index import Corpus
from eval.held_out import HeldOut
from runtime.errors import UserError


class Unsuited(UserError):
    """The corpus lacks what a task needs."""


@dataclass(frozen=True)
class Task:
    """An image-conditioned task.

    Attributes:
        name: of its file, its stage and its table.
        condition: (corpus, rows) -> the images that the network is conditioned on, uint8 [K, R, R, 3].
        facts: what these depend on beside the corpus, for fingerprints.
        captioned: whether the network reads the captions of the images.
        metrics: keys of `eval.metrics.METRICS` that are measured; those that need a segmentation get one.
        inputs: (held-out images) -> labelled rows of the sample sheet above the outputs; inputs.npy is the first.
        baselines: methods without a network, by name: held-out images to outputs uint8 [N, R, R, 3].
        files: further JSON files of a run, by name.
    """

    name: str
    condition: Callable[[Corpus, np.ndarray], np.ndarray]
    facts: Mapping[str, Any]
    captioned: bool
    metrics: tuple[str, ...]
    inputs: Callable[[HeldOut], dict[str, np.ndarray]]
    baselines: Mapping[str, Callable[[HeldOut], np.ndarray]] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
