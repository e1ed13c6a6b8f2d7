"""Source for a Hugging Face data set: by hub name, saved to disk, or as Parquet and Arrow files."""

from __future__ import annotations

import glob
import hashlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from corpus.captions import (
    CAPTION_KEYS,
    caption_metadata,
    chosen_classes,
    class_list,
    label_list,
    own_captions,
    row_scene,
    scalars,
)
from corpus.copies import by_key
from corpus.decoding import EMPTY, read_bytes, survey_files
from corpus.masks import MISSING, MaskRule, Sample, mask_rule
from corpus.names import CLASS_FILES, honest_suffix
from corpus.raster import Survey, spread
from corpus.reading import Decoding, Shown
from corpus.splits import assigned, check, elsewhere, part_names, split_of, thinned
from runtime.errors import UserError
from runtime.notices import notice
from runtime.progress import progress

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture")
SCENE_COLUMNS = ("scene", "label", "labels", "class", "category")
#: Number of images of a stream in the survey for showing values deeper than 8 bits.
STREAMED_SAMPLE = 16
MASK_COLUMNS = ("mask", "seg", "annotation", "segmentation")


@dataclass(frozen=True)
class HuggingFace(Shown):
    """Rows of a data set that `datasets` can load.

    The id of an image is the value of a text column `id` if there is one, else `<split>/<row>`. Images are kept as
    encoded bytes and decoded here, so a broken image becomes a row with a reason.

    Args:
        path: a hub name ("owner/name"), a folder that `save_to_disk` wrote, or a folder, file or pattern of Parquet or
            Arrow files.
        config: name of the configuration, if the data set has several.
        split: "all", "train", "val" or "test". These are the splits of the data set if one of them is for training,
            else splits by a hash of the id. `corpus.splits` has the names of splits and the rules for a split that the
            names leave out.
        streaming: read a hub data set row by row instead of downloading it completely; this uses one process and two
            passes.
        image_column, scene_column, caption_column, mask_column: names of columns; None: the first column with a usual
            name.
        classes, mask_ignore, mask_values, mask_colours: meaning of the pixel values of masks
            (`corpus.masks.mask_rule`); without names of classes, masks are ignored.
        class_names: names of scenes that are given as numbers, if the data set has no names: a list, or a file with a
            list; None: `corpus.names.CLASS_FILES` in the folder of the data set, if there is one.
        bands, no_data, stretch, low, high: options for rasters, as in `corpus.raster.RasterOptions`.
        resolution: side of the resulting images in pixels.
        val_fraction, test_fraction: fractions of the images that the hash holds out.
        limit: largest number of images to keep, evenly spread (None: all).
        workers: number of decoding processes (None: one per core); the result does not depend on it.
    Raises:
        UserError: no path is given, there is no data set at the path, or a named column does not exist.
    """

    path: str | None = None
    config: str | None = None
    split: str = "all"
    streaming: bool = False
    image_column: str | None = None
    scene_column: str | None = None
    caption_column: str | None = None
    mask_column: str | None = None
    classes: tuple[str, ...] = ()
    class_names: Any = None
    mask_ignore: Any = None
    mask_values: Any = None
    mask_colours: Any = None
    resolution: int = 64
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    limit: int | None = None
    workers: int | None = field(default=None, metadata={"fingerprint": False})
    name: str = "huggingface"

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("corpus=huggingface needs a data set: give corpus.path=OWNER/NAME or a folder")
        check(self.split, self.val_fraction, self.test_fraction, self.limit, self.resolution)
        _ = self.raster
        _ = self.mask_rule  # an invalid rule is refused before anything is read
        if self.streaming and self.workers not in (None, 1):
            raise UserError("corpus.streaming=true reads in one process: leave corpus.workers=null")
        if self.streaming:
            object.__setattr__(self, "workers", 1)

    @property
    def version(self) -> dict[str, Any]:
        """The fingerprints from `datasets`, which change with the data, and the names of the classes if any exist."""
        names = {"class_names": list(self._class_names)} if self._class_names else {}
        return {**self._data_version, **names}

    @property
    def _data_version(self) -> dict[str, str]:
        if not self.streaming:
            return {name: str(getattr(part, "_fingerprint", "")) for name, part in self._parts.items()}
        parts = self._parts  # raises a one-line error if the data set cannot be loaded
        files = _files(Path(str(self.path)).expanduser())
        if files:
            return {file: f"{Path(file).stat().st_size}-{Path(file).stat().st_mtime_ns}" for file in files}
        from huggingface_hub import HfApi

        try:
            return {"commit": str(HfApi().dataset_info(str(self.path)).sha), "splits": ",".join(parts)}
        except Exception as error:
            raise UserError(
                f"the version of {self.path} could not be read from the hub ({_reason(error)}): try again"
            ) from error

    @cached_property
    def mask_rule(self) -> MaskRule:
        return mask_rule(self.classes, self.mask_ignore, self.mask_values, self.mask_colours)

    @property
    def mask_classes(self) -> tuple[str, ...]:
        return self.mask_rule.classes

    def manifest(self) -> pd.DataFrame:
        """Table with one row per image: id, scene, caption, all columns of numbers or texts; stamp unless streamed."""
        return self._chosen[1]

    def reader(self, rows: np.ndarray) -> Callable[[], Iterator[np.ndarray | Sample | str]]:
        positions = self._chosen[0][rows]
        if self.streaming:
            return partial(self._stream, positions)
        names = list(self._parts)
        parts = {names[number]: self._parts[names[number]] for number in sorted(set(positions[:, 0].tolist()))}
        chosen = [(names[number], int(row)) for number, row in positions]
        return partial(_read_rows, parts, chosen, self._pair, self._decoding)

    @cached_property
    def _decoding(self) -> Decoding:
        return Decoding(self.resolution, self.raster, self.survey, self.mask_rule)

    @cached_property
    def survey(self) -> Survey:
        """Survey of images spread over the data set, independent of the split; for a stream, of its first images."""
        column = self._columns["image"]
        if self.streaming:
            records = islice(next(iter(self._parts.values())), STREAMED_SAMPLE)
        else:
            result = [(part, row) for part in self._parts.values() for row in range(len(part))]
            records = (result[place][0][result[place][1]] for place in spread(len(result)))
        data = (_bytes(record[column]) for record in records)
        return survey_files((part for part in data if isinstance(part, bytes)), self.raster)

    def originals(self, rows: np.ndarray) -> Iterator[tuple[bytes, str, tuple[bytes, str] | None]]:
        """Yield the bytes and suffix of each image, and the bytes and suffix of its mask or None."""
        parts, (column, mask_column) = list(self._parts.values()), self._pair
        records = (
            self._stream_records(self._chosen[0][rows])
            if self.streaming
            else (parts[number][row] for number, row in self._chosen[0][rows].tolist())
        )
        for record in records:
            data = _bytes(record[column])
            if isinstance(data, str):
                raise UserError(f"an image of {self.path} can no longer be read ({data}): prune again, or restore it")
            mask = _bytes(record[mask_column]) if mask_column else EMPTY
            yield data, _suffix(data), None if isinstance(mask, str) else (mask, _suffix(mask))

    @cached_property
    def _parts(self) -> dict[str, Any]:
        """The splits of the data set by name, with images that are not decoded."""
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        try:
            loaded = _load(str(self.path), self.config, self.streaming)
        except Exception as error:
            raise UserError(
                f"corpus.path={self.path} cannot be loaded ({_reason(error)}): give a hub name, a folder of "
                "save_to_disk, or Parquet files"
            ) from error
        return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}

    @cached_property
    def _columns(self) -> dict[str, str | None]:
        first = next(iter(self._parts.values()))
        features = first.features or {}
        names = list(first.column_names or features)

        def named(requested: str | None, usual: tuple[str, ...], what: str) -> str | None:
            if requested is not None and requested not in names:
                raise UserError(f"corpus.{what}_column={requested} is not in {self.path}: it has {', '.join(names)}")
            return requested or next((name for name in usual if name in names), None)

        import datasets

        masks = [self.mask_column] if self.mask_column else MASK_COLUMNS
        pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        images = [name for name in pictures if name not in masks]
        columns = {
            "image": named(self.image_column, (*images, *IMAGE_COLUMNS), "image"),
            "mask": named(self.mask_column, MASK_COLUMNS, "mask"),
            "scene": named(self.scene_column, SCENE_COLUMNS, "scene"),
        }
        named(self.caption_column, (), "caption")
        if columns["image"] is None:
            raise UserError(
                f"{self.path} has no column of images: name it with corpus.image_column ({', '.join(names)})"
            )
        if self.mask_rule and columns["mask"] is None:
            raise UserError(f"{self.path} has no column of masks: name it with corpus.mask_column ({', '.join(names)})")
        return columns

    @property
    def _pair(self) -> tuple[str, str | None]:
        """The column of the image and, if masks are read, the column of its mask."""
        return self._columns["image"], self._columns["mask"] if self.mask_rule else None

    @cached_property
    def _class_names(self) -> tuple[str, ...]:
        if self.class_names is not None:
            return chosen_classes(self.class_names)
        folder = Path(str(self.path)).expanduser()
        if not folder.is_dir() and not _files(folder):  # a hub name has no local folder
            return ()
        lists = (read_bytes((folder if folder.is_dir() else folder.parent) / name) for name in CLASS_FILES)
        return next((class_list(data) for data in lists if isinstance(data, bytes)), ())

    @cached_property
    def _chosen(self) -> tuple[np.ndarray, pd.DataFrame]:
        """Part and row of every image of the split, int64 [n, 2], reduced to the limit; and their manifest."""
        rows, positions, names, taken, digests = [], [], [], set(), []
        named, counts = part_names(self._parts), []
        for number, (name, part) in enumerate(self._parts.items()):
            pictures = (self._columns["image"], self._columns["mask"])
            texts = part.select_columns([column for column in part.column_names if column not in pictures])
            metadata = texts if texts.column_names else ({} for _ in part)
            stamps = repeat(({}, None)) if self.streaming else _stamps(part, self._pair)
            for row, (record, stamp) in enumerate(
                zip(progress(metadata, f"read rows of {name}"), stamps, strict=False)
            ):
                identifier = f"{name}/{row:08d}"
                if isinstance(record.get("id"), str) and record["id"] not in taken:
                    identifier = record["id"]
                while identifier in taken:
                    identifier += "#"
                taken.add(identifier)
                positions.append((number, row))
                names.append(self._split_name(record, named[name]))
                result, captions = self._metadata(record, part.features)
                rows.append({"id": identifier, **result, **_shown(stamp[0], self.survey)})
                digests.append(stamp[1])
                counts.append(captions)
        if any(counts):
            notice(
                f"{self.name}: {np.count_nonzero(counts)} of {len(rows)} rows have captions ({sum(counts)} captions)"
            )
        chosen = np.arange(len(rows))
        if self.split != "all":
            if self.streaming:
                notice(f"{self.name}: rows are streamed, so no search for copies of an image in two splits is done")
            ids = [row["id"] for row in rows]
            firsts = by_key(ids, digests)
            splits = assigned(self.name, ids, names, self.val_fraction, self.test_fraction, firsts)
            copies = elsewhere(self.name, splits, firsts)
            rows = [{**row, "copy_in": copy} for row, copy in zip(rows, copies, strict=True)] if any(copies) else rows
            chosen = np.flatnonzero(np.array(splits) == self.split)
        kept = chosen[thinned(len(chosen), self.limit)]
        table = pd.DataFrame([rows[row] for row in kept], columns=None if len(kept) else ["id", "scene", "caption"])
        return np.array(positions, dtype=np.int64).reshape(-1, 2)[kept], table

    def _split_name(self, record: dict, part: str) -> str:
        """Name of the split of a row: from the row if the data set has one part, else the name of its part."""
        named = record.get("split") if len(self._parts) == 1 else None
        return named if isinstance(named, str) and split_of(named) else part

    def _metadata(self, record: dict, features: Any) -> tuple[dict[str, Any], int]:
        """Scene, caption and metadata of a row, and the number of captions in the row."""
        column = self._columns["scene"]
        value = record.get(column) if column else None
        feature = features.get(column) if features and value is not None else None
        names = getattr(getattr(feature, "feature", feature), "names", None)  # of a label or of a list of labels
        own = [self.caption_column] if self.caption_column else [name for name in CAPTION_KEYS if name in record]
        scene = row_scene({**record, "scene": value}, names or self._class_names, ("scene",))
        row = {"captions": next((texts for name in own if (texts := own_captions({"text": record[name]}))), None)}
        known = {key: value for key, value in scalars(record).items() if key not in (column, *own)}
        labels = label_list(record, names or self._class_names)
        return {**known, "scene": scene, **caption_metadata(row, scene, labels)}, len(own_captions(row))

    def _stream(self, positions: np.ndarray) -> Iterator[np.ndarray | Sample | str]:
        for record in self._stream_records(positions):
            yield _decode(record, self._pair, self._decoding)

    def _stream_records(self, positions: np.ndarray) -> Iterator[dict]:
        """Rows of a stream in ascending order; a chunk that follows the previous one continues the same stream."""
        parts = list(self._parts.values())
        state = self.__dict__.get("_position")
        if state is None:
            state = self.__dict__["_position"] = {}
            weakref.finalize(self, _close, state)  # otherwise the stream would be closed too late at exit
        for number, row in positions.tolist():
            if state.get("part") != number or state["row"] > row:
                _close(state)
                state.update(part=number, row=0, rows=iter(parts[number]))
            while state["row"] <= row:
                record = next(state["rows"])
                state["row"] += 1
            yield record


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _load(path: str, config: str | None, streaming: bool) -> Any:
    import datasets

    folder = Path(path).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(folder))
    else:
        files = _files(folder)
        if files:
            kind = "parquet" if files[0].endswith(".parquet") else "arrow"
            loaded = datasets.load_dataset(kind, data_files=files, streaming=streaming)
        else:
            loaded = datasets.load_dataset(path, config, streaming=streaming)
    if not isinstance(loaded, dict):
        loaded = {str(loaded.split or "train"): loaded}
    return {name: _undecoded(part) for name, part in loaded.items()}


