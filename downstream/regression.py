"""Regression baseline of super-resolution: a network from the low-resolution image to the image, in pixel space.

The network is EDSR (Lim et al. 2017) of basicsr, added to the bicubic enlargement. Its loss is the mean absolute error
in pixels (section 3.3 of that paper). It has as many weights, training images, steps and batches as the network that it
is compared with.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import interpolate, l1_loss

from downstream.corpora import corpus_of, held_out_images, training_rows
from downstream.degradation import check_factor, degradation_of, degrade
from downstream.measured_task import TaskJudges, computed_outputs, measure_outputs
from downstream.task import Task
from encoders.embedding import device
from encoders.pixels import to_tensor, to_uint8
from runtime.artefacts import is_main_process, read_json, stage, write_json
from runtime.errors import UserError
from runtime.tracking import track
from train.components import first_process_decides, make_accelerator
from train.latents import symmetric
from train.loop import Batch, DrawBatch, LoopOptions, Modules, train_loop
from train.measured_run import TRAINING

#: Name of the method, and of its network in checkpoints.
REGRESSION = "regression"
WEIGHTS = "regression.safetensors"
CHECKPOINTS = "checkpoints"
BATCH = 100
#: Largest number of EDSR's residual blocks (section 4.2 of the paper); further weights go into the width.
MOST_BLOCKS = 32
#: The number of channels is a multiple of this.
WIDTH_STEP = 8
#: Largest relative difference between the number of weights and the requested one.
LEEWAY = 0.1


class RegressionNetwork(nn.Module):
    """EDSR added to the bicubic enlargement; its last weights are zero at first, so the initial output is the
    enlargement.

    Args:
        factor: 2, 3, 4, 8 and so on.
        width: number of channels.
        blocks: number of residual blocks.
    """

    def __init__(self, factor: int, width: int, blocks: int) -> None:
        from downstream.basicsr_parts import EDSR  # on first use: it takes a second

        super().__init__()
        self.shape = {"factor": factor, "width": width, "blocks": blocks}
        self.body = EDSR(
            3, 3, num_feat=width, num_block=blocks, upscale=factor, img_range=1.0, rgb_mean=(0.0, 0.0, 0.0)
        )
        nn.init.zeros_(self.body.conv_last.weight)
        nn.init.zeros_(self.body.conv_last.bias)

    def forward(self, low: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, factor h, factor w] in about [-1, 1] from low-resolution images [N, 3, h, w] in [-1, 1]."""
        # PIL's bicubic: without antialias, torch uses another kernel
        base = interpolate(low, scale_factor=self.shape["factor"], mode="bicubic", antialias=True, align_corners=False)
        return base + self.body(low.contiguous(memory_format=torch.channels_last))


def new_regression_network(parameters: int, factor: int, seed: int) -> RegressionNetwork:
    """An untrained network with approximately the given number of weights.

    Args:
        parameters: number of weights.
        factor: enlargement factor.
        seed: seed of the initial weights.
    Raises:
        UserError: EDSR does not support this factor, or has no shape of that size.
    """
    if factor < 2 or (factor != 3 and factor & (factor - 1)):
        raise UserError(
            f"downstream.super_resolution.factor={factor}: the regression network enlarges by 2, 3, 4, 8 ...; give "
            "one of these, or leave regression out"
        )
    width, blocks = _shape_of(parameters, factor)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RegressionNetwork(factor, width, blocks)


def _shape_of(parameters: int, factor: int) -> tuple[int, int]:
    """The smallest width that needs at most `MOST_BLOCKS` blocks, and the number of blocks.

    Raises:
        UserError: no shape is within `LEEWAY` of the number of weights.
    """
    width = WIDTH_STEP
    while _weights(width, MOST_BLOCKS, factor) < parameters:
        width += WIDTH_STEP
    empty = _weights(width, 0, factor)
    blocks = max(1, round((parameters - empty) / (_weights(width, 1, factor) - empty)))
    if abs(_weights(width, blocks, factor) - parameters) > LEEWAY * parameters:
        raise UserError(
            f"no regression network has about {parameters} weights, the smallest has "
            f"{_weights(WIDTH_STEP, 1, factor)}: compare with a larger network, or leave regression out"
        )
    return width, blocks


