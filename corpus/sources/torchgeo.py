"""Source for a non-geo classification data set of torchgeo, by class name; torchgeo comes with the extra `geo`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from corpus.captions import scene_caption, scene_name
from corpus.copies import of_files
from corpus.decoding import DAMAGED, square
from corpus.raster import Pixels, RasterOptions, Survey, has_data, spread, survey_of, to_rgb
from corpus.splits import assigned, check, elsewhere, part_names, thinned
from runtime.artefacts import file_stamp
from runtime.errors import UserError

#: Usual attributes of the band names in torchgeo classes, for objects that do not list the bands that they have loaded.
BAND_NAMES = ("all_bands", "all_band_names", "band_names")


@dataclass(frozen=True)
class TorchGeo:
    """Images of `torchgeo.datasets.<dataset>` that are already below `root`; nothing is downloaded.

    The id of an image is the path of its file relative to `root` if the class lists its files, as most classes do, else
    `<split>/<row>`; in the latter case, only a change of the number of images is detected. Values outside 0..255 are
    stretched between percentiles of the image.

    Args:
        dataset: name of the class, such as EuroSAT, RESISC45 or UCMerced.
        root: the argument `root` of the class.
        bands: three bands for red, green and blue, or one for grey, by the names of the class (B04) or as indices into
            the image tensor, from 0. None: the `rgb_bands` of the class, else all bands of an image with three bands or
            one.
        split: "all", "train", "val" or "test": the splits of the class, or splits by a hash if the class has none for
            training. `corpus.splits` has the names of splits and the rules for a split that the names leave out.
        resolution: side of the resulting images in pixels.
        val_fraction, test_fraction: fractions of the images that the hash holds out.
        limit: largest number of images to keep, evenly spread (None: all).
    Raises:
        UserError: torchgeo is not installed, the class is unknown or does not find its files, a band is unknown, or the
            class has many bands and does not define which are red, green and blue.
    """

    dataset: str | None = None
    root: str | None = None
    bands: tuple[int | str, ...] | None = None
    split: str = "all"
    resolution: int = 64
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    limit: int | None = None
    name: str = "torchgeo"
    workers: int = field(default=1, metadata={"fingerprint": False})
    mask_classes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not self.dataset or not self.root:
            raise UserError("corpus=torchgeo needs a class and its folder: corpus.dataset=EuroSAT corpus.root=DIR")
        if not Path(self.root).expanduser().is_dir():
            raise UserError(f"corpus.root={self.root} is not a folder: give the folder of {self.dataset}")
        check(self.split, self.val_fraction, self.test_fraction, self.limit, self.resolution)
        if self.bands is not None and len(self.bands) not in (1, 3):
            raise UserError(
                f"corpus.bands={list(self.bands)}: name three bands for red, green and blue, or one for grey"
            )

    @property
    def version(self) -> dict[str, Any]:
        """The version of torchgeo, the number of images in each split, and a digest of the files and their stamps."""
        digest = hashlib.sha256()
        for name, part in self._parts.items():
            for row in range(len(part)):
                file = self._file(name, row)
                digest.update(f"{file}\0{file_stamp(file) if file else ''}\0".encode("utf-8", "surrogateescape"))
        counts = {name: len(part) for name, part in self._parts.items()}
        return {"torchgeo": metadata.version("torchgeo"), "files": digest.hexdigest()[:16], **counts}

    def manifest(self) -> pd.DataFrame:
        """Table with one row per image: id, scene (name of the class), caption (of the scene), stamp of the file."""
        _ = self._bands  # invalid bands are refused before the index reads anything
        rows = []
        for name, row in self._chosen:
            part = self._parts[name]
            targets = getattr(part, "targets", None)
            try:
                label = targets[row] if targets is not None else part[row]["label"]
                scene = scene_name(part.classes[int(label)])
            except Exception:  # an unreadable row: the reader reports it
                scene = ""
            file = self._file(name, row)
            stamp = (file_stamp(file) if file else "") + self._shown[1].stamp
            rows.append((self._id(name, row), scene, scene_caption(scene), stamp))
        return pd.DataFrame(rows, columns=["id", "scene", "caption", "stamp"])

    def reader(self, rows: np.ndarray) -> Callable[[], Iterator[np.ndarray | str]]:
        def read() -> Iterator[np.ndarray | str]:
            for name, row in (self._chosen[position] for position in rows):
                try:
                    image = np.asarray(self._parts[name][row]["image"])
                except Exception:
                    yield DAMAGED
                    continue
                if len(image) <= max(self._bands):
                    yield f"has {len(image)} bands, not {max(self._bands) + 1}"
                    continue
                yield square(to_rgb(_pixels(image[list(self._bands)]), *self._shown), self.resolution)

        return read

    @cached_property
    def _bands(self) -> tuple[int, ...]:
        """Indices of bands in the image tensor: three for red, green and blue, or one for grey."""
        part = next(iter(self._parts.values()), None)
        names = _band_names(part)
        if self.bands is None:
            usual = getattr(part, "rgb_bands", None)
            known = _are_names(usual) and set(usual) <= set(names)
            return tuple(map(names.index, usual)) if known else self._only_bands(names)
        for band in self.bands:
            if band not in (names if isinstance(band, str) else range(self._band_count)):
                raise UserError(
                    f"corpus.bands={list(self.bands)}: {self.dataset} has no band {band}; it has the rows 0 to "
                    f"{self._band_count - 1}" + (f", called {', '.join(names)}" if names else ", which have no names")
                )
        return tuple(names.index(band) if isinstance(band, str) else int(band) for band in self.bands)

    @cached_property
    def _shown(self) -> tuple[RasterOptions, Survey]:
        """Options and survey for converting values to colours.

        torchgeo converts all values to floats, so the original type is inferred from a sample.
        """
        result = [(part, row) for part in self._parts.values() for row in range(len(part))]
        images = []
        for part, row in (result[place] for place in spread(len(result))):
            try:
                images.append(_pixels(np.asarray(part[row]["image"])[list(self._bands)]))
            except Exception:  # the reader reports it
                continue
        values = np.concatenate([image.values.ravel() for image in images]) if images else np.zeros(1)
        values = values[np.isfinite(values)]
        if values.size and values.min() >= 0 and 1 < values.max() <= 255 and (values == values.round()).all():
            return RasterOptions(stretch="none"), Survey()
        return RasterOptions(), survey_of(images, RasterOptions())

    def _only_bands(self, names: Sequence[str]) -> tuple[int, ...]:
        """All bands of an image that has three bands (colour) or one (grey)."""
        count = self._band_count
        if count > 3:
            known = f" ({', '.join(names)})" if names else ""
            raise UserError(
                f"torchgeo's {self.dataset} has {count} bands and does not say which are red, green and blue: give "
                f"three as corpus.bands=[…], by name{known} or by row from 0 to {count - 1}"
            )
        return (0, 1, 2) if count == 3 else (0,)

    @cached_property
    def _band_count(self) -> int:
        """Number of bands of the first readable image; 3 if there is none."""
        for part in self._parts.values():
            for row in range(len(part)):
                try:
                    return len(part[row]["image"])
                except Exception:  # the reader reports it
                    continue
        return 3

    def _file(self, name: str, row: int) -> Path | None:
        """File of an image, if its class is an image folder that lists its files; else None."""
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
            raise UserError(
                f"corpus.dataset={self.dataset} is not a non-geo data set of torchgeo: see its documentation"
            )
        root = str(Path(str(self.root)).expanduser())
        named = getattr(kind, "splits", None) or getattr(kind, "valid_splits", None)
        splits = named or ("train", "val", "validation", "test")
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
        result = [(name, row) for name, part in self._parts.items() for row in range(len(part))]
        if self.split != "all":
            named = part_names(self._parts)
            ids, names = [self._id(*place) for place in result], [named[name] for name, _ in result]
            files = [self._file(*place) for place in result]
            firsts = of_files(self.name, ids, files, (str(self.root), self.dataset, self.version["files"]))
            splits = assigned(self.name, ids, names, self.val_fraction, self.test_fraction, firsts)
            elsewhere(self.name, splits, firsts)  # reported on stderr
            result = [place for place, split in zip(result, splits, strict=True) if split == self.split]
        return [result[row] for row in thinned(len(result), self.limit)]


def _are_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, str) for one in value)


def _band_names(part: Any) -> list[str]:
    """Band names of the images of a data set: the bands it has loaded, else all bands it knows, else none."""
    result = (getattr(part, name, None) for name in ("bands", *BAND_NAMES))
    return list(next((names for names in result if names and _are_names(names)), ()))


def _pixels(image: np.ndarray) -> Pixels:
    """Convert an image, float [3 or 1, H, W], to `Pixels`."""
    values = np.moveaxis(image, 0, -1)
    return Pixels(values, has_data(values, [None] * values.shape[-1]))
