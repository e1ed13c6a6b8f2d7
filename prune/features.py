"""Cached per-image features of an indexed corpus: local entropy and embeddings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from corpus.index import CHUNK, Corpus, Scan, Source, index_corpus, indexes_of, rows_in, scanned
from encoders.efficientnet import EfficientNetLite0
from prune.entropy import LocalEntropy, entropies
from runtime.artefacts import COMPLETE, read_json, stage, stage_fingerprint, write_json
from runtime.progress import progress


def scan_corpus(source: Source, runs: Path | str, measure: LocalEntropy, encoder: EfficientNetLite0) -> Corpus:
    """Index a source, its entropies and its embeddings in one pass over the bytes, or open what is there.

    Worker processes decode the next images and measure their entropy while the network embeds these. `corpus_entropy`
    and `corpus_embeddings` then find their results; on a corpus that was indexed before, they compute them from its
    decoded images.
    """
    entropy = stage_fingerprint("entropy", {"measure": measure})
    embedding = stage_fingerprint("embedding", {"encoder": encoder})
    scans = [
        Scan(entropy, partial(entropies, measure), CHUNK, np.float32, by_worker=True),
        Scan(embedding, encoder, encoder.batch_size, np.float16, (encoder.dimensions,)),
    ]
    return index_corpus(source, runs, scans)


def corpus_entropy(corpus: Corpus, measure: LocalEntropy, runs: Path | str) -> np.ndarray:
    """Local entropy float32 [N] in bits, zero where unreadable; cached."""

    def build(directory: Path) -> None:
        if _take(corpus, stage_fingerprint("entropy", {"measure": measure}), directory / "entropy.npy"):
            return
        values = np.zeros(len(corpus), np.float32)
        known = _take_over(corpus, runs, "entropy", {"measure": measure}, "entropy.npy", values)
        for row in progress(np.flatnonzero(~known), "entropy"):
            values[row] = measure(corpus.images[row])
        np.save(directory / "entropy.npy", np.where(corpus.readable, values, 0).astype(np.float32))

    directory = stage(runs, "entropy", {"corpus": corpus.fingerprint, "measure": measure}, build)
    return np.load(directory / "entropy.npy")


def corpus_embeddings(corpus: Corpus, encoder: EfficientNetLite0, runs: Path | str) -> np.ndarray:
    """Embeddings float16 [N, D], memory-mapped, zeros where unreadable; cached, resumed batch by batch."""

    def build(directory: Path) -> None:
        path, state, rest = directory / "embeddings.npy", directory / "progress.json", directory / "todo.npy"
        if _take(corpus, stage_fingerprint("embedding", {"encoder": encoder}), path):
            return
        batch = encoder.batch_size
        done = read_json(state)["done"] if state.exists() and rest.exists() else 0
        if done:
            array = np.lib.format.open_memmap(path, mode="r+")
        else:
            shape = (len(corpus), encoder.dimensions)
            array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
            known = _take_over(corpus, runs, "embedding", {"encoder": encoder}, path.name, array)
            np.save(rest, np.flatnonzero(~known))
        todo = np.load(rest)
        starts = range(done, len(todo), batch)
        total = -(-len(todo) // batch)
        for start in progress(starts, "embed", total=total, initial=done // batch, unit="batch"):
            rows = todo[start : start + batch]
            array[rows] = encoder(corpus.images[rows])
            if start // batch % 20 == 19:
                array.flush()
                write_json(state, {"done": start + batch})
        array[~corpus.readable] = 0
        array.flush()
        state.unlink(missing_ok=True)
        rest.unlink()

    inputs = {"corpus": corpus.fingerprint, "encoder": encoder}
    directory = stage(runs, "embedding", inputs, build, resumable=True)
    return np.load(directory / "embeddings.npy", mmap_mode="r")


def _take_over(
    corpus: Corpus, runs: Path | str, name: str, options: Mapping[str, Any], file: str, values: np.ndarray
) -> np.ndarray:
    """Fill in what earlier indexes of the same source have of the same images; returns which rows, bool [N]."""
    known = np.zeros(len(corpus), bool)
    if "stamp" not in corpus.manifest:
        return known
    source = read_json(corpus.directory / COMPLETE)["inputs"]["source"]
    for previous in indexes_of(source, runs):
        stages = Path(runs) / name / stage_fingerprint(name, {"corpus": previous.fingerprint, **options})
        found = scanned(previous, stage_fingerprint(name, options)) or stages / file
        if not found.is_file():
            continue
        origin = rows_in(previous, corpus.manifest)
        rows = np.flatnonzero((origin >= 0) & ~known)
        values[rows] = np.load(found, mmap_mode="r")[origin[rows]]
        known[rows] = True
    return known


def _take(corpus: Corpus, key: str, path: Path) -> bool:
    """Put what a scan left at `path`, by a second name of the same file where the file system can."""
    found = scanned(corpus, key)
    if found is None:
        return False
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(found, partial)
    except OSError:
        shutil.copyfile(found, partial)
    os.replace(partial, path)
    return True
