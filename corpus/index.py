"""The index stage: any source becomes one manifest, one image array and, where there are any, one mask array."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from corpus.artefacts import fingerprint, read_json, stage, write_json
from corpus.errors import UserError
from corpus.progress import progress


class Source(Protocol):
    """What a corpus must offer; see `corpus.bluemarble` and `corpus.folder`."""

    name: str
    resolution: int

    @property
    def version(self) -> Any:
        """What the pixels depend on beyond the source's own fields, JSON-ready."""

    @property
    def mask_classes(self) -> tuple[str, ...]:
        """Names of the mask values; empty where there are no masks."""

    def manifest(self) -> pd.DataFrame:
        """One row an image, with at least id, scene ("" unknown) and caption ("" none)."""

    def images(self) -> Iterator[np.ndarray | str]:
        """uint8 [R, R, 3] in manifest order, or the reason why an image cannot be read."""

    def masks(self) -> Iterator[np.ndarray]:
        """uint8 [R, R] in manifest order."""


@dataclass(frozen=True)
class Corpus:
    """An indexed corpus, opened from its stage directory.

    Attributes:
        images: uint8 [N, R, R, 3], memory-mapped; zeros where unreadable.
        manifest: N rows with id, scene, caption, readable, reason and the source's own columns.
        masks: uint8 [N, R, R], memory-mapped, or None.
        mask_classes: names of the mask values.
    """

    name: str
    directory: Path
    images: np.ndarray
    manifest: pd.DataFrame
    masks: np.ndarray | None
    mask_classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def fingerprint(self) -> str:
        return self.directory.name

    @property
    def resolution(self) -> int:
        return self.images.shape[1]

    @property
    def readable(self) -> np.ndarray:
        """bool [N]."""
        return self.manifest["readable"].to_numpy()


def index_corpus(source: Source, runs: Path | str) -> Corpus:
    """Decode a source once into `runs/corpus/<fingerprint>/`, or open what is there."""
    inputs = {"source": source, "version": source.version}
    return open_corpus(stage(runs, "corpus", inputs, lambda directory: _build(source, directory)))


def open_corpus(directory: Path) -> Corpus:
    """Open an index stage's directory."""
    facts = read_json(directory / "corpus.json")
    masks = directory / "masks.npy"
    return Corpus(
        name=facts["name"],
        directory=directory,
        images=np.load(directory / "images.npy", mmap_mode="r"),
        manifest=pd.read_parquet(directory / "manifest.parquet"),
        masks=np.load(masks, mmap_mode="r") if masks.exists() else None,
        mask_classes=tuple(facts["mask_classes"]),
    )


def _build(source: Source, directory: Path) -> None:
    manifest = source.manifest()
    if manifest.empty:
        raise UserError(f"corpus {source.name} has no images: check its root, split and limit")
    size = source.resolution
    array = np.lib.format.open_memmap(
        directory / "images.npy", mode="w+", dtype=np.uint8, shape=(len(manifest), size, size, 3)
    )
    reasons = [""] * len(manifest)
    for row, image in enumerate(progress(source.images(), f"index {source.name}", total=len(manifest))):
        if isinstance(image, str):
            reasons[row] = image
        else:
            array[row] = image
    array.flush()
    if source.mask_classes:
        masks = np.lib.format.open_memmap(
            directory / "masks.npy", mode="w+", dtype=np.uint8, shape=(len(manifest), size, size)
        )
        for row, mask in enumerate(source.masks()):
            masks[row] = mask
        masks.flush()
    manifest["readable"] = [not reason for reason in reasons]
    manifest["reason"] = reasons
    manifest.to_parquet(directory / "manifest.parquet", index=False)
    write_json(directory / "corpus.json", {"name": source.name, "mask_classes": list(source.mask_classes)})


def subset_fingerprint(corpus: Corpus, rows: np.ndarray) -> str:
    """Fingerprint of some rows of a corpus, in this order."""
    return fingerprint(corpus=corpus.fingerprint, rows=np.asarray(rows).tolist())
