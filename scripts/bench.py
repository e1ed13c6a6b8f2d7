"""Speed of the stages compared with their upper bounds, in one run on this machine: `make bench`."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from skimage.filters.rank import entropy as rank_entropy
from skimage.measure import shannon_entropy
from skimage.morphology import disk

from corpus.decoding import decode_jpeg, read_image
from corpus.index import CHUNK, index_corpus
from corpus.names import IMAGE_SUFFIXES
from corpus.sources.folder import ImageFolder
from encoders.efficientnet import EfficientNetLite0
from encoders.pixels import to_tensor
from prune.entropy import LocalEntropy, luma
from prune.features import corpus_embeddings, corpus_entropy, scan_corpus
from runtime.application import run
from runtime.artefacts import plain, stage, write_json
from runtime.errors import UserError
from runtime.machine import machine
from runtime.parallel import in_processes
from train.components import load_autoencoder
from train.latents import decode, encode
from train.networks import diffusion_loss, new_unet
from train.objective import Objective

SIDE = 400  # px, side of the generated JPEGs if no folder is given
ROUNDS = 5


def per_second(work: Callable[[], object], items: int, *, seconds: float = 2.0) -> float:
    """Items per second of a repeated call, after one warm-up call."""
    work()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        calls += 1
    return items * calls / (time.perf_counter() - start)


def paired(limit: Callable[[], float], ours: Callable[[], float]) -> tuple[float, float, float]:
    """Measure two rates alternately; returns their medians and the median of the ratio within a turn.

    The load of a machine varies with time, so only measurements from the same seconds are comparable.
    """
    turns = np.array([(limit(), ours()) for _ in range(ROUNDS)])
    return *np.median(turns, axis=0).tolist(), float(np.median(turns[:, 1] / turns[:, 0]))


def jpegs(cfg: DictConfig, count: int) -> list[Path]:
    """`count` JPEG files: from `bench.root`, or enlarged tiles of the corpus, which are written once.

    Raises:
        UserError: the folder has no images.
    """
    if cfg.bench.root is not None:
        files = sorted(path for path in Path(cfg.bench.root).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"bench.root={cfg.bench.root} has no images: give a folder of images, or null")
        return [files[index] for index in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)]
    corpus = index_corpus(instantiate(cfg.corpus.train), cfg.runs)

    def build(directory: Path) -> None:
        random = np.random.default_rng(cfg.seed)
        for row in range(count):
            tile = Image.fromarray(np.array(corpus.images[row * len(corpus) // count])).resize((SIDE, SIDE))
            grain = random.normal(0, 6, (SIDE, SIDE, 3))  # as in photographs; without it too smooth
            textured = np.clip(np.asarray(tile) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(textured).save(directory / f"{row:06d}.jpg", quality=88)

    directory = stage(cfg.runs, "bench_jpegs", {"corpus": corpus.fingerprint, "count": count, "side": SIDE}, build)
    return sorted(directory.glob("*.jpg"))


def pixels(path: Path) -> np.ndarray:
    """The whole image, decoded as when indexing a corpus."""
    result = decode_jpeg(path.read_bytes())
    return pixels_of_pillow(path) if result is None else result


def pixels_of_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def decode_all(decode: Callable[[Path], np.ndarray], files: list[Path]) -> int:
    return sum(decode(path).size > 0 for path in files)


def decode_and_measure_all(decode: Callable[[Path], np.ndarray], measure: LocalEntropy, files: list[Path]) -> int:
    return sum(measure(decode(path)) >= 0 for path in files)


def entropy_figures(files: list[Path], resolution: int) -> dict[str, float]:
    """Speed of the entropy step, compared with pure decoding of the same files and with scikit-image.

    All use the worker processes and chunks of indexing. The images are squares at the corpus's resolution, as in the
    stage, and also whole images.
    """
    measure = LocalEntropy()
    corpus_square = partial(read_image, resolution=resolution)
    images = [pixels(path) for path in files[:64]]
    greys = [luma(image) for image in images]
    chunks = [files[start : start + CHUNK // 4] for start in range(0, len(files), CHUNK // 4)]

    def rate(work: Callable[[list[Path]], int]) -> float:
        return per_second(lambda: sum(in_processes(work, chunks)), len(files), seconds=1)

    alone = partial(decode_all, pixels)
    _, stage_rate, stage_fraction = paired(
        lambda: rate(alone), lambda: rate(partial(decode_and_measure_all, corpus_square, measure))
    )
    limit, whole_rate, whole_fraction = paired(
        lambda: rate(alone), lambda: rate(partial(decode_and_measure_all, pixels, measure))
    )
    pillow = rate(partial(decode_all, pixels_of_pillow))
    return {
        "JPEG decoding alone, Pillow": pillow,
        "JPEG decoding alone, ours (limit)": limit,
        "entropy of whole images, from files": whole_rate,
        f"entropy step at {resolution} px, from files": stage_rate,
        f"entropy step at {resolution} px, of pure decoding": stage_fraction,
        "entropy of whole images, of pure decoding": whole_fraction,
        "entropy of whole images, of Pillow's decoding": whole_rate / pillow,
        "local entropy alone, one core": per_second(lambda: [measure(image) for image in images], len(images)),
        "skimage shannon_entropy of the whole image, one core": per_second(
            lambda: [shannon_entropy(grey) for grey in greys], len(greys)
        ),
        "skimage rank.entropy, 16 px disk, one core": per_second(lambda: rank_entropy(greys[0], disk(8)), 1),
    }


def feature_figures(cfg: DictConfig, files: list[Path]) -> dict[str, float]:
    """Speed of index, entropy and embedding of files with caching on disk, compared with the bare network."""
    encoder = instantiate(cfg.encoder)
    size = encoder.input_size
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        root.mkdir()
        for index, path in enumerate(files):
            shutil.copy(path, root / f"{index:06d}{path.suffix}")
        source = ImageFolder(root=str(root), resolution=size)

        def stages() -> None:
            runs = Path(folder) / "runs"
            shutil.rmtree(runs, ignore_errors=True)
            corpus = scan_corpus(source, runs, LocalEntropy(), encoder)
            corpus_entropy(corpus, LocalEntropy(), runs)
            corpus_embeddings(corpus, encoder, runs)

        limit, ours, fraction = paired(lambda: network_rate(encoder), lambda: per_second(stages, len(files), seconds=8))
    with multiprocessing.get_context("spawn").Pool(1) as process:
        plain = process.apply(network_rate, (encoder,))
    return {
        "bare network in a process as torch leaves it": plain,
        "bare network on ready tensors (limit)": limit,
        "files to index, entropy and embeddings": ours,
        "entropy and embedding, of the bare network": fraction,
        "entropy and embedding, of the network as torch leaves it": ours / plain,
    }


def network_rate(encoder: EfficientNetLite0) -> float:
    """Images per second of the bare network on ready tensors."""
    network, size = encoder.network(), encoder.input_size
    ready = torch.rand(encoder.batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        return per_second(lambda: network(ready), len(ready), seconds=8)


def network_figures(cfg: DictConfig) -> dict[str, float]:
    """Speed of the autoencoder and of one training step of the diffusion model."""
    corpus = index_corpus(instantiate(cfg.corpus.train), cfg.runs)
    tensors = to_tensor(np.array(corpus.images[:: max(1, len(corpus) // 128)][:128]))
    autoencoder, _ = load_autoencoder(cfg)
    with torch.inference_mode():
        latents = encode(autoencoder, tensors)
        figures = {
            "autoencoder, encode": per_second(lambda: encode(autoencoder, tensors), len(tensors)),
            "autoencoder, decode": per_second(lambda: decode(autoencoder, latents), len(tensors)),
        }
    width = cfg.text_encoder.get("width", 128)
    unet = new_unet(plain(cfg.model.unet), latents.shape[1], latents.shape[2], width, seed=0)
    optimiser = torch.optim.AdamW(unet.parameters(), fused=True)
    size = cfg.train.loop.batch_size
    batch, text = latents[:size].clone(), torch.randn(size, cfg.text_encoder.get("max_length", 77), width)

    def step() -> None:
        loss = diffusion_loss(unet, Objective(), batch, text, torch.randn_like(batch), torch.rand(size))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return {**figures, "diffusion, bare training step": per_second(step, size)}


def main(cfg: DictConfig) -> None:
    files = jpegs(cfg, cfg.bench.files)
    figures = {
        **entropy_figures(files, cfg.corpus.train.resolution),
        **feature_figures(cfg, files),
        **network_figures(cfg),
    }
    fractions = {name: figures.pop(name) for name in list(figures) if ", of " in name}
    for name, value in figures.items():
        print(f"{name:60s} {value:10.1f} images/s")
    for name, value in fractions.items():
        print(f"{name:60s} {value:10.0%}")
    path = Path(cfg.results) / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(files[0]) as first:
        width, height = first.size
    metadata = {
        "machine": machine(),
        "files": f"{len(files)} JPEGs of {width} x {height} px",
        "images_per_second": figures,
        "fractions": fractions,
    }
    write_json(path, metadata)
    print(f"results: {path.parent}")


if __name__ == "__main__":
    run(main)
