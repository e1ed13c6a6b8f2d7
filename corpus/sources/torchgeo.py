"""A non-geo classification data set of torchgeo, by class name; torchgeo is the extra `geo`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from corpus.captions import words
from corpus.decoding import DAMAGED, square, stretch
from corpus.splits import check, hashed_split, thinned
from runtime.artefacts import file_stamp
from runtime.errors import UserError


@dataclass(frozen=True)
class TorchGeo:
    """Images of `torchgeo.datasets.<dataset>`, which has them below `root` already; nothing is downloaded.

    Ids are the files' paths below `root` where the class lists its files, as most do, else `<split>/<row>`, of which no
    change is noticed but in their number. Values that are not 0..255 are stretched between percentiles of the image.

    Args:
        dataset: the class, such as EuroSAT, RESISC45 or UCMerced.
        root: what the class calls root.
        bands: rows of the image tensor for red, green and blue, counted from 0.
        split: "all", "train" or "test"; the class's own splits (validation is held out), or a hash where it has none.
        resolution: side of the images handed on, in pixels.
        test_share: share of the images that the hash holds out.
        limit: keep at most so many images, evenly spread (None: all).
    Raises:
        UserError: torchgeo is not installed, there is no such class, or it does not find its files.
    """

    dataset: str | None = None
    root: str | None = None
    bands: tuple[int, ...] = (0, 1, 2)
    split: str = "all"
    resolution: int = 64
    test_share: float = 0.1
    limit: int | None = None
    name: str = "torchgeo"
    workers: int = field(default=1, metadata={"fingerprint": False})
    mask_classes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not self.dataset or not self.root:
            raise UserError("corpus=torchgeo needs a class and its folder: corpus.dataset=EuroSAT corpus.root=DIR")
        if not Path(self.root).expanduser().is_dir():
            raise UserError(f"corpus.root={self.root} is no folder: give the one that holds {self.dataset}")
        check(self.split, self.test_share, self.limit, self.resolution)

    @property
    def version(self) -> dict[str, Any]:
        """torchgeo's version, the number of images in each split, and a digest of the files and their stamps."""
        digest = hashlib.sha256()
        for name, part in self._parts.items():
            for row in range(len(part)):
                file = self._file(name, row)
                digest.update(f"{file}\0{file_stamp(file) if file else ''}\0".encode("utf-8", "surrogateescape"))
        counts = {name: len(part) for name, part in self._parts.items()}
        return {"torchgeo": metadata.version("torchgeo"), "files": digest.hexdigest()[:16], **counts}

    def manifest(self) -> pd.DataFrame:
        """One row an image: id, scene (the class's name), caption (of the scene), stamp of its file."""
        rows = []
        for name, row in self._chosen:
            part = self._parts[name]
            targets = getattr(part, "targets", None)
            try:
                label = targets[row] if targets is not None else part[row]["label"]
                scene = str(part.classes[int(label)])
            except Exception:  # a row that cannot be read: the reader will say so
                scene = ""
            file = self._file(name, row)
            stamp = file_stamp(file) if file else ""
            rows.append((self._id(name, row), scene, f"a satellite image of {words(scene)}" if scene else "", stamp))
        return pd.DataFrame(rows, columns=["id", "scene", "caption", "stamp"])

    def reader(self, rows: np.ndarray) -> Callable[[], Iterator[np.ndarray | str]]:
        def read() -> Iterator[np.ndarray | str]:
            for name, row in (self._chosen[position] for position in rows):
                try:
                    image = np.asarray(self._parts[name][row]["image"])
                except Exception:
                    yield DAMAGED
                    continue
                yield square(_colours(image[list(self.bands)]), self.resolution)

        return read

    def _file(self, name: str, row: int) -> Path | None:
        """Of an image, where its class is a folder of images that lists them."""
        listed = getattr(self._parts[name], "samples", None)
        return Path(listed[row][0]) if listed else None

    def _id(self, name: str, row: int) -> str:
        file, root = self._file(name, row), Path(str(self.root)).expanduser()
        return file.relative_to(root).as_posix() if file and file.is_relative_to(root) else f"{name}/{row:08d}"

    @cached_property
    def _parts(self) -> dict[str, Any]:
        try:
            from torchgeo import datasets
        except ImportError:
            raise UserError("corpus=torchgeo needs torchgeo: run .venv/bin/python -m pip install '.[geo]'") from None
        kind = getattr(datasets, str(self.dataset), None)
        if not (isinstance(kind, type) and issubclass(kind, datasets.NonGeoDataset)):
            raise UserError(f"corpus.dataset={self.dataset} is no non-geo data set of torchgeo: see its documentation")
        root = str(Path(str(self.root)).expanduser())
        splits = getattr(kind, "splits", None) or ("train", "val", "test")
        parts = {}
        for name in splits:
            try:
                parts[str(name)] = kind(root=root, split=name)
            except AssertionError:  # the class has no such split
                continue
            except TypeError:  # it has no splits at all
                return {"all": self._opened(kind, root=root)}
            except datasets.DatasetNotFoundError:
                return {name: self._opened(kind, root=root, split=name)}
        return parts

    def _opened(self, kind: type, **options: str) -> Any:
        from torchgeo import datasets

        try:
            return kind(**options)
        except datasets.DatasetNotFoundError:
            message = f"torchgeo's {self.dataset} does not find its files in {self.root}: put them there"
            raise UserError(message) from None

    @cached_property
    def _chosen(self) -> list[tuple[str, int]]:
        names = {name: "train" if name == "train" else "test" for name in self._parts if name != "all"}
        found = [
            (name, row)
            for name, part in self._parts.items()
            for row in range(len(part))
            if self.split in ("all", names.get(name) or hashed_split(self._id(name, row), self.test_share))
        ]
        return [found[row] for row in thinned(len(found), self.limit)]


def _colours(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of float [3, H, W]."""
    image = np.moveaxis(image, 0, -1)
    valid = np.isfinite(image)
    if image.min() >= 0 and 1 < image.max() <= 255:
        return np.where(valid, image, 0).round().astype(np.uint8)
    return np.stack([stretch(image[..., band], valid[..., band]) for band in range(3)], axis=-1)
