"""The segmenter for judging images drawn from masks: a library's network, trained on real images and their masks.

It is trained on the training split until its mean intersection over union on `val` stops improving. It has no part in
the generation of the images that it judges. Its result on real images is the reference for generated ones.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from corpus.index import Corpus
from corpus.masks import IGNORED
from downstream.corpora import corpus_of
from encoders.embedding import device
from encoders.pixels import to_tensor
from eval.held_out import balanced_rows
from eval.pairs import mean_intersection_over_union, pixel_accuracy
from runtime.artefacts import stage, write_json
from runtime.errors import UserError
from runtime.progress import progress
from train.latents import scene_balanced_weights, symmetric

WEIGHTS = "segmenter.safetensors"
BATCH = 100
#: The learning rate is multiplied by the factor after more than RATE_PATIENCE rounds without a better result.
RATE_FACTOR, RATE_PATIENCE = 0.3, 1


@dataclass(frozen=True)
class SegmenterOptions:
    """The network and its training.

    Attributes:
        encoder: name of an encoder of segmentation_models_pytorch.
        channels: number of channels of the decoder; a multiple of 32.
        batch_size, learning_rate, weight_decay: options of AdamW.
        ema_decay: decay per step of the average of the weights; the average is measured and kept.
        round_images: training images between two evaluations on `val`; every scene has the same chance.
        val_images: number of scene-balanced images of `val`.
        patience: rounds without a better result after which the training ends.
        most_rounds: largest number of rounds.
        seed: seed of its weights and batches; the same for all training seeds of the networks that it judges.
    Raises:
        UserError: a number is below 1.
    """

    encoder: str
    channels: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    ema_decay: float
    round_images: int
    val_images: int
    patience: int
    most_rounds: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "round_images", "val_images", "patience", "most_rounds"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"downstream.segmenter.{name}={value}: give at least 1")

    @classmethod
    def of(cls, cfg: DictConfig) -> SegmenterOptions:
        return cls(**cfg.downstream.segmenter)


@dataclass(frozen=True)
class Segmenter:
    """A trained segmenter on disk.

    Attributes:
        directory: directory of the stage that trained it.
        options: the options with which it was trained.
        classes: number of classes.
    """

    directory: Path
    options: SegmenterOptions
    classes: int

    @property
    def key(self) -> str:
        """Its identity for fingerprints."""
        return self.directory.name

    @cached_property
    def network(self) -> nn.Module:
        network = new_network(self.options, self.classes)
        network.load_state_dict(load_file(self.directory / WEIGHTS))
        return network.to(device()).eval()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The most probable class of every pixel, uint8 [N, H, W], of uint8 [N, H, W, 3]."""
        return segment(self.network, images)


@dataclass(frozen=True)
class LabelledImages:
    """Images with masks from which batches are drawn.

    Attributes:
        images: uint8 [N, R, R, 3], usually a memory map.
        masks: uint8 [N, R, R].
        weights: float64 [N], relative probability of drawing each image; 0: never.
    """

    images: np.ndarray
    masks: np.ndarray
    weights: np.ndarray


def trained_segmenter(cfg: DictConfig) -> Segmenter:
    """The segmenter of the corpus; if it does not exist, the first process of a launch trains it.

    Raises:
        UserError: the corpus has no masks.
    """
    training, val = corpus_of(cfg, "train"), corpus_of(cfg, "val")
    for corpus in (training, val):
        if corpus.masks is None:
            raise UserError(f"corpus {corpus.name} has no masks to train a segmenter on: try corpus=bluemarble")
    options, classes = SegmenterOptions.of(cfg), len(training.mask_classes)

    def build(directory: Path) -> None:
        start = time.perf_counter()
        network = new_network(options, classes).to(device())
        state, rounds = train_segmenter(network, training, val, options)
        save_file(state, directory / WEIGHTS)
        best = max(rounds, key=lambda result: result["miou"])
        metadata = {"best_round": best["round"], "rounds": rounds, "seconds": round(time.perf_counter() - start, 1)}
        write_json(directory / "training.json", metadata)

    inputs = {"training": training.fingerprint, "val": val.fingerprint, "options": options}
    return Segmenter(stage(cfg.runs, "segmenter", inputs, build), options, classes)


def new_network(options: SegmenterOptions, classes: int) -> nn.Module:
    """An untrained feature pyramid network (Kirillov et al. 2019, Panoptic FPN): images in [-1, 1] to class scores.

    Raises:
        UserError: there is no such encoder.
    """
    import segmentation_models_pytorch as smp  # on first use: it takes seconds

    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        try:
            network = smp.FPN(
                options.encoder,
                encoder_weights=None,
                decoder_pyramid_channels=options.channels,
                decoder_segmentation_channels=options.channels,
                decoder_dropout=0.0,
                classes=classes,
            )
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"downstream.segmenter.encoder={options.encoder}, channels={options.channels} make no network "
                f"({reason}): see segmentation_models_pytorch, or give tu-resnet10t and 64"
            ) from error
    return network.to(memory_format=torch.channels_last)