def _files(folder: Path) -> list[str]:
    """Parquet or Arrow files in a folder or of a pattern, or the named file itself."""
    if folder.is_dir():
        result = sorted(str(path) for path in folder.rglob("*.parquet")) or sorted(map(str, folder.rglob("*.arrow")))
    else:
        result = [str(folder)] if folder.exists() else sorted(glob.glob(str(folder)))
    return [path for path in result if path.endswith((".parquet", ".arrow"))]


def _close(state: dict[str, Any]) -> None:
    if "rows" in state:
        state.pop("rows").close()


def _stamps(part: Any, columns: tuple[str, str | None]) -> Iterator[tuple[dict[str, str], bytes | None]]:
    """Yield a digest of the bytes of each image and its mask, and one of the image alone; None if it has no bytes."""
    image, mask = columns
    for record in part.select_columns([name for name in columns if name]):
        data = _bytes(record[image])
        digest = hashlib.blake2b(b"" if isinstance(data, str) else data, digest_size=8)
        own = None if isinstance(data, str) else digest.digest()
        if mask and not isinstance(more := _bytes(record[mask]), str):
            digest.update(more)
        yield {"stamp": "" if isinstance(data, str) else digest.hexdigest()}, own


def _shown(stamp: dict[str, str], survey: Survey) -> dict[str, str]:
    return {name: value and value + survey.stamp for name, value in stamp.items()}


