"""The definition of an image-conditioned task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from torch import nn

from corpus.index import Corpus
from eval.held_out import HeldOut
from runtime.errors import UserError


class Unsuited(UserError):
    """The corpus lacks data that a task needs."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a draw (Brooks et al. 2023, section 3.2.1).

    Attributes:
        text: scale of guidance towards the caption.
        condition: scale of guidance towards the condition. If both are 1, guidance is off, and a step costs a third.
    """

    text: float = 1.0
    condition: float = 1.0

    def arguments(self, controlnet: bool) -> dict[str, float]:
        """The arguments of the pipeline.

        An InstructPix2Pix pipeline guides only if its text scale is above 1; a ControlNet pipeline cannot guide by the
        condition.
        """
        if controlnet or self.text == self.condition == 1:
            return {"guidance_scale": self.text}
        return {"guidance_scale": max(self.text, 1 + 1e-6), "image_guidance_scale": self.condition}


@dataclass(frozen=True)
class Task:
    """An image-conditioned task.

    Attributes:
        name: name of its file, its stage and its table.
        condition: (corpus, rows) -> the condition pictures for the pipeline, uint8 [K, R, R, 3]; None: the only inputs
            are `controls`.
        metadata: further dependencies of the trained network in addition to the corpus, for fingerprints.
        captioned: whether the network reads the captions of the images.
        metrics: keys of `eval.metrics.METRICS` that are measured; those that need a segmentation get one.
        curve: the metrics that are measured at every length of `downstream.lengths`; the others only at the end.
        inputs: (held-out images) -> labelled rows of the sample sheet above the outputs; inputs.npy is the first.
        baselines: methods without a network, by name: held-out images to outputs uint8 [N, R, R, 3].
        files: further JSON files of a run, by name.
        encoder: (autoencoder) -> an autoencoder whose encoder reads the condition pictures; its raw latents are used
            without a scaling factor. None: the autoencoder itself reads them.
        controls: for each condition, by name: (corpus, rows) -> float32 [K, C, R, R]. It is the input of a ControlNet
            on the frozen foundation, and the argument `image` of its pipeline. Several conditions have one ControlNet
            each. Empty: there is no ControlNet, and `condition` is an input of the network itself.
        control_dropout: for several ControlNets, probability that each is switched off for an image in training;
            replaces `downstream.condition_dropout`.
        scales: scale of each of several ControlNets when outputs are drawn; 0 switches one off.
        examples: (corpus, rows) -> condition pictures and texts of training images, if they differ from those of
            held-out images.
        relative: whether the network learns the difference between the image's latents and those of the condition
            picture.
        mean_fraction: fraction of the training images that are pure noise, from which the network learns the mean
            image.
        channel_dropout: probability that each channel of a condition is blanked in training.
        guidance: guidance of the outputs.
        draw: (pipeline, corpus, rows, noise) -> outputs uint8 [K, R, R, 3], if one call of the pipeline is not enough;
            noise is float32 [K, samples, C, h, w].
        draw_metadata: further dependencies of the outputs in addition to the trained network, for fingerprints.
        samples: number of noises from which an output is drawn.
        measured: (held-out images, outputs) -> further inputs of metrics, by name.
        own_metrics: (held-out images, outputs) -> numbers that are not in `eval.metrics.METRICS`, by name.
        maps: (held-out images, outputs) -> labelled rows of pictures below the outputs of the sample sheet.
        legend: legend of these pictures.
    """

    name: str
    condition: Callable[[Corpus, np.ndarray], np.ndarray] | None
    metadata: Mapping[str, Any]
    captioned: bool
    metrics: tuple[str, ...]
    inputs: Callable[[HeldOut], dict[str, np.ndarray]]
    baselines: Mapping[str, Callable[[HeldOut], np.ndarray]] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    encoder: Callable[[nn.Module], nn.Module] | None = None
    controls: Mapping[str, Callable[[Corpus, np.ndarray], np.ndarray]] = field(default_factory=dict)
    control_dropout: float = 0.0
    scales: tuple[float, ...] = ()
    examples: Callable[[Corpus, np.ndarray], tuple[np.ndarray, Sequence[str]]] | None = None
    relative: bool = False
    mean_fraction: float = 0.0
    channel_dropout: float = 0.0
    guidance: Guidance = Guidance()
    draw: Callable[[DiffusionPipeline, Corpus, np.ndarray, np.ndarray], np.ndarray] | None = None
    draw_metadata: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1
    measured: Callable[[HeldOut, np.ndarray], dict[str, Any]] | None = None
    own_metrics: Callable[[HeldOut, np.ndarray], dict[str, float]] | None = None
    curve: tuple[str, ...] = ("kid_x1000",)
    maps: Callable[[HeldOut, np.ndarray], dict[str, np.ndarray]] | None = None
    legend: Mapping[str, str] | None = None

    def texts(self, corpus: Corpus, rows: np.ndarray) -> list[str]:
        """The text of each image, which the network reads in addition to the condition."""
        if not self.captioned:
            return [""] * len(rows)
        return corpus.manifest["caption"].to_numpy(dtype=str)[rows].tolist()

    def combinations(self) -> dict[str, Task]:
        """Variants of a task with several ControlNets, by name: all, all but one, only one, and none of them."""
        if len(self.controls) < 2:
            return {}
        switched_on = {"all": list(self.controls)}
        if len(self.controls) > 2:  # with two, "without one" is the same as "only the other"
            switched_on |= {f"without {name}": [one for one in self.controls if one != name] for name in self.controls}
        switched_on |= {f"{name} alone": [name] for name in self.controls} | {"none": []}
        return {
            name.replace("_", " "): replace(self, scales=tuple(float(one in on) for one in self.controls))
            for name, on in switched_on.items()
        }

    def training_examples(self, corpus: Corpus, rows: np.ndarray) -> tuple[np.ndarray, Sequence[str]]:
        """Condition pictures uint8 [K, R, R, 3] and texts of training images."""
        if self.examples is not None:
            return self.examples(corpus, rows)
        return self.condition(corpus, rows), self.texts(corpus, rows)