def train_segmenter(
    network: nn.Module, training: Corpus, val: Corpus, options: SegmenterOptions
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Train in rounds until the result on `val` stops improving.

    Returns:
        the averaged weights of the best round, and for every round its number, loss, `miou` and `pixel_accuracy`.
    """
    generator = np.random.default_rng([options.seed, 30])
    rows = np.sort(balanced_rows(val, val.readable, options.val_images, generator))
    images, masks = np.array(val.images[rows]), np.array(val.masks[rows])
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule = ReduceLROnPlateau(optimizer, mode="max", threshold=0, factor=RATE_FACTOR, patience=RATE_PATIENCE)
    rounds: list[dict[str, Any]] = []
    best: dict[str, torch.Tensor] = {}
    steps = max(1, options.round_images // options.batch_size)
    bar = progress(range(options.most_rounds * steps), "segmenter, at most", unit="step")
    losses: list[float] = []
    # every scene with the same chance
    labelled = LabelledImages(training.images, training.masks, scene_balanced_weights(training))
    batches = labelled_batches([(labelled, options.batch_size)], generator)
    for step, batch in zip(bar, batches, strict=False):
        losses.append(_update(network, optimizer, *batch))
        average.update_parameters(network)
        if (step + 1) % steps:
            continue
        result = {"round": len(rounds) + 1, "loss": float(np.mean(losses)), **_measured(average.module, images, masks)}
        if not rounds or result["miou"] > max(earlier["miou"] for earlier in rounds):
            best = _weights(average)
        rounds.append(result)
        schedule.step(result["miou"])
        losses.clear()
        bar.set_postfix(miou=f"{result['miou']:.3f}", refresh=False)
        if _stopped_improving(rounds, options.patience):
            break
    bar.close()
    return best, rounds


def train_for(
    network: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], options: SegmenterOptions, steps: int
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train for a fixed number of steps; the learning rate falls to zero along a cosine. No other images are used.

    Returns:
        the averaged weights, and the loss of every step.
    """
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule = CosineAnnealingLR(optimizer, steps)
    losses = []
    for _, batch in zip(progress(range(steps), "segmenter", unit="step"), batches, strict=False):
        losses.append(_update(network, optimizer, *batch))
        average.update_parameters(network)
        schedule.step()
    return _weights(average), losses


def labelled_batches(
    sources: Sequence[tuple[LabelledImages, int]], generator: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches: a fixed number of images per source, drawn by their weights, all in one of the eight symmetries.

    Yields:
        images float32 [B, 3, R, R] in [-1, 1] and masks int64 [B, R, R].
    """
    chances = [np.cumsum(source.weights) for source, _ in sources]
    while True:
        picked = [
            (source, np.searchsorted(upto, generator.random(count) * upto[-1], side="right"))
            for (source, count), upto in zip(sources, chances, strict=True)
        ]
        symmetry = int(generator.integers(8))
        images = np.concatenate([source.images[rows] for source, rows in picked])
        masks = torch.from_numpy(np.concatenate([source.masks[rows] for source, rows in picked]))[:, None].long()
        yield symmetric(to_tensor(images), symmetry), symmetric(masks, symmetry)[:, 0]


def _weights(average: AveragedModel) -> dict[str, torch.Tensor]:
    return copy.deepcopy({key: value.cpu().contiguous() for key, value in average.module.state_dict().items()})


def _update(network: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, masks: torch.Tensor) -> float:
    network.train()
    optimizer.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(class_scores(network, images), masks.to(device()), ignore_index=IGNORED)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _measured(network: nn.Module, images: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    result, classes = segment(network.eval(), images), network.segmentation_head[0].out_channels
    return {
        "miou": mean_intersection_over_union(result, masks, classes),
        "pixel_accuracy": pixel_accuracy(result, masks, classes),
    }


def _stopped_improving(rounds: list[dict[str, Any]], patience: int) -> bool:
    best = max(range(len(rounds)), key=lambda index: rounds[index]["miou"])
    return len(rounds) - 1 - best >= patience


def class_scores(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Class scores [B, K, H, W] of images [B, 3, H, W] in [-1, 1] of any side."""
    height, width = images.shape[-2:]
    stride = network.encoder.output_stride
    padding = (0, -width % stride, 0, -height % stride)
    padded = nn.functional.pad(images.to(device()), padding, mode="replicate") if any(padding) else images.to(device())
    return network(padded.contiguous(memory_format=torch.channels_last))[..., :height, :width]


@torch.inference_mode()
def segment(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """The most probable class of every pixel, uint8 [N, H, W], of uint8 [N, H, W, 3]."""
    parts = [
        class_scores(network, to_tensor(images[start : start + BATCH])).argmax(1).byte().cpu().numpy()
        for start in range(0, len(images), BATCH)
    ]
    return np.concatenate(parts)