def _weights(width: int, blocks: int, factor: int) -> int:
    """Number of weights of an EDSR."""

    def convolution(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + outputs

    trunk = convolution(3, width) + (2 * blocks + 1) * convolution(width, width) + convolution(width, 3)
    if factor == 3:
        return trunk + convolution(width, 9 * width)
    return trunk + (factor.bit_length() - 1) * convolution(width, 4 * width)


# ---------------------------------------------------------------- training


def train_regression(cfg: DictConfig, parameters: int, options: LoopOptions) -> Path:
    """Train a network on the training images of the other super-resolution networks; cached for all foundations.

    Args:
        parameters: number of weights of the network that it is compared with.
        options: that network's options, except for those that `downstream.super_resolution.regression` sets.
    Returns:
        runs/regression/<fingerprint>/ with regression.safetensors and training.json.
    Raises:
        UserError: the factor does not divide the side of the images, or there is no such network.
    """
    settings = cfg.downstream.super_resolution
    factor, degradation = int(settings.factor), degradation_of(cfg)
    corpus = corpus_of(cfg, "train")
    check_factor(factor, corpus.resolution)
    rows = training_rows(corpus, cfg.downstream.training_images, cfg.seed)
    options = replace(options, **settings.regression)
    network = new_regression_network(parameters, factor, options.seed)

    def build(directory: Path) -> None:
        images = corpus.images[rows]
        low = degrade(images, factor, degradation, rows)
        _train(cfg, network, low, images, options, directory)

    inputs = {
        "network": network.shape,
        "degradation": degradation,
        "corpus": corpus.fingerprint,
        "rows": rows.tolist(),
        "loop": options,
        "mixed_precision": cfg.train.mixed_precision,
    }
    return stage(cfg.runs, "regression", inputs, build, resumable=True, together=first_process_decides(cfg))


def _train(
    cfg: DictConfig,
    network: RegressionNetwork,
    low: np.ndarray,
    images: np.ndarray,
    options: LoopOptions,
    directory: Path,
) -> None:
    """Train, and write the weights and training.json to the directory."""
    accelerator = make_accelerator(cfg)
    metadata = {
        "method": REGRESSION,
        "network": network.shape,
        "steps": options.steps,
        "training_images": len(images),
        "images_seen": options.steps * options.batch_size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "seed": options.seed,
    }
    with track(cfg, REGRESSION, REGRESSION) as tracker:
        best = train_loop(
            accelerator,
            {REGRESSION: network},
            paired_batches(low, images, options.batch_size),
            pixel_loss,
            options,
            directory,
            label=f"super_resolution {REGRESSION}",
            log=tracker.log,
        )
    if is_main_process():
        trained = accelerator.unwrap_model(best[REGRESSION], keep_fp32_wrapper=False)
        state = {name: value.detach().cpu().contiguous() for name, value in trained.state_dict().items()}
        save_file(state, directory / WEIGHTS)
        last = read_json(directory / CHECKPOINTS / f"{options.steps:08d}" / "state.json")
        metadata |= {"seconds": round(last["seconds"], 2), "loss": float(np.mean(last["losses"]))}
        write_json(directory / TRAINING, metadata)
        shutil.rmtree(directory / CHECKPOINTS)
    accelerator.wait_for_everyone()


def paired_batches(low: np.ndarray, images: np.ndarray, size: int) -> DrawBatch:
    """Batches for `train_loop`: low-resolution images and images in [-1, 1], each pair in one of eight symmetries.

    Args:
        low: uint8 [K, h, h, 3].
        images: uint8 [K, H, H, 3].
    """

    def draw(random: np.random.Generator, part: slice) -> Batch:
        picked, symmetries = random.integers(len(images), size=size)[part], random.integers(8, size=size)[part]
        return tuple(_turned(to_tensor(of[picked]), symmetries) for of in (low, images))

    return draw


def _turned(images: torch.Tensor, symmetries: np.ndarray) -> torch.Tensor:
    """Transform each of the images [N, 3, H, H] by its symmetry."""
    return torch.cat([symmetric(images[i : i + 1], int(symmetry)) for i, symmetry in enumerate(symmetries)])


def pixel_loss(modules: Modules, batch: Batch) -> torch.Tensor:
    """Mean absolute error of a batch of `paired_batches`, of values in [-1, 1]."""
    low, images = batch
    return l1_loss(modules[REGRESSION](low), images)


# ---------------------------------------------------------------- inference


def load_regression(directory: Path) -> RegressionNetwork:
    """Load a network of `train_regression` on this machine's accelerator."""
    network = RegressionNetwork(**read_json(directory / TRAINING)["network"])
    network.load_state_dict(load_file(directory / WEIGHTS))
    return network.to(device()).eval()


@torch.inference_mode()
def regression_outputs(network: nn.Module, low: np.ndarray) -> np.ndarray:
    """Outputs uint8 [N, factor h, factor w, 3] of low-resolution images uint8 [N, h, w, 3]."""
    place = next(network.parameters()).device
    starts = range(0, max(1, len(low)), BATCH)
    return np.concatenate([to_uint8(network(to_tensor(low[start : start + BATCH]).to(place))) for start in starts])


def measured_regression(cfg: DictConfig, task: Task, parameters: int, options: LoopOptions) -> tuple[Path, Path]:
    """Train the network and measure it like the task's networks; returns the directories of training and metrics.

    Args:
        task: super_resolution.
        parameters, options: as for `train_regression`.
    """
    run, held = train_regression(cfg, parameters, options), held_out_images(cfg)
    factor, degradation = int(cfg.downstream.super_resolution.factor), degradation_of(cfg)

    def compute_all() -> np.ndarray:
        return regression_outputs(load_regression(run), degrade(held.images, factor, degradation, held.rows))

    outputs = computed_outputs(cfg, task, REGRESSION, held, compute_all, of=run.name)
    return run, measure_outputs(cfg, task, outputs, held, TaskJudges.of(cfg, task))
