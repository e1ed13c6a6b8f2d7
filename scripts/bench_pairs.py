"""Speed and memory of scoring image-text pairs, compared with bare products and networks: part of `make bench`."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from captioning.captioners.captioner import ImageMetadata
from captioning.evidence import fit_mismatch, learn_evidence
from captioning.loop import material_of
from captioning.pair_statistics import SAMPLE, pair_statistics
from captioning.pairs import GIVEN, Pairs
from captioning.scorers import FittedScorer, embed_with_clip
from captioning.scoring import FITTED, USED
from corpus.index import Corpus, index_corpus
from encoders.clip_scores import ClipScorer
from encoders.pixels import to_tensor
from prune.captioned import FOLDS
from runtime.application import run
from runtime.artefacts import write_json
from runtime.machine import machine
from train.text_encoder import clip_tokenizer, small_clip

DIMENSIONS, SCENES, WORDS = 256, 30, 2000
#: Number of images for CLIP and the captioner.
IMAGES = 1024


def made_pairs(folder: Path, count: int, seed: int) -> tuple[Corpus, np.ndarray, Pairs, np.ndarray]:
    """A corpus of features without images, written in parts; each scene has its own direction and words."""
    generator = np.random.default_rng([seed, count])
    scene = generator.integers(SCENES, size=count)
    centres = generator.standard_normal((SCENES, DIMENSIONS)).astype(np.float32)
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (count, DIMENSIONS))
    for start in range(0, count, 65_536):
        part = scene[start : start + 65_536]
        features[start : start + 65_536] = centres[part] + generator.standard_normal((len(part), DIMENSIONS))
    words = np.array([f"word{number}" for number in range(WORDS)], dtype=object)
    own = scene[:, None] * 40 + generator.integers(40, size=(count, 10))  # half of the words belong to the scene
    chosen = np.where(generator.random((count, 10)) < 0.5, own, generator.integers(WORDS, size=(count, 10)))
    texts = [" ".join(row) for row in words[chosen]]
    ids = np.arange(count).astype(str)
    manifest = pd.DataFrame({"id": ids, "scene": scene.astype(str), "readable": True})
    empty = np.zeros((0, 1, 1, 3), np.uint8)
    corpus = Corpus("made", folder / "made", empty, manifest, None, ())
    return corpus, features, Pairs.of(np.arange(count), texts, [GIVEN] * count, 0), scene.astype(str)


def scoring_figures(count: int, scorer: FittedScorer) -> dict[str, float]:
    """Seconds of each step, seconds of the matrix products of the statistics alone, and peak memory in GB."""
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), {}
        corpus, features, pairs, scenes = made_pairs(folder, count, seed=0)
        material = material_of(corpus, features, "made", scenes, True, FOLDS, seed=0)
        start = time.perf_counter()
        images, texts = scorer.embed(material, pairs, pairs)
        seconds["embed"] = time.perf_counter() - start
        start = time.perf_counter()
        partner = np.ones(count, bool)
        result = pair_statistics(
            images, texts, pairs.image, material.fold, material.scene, partner, np.random.default_rng(0)
        )
        seconds["statistics"] = time.perf_counter() - start
        start = time.perf_counter()
        sample = slice(0, FITTED)
        other = learn_evidence(result.observed[sample, USED["other"]], result.other[sample, USED["other"]])
        evidence = other(result.observed[:, USED["other"]])
        fit_mismatch(evidence, material.scene, other.shuffled, material.scene[sample], len(material.scenes))
        seconds["probability"] = time.perf_counter() - start
        start = time.perf_counter()
        _products(images, texts)
        seconds["products alone (limit)"] = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    return {**seconds, "pairs a second": count / (sum(seconds.values()) - seconds["products alone (limit)"]),
            "memory, GB": memory}  # fmt: skip


def _products(images: np.ndarray, texts: np.ndarray) -> None:
    """The cosines for the statistics of the pairs and of both kinds of shuffled pairs."""
    for start in range(0, len(images), 8192):
        for _ in range(3):
            for side, sample in ((images, texts), (texts, images)):
                for _ in range(2):
                    side[start : start + 8192] @ sample[:SAMPLE].T


def network_figures(cfg: DictConfig) -> dict[str, float]:
    """Images and captions per second of a CLIP of the size that is trained here, and of the captioner."""
    corpus = index_corpus(instantiate(cfg.corpus.train), cfg.runs)
    rows = np.arange(min(IMAGES, len(corpus)))
    part = Corpus(corpus.name, corpus.directory, np.asarray(corpus.images[rows]), corpus.manifest.iloc[rows], None, ())
    model = small_clip(part.resolution, width=128, layers=2, patch=8, max_length=24, seed=0).eval()
    clip = ClipScorer("bench", model, clip_tokenizer(24), "bench")
    loaded = SimpleNamespace(clip=lambda: clip)
    captions = [f"a satellite image of place {row} with {row % 7} fields" for row in rows]
    pairs = Pairs.of(rows, captions, [GIVEN] * len(rows), 0)
    material = material_of(part, np.zeros((len(rows), 1)), "bench", np.full(len(rows), "a"), True, 1, seed=0)
    ready = to_tensor(part.images)
    tokens = clip.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids

    @torch.no_grad()
    def bare() -> None:
        for start in range(0, len(rows), 256):
            model.get_image_features(pixel_values=ready[start : start + 256])
            model.get_text_features(input_ids=tokens[start : start + 256])

    captioner = instantiate(cfg.captioning.captioner, _convert_="all")
    metadata = [ImageMetadata() for _ in rows]
    limit, ours = _rate(bare, len(rows)), _rate(lambda: embed_with_clip(loaded, material, pairs), len(rows))
    described = _rate(lambda: captioner(part.images, metadata, 0, rows.tolist()), len(rows))
    return {
        "bare CLIP on ready tensors (limit), pairs a second": limit,
        "CLIP scorer, pairs a second": ours,
        "CLIP scorer, of the bare network": ours / limit,
        "captioner, images a second": described,
    }


def _rate(work: Callable[[], object], items: int) -> float:
    work()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < 3:
        work()
        calls += 1
    return items * calls / (time.perf_counter() - start)


def main(cfg: DictConfig) -> None:
    scorer = instantiate(cfg.captioning.scorers.fitted, _convert_="all")
    by_size = {}
    for count in cfg.bench.sizes:
        with multiprocessing.get_context("spawn").Pool(1) as process:  # separate, for its own peak memory
            by_size[str(count)] = process.apply(scoring_figures, (int(count), scorer))
        print(f"{count:,} pairs: " + ", ".join(f"{name} {value:.3g}" for name, value in by_size[str(count)].items()))
    network = network_figures(cfg)
    for name, value in network.items():
        print(f"{name:60s} {value:10.2f}")
    path = Path(cfg.results) / "bench_pairs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": machine(), "pairs": by_size, "network": network})
    print(f"results: {path.parent}")


if __name__ == "__main__":
    run(main)
