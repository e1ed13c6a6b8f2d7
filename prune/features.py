"""Cached per-image features of an indexed corpus: local entropy and embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from corpus.artefacts import read_json, stage, write_json
from corpus.encoder import EfficientNetLite0
from corpus.index import Corpus
from corpus.progress import progress
from prune.entropy import LocalEntropy


def corpus_entropy(corpus: Corpus, measure: LocalEntropy, runs: Path | str) -> np.ndarray:
    """Local entropy float32 [N] in bits, zero where unreadable; cached."""

    def build(directory: Path) -> None:
        images = progress(corpus.images, "entropy", total=len(corpus))
        np.save(directory / "entropy.npy", np.array([measure(image) for image in images], np.float32))

    directory = stage(runs, "entropy", {"corpus": corpus.fingerprint, "measure": measure}, build)
    return np.load(directory / "entropy.npy")


def corpus_embeddings(corpus: Corpus, encoder: EfficientNetLite0, runs: Path | str) -> np.ndarray:
    """Embeddings float16 [N, D], memory-mapped, zeros where unreadable; cached, resumed batch by batch."""

    def build(directory: Path) -> None:
        path, state = directory / "embeddings.npy", directory / "progress.json"
        batch = encoder.batch_size
        done = read_json(state)["done"] if state.exists() else 0
        shape = (len(corpus), encoder.dimensions)
        if done:
            array = np.lib.format.open_memmap(path, mode="r+")
        else:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        starts = range(done, len(corpus), batch)
        total = -(-len(corpus) // batch)
        for start in progress(starts, "embed", total=total, initial=done // batch, unit="batch"):
            array[start : start + batch] = encoder(corpus.images[start : start + batch])
            if start // batch % 20 == 19:
                array.flush()
                write_json(state, {"done": start + batch})
        array[~corpus.readable] = 0
        array.flush()

    inputs = {"corpus": corpus.fingerprint, "encoder": encoder}
    directory = stage(runs, "embedding", inputs, build, resumable=True)
    return np.load(directory / "embeddings.npy", mmap_mode="r")