def _undecoded(part: Any) -> Any:
    import datasets

    for name, feature in (part.features or {}).items():
        if isinstance(feature, datasets.Image):
            part = part.cast_column(name, datasets.Image(decode=False))
    return part


def _read_rows(
    parts: dict[str, Any], positions: list[tuple[str, int]], columns: tuple[str, str | None], decoding: Decoding
) -> Iterator[np.ndarray | Sample | str]:
    for name, row in positions:
        yield _decode(parts[name][row], columns, decoding)


def _decode(record: dict, columns: tuple[str, str | None], decoding: Decoding) -> np.ndarray | Sample | str:
    mask = _bytes(record[columns[1]]) if columns[1] else MISSING
    return decoding(_bytes(record[columns[0]]), MISSING if isinstance(mask, str) else mask)


def _bytes(value: Any) -> bytes | str:
    """The bytes of an image, stored by `datasets` as {bytes, path} or directly; or the reason why there are none."""
    data = value
    if isinstance(value, dict):
        data = value.get("bytes")
        if data is None and value.get("path"):
            return read_bytes(value["path"])
    if isinstance(value, str):
        return read_bytes(value)
    return data if isinstance(data, bytes) and data else EMPTY


def _suffix(data: bytes) -> str:
    """Suffix for the format of the bytes; for an unknown format, the suffix of TIFF."""
    return honest_suffix(data, ".tif")
