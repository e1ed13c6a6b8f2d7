"""Cached per-image features of an indexed corpus: local entropy and embeddings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from corpus.index import (
    CHUNK,
    ArrayFile,
    Corpus,
    Scan,
    Source,
    index_corpus,
    indexes_of,
    over_images,
    rows_in,
    scanned,
)
from encoders.efficientnet import EfficientNetLite0
from prune.entropy import LocalEntropy, entropies
from runtime.artefacts import COMPLETE, read_json, stage, stage_fingerprint, write_json
from runtime.cost import StageLog
from runtime.progress import progress

#: Files that the stages write.
ENTROPY, EMBEDDINGS = "entropy.npy", "embeddings.npy"


def scan_corpus(source: Source, runs: Path | str, measure: LocalEntropy, encoder: EfficientNetLite0) -> Corpus:
    """Index a source and compute entropies and embeddings in one pass over the files, or open an existing index.

    Worker processes decode the next images and measure their entropy while the network embeds the current ones.
    `corpus_entropy` and `corpus_embeddings` then find their results. For a corpus that was indexed before, they compute
    them from its decoded images.
    """
    entropy = stage_fingerprint("entropy", {"measure": measure})
    embedding = stage_fingerprint("embedding", {"encoder": encoder})
    scans = [
        Scan(entropy, partial(entropies, measure), CHUNK, np.float32, by_worker=True),
        Scan(embedding, encoder, encoder.batch_size, np.float16, (encoder.dimensions,)),
    ]
    return index_corpus(source, runs, scans)


def corpus_entropy(corpus: Corpus, measure: LocalEntropy, runs: Path | str) -> np.ndarray:
    """Local entropy of every image in bits, float32 [N], zero where the image is unreadable; cached."""
    options = {"measure": measure}
    scan = Scan(stage_fingerprint("entropy", options), partial(entropies, measure), CHUNK, np.float32)
    build = partial(_compute, corpus, scan, "entropy", options, ENTROPY, runs)
    directory = stage(runs, "entropy", {"corpus": corpus.fingerprint, **options}, build, resumable=True)
    return np.load(directory / ENTROPY)


def corpus_embeddings(corpus: Corpus, encoder: EfficientNetLite0, runs: Path | str) -> np.ndarray:
    """Embeddings of all images, float16 [N, D], memory-mapped, zeros where unreadable; cached, resumable by chunks."""
    options = {"encoder": encoder}
    key = stage_fingerprint("embedding", options)
    scan = Scan(key, encoder, encoder.batch_size, np.float16, (encoder.dimensions,))
    build = partial(_compute, corpus, scan, "embedding", options, EMBEDDINGS, runs)
    directory = stage(runs, "embedding", {"corpus": corpus.fingerprint, **options}, build, resumable=True)
    return np.load(directory / EMBEDDINGS, mmap_mode="r")


def _compute(
    corpus: Corpus, scan: Scan, name: str, options: Mapping[str, Any], file: str, runs: Path | str, directory: Path
) -> None:
    """Fill a stage's directory with the results of a scan of an indexed corpus.

    Results that this index or earlier indexes of the source already have are copied; only the others are computed.
    """
    path, state, rest = directory / file, directory / "progress.json", directory / "todo.npy"
    if _take(corpus, scan.key, path):
        return
    array = ArrayFile(path, (len(corpus), *scan.shape), scan.dtype)
    done = read_json(state)["done"] if state.exists() and rest.exists() else 0
    if not done:
        array.create()
        np.save(rest, np.flatnonzero(~_take_over(corpus, runs, name, options, file, array)))
    todo = np.load(rest)
    log = StageLog(directory, name, corpus.name)
    groups = [todo[at : at + CHUNK] for at in range(done, len(todo), CHUNK)]
    with progress(range(len(todo)), name, total=len(todo), initial=done, unit="image") as bar:
        for part in over_images(corpus, groups, scan):
            rows, values = part.value
            array.write(rows, values)
            log.add(part, rows)
            done += len(rows)
            write_json(state, {"done": done})
            bar.update(len(rows))
    log.close()
    gone = np.flatnonzero(~corpus.readable)
    array.write(gone, np.zeros((len(gone), *scan.shape), scan.dtype))
    state.unlink(missing_ok=True)
    rest.unlink()


def _take_over(
    corpus: Corpus, runs: Path | str, name: str, options: Mapping[str, Any], file: str, values: ArrayFile
) -> np.ndarray:
    """Copy results for the same images from earlier indexes of the source; returns which rows were filled, bool [N]."""
    known = np.zeros(len(corpus), bool)
    if "stamp" not in corpus.manifest:
        return known
    source = read_json(corpus.directory / COMPLETE)["inputs"]["source"]
    for previous in indexes_of(source, runs):
        stages = Path(runs) / name / stage_fingerprint(name, {"corpus": previous.fingerprint, **options})
        result = scanned(previous, stage_fingerprint(name, options)) or stages / file
        if not result.is_file():
            continue
        origin = rows_in(previous, corpus.manifest)
        rows = np.flatnonzero((origin >= 0) & ~known)
        values.write(rows, np.load(result, mmap_mode="r")[origin[rows]])
        known[rows] = True
    return known


def _take(corpus: Corpus, key: str, path: Path) -> bool:
    """Put the result file of a scan at `path`: a hard link where the file system supports it, otherwise a copy.

    Returns whether there was a result.
    """
    result = scanned(corpus, key)
    if result is None:
        return False
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(result, partial)
    except OSError:
        shutil.copyfile(result, partial)
    os.replace(partial, path)
    return True
