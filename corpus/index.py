"""The index stage: convert any source into one manifest, one image array and, if it has masks, one mask array."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from corpus.decoding import NO_PERMISSION, UNREACHABLE, UNREADABLE_FILE, VANISHED
from corpus.masks import Sample
from corpus.quarantine import QUARANTINE, announce, announce_masks, quarantined
from runtime.artefacts import (
    COMPLETE,
    fingerprint,
    may_build,
    plain,
    process_count,
    read_json,
    stage,
    stage_fingerprint,
    write_json,
)
from runtime.cost import StageLog
from runtime.engine import Done, Step, engine
from runtime.errors import UserError
from runtime.notices import notice
from runtime.parallel import cores
from runtime.progress import progress
from runtime.quiet import native_stderr_closed
from runtime.versions import versions_of

#: Folder inside a corpus stage for the results of its scans.
SCANNED = "scanned"
#: Number of images that are decoded, scanned and recorded as done together.
CHUNK = 256
#: Reasons for unreadable images that may disappear at the next attempt, even if the bytes are the same.
PASSING = (VANISHED, NO_PERMISSION, UNREADABLE_FILE, UNREACHABLE)
#: How often an unchanged source is indexed again because some images could not be reached.
AGAIN = 3
#: Number of rows per row group of the manifest's Parquet file.
ROW_GROUP = 65_536
#: Number of chunks per worker from which starting worker processes saves time.
CHUNKS_PER_WORKER = 2


#: A callable that reads some images in order. It yields uint8 [R, R, 3], or a `Sample` if the source has masks, or the
#: reason why an image is unreadable.
Reader = Callable[[], Iterable["np.ndarray | Sample | str"]]


class Source(Protocol):
    """Interface of a corpus source; see `corpus.sources.bluemarble` and `corpus.sources.folder` for examples.

    A source that reads its masks from files has an attribute `mask_rule` (`corpus.masks.MaskRule`); the number of
    matched masks is then reported. A source of rasters has an attribute `survey` (`corpus.raster.Survey`), whose notes
    are reported.

    Attributes:
        workers: number of decoding processes; None: one per core; 1: decode in the calling process, so that a reader
            need not be picklable.
    """

    name: str
    resolution: int
    workers: int | None

    @property
    def version(self) -> Any:
        """Everything that the pixels depend on besides the fields of the source, as a JSON-compatible value."""

    @property
    def mask_classes(self) -> tuple[str, ...]:
        """Names of the mask values; empty if there are no masks."""

    def manifest(self) -> pd.DataFrame:
        """Table with one row per image and at least the columns id, scene ("": unknown) and caption ("": none).

        An optional column `stamp` changes with the bytes of an image; the next index then reuses unchanged images. An
        optional column `ground` names the location of an image; images with different values share no ground, unless
        one of the values is "".
        """

    def reader(self, rows: np.ndarray) -> Reader:
        """A callable that reads some rows of the manifest, ascending; it may run in a worker process."""


@dataclass(frozen=True)
class Corpus:
    """An indexed corpus, opened from its stage directory.

    Attributes:
        images: uint8 [N, R, R, 3], memory-mapped; zeros where unreadable.
        manifest: table of N rows with id, scene, caption, readable, reason and further columns of the source.
        masks: uint8 [N, R, R], memory-mapped, or None.
        mask_classes: names of the mask values.
        metadata: metadata of the source as a whole, for the summary.
        captions: fingerprint of the captions in the manifest, if they do not come from the source.
    """

    name: str
    directory: Path
    images: np.ndarray
    manifest: pd.DataFrame
    masks: np.ndarray | None
    mask_classes: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    captions: str = ""

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
    """A computation on every image that runs while images are decoded; `scanned` finds the result.

    Attributes:
        key: name of the result.
        compute: function (uint8 [B, R, R, 3]) -> [B, ...], called in corpus order.
        batch_size: images per call; the last call of a chunk may have fewer.
        dtype, shape: type and shape of the result for one image.
        by_worker: compute in the worker that decodes the image, so that `compute` must be picklable; otherwise in the
            calling process.
    """

    key: str
    compute: Callable[[np.ndarray], np.ndarray]
    batch_size: int
    dtype: type
    shape: tuple[int, ...] = ()
    by_worker: bool = False


def index_corpus(source: Source, runs: Path | str, scans: Sequence[Scan] = ()) -> Corpus:
    """Decode a source once into `runs/corpus/<fingerprint>/`, or open the existing index.

    The `scans` run in the same pass, while the next images are decoded; an existing index is not scanned. An
    interrupted pass continues after its last finished chunk. If an earlier version of the source was indexed, only new
    and changed images are decoded and scanned. One line on stderr reports how many images are quarantined, and why; it
    is printed for an existing index as well.

    Raises:
        UserError: no image can be read.
    """
    inputs = _looked_again({"source": source, "version": source.version}, Path(runs))
    build = lambda directory: _build(source, Path(runs), directory, scans)  # noqa: E731
    corpus = open_corpus(stage(runs, "corpus", inputs, build, resumable=True))
    for note in getattr(source, "network_notes", ()):
        notice(f"{source.name}: {note}")
    for note in getattr(getattr(source, "survey", None), "notes", ()):
        notice(f"{source.name}: {note}")
    if getattr(source, "mask_rule", None):
        announce_masks(corpus.manifest, _name(source))
    announce(corpus.manifest, _name(source), corpus.directory)
    return corpus


def _looked_again(inputs: dict[str, Any], runs: Path) -> dict[str, Any]:
    """The inputs of the index of a source, changed if an existing index has images that could not be reached.

    The source is the same when the network is available again, so with an unchanged fingerprint these images would
    never be read. The processes of one launch must agree on the index, so they use the existing one.
    """
    directory = lambda inputs: runs / "corpus" / stage_fingerprint("corpus", inputs)  # noqa: E731
    for _ in range(AGAIN):
        result = directory(inputs)
        if not (result / COMPLETE).is_file() or UNREACHABLE not in set(pd.read_parquet(result / QUARANTINE)["reason"]):
            break
        further = {**inputs, "after": result.name}
        if not (may_build() and process_count() == 1) and not (directory(further) / COMPLETE).is_file():
            break
        inputs = further
    return inputs


def _name(source: Source) -> str:
    """Name of a source and of its split, if it has one, for messages on stderr."""
    split = getattr(source, "split", "all")
    return source.name if split == "all" else f"{source.name} ({split})"


def image_file(corpus: Corpus) -> ArrayFile:
    """The file of the images of a corpus, which workers on this machine can read."""
    path = corpus.directory / "images.npy"
    return ArrayFile(path, np.load(path, mmap_mode="r").shape, np.uint8)


def over_images(corpus: Corpus, groups: Iterable[np.ndarray], scan: Scan) -> Iterator[Done]:
    """Run a scan on groups of images of an indexed corpus; yields (rows, results [K, ...]) and their cost, in order."""
    read = partial(_taken, corpus.images) if engine().shares_files else partial(_read, image_file(corpus))
    steps = [Step(read, home=True), Step(partial(_values, scan), network=not scan.by_worker)]
    return engine().run(steps, groups, workers=0)


def _taken(images: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows, np.asarray(images[rows])


def _read(images: ArrayFile, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows, images.read(rows)


def _values(scan: Scan, part: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    rows, images = part
    return rows, _scan(scan, images, np.ones(len(rows), bool))


def scanned(corpus: Corpus, key: str) -> Path | None:
    """File with the results of the `Scan` of this key, zeros where unreadable; None if the scan did not run."""
    path = corpus.directory / SCANNED / f"{key}.npy"
    return path if path.is_file() else None


def open_corpus(directory: Path) -> Corpus:
    """Open the directory of an index stage."""
    metadata = read_json(directory / "corpus.json")
    masks = directory / "masks.npy"
    return Corpus(
        name=metadata["name"],
        directory=directory,
        images=np.load(directory / "images.npy", mmap_mode="r"),
        manifest=pd.read_parquet(directory / "manifest.parquet"),
        masks=np.load(masks, mmap_mode="r") if masks.exists() else None,
        mask_classes=tuple(metadata["mask_classes"]),
        metadata=metadata.get("metadata", {}),  # absent from an older index
    )


@dataclass(frozen=True)
class ArrayFile:
    """An .npy file that is written and read in parts, without a memory map.

    The pages of a memory map would count as memory of the process, and a full disk would kill the process instead of
    raising an OSError.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: Any

    def create(self) -> None:
        """Create the file filled with zeros, which take no disk space yet."""
        self.path.parent.mkdir(exist_ok=True)
        np.lib.format.open_memmap(self.path, mode="w+", dtype=self.dtype, shape=self.shape)

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write values [K, ...] to rows [K], ascending."""
        values = np.ascontiguousarray(values, dtype=self.dtype)
        with open(self.path, "r+b", buffering=0) as file:
            for part in _runs(rows):
                file.seek(self._offset(rows[part.start]))
                data = memoryview(values[part]).cast("B")
                while len(data):  # a write may be incomplete, for example just before the disk is full
                    data = data[file.write(data) :]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The values [K, ...] at ascending rows [K].

        Raises:
            UserError: the file ends before the last of them.
        """
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            for part in _runs(rows):
                file.seek(self._offset(rows[part.start]))
                data = memoryview(values[part]).cast("B")
                while len(data):  # one call reads at most 2 GiB
                    count = file.readinto(data)
                    if not count:
                        raise UserError(
                            f"{self.path} is truncated: remove {self.path.parent} and run the same command again"
                        )
                    data = data[count:]
        return values

    def _offset(self, row: int) -> int:
        whole = int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize
        return self.path.stat().st_size - whole + int(row) * (whole // max(1, self.shape[0]))


def _runs(rows: np.ndarray) -> Iterator[slice]:
    """Slices of positions whose rows are consecutive numbers."""
    edges = np.flatnonzero(np.diff(rows) != 1) + 1
    for start, stop in zip([0, *edges], [*edges, len(rows)], strict=True):
        if stop > start:
            yield slice(start, stop)


@dataclass(frozen=True)
class _Files:
    """The arrays of a corpus while it is built."""

    images: ArrayFile
    masks: ArrayFile | None
    scans: dict[str, ArrayFile]

    @classmethod
    def of(cls, directory: Path, count: int, source: Source, scans: Sequence[Scan]) -> _Files:
        size = source.resolution
        masks = ArrayFile(directory / "masks.npy", (count, size, size), np.uint8) if source.mask_classes else None
        return cls(
            images=ArrayFile(directory / "images.npy", (count, size, size, 3), np.uint8),
            masks=masks,
            scans={
                scan.key: ArrayFile(directory / SCANNED / f"{scan.key}.npy", (count, *scan.shape), scan.dtype)
                for scan in scans
            },
        )

    def create(self) -> None:
        for file in (self.images, self.masks, *self.scans.values()):
            if file is not None:
                file.create()

    def write(self, decoded: Decoded) -> None:
        """Write the pixels, masks and scan results of a chunk, as far as the chunk has them."""
        if decoded.images is not None:
            self.images.write(decoded.rows, decoded.images)
        if self.masks is not None and decoded.masks is not None:
            self.masks.write(decoded.rows, decoded.masks)
        for key, values in decoded.scans.items():
            self.scans[key].write(decoded.rows, values)


@dataclass(frozen=True)
class Work:
    """Some images to read: ascending rows of a manifest, int64, and the reader for them."""

    reader: Reader
    rows: np.ndarray


@dataclass(frozen=True)
class Decoded:
    """Results for a chunk of K images.

    Attributes:
        rows: int64 [K], rows of the manifest.
        problems: reason for each row that has no image.
        images: uint8 [K, R, R, 3], zeros where there is no image; None: they are already in the corpus's file.
        masks: uint8 [K, R, R], or None.
        scans: results of the scans by key, [K, ...].
    """

    rows: np.ndarray
    problems: dict[int, str]
    images: np.ndarray | None
    masks: np.ndarray | None
    scans: dict[str, np.ndarray]

    @property
    def readable(self) -> np.ndarray:
        """bool [K]."""
        return ~np.isin(self.rows, list(self.problems))


def decode(size: int, masked: bool, scans: Sequence[Scan], work: Work) -> Decoded:
    """Read some images at a resolution, and compute the scans that need no network."""
    images = np.zeros((len(work.rows), size, size, 3), np.uint8)
    masks = np.zeros((len(work.rows), size, size), np.uint8) if masked else None
    problems = {}
    with native_stderr_closed():
        for position, sample in enumerate(work.reader()):
            if isinstance(sample, str):
                problems[int(work.rows[position])] = sample
            elif isinstance(sample, Sample):
                images[position], masks[position] = sample
            else:
                images[position] = sample
    decoded = Decoded(work.rows, problems, images, masks, {})
    return replace(decoded, scans={scan.key: _scan(scan, images, decoded.readable) for scan in scans})


def _stored(files: _Files, decoded: Decoded) -> Decoded:
    """Write a chunk in a worker that can reach the run directory; returns the chunk without the written arrays."""
    files.write(decoded)
    return replace(decoded, images=None, masks=None, scans={})


def _scanned(scans: Sequence[Scan], files: _Files | None, decoded: Decoded) -> Decoded:
    """Compute the scans of a chunk; its images are in the chunk or in `files`."""
    images = files.images.read(decoded.rows) if decoded.images is None else decoded.images
    result = {scan.key: _scan(scan, images, decoded.readable) for scan in scans}
    return replace(decoded, scans={**decoded.scans, **result})


def _scan(scan: Scan, images: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """Run a scan on some images batch by batch; zeros where there is no image."""
    values = np.zeros((len(images), *scan.shape), scan.dtype)
    for start in range(0, len(images), scan.batch_size):
        part = slice(start, start + scan.batch_size)
        values[part] = scan.compute(images[part])
    values[~readable] = 0
    return values


def _steps(files: _Files, source: Source, scans: Sequence[Scan], shares_files: bool) -> list[Step]:
    """Steps of the index: decode, store in workers that share files, and scan by networks."""
    by_worker = tuple(scan for scan in scans if scan.by_worker)
    networks = tuple(scan for scan in scans if not scan.by_worker)
    steps = [Step(partial(decode, source.resolution, bool(source.mask_classes), by_worker))]
    if shares_files:
        steps.append(Step(partial(_stored, files)))
    if networks:
        steps.append(Step(partial(_scanned, networks, files if shares_files else None), network=True))
    return steps


def _build(source: Source, runs: Path, directory: Path, scans: Sequence[Scan]) -> None:
    manifest = _checked_manifest(source)
    count = len(manifest)
    previous, origin = _earlier(source, runs, manifest)
    if previous is not None:  # scans that did not run then are left to later stages, which process all images
        scans = [scan for scan in scans if scanned(previous, scan.key) is not None]
    files, state = _Files.of(directory, count, source, scans), directory / "progress.json"
    noted = directory / "reasons.jsonl"
    plan = {"count": count, "scans": sorted(files.scans), "previous": previous and previous.fingerprint}
    before = read_json(state) if state.exists() else {}
    done = before["done"] if {key: before.get(key) for key in plan} == plan else 0
    todo = np.flatnonzero(origin < 0)
    if not done:
        state.unlink(missing_ok=True)  # the state may refer to arrays that are now replaced
        files.create()
        noted.touch()
        if previous is not None:
            _copy(previous, files, np.flatnonzero(origin >= 0), origin)
        write_json(state, {**plan, "done": 0, "noted": 0})
    os.truncate(noted, read_json(state)["noted"])  # a killed run may have written half a line

    chunks = [todo[start : start + CHUNK] for start in range(done, len(todo), CHUNK)]
    workers = min(cores() if source.workers is None else source.workers, len(chunks) // CHUNKS_PER_WORKER)
    steps = _steps(files, source, scans, engine().shares_files)
    work = (Work(source.reader(rows), rows) for rows in chunks)
    ledger = StageLog(directory, "corpus", _name(source))
    bar = progress(range(len(todo)), f"index {source.name}", total=len(todo), initial=done)
    with bar, noted.open("a", encoding="ascii") as log:
        for part in engine().run(steps, work, workers):
            decoded = part.value
            files.write(decoded)
            log.write(json.dumps(decoded.problems) + "\n")
            log.flush()
            done += len(decoded.rows)
            ledger.add(part, decoded.rows, len(decoded.problems), _shards(source, decoded.rows))
            write_json(state, {**plan, "done": done, "noted": log.tell()})
            bar.update(len(decoded.rows))
    ledger.close()

    _write_tables(directory, source, manifest, _reasons(noted, previous, origin))
    state.unlink()  # removed first: a killed run with this file needs the reasons, one without it starts again
    noted.unlink()


def _write_tables(directory: Path, source: Source, manifest: pd.DataFrame, reasons: np.ndarray) -> None:
    """Write the manifest with the reasons of unreadable images, the quarantine table, and the file about the corpus."""
    manifest["readable"] = reasons == ""
    manifest["reason"] = reasons
    manifest.to_parquet(directory / "manifest.parquet", index=False, row_group_size=ROW_GROUP)
    quarantined(manifest).to_parquet(directory / QUARANTINE, index=False)
    about = {
        "name": source.name,
        "mask_classes": list(source.mask_classes),
        "metadata": getattr(source, "metadata", {}),
    }
    write_json(directory / "corpus.json", about)


def _shards(source: Source, rows: np.ndarray) -> list[str]:
    """The shards that hold some rows, for a source that has shards."""
    return source.shards_of(rows) if hasattr(source, "shards_of") else []


def _checked_manifest(source: Source) -> pd.DataFrame:
    """The manifest of a source, checked.

    Raises:
        UserError: there are no images, or two images have the same id.
    """
    manifest = _storable(source.manifest())
    if manifest.empty:
        split = getattr(source, "split", "all")
        if split != "all":
            raise UserError(
                f"corpus {source.name} has no images in its split {split}: choose a corpus with this split, or use "
                f"all of its images with corpus.{split}.split=all"
            )
        raise UserError(f"corpus {source.name} has no images: check its root and its limit")
    if not manifest["id"].is_unique:
        twice = manifest.loc[manifest["id"].duplicated(), "id"].iloc[0]
        raise UserError(f"corpus {source.name} has the id {twice!r} twice: ids must be unique")
    return manifest


def _reasons(noted: Path, previous: Corpus | None, origin: np.ndarray) -> np.ndarray:
    """Reason why each image is unreadable, object [N], "" if it is readable; from this run or an earlier corpus."""
    reasons = np.full(len(origin), "", dtype=object)
    if previous is not None:
        reasons[origin >= 0] = previous.manifest["reason"].to_numpy()[origin[origin >= 0]]
    for line in noted.read_text(encoding="ascii").splitlines():
        for row, reason in json.loads(line).items():
            reasons[int(row)] = reason
    return reasons


def _storable(manifest: pd.DataFrame) -> pd.DataFrame:
    """Convert columns that mix numbers and texts into texts, because a Parquet column has a single type."""
    for name in manifest.select_dtypes("object"):
        kinds = {type(value) for value in manifest[name] if not (isinstance(value, float) and value != value)}
        if len(kinds) > 1:
            manifest[name] = manifest[name].map(str, na_action="ignore")
    return manifest


def indexes_of(source: Any, runs: Path | str) -> Iterator[Corpus]:
    """Indexes of earlier versions of a source (given as JSON) that this version of the code made, the newest first."""
    stages = sorted((Path(runs) / "corpus").glob(f"*/{COMPLETE}"), key=lambda path: -path.stat().st_mtime_ns)
    for path in stages:
        metadata = read_json(path)
        if metadata["inputs"]["source"] == source and metadata.get("version") == versions_of("corpus")["corpus"]:
            corpus = open_corpus(path.parent)
            if "stamp" in corpus.manifest:
                yield corpus


def rows_in(previous: Corpus, manifest: pd.DataFrame) -> np.ndarray:
    """Row of each image in an earlier index, int64, or -1; images with equal id and `stamp` are the same."""
    before = pd.MultiIndex.from_frame(previous.manifest[["id", "stamp"]])
    origin = before.get_indexer(pd.MultiIndex.from_frame(manifest[["id", "stamp"]]))
    again = previous.manifest["reason"].isin(PASSING).to_numpy()[origin]
    return np.where(again | (manifest["stamp"] == "").to_numpy(), -1, origin)


def _earlier(source: Source, runs: Path, manifest: pd.DataFrame) -> tuple[Corpus | None, np.ndarray]:
    """The newest earlier index of the same source, and the row of each image in it, or -1."""
    previous = next(indexes_of(plain(source), runs), None) if "stamp" in manifest else None
    return previous, np.full(len(manifest), -1) if previous is None else rows_in(previous, manifest)


def _copy(previous: Corpus, files: _Files, rows: np.ndarray, origin: np.ndarray) -> None:
    """Copy the images, masks and scan results of rows that an earlier corpus has."""
    scans = {key: np.load(scanned(previous, key), mmap_mode="r") for key in files.scans}
    for start in progress(range(0, len(rows), CHUNK), "copy unchanged images", unit="chunk"):
        part = rows[start : start + CHUNK]
        files.images.write(part, previous.images[origin[part]])
        if files.masks is not None:
            files.masks.write(part, previous.masks[origin[part]])
        for key, values in scans.items():
            files.scans[key].write(part, values[origin[part]])


def subset_fingerprint(corpus: Corpus, rows: np.ndarray) -> str:
    """Fingerprint of some rows of a corpus, in this order."""
    return fingerprint(corpus=corpus.fingerprint, rows=np.asarray(rows).tolist())
