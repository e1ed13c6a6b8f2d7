"""Speed of the training loop, compared with the bare network and a conventional loop: part of `make bench`."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from corpus.index import Corpus, index_corpus
from runtime.application import run
from runtime.artefacts import write_json
from runtime.errors import UserError
from runtime.machine import machine
from runtime.progress import progress
from train.components import TextParts, load_autoencoder, load_text_parts, make_accelerator
from train.data import NETWORK, Subset, encode_subset, subset_batches, subset_loss
from train.latents import Views, encode
from train.loop import LoopOptions, train_loop
from train.networks import diffusion_loss, masks_padding, new_network
from train.objective import Objective
from train.utilisation import compute_dtype, peak_flops, training_flops

ROUNDS = 5
STEPS = 40  # per round; the first half is warm-up


class ImagesAndCaptions(Dataset):
    """Image files and captions, read as in the training examples of diffusers: decoded for every step."""

    def __init__(self, files: list[Path], captions: list[str], resolution: int) -> None:
        self.files, self.captions = files, captions
        self.transform = transforms.Compose(
            [
                transforms.Resize(resolution, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(resolution),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB")), self.captions[index]


def usual_way(
    cfg: DictConfig, files: list[Path], captions: list[str], network: torch.nn.Module, autoencoder, text: TextParts
) -> Callable[[int], None]:
    """A function that runs steps of a conventional loop: decode, encode, tokenise and embed in every step.

    The DataLoader runs in the process itself, which is its default.
    """
    accelerator = make_accelerator(cfg)
    network = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    loader = DataLoader(
        ImagesAndCaptions(files, captions, cfg.corpus.train.resolution),
        batch_size=cfg.train.loop.batch_size,
        shuffle=True,
        drop_last=True,
    )
    average = EMAModel(network.parameters())
    network, optimiser, loader = accelerator.prepare(network, optimiser, loader)
    objective = Objective(**cfg.train.objective)
    batches, random = iter(loader), np.random.default_rng(cfg.seed)

    def steps(count: int) -> None:
        nonlocal batches
        for _ in range(count):
            try:
                images, texts = next(batches)
            except StopIteration:
                batches = iter(loader)
                images, texts = next(batches)
            with torch.no_grad():
                latents = encode(autoencoder, images)
                tokens = text.tokenizer(
                    list(texts),
                    max_length=text.tokenizer.model_max_length,
                    padding="max_length",
                    truncation=True,
                    return_tensors="pt",
                ).input_ids
                states = text.text_encoder(tokens.to(accelerator.device))[0]
            noise, time, _ = objective.draw(random, latents.shape)
            noise, time = noise.to(accelerator.device), time.to(accelerator.device)
            loss = diffusion_loss(network, objective, latents, states, noise, time)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            average.step(network.parameters())

    return steps


def bare(cfg: DictConfig, subset: Subset, network: torch.nn.Module, accelerator: Accelerator) -> Callable[[int], None]:
    """A function that runs forward and backward passes and optimizer steps on one ready batch: the upper bound."""
    network = copy.deepcopy(network)
    objective = Objective(**cfg.train.objective)
    batch = subset_batches(subset, objective, cfg.train.loop.batch_size)(np.random.default_rng(0), slice(None))
    batch = tuple(tensor.to(accelerator.device) for tensor in batch)
    loss = subset_loss(objective, hide_padding=masks_padding(network))
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def steps(count: int) -> None:
        for _ in range(count):
            optimiser.zero_grad(set_to_none=True)
            with accelerator.autocast():
                value = loss({NETWORK: network}, batch)
            value.backward()
            optimiser.step()

    return steps


def ours(cfg: DictConfig, subset: Subset, network: torch.nn.Module, accelerator: Accelerator) -> Callable[[int], float]:
    """A function that returns the images per second of `train_loop` over some steps; the first half is not counted."""
    objective = Objective(**cfg.train.objective)
    hide = masks_padding(network)

    def rate(count: int) -> float:
        loop = {**cfg.train.loop, "steps": count, "checkpoint_every": 10**9}
        rates = []
        with tempfile.TemporaryDirectory() as folder:
            train_loop(
                accelerator,
                {NETWORK: copy.deepcopy(network)},
                subset_batches(subset, objective, cfg.train.loop.batch_size, hide_padding=hide),
                subset_loss(objective, hide_padding=hide),
                LoopOptions(**loop, seed=cfg.seed),
                Path(folder),
                label="ours",
                log=lambda values, step: rates.append(values["images_per_second"]),
            )
        return float(np.mean(rates[len(rates) // 2 :]))

    return rate


def jpegs(corpus: Corpus, rows: np.ndarray, folder: Path) -> list[Path]:
    """The rows' images as JPEG files."""
    files = []
    for row in rows:
        files.append(folder / f"{row:07d}.jpg")
        Image.fromarray(np.array(corpus.images[row])).save(files[-1], quality=90)
    return files


