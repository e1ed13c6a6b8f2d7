"""The index stage: any source becomes one manifest, one image array and, where there are any, one mask array."""

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

#: Folder of a corpus stage with the results of its scans.
SCANNED = "scanned"
#: Images that are decoded, scanned and noted as done together.
CHUNK = 256
#: Reasons that may be gone when one looks again, though the bytes are the same.
PASSING = (VANISHED, NO_PERMISSION, UNREADABLE_FILE, UNREACHABLE)
#: How often a source that has not changed is indexed anew because some images could not be reached.
AGAIN = 3
#: Rows of the manifest that are written together.
ROW_GROUP = 65_536
#: Chunks per worker from which worker processes are worth their start.
CHUNKS_PER_WORKER = 2


#: Reads some images in turn: uint8 [R, R, 3], or a `Sample` where the source has masks, or the reason why one cannot
#: be read.
Reader = Callable[[], Iterable["np.ndarray | Sample | str"]]


class Source(Protocol):
    """What a corpus must offer; see `corpus.sources.bluemarble` and `corpus.sources.folder`.

    One that reads its masks from files has a `mask_rule`, a `corpus.masks.MaskRule`; how many matched is then reported.
    One that shows rasters has a `survey`, a `corpus.raster.Survey`, whose notes are reported.

    Attributes:
        workers: processes that decode; None: one a core; 1: in this process, and a reader need not be picklable.
    """

    name: str
    resolution: int
    workers: int | None

    @property
    def version(self) -> Any:
        """What the pixels depend on beyond the source's own fields, JSON-ready."""

    @property
    def mask_classes(self) -> tuple[str, ...]:
        """Names of the mask values; empty where there are no masks."""

    def manifest(self) -> pd.DataFrame:
        """One row an image, with at least id, scene ("" unknown) and caption ("" none).

        A column `stamp` that changes with an image's bytes lets the next index take over what has not changed.
        A column `ground` says which images share no ground: those with different values, where neither is "".
        """

    def reader(self, rows: np.ndarray) -> Reader:
        """Work that reads some rows of the manifest, ascending; a worker process may do it."""


@dataclass(frozen=True)
class Corpus:
    """An indexed corpus, opened from its stage directory.

    Attributes:
        images: uint8 [N, R, R, 3], memory-mapped; zeros where unreadable.
        manifest: N rows with id, scene, caption, readable, reason and the source's own columns.
        masks: uint8 [N, R, R], memory-mapped, or None.
        mask_classes: names of the mask values.
        metadata: what the source says about itself, for the summary.
        captions: fingerprint of the captions in the manifest where they are not the source's own.
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
    """What is computed of every image while it is decoded; `scanned` finds the result.

    Attributes:
        key: names the result.
        compute: (uint8 [B, R, R, 3]) -> [B, ...], called in corpus order.
        batch_size: images a call, the last of a chunk excepted.
        dtype, shape: of one image's result.
        by_worker: compute where the image is decoded, so it must be picklable; otherwise here.
    """

    key: str
    compute: Callable[[np.ndarray], np.ndarray]
    batch_size: int
    dtype: type
    shape: tuple[int, ...] = ()
    by_worker: bool = False


def index_corpus(source: Source, runs: Path | str, scans: Sequence[Scan] = ()) -> Corpus:
    """Decode a source once into `runs/corpus/<fingerprint>/`, or open what is there.

    `scans` run in the same pass, while the next images are decoded; a corpus that is there already is not scanned.
    A killed pass goes on from its last finished chunk. Where the source was indexed before and some of its images came,
    went or changed since, only the new and changed ones are decoded and scanned. How many images are quarantined, and
    why, is one line on stderr, also where the index was there already.

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
    """The inputs of the index of a source, which differ from those of one in which images could not be reached.

    The source is the same when the network is back, so that its fingerprint alone would never look at them again. The
    processes of a launch must agree, and so take what is there.
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
    """The source's name and, where it has one, its split: what a message on stderr calls it."""
    split = getattr(source, "split", "all")
    return source.name if split == "all" else f"{source.name} ({split})"


def image_file(corpus: Corpus) -> ArrayFile:
    """The file of a corpus's images, which a worker on this machine can read."""
    path = corpus.directory / "images.npy"
    return ArrayFile(path, np.load(path, mmap_mode="r").shape, np.uint8)


def over_images(corpus: Corpus, groups: Iterable[np.ndarray], scan: Scan) -> Iterator[Done]:
    """A scan of groups of images of an indexed corpus, in order: (rows, [K, ...]) with what it cost."""
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
    """The array that a `Scan` of this key left, zeros where unreadable, or None where it did not run."""
    path = corpus.directory / SCANNED / f"{key}.npy"
    return path if path.is_file() else None


