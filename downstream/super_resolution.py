"""Super-resolution of a fine-tuned foundation model: `python downstream/super_resolution.py foundation=DIR`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from corpus.index import Corpus
from downstream.conditional import Task, fine_tune, held_out_part, print_result, resolve_foundation
from downstream.image_metrics import psnr_ssim
from encoders.embedding import embed
from eval.held_out import HeldOut
from eval.metrics import compare_features
from runtime.application import run
from runtime.artefacts import read_json, stage, write_json
from runtime.errors import UserError
from train.components import load_encoder


def low_resolution(images: np.ndarray, factor: int) -> np.ndarray:
    """Area means, uint8 [N, H, W, 3] to [N, H/factor, W/factor, 3], rounded half up.

    Raises:
        UserError: the sides are no multiples of the factor.
    """
    count, height, width, channels = images.shape
    if height % factor or width % factor:
        raise UserError(f"downstream.factor={factor} does not divide {height} x {width} px: give a divisor of both")
    blocks = images.reshape(count, height // factor, factor, width // factor, factor, channels)
    area = factor**2
    return ((blocks.sum(axis=(2, 4), dtype=np.uint32) + area // 2) // area).astype(np.uint8)


def bicubic(images: np.ndarray, factor: int) -> np.ndarray:
    """PIL's bicubic enlargement, uint8 [N, H, W, 3] to [N, factor H, factor W, 3]."""
    size = (images.shape[2] * factor, images.shape[1] * factor)
    return np.stack([Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in images])


def measure(cfg: DictConfig, outputs: np.ndarray, held: HeldOut) -> dict[str, float]:
    """Distortion (psnr in dB, ssim) pair by pair and distances (Fréchet, KID) between the two sets."""
    encoder = load_encoder(cfg)
    distances = compare_features(embed(encoder, outputs, label="embed outputs"), held.features, encoder.name)
    wanted = {key: value for key, value in distances.items() if key.startswith(("fid", "fd_", "kid_"))}
    return {**psnr_ssim(outputs, held.images), **wanted}


def super_resolution(cfg: DictConfig, foundation: Path | None, name: str) -> Path:
    """Fine-tune for super-resolution from a pretraining run, or from nothing (None), and measure.

    Args:
        name: of the foundation's pruning method, or `scratch`.
    """
    factor = int(cfg.downstream.factor)

    def condition(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
        return bicubic(low_resolution(corpus.images[rows], factor), factor)

    def inputs(held: HeldOut) -> dict[str, np.ndarray]:
        small = low_resolution(held.images, factor)
        return {f"input, {small.shape[1]} px": small, "bicubic": bicubic(small, factor)}

    task = Task(
        "super_resolution", {"factor": factor}, condition, lambda outputs, held: measure(cfg, outputs, held), inputs
    )
    return fine_tune(cfg, task, foundation, name)


def bicubic_baseline(cfg: DictConfig) -> dict[str, float]:
    """The same metrics for bicubic enlargement of the same held-out images; cached."""
    held = held_out_part(cfg)
    factor = int(cfg.downstream.factor)

    def build(directory: Path) -> None:
        outputs = bicubic(low_resolution(held.images, factor), factor)
        write_json(directory / "metrics.json", measure(cfg, outputs, held))

    inputs = {"held_out": [held.corpus.fingerprint, held.rows.tolist()], "factor": factor, "encoder": cfg.eval.encoder}
    return read_json(stage(cfg.runs, "bicubic", inputs, build) / "metrics.json")


def main(cfg: DictConfig) -> None:
    start = time.perf_counter()
    directory = super_resolution(cfg, *resolve_foundation(cfg))
    for key, value in sorted(bicubic_baseline(cfg).items()):
        print(f"bicubic {key}: {value:.4g}")
    print_result(directory, start)


if __name__ == "__main__":
    run(main)