def measured(
    usual: Callable[[int], None], limit: Callable[[int], None], loop: Callable[[int], float], batch_size: int
) -> dict[str, np.ndarray]:
    """Images per second of the three loops, measured in turn `ROUNDS` times so that they are comparable."""

    def rate(steps: Callable[[int], None]) -> float:
        steps(STEPS // 2)
        start = time.perf_counter()
        steps(STEPS // 2)
        return STEPS // 2 * batch_size / (time.perf_counter() - start)

    turns = [(rate(usual), rate(limit), loop(STEPS)) for _ in progress(range(ROUNDS), "rounds")]
    return dict(zip(("usual", "bare", "ours"), np.array(turns).T, strict=True))


def main(cfg: DictConfig) -> None:
    autoencoder, key = load_autoencoder(cfg)
    corpus = index_corpus(instantiate(cfg.corpus.train), cfg.runs)
    rows = np.flatnonzero(corpus.readable)[: cfg.bench.training_images]
    size = cfg.train.loop.batch_size
    if len(rows) < size:
        raise UserError(
            f"the corpus has {len(rows)} readable images, fewer than a batch of {size}: give a larger corpus"
        )
    text = load_text_parts(cfg, corpus)
    accelerator = make_accelerator(cfg)
    for part in (autoencoder, text.text_encoder):
        part.to(accelerator.device)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subset = encode_subset(
            corpus, rows, autoencoder, key, text, Path(folder) / "runs", views=Views(), fields={}, seed=0, half=False
        )
        encoding = len(rows) / (time.perf_counter() - start)
        channels, side, _ = subset.latent_shape
        network = new_network(cfg.model, channels, side, subset.prompts.shape[-1], cfg.seed).to(accelerator.device)
        files = jpegs(corpus, rows, Path(folder))
        captions = corpus.manifest["caption"].to_numpy(dtype=str)[rows].tolist()
        figures = measured(
            usual_way(cfg, files, captions, network, autoencoder, text),
            bare(cfg, subset, network, accelerator),
            ours(cfg, subset, network, accelerator),
            size,
        )
    sample, states = torch.zeros(1, *subset.latent_shape), torch.from_numpy(np.array(subset.prompts[:1])).float()
    flops = training_flops(network, sample.to(accelerator.device), states.to(accelerator.device))
    peak = peak_flops(accelerator.device, compute_dtype(str(cfg.train.mixed_precision)))
    description = (
        f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} M parameters, "
        f"latents {channels} x {side} x {side}, batch {size}, {len(rows)} images of {corpus.resolution} px"
    )
    result = {"machine": machine(), "network": description, **summarise(figures, encoding, flops, peak)}
    for name, value in (*result["images_per_second"].items(), *result["ratios"].items()):
        print(f"{name:60s} {value:10.2f}")
    print(f"{'model FLOPs utilisation':60s} {result['model_flops_utilisation']:10.0%}")
    path = Path(cfg.results) / "bench_training.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"results: {path.parent}")


def summarise(figures: Mapping[str, np.ndarray], encoding: float, flops: float, peak: float) -> dict:
    """Medians of the measured rates, their ratios, and the utilisation of the machine.

    Args:
        figures: images per second of every round, for the loops `usual`, `bare` and `ours`.
        encoding: images per second of encoding latents and text.
        flops: floating-point operations of training with one image.
        peak: floating-point operations per second that the machine can do.
    """
    rates = {name: float(np.median(values)) for name, values in figures.items()}
    return {
        "images_per_second": {
            "decode, encode, tokenise and embed in every step": rates["usual"],
            "forward, backward and optimiser step alone (limit)": rates["bare"],
            "our loop, latents and text cached": rates["ours"],
            "encoding latents and text, once": encoding,
        },
        "ratios": {
            "our loop to the usual one": float(np.median(figures["ours"] / figures["usual"])),
            "our loop to the limit": float(np.median(figures["ours"] / figures["bare"])),
        },
        "model_flops_utilisation": rates["ours"] * flops / peak,
        "gflop_per_image": flops / 1e9,
        "peak_gflops": peak / 1e9,
    }


if __name__ == "__main__":
    run(main)