def open_corpus(directory: Path) -> Corpus:
    """Open an index stage's directory."""
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
    """An .npy file that is written and read piece by piece, without mapping it.

    Mapped pages would count as this process's memory, and a full disk would kill it instead of raising an OSError.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: Any

    def create(self) -> None:
        """The file with zeros, which take no space yet."""
        self.path.parent.mkdir(exist_ok=True)
        np.lib.format.open_memmap(self.path, mode="w+", dtype=self.dtype, shape=self.shape)

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Put values [K, ...] at ascending rows [K]."""
        values = np.ascontiguousarray(values, dtype=self.dtype)
        with open(self.path, "r+b", buffering=0) as file:
            for part in _runs(rows):
                file.seek(self._offset(rows[part.start]))
                data = memoryview(values[part]).cast("B")
                while len(data):  # a write may stop halfway, on a full disk just before the error
                    data = data[file.write(data) :]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The values [K, ...] at ascending rows [K].

        Raises:
            UserError: the file ends before they do.
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
                            f"{self.path} was cut short: remove {self.path.parent}, run the same command again"
                        )
                    data = data[count:]
        return values

    def _offset(self, row: int) -> int:
        whole = int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize
        return self.path.stat().st_size - whole + int(row) * (whole // max(1, self.shape[0]))


def _runs(rows: np.ndarray) -> Iterator[slice]:
    """Positions of runs of neighbouring rows."""
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
        """Put what is known of a chunk in its place: pixels, masks and scans, as far as it holds them."""
        if decoded.images is not None:
            self.images.write(decoded.rows, decoded.images)
        if self.masks is not None and decoded.masks is not None:
            self.masks.write(decoded.rows, decoded.masks)
        for key, values in decoded.scans.items():
            self.scans[key].write(decoded.rows, values)


@dataclass(frozen=True)
class Work:
    """Some images to read: a part of a manifest, int64 rows, ascending, and what reads them."""

    reader: Reader
    rows: np.ndarray


@dataclass(frozen=True)
class Decoded:
    """What is known of a chunk of images.

    Attributes:
        rows: int64 [K] of the manifest.
        problems: why a row has no image.
        images: uint8 [K, R, R, 3], zeros where there is none; None: they are in the corpus's file already.
        masks: uint8 [K, R, R], or None.
        scans: results of scans by their keys, [K, ...].
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
    """Write a chunk where the run directory is at hand; what goes on is the rest of it."""
    files.write(decoded)
    return replace(decoded, images=None, masks=None, scans={})


def _scanned(scans: Sequence[Scan], files: _Files | None, decoded: Decoded) -> Decoded:
    """Compute scans of a chunk, whose images are with it or in `files`."""
    images = files.images.read(decoded.rows) if decoded.images is None else decoded.images
    result = {scan.key: _scan(scan, images, decoded.readable) for scan in scans}
    return replace(decoded, scans={**decoded.scans, **result})


def _scan(scan: Scan, images: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """A scan of some images batch by batch, zeros where there is no image."""
    values = np.zeros((len(images), *scan.shape), scan.dtype)
    for start in range(0, len(images), scan.batch_size):
        part = slice(start, start + scan.batch_size)
        values[part] = scan.compute(images[part])
    values[~readable] = 0
    return values


def _steps(files: _Files, source: Source, scans: Sequence[Scan], shares_files: bool) -> list[Step]:
    """Of the index: decode, store where workers can, and scan by networks."""
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
    if previous is not None:  # what was not scanned then is left to the stages that need it: they take all images
        scans = [scan for scan in scans if scanned(previous, scan.key) is not None]
    files, state = _Files.of(directory, count, source, scans), directory / "progress.json"
    noted = directory / "reasons.jsonl"
    plan = {"count": count, "scans": sorted(files.scans), "previous": previous and previous.fingerprint}
    before = read_json(state) if state.exists() else {}
    done = before["done"] if {key: before.get(key) for key in plan} == plan else 0
    todo = np.flatnonzero(origin < 0)
    if not done:
        state.unlink(missing_ok=True)  # it may speak of arrays that are gone in a moment
        files.create()
        noted.touch()
        if previous is not None:
            _copy(previous, files, np.flatnonzero(origin >= 0), origin)
        write_json(state, {**plan, "done": 0, "noted": 0})
    os.truncate(noted, read_json(state)["noted"])  # a killed run may have noted half a line more

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

    reasons = _reasons(noted, previous, origin)
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
    state.unlink()  # first: without it a killed run starts anew, with it the reasons must be there
    noted.unlink()


def _shards(source: Source, rows: np.ndarray) -> list[str]:
    """The shards that some rows lie in, of a source that has shards."""
    return source.shards_of(rows) if hasattr(source, "shards_of") else []


def _checked_manifest(source: Source) -> pd.DataFrame:
    """
    Raises:
        UserError: there are no images, or two of one id.
    """
    manifest = _storable(source.manifest())
    if manifest.empty:
        split = getattr(source, "split", "all")
        if split != "all":
            raise UserError(
                f"corpus {source.name} has no images in its split {split}: give a corpus that has, or take "
                f"corpus.{split}.split=all, which is every image whatever its split"
            )
        raise UserError(f"corpus {source.name} has no images: check its root and its limit")
    if not manifest["id"].is_unique:
        twice = manifest.loc[manifest["id"].duplicated(), "id"].iloc[0]
        raise UserError(f"corpus {source.name} has the id {twice!r} twice: ids must be unique")
    return manifest


def _reasons(noted: Path, previous: Corpus | None, origin: np.ndarray) -> np.ndarray:
    """Why each image cannot be read, object [N], "" if it can: as noted now, or taken over from an earlier corpus."""
    reasons = np.full(len(origin), "", dtype=object)
    if previous is not None:
        reasons[origin >= 0] = previous.manifest["reason"].to_numpy()[origin[origin >= 0]]
    for line in noted.read_text(encoding="ascii").splitlines():
        for row, reason in json.loads(line).items():
            reasons[int(row)] = reason
    return reasons


def _storable(manifest: pd.DataFrame) -> pd.DataFrame:
    """A column of numbers here and texts there, as rows of many hands have, becomes texts: Parquet wants one kind."""
    for name in manifest.select_dtypes("object"):
        kinds = {type(value) for value in manifest[name] if not (isinstance(value, float) and value != value)}
        if len(kinds) > 1:
            manifest[name] = manifest[name].map(str, na_action="ignore")
    return manifest


def indexes_of(source: Any, runs: Path | str) -> Iterator[Corpus]:
    """What this code has indexed of a source (as JSON) from before files came, went or changed, the newest first."""
    stages = sorted((Path(runs) / "corpus").glob(f"*/{COMPLETE}"), key=lambda path: -path.stat().st_mtime_ns)
    for path in stages:
        metadata = read_json(path)
        if metadata["inputs"]["source"] == source and metadata.get("version") == versions_of("corpus")["corpus"]:
            corpus = open_corpus(path.parent)
            if "stamp" in corpus.manifest:
                yield corpus


def rows_in(previous: Corpus, manifest: pd.DataFrame) -> np.ndarray:
    """Each image's row in an earlier index, int64, or -1: an image is the same if its id and its `stamp` are."""
    before = pd.MultiIndex.from_frame(previous.manifest[["id", "stamp"]])
    origin = before.get_indexer(pd.MultiIndex.from_frame(manifest[["id", "stamp"]]))
    again = previous.manifest["reason"].isin(PASSING).to_numpy()[origin]
    return np.where(again | (manifest["stamp"] == "").to_numpy(), -1, origin)


def _earlier(source: Source, runs: Path, manifest: pd.DataFrame) -> tuple[Corpus | None, np.ndarray]:
    """The newest index of the same source, and each image's row there or -1."""
    previous = next(indexes_of(plain(source), runs), None) if "stamp" in manifest else None
    return previous, np.full(len(manifest), -1) if previous is None else rows_in(previous, manifest)


def _copy(previous: Corpus, files: _Files, rows: np.ndarray, origin: np.ndarray) -> None:
    """Take over the images, masks and scans of rows that an earlier corpus has."""
    scans = {key: np.load(scanned(previous, key), mmap_mode="r") for key in files.scans}
    for start in progress(range(0, len(rows), CHUNK), "take over", unit="chunk"):
        part = rows[start : start + CHUNK]
        files.images.write(part, previous.images[origin[part]])
        if files.masks is not None:
            files.masks.write(part, previous.masks[origin[part]])
        for key, values in scans.items():
            files.scans[key].write(part, values[origin[part]])


def subset_fingerprint(corpus: Corpus, rows: np.ndarray) -> str:
    """Fingerprint of some rows of a corpus, in this order."""
    return fingerprint(corpus=corpus.fingerprint, rows=np.asarray(rows).tolist())
