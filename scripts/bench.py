"""Speed of the stages beside their limits, in one run on this machine: `make bench`."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from skimage.measure import shannon_entropy

from corpus.application import run
from corpus.artefacts import plain, write_json
from corpus.encoder import embed
from corpus.index import index_corpus
from prune.entropy import local_entropy
from train.components import load_autoencoder, load_encoder
from train.diffusion import flow_matching_loss, new_unet
from train.latents import decode, encode, to_tensor


def per_second(work: Callable[[], object], items: int, *, seconds: float = 2.0) -> float:
    """Items a second of a repeated call, after one warm-up call."""
    work()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        calls += 1
    return items * calls / (time.perf_counter() - start)


def main(cfg: DictConfig) -> None:
    corpus = index_corpus(instantiate(cfg.corpus.train), cfg.runs)
    images = np.array(corpus.images[:: max(1, len(corpus) // 128)][:128])
    encoder = load_encoder(cfg)
    autoencoder, _ = load_autoencoder(cfg)
    greys = [np.asarray(Image.fromarray(image).convert("L")) for image in images]
    tensors = to_tensor(images)
    network = encoder.network()
    with torch.inference_mode():
        resized = encoder._resize(tensors)
        latents = encode(autoencoder, tensors)
        figures = {
            "local entropy, ours": per_second(lambda: [local_entropy(image) for image in images], len(images)),
            "entropy, skimage shannon_entropy of the whole tile": per_second(
                lambda: [shannon_entropy(grey) for grey in greys], len(images)
            ),
            "embedding, ours": per_second(lambda: embed(encoder, images), len(images)),
            "embedding, bare network on prepared tensors": per_second(lambda: network(resized), len(images)),
            "autoencoder, encode": per_second(lambda: encode(autoencoder, tensors), len(images)),
            "autoencoder, decode": per_second(lambda: decode(autoencoder, latents), len(images)),
        }
    width = cfg.text_encoder.get("width", 128)
    unet = new_unet(plain(cfg.model.unet), latents.shape[1], latents.shape[2], width, seed=0)
    optimiser = torch.optim.AdamW(unet.parameters(), fused=True)
    size = cfg.train.loop.batch_size
    batch, text = latents[:size].clone(), torch.randn(size, cfg.text_encoder.get("max_length", 77), width)

    def step() -> None:
        loss = flow_matching_loss(unet, batch, text, torch.randn_like(batch), torch.rand(size))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    figures["diffusion, bare training step"] = per_second(step, size)
    for name, value in figures.items():
        print(f"{name:55s} {value:10.1f} images/s")
    path = Path(cfg.results) / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    write_json(path, {"machine": machine, "images_per_second": figures})
    print(f"results: {path.parent}")


if __name__ == "__main__":
    run(main)
