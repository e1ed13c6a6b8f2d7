"""Images from masks by a fine-tuned foundation model: `python downstream/semantic_synthesis.py foundation=DIR`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import nn

from corpus.index import Corpus, index_corpus
from downstream.conditional import Task, fine_tune, print_result, resolve_foundation, training_corpus, training_rows
from encoders.embedding import embed
from encoders.pixels import to_tensor
from eval.held_out import HeldOut
from eval.metrics import compare_features
from runtime.application import run
from runtime.artefacts import stage
from runtime.errors import UserError
from train.components import first_process_says, load_encoder, make_accelerator, precision
from train.latents import symmetric
from train.loop import Batch, LoopOptions, Modules, train_loop

#: Training tiles whose pixels make the palette.
PALETTE_IMAGES = 2000


def require_masks(cfg: DictConfig) -> Corpus:
    """The training corpus, if it and the held-out one have masks.

    Raises:
        UserError: one has none.
    """
    corpus = training_corpus(cfg)
    for source in (corpus, index_corpus(instantiate(cfg.corpus.test), cfg.runs)):
        if source.masks is None:
            raise UserError(f"corpus {source.name} has no masks, semantic synthesis needs them: try corpus=bluemarble")
    return corpus


# ---------------------------------------------------------------- palette


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


# ---------------------------------------------------------------- segmenter


class Segmenter(nn.Module):
    """Class scores [B, K, H, W] of images [B, 3, H, W] in [-1, 1]; H and W are multiples of 8."""

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.GroupNorm(8, outputs), nn.SiLU()
            )

        self.stem = block(3, width, 2, 5)
        self.quarter = block(width, 2 * width, 2)
        self.eighth = nn.Sequential(block(2 * width, 4 * width, 2), block(4 * width, 4 * width))
        self.up_quarter = block(6 * width, width)
        self.up_half = block(2 * width, width)
        self.score = nn.Conv2d(width, classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        def larger(hidden: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=False)

        half = self.stem(images)
        quarter = self.quarter(half)
        hidden = larger(self.eighth(quarter))
        hidden = larger(self.up_quarter(torch.cat([hidden, quarter], 1)))
        return larger(self.score(self.up_half(torch.cat([hidden, half], 1))))


@torch.no_grad()
def segment(segmenter: Segmenter, images: np.ndarray) -> np.ndarray:
    """The likeliest class of every pixel, uint8 [N, H, W], of uint8 [N, H, W, 3]."""
    device = next(segmenter.parameters()).device
    parts = [
        segmenter(to_tensor(images[start : start + 128]).to(device)).argmax(1).byte().cpu().numpy()
        for start in range(0, len(images), 128)
    ]
    return np.concatenate(parts)


def trained_segmenter(cfg: DictConfig, corpus: Corpus) -> Segmenter:
    """A small network trained on real training tiles and their masks; cached in runs/segmenter."""
    classes = len(corpus.mask_classes)
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        segmenter = Segmenter(classes)
    rows = training_rows(corpus, cfg.downstream.training_images, cfg.seed)
    options = LoopOptions(**cfg.downstream.segmenter, seed=cfg.seed)

    def build(directory: Path) -> None:
        accelerator = make_accelerator(cfg)
        images, masks = corpus.images[rows], corpus.masks[rows]

        def draw(random: np.random.Generator, part: slice) -> Batch:
            picked = random.integers(len(rows), size=options.batch_size)[part]
            symmetry = int(random.integers(8))
            tiles = symmetric(to_tensor(images[picked]), symmetry)
            return tiles, symmetric(torch.from_numpy(masks[picked])[:, None].long(), symmetry)[:, 0]

        def loss(modules: Modules, batch: Batch) -> torch.Tensor:
            tiles, target = batch
            return nn.functional.cross_entropy(modules["segmenter"](tiles).float(), target)

        best = train_loop(accelerator, {"segmenter": segmenter}, draw, loss, options, directory, label="segmenter")
        if accelerator.is_main_process:
            state = accelerator.unwrap_model(best["segmenter"]).state_dict()
            state = {key: value.cpu().contiguous() for key, value in state.items()}
            save_file(state, directory / "segmenter.safetensors")

    inputs = {
        "corpus": corpus.fingerprint,
        "training_images": cfg.downstream.training_images,
        "options": cfg.downstream.segmenter,
        "seed": cfg.seed,
        **precision(cfg),
    }
    directory = stage(cfg.runs, "segmenter", inputs, build, resumable=True, together=first_process_says(cfg))
    trained = Segmenter(classes)  # not the one that Accelerate has made compute in another precision
    trained.load_state_dict(load_file(directory / "segmenter.safetensors"))
    return trained.eval()


# ---------------------------------------------------------------- the task


def measure(cfg: DictConfig, outputs: np.ndarray, held: HeldOut, segmenter: Segmenter) -> dict[str, float]:
    """Distances between the sets, and pair by pair to the mask's real tile and to the mask itself.

    feature_distance: mean of 1 - cosine of the encoder's features of the generated and the real tile of a mask.
    mask_agreement: share of pixels whose class, as the segmenter sees it, is the mask's; _real: the same on the real
    tiles, what a perfect generator would score.
    """
    encoder = load_encoder(cfg)
    features = embed(encoder, outputs, label="embed outputs")
    metrics = compare_features(features, held.features, encoder.name)
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, held.features))
    return {
        **metrics,
        "feature_distance": float(1 - (first * second).sum(1).mean()),
        "mask_agreement": float((segment(segmenter, outputs) == held.masks).mean()),
        "mask_agreement_real": float((segment(segmenter, held.images) == held.masks).mean()),
    }


def semantic_synthesis(cfg: DictConfig, foundation: Path | None, name: str) -> Path:
    """Fine-tune for mask -> image from a pretraining run, or from nothing (None), and measure.

    Args:
        name: of the foundation's pruning method, or `scratch`.
    Raises:
        UserError: the corpus has no masks.
    """
    corpus = require_masks(cfg)
    palette = natural_palette(corpus, cfg.seed, cfg.downstream.colour_distance)
    segmenter = trained_segmenter(cfg, corpus)  # by all processes of a launch; the first alone measures
    task = Task(
        name="semantic_synthesis",
        facts={"palette": palette.tolist()},
        condition=lambda source, rows: palette[source.masks[rows]],
        measure=lambda outputs, held: measure(cfg, outputs, held, segmenter),
        inputs=lambda held: {"input": palette[held.masks]},
        yardstick=cfg.downstream.segmenter,
        files={"palette.json": dict(zip(corpus.mask_classes, palette.tolist(), strict=True))},
    )
    return fine_tune(cfg, task, foundation, name)


def main(cfg: DictConfig) -> None:
    start = time.perf_counter()
    require_masks(cfg)  # before minutes go into a foundation
    print_result(semantic_synthesis(cfg, *resolve_foundation(cfg)), start)


if __name__ == "__main__":
    run(main)
