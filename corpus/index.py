"""The index stage: any source becomes one manifest, one image array and, where there are any, one mask array."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from corpus.artefacts import fingerprint, read_json, stage, write_json
from corpus.errors import UserError
from corpus.progress import progress

#: Folder of a corpus stage with the results of its scans.
SCANNED = "scanned"


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


@dataclass(frozen=True)
class Scan:
    """What is computed of every image while it is decoded; `scanned` finds the result.

    Attributes:
        key: names the result.
        compute: (uint8 [B, R, R, 3]) -> [B, ...], called with whole batches in corpus order.
        batch_size: images a call.
        dtype: of the result.
    """

    key: str
    compute: Callable[[np.ndarray], np.ndarray]
    batch_size: int
    dtype: type


def index_corpus(source: Source, runs: Path | str, scans: Sequence[Scan] = ()) -> Corpus:
    """Decode a source once into `runs/corpus/<fingerprint>/`, or open what is there.

    `scans` run in the same pass, while the next images are decoded; a corpus that is there already is not scanned.
    """
    inputs = {"source": source, "version": source.version}
    return open_corpus(stage(runs, "corpus", inputs, lambda directory: _build(source, directory, scans)))


def scanned(corpus: Corpus, key: str) -> Path | None:
    """The array that a `Scan` of this key left, zeros where unreadable, or None where it did not run."""
    path = corpus.directory / SCANNED / f"{key}.npy"
    return path if path.is_file() else None


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


def _build(source: Source, directory: Path, scans: Sequence[Scan]) -> None:
    manifest = source.manifest()
    if manifest.empty:
        raise UserError(f"corpus {source.name} has no images: check its root, split and limit")
    size = source.resolution
    array = np.lib.format.open_memmap(
        directory / "images.npy", mode="w+", dtype=np.uint8, shape=(len(manifest), size, size, 3)
    )
    reasons = [""] * len(manifest)
    running = [_RunningScan(scan, array, directory / SCANNED) for scan in scans]
    for row, image in enumerate(progress(source.images(), f"index {source.name}", total=len(manifest))):
        if isinstance(image, str):
            reasons[row] = image
        else:
            array[row] = image
        for scan in running:
            scan.advance(row + 1)
    array.flush()
    for scan in running:
        scan.finish(np.array(reasons) != "")
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


class _RunningScan:
    """Applies a scan to each batch of `images` as soon as it is decoded."""

    def __init__(self, scan: Scan, images: np.ndarray, folder: Path) -> None:
        self._scan, self._images, self._done = scan, images, 0
        folder.mkdir(exist_ok=True)
        self._path = folder / f"{scan.key}.npy"
        self._results: np.ndarray | None = None

    def advance(self, decoded: int) -> None:
        """Compute the batches that are whole now, and the last one."""
        while self._done < decoded and (decoded - self._done >= self._scan.batch_size or decoded == len(self._images)):
            rows = slice(self._done, min(self._done + self._scan.batch_size, decoded))
            values = self._scan.compute(self._images[rows])
            if self._results is None:
                shape = (len(self._images), *values.shape[1:])
                self._results = np.lib.format.open_memmap(self._path, mode="w+", dtype=self._scan.dtype, shape=shape)
            self._results[rows] = values
            self._done = rows.stop

    def finish(self, unreadable: np.ndarray) -> None:
        self._results[unreadable] = 0
        self._results.flush()


def subset_fingerprint(corpus: Corpus, rows: np.ndarray) -> str:
    """Fingerprint of some rows of a corpus, in this order."""
    return fingerprint(corpus=corpus.fingerprint, rows=np.asarray(rows).tolist())
