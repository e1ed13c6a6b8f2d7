"""The external loop: write captions of images block by block, over all processes, or reasons why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from captioning.captioners.captioner import Captioner, ImageMetadata, Undescribed
from captioning.pairs import NO_WORDS, Pairs, has_words
from captioning.scorers import Material
from corpus.captions import words
from corpus.index import ArrayFile, image_file
from eval.processes import first_process_decides, over_processes
from runtime.artefacts import fingerprint, is_main_process, stage
from runtime.engine import Step, engine
from runtime.progress import progress

#: Number of images that are described between two records of progress.
BLOCK = 2048
#: Approximate number of images per task of a cluster's worker.
WORKER_IMAGES = 128
#: Largest size of a caption in bytes.
MOST_BYTES = 2048
DESCRIPTIONS = "descriptions.parquet"


def describe(
    material: Material, rows: np.ndarray, captioner: Captioner, attempt: int, seed: int, runs: Path | str
) -> tuple[Pairs, pd.DataFrame]:
    """Captions of some images of a corpus; cached, and resumed from the last finished block.

    Args:
        material: the corpus and its metadata.
        rows: rows of the images, int64, ascending.
        captioner: the captioner.
        attempt: 0, 1, ...; each attempt uses another prompt, temperature or plan.
        seed: together with the id of an image, it determines all randomness of its caption.
        runs: directory of the stages.
    Returns:
        the pairs, and a table with id, caption ("") and reason of the images that could not be described.
    """

    def build(directory: Path) -> None:
        for start in progress(range(0, len(rows), BLOCK), f"describe, {captioner.name}", unit="block"):
            path = directory / f"{start:012d}.parquet"
            if path.is_file():
                continue
            part = rows[start : start + BLOCK]
            texts = _lines(material, part, captioner, attempt, seed)
            if is_main_process():
                partial = path.with_name(path.name + ".partial")
                pd.DataFrame({"image": part, "text": texts}).to_parquet(partial, index=False)
                partial.rename(path)
        if is_main_process():
            blocks = sorted(directory.glob("[0-9]*.parquet"))
            frames = [pd.read_parquet(path) for path in blocks]
            whole = pd.concat(frames) if frames else pd.DataFrame({"image": rows, "text": []})
            whole.to_parquet(directory / DESCRIPTIONS, index=False)
            for path in blocks:
                path.unlink()

    inputs = {
        "corpus": material.corpus.fingerprint, "rows": fingerprint(of=rows.tolist()), "captioner": captioner,
        "attempt": attempt, "seed": seed, "scenes": fingerprint(of=[material.scenes, material.scene[rows].tolist()]),
    }  # fmt: skip
    directory = stage(runs, "descriptions", inputs, build, resumable=True, together=first_process_decides)
    table = pd.read_parquet(directory / DESCRIPTIONS)
    failed = table["text"].str.startswith("!")
    ids = material.corpus.manifest["id"].to_numpy(dtype=object)[table["image"][failed]]
    refused = pd.DataFrame({"id": ids, "caption": "", "reason": table["text"][failed].str[1:].to_numpy()})
    good = table[~failed]
    pairs = Pairs.of(good["image"], good["text"].str[1:], [captioner.name] * len(good), made_in=attempt + 1)
    return pairs, refused


def metadata_of(material: Material, row: int) -> ImageMetadata:
    """Known data about an image besides its pixels."""
    corpus = material.corpus
    mask = None if corpus.masks is None else np.asarray(corpus.masks[row])
    scene = material.scenes[material.scene[row]] if material.labelled else ""
    return ImageMetadata(words(scene), mask, tuple(corpus.mask_classes))


@dataclass(frozen=True)
class _Request:
    """Images to describe: rows int64 [n], ascending, and the metadata and seed of each image."""

    rows: np.ndarray
    metadata: list[ImageMetadata]
    seeds: list[int]


def _request(material: Material, rows: np.ndarray, attempt: int, seed: int) -> _Request:
    ids = material.corpus.manifest["id"].to_numpy(dtype=object)
    seeds = [int(fingerprint(id=str(ids[row]), seed=seed, attempt=attempt), 16) % 2**63 for row in rows]
    return _Request(rows, [metadata_of(material, row) for row in rows], seeds)


def _lines(material: Material, rows: np.ndarray, captioner: Captioner, attempt: int, seed: int) -> list[str]:
    """One line per image, "=" and a caption or "!" and a reason, by all processes of a launch or all workers."""
    if engine().shares_files:

        def of_process(own: np.ndarray) -> np.ndarray:
            requested = _request(material, rows[own], attempt, seed)
            return _packed(_described(captioner, attempt, (requested, material.corpus.images)))

        return [bytes(row).rstrip(b"\0 ").decode("utf-8", "ignore") for row in over_processes(of_process, len(rows))]
    size = captioner.batch_size * max(1, WORKER_IMAGES // captioner.batch_size)
    groups = (_request(material, rows[at : at + size], attempt, seed) for at in range(0, len(rows), size))
    steps = [Step(partial(_pixels, image_file(material.corpus)), home=True)]
    steps.append(Step(partial(_described, captioner, attempt), network=True))
    return [line for part in engine().run(steps, groups) for line in part.value]


def _pixels(images: ArrayFile, requested: _Request) -> tuple[_Request, np.ndarray]:
    return replace(requested, rows=np.arange(len(requested.rows))), images.read(requested.rows)


def _described(captioner: Captioner, attempt: int, work: tuple[_Request, np.ndarray]) -> list[str]:
    """Lines for the requested images [N, R, R, 3]."""
    requested, images = work
    result: list[str | Undescribed] = []
    for start in range(0, len(requested.rows), captioner.batch_size):
        part = slice(start, start + captioner.batch_size)
        result += captioner(
            np.asarray(images[requested.rows[part]]), requested.metadata[part], attempt, requested.seeds[part]
        )
    texts = [text if isinstance(text, Undescribed) or has_words(text) else Undescribed(NO_WORDS) for text in result]
    lines = [f"!{text.reason}" if isinstance(text, Undescribed) else f"={text}" for text in texts]
    return [line.encode()[:MOST_BYTES].decode("utf-8", "ignore").rstrip("\0 ") for line in lines]


def _packed(lines: Sequence[str]) -> np.ndarray:
    """The lines as an array uint8 [n, MOST_BYTES], which processes can exchange."""
    packed = np.zeros((len(lines), MOST_BYTES), np.uint8)
    for place, line in enumerate(lines):
        data = line.encode()
        packed[place, : len(data)] = np.frombuffer(data, np.uint8)
    return packed
