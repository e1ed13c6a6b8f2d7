"""Source for tar shards in the WebDataset convention, local or behind any URL that fsspec can open."""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import tarfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pandas as pd
from braceexpand import UnbalancedBracesError, braceexpand
from omegaconf import DictConfig, OmegaConf

from corpus.captions import (
    caption_metadata,
    chosen_classes,
    class_list,
    decoded,
    encodable,
    label_list,
    own_captions,
    row_scene,
    sample_captions,
    scalars,
    scene_name,
)
from corpus.copies import by_key, ends, firsts_of
from corpus.decoding import NO_PERMISSION, UNREACHABLE, UNREADABLE_FILE, VANISHED, survey_files
from corpus.masks import MISSING, PREFIX, MaskRule, Sample, mask_rule
from corpus.names import (
    CLASS_FILES,
    HEAD,
    SHALLOW,
    Group,
    counted,
    extra_suffixes,
    honest_suffix,
    member_kind,
    samples,
    suffix_of,
    unique_ids,
)
from corpus.raster import Survey, spread
from corpus.reading import Decoding, Shown
from corpus.remote import (
    AT_ONCE,
    HOW_TO_GIVE,
    Access,
    Cut,
    Refused,
    RemoteFile,
    Unreachable,
    as_file,
    files_below,
    is_folder,
    is_pattern,
    is_remote,
    metadata_of,
    new_tally,
    read_whole,
    repeated_since,
    stretches_of,
)
from corpus.splits import assigned, check, elsewhere, thinned
from runtime.artefacts import fingerprint, run_folder
from runtime.engine import LocalEngine, Step, engine
from runtime.errors import UserError
from runtime.notices import notice
from runtime.parallel import in_threads
from runtime.progress import progress
from runtime.redaction import public

CUT = "shard cut in the middle"
BROKEN = "not a tar shard"
DUPLICATE = "duplicate key"
UNSAFE = "unsafe member name"
LINK = "a link, not followed"
COMPRESSED = "compressed shard"
NO_IMAGE = "no image in the sample"
TOO_LARGE = "member above 1 GiB"
#: Largest size of a text member in bytes; larger ones are not captions.
LARGEST_TEXT = 2**20
#: Largest size of a member in bytes; a sparse member of a few bytes can claim any size.
LARGEST_MEMBER = 2**30
#: Largest number of zero bytes after the last member; writers fill archives up to their block size.
LONGEST_END = 2**22
#: Fewer local shards than this are scanned in the calling process.
FEW_SHARDS = 64
#: Number of consecutive unreachable images after which the network counts as down.
GONE = 3


@dataclass(frozen=True, slots=True)
class _Entry:
    """Position of a member in its shard, from its header to the header of the next member.

    Attributes:
        text: bytes of a short member that is not an image.
        digest: digest of the bytes, if digests are requested.
        kind: kind of the member, from `corpus.names.member_kind`.
        data: offset of its bytes.
        size: number of its bytes; 0: the bytes are not contiguous.
    """

    shard: str
    name: str
    start: int
    end: int
    text: bytes = field(default=b"", repr=False)
    digest: str = ""
    kind: str = ""
    data: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class _Item:
    """One sample, or a part of a shard that is no sample for the reason `problem`; `key` is unique in the shard."""

    id: str
    shard: str
    key: str = ""
    stamp: str = ""
    image: _Entry | None = None
    image_suffix: str = ""
    mask: _Entry | None = None
    mask_suffix: str = ""
    problem: str = ""
    captions: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WebDataset(Shown):
    """Samples of tar shards: the members with one key, anywhere in the shard (`corpus.names.samples`).

    A sample has an image (recognised by its last suffix or first bytes) and optionally captions (`txt`), metadata
    (`json`: id, caption or captions, scene, label, split, lon, lat, …), a class (`cls`) and a mask (`mask.png` or
    `seg.png`). The scene is taken from the metadata, else from `cls`, else it is the first folder of the key. The id is
    taken from the metadata, else it is the key; samples with equal ids get ids of shard and key. A first pass over the
    headers of the shards finds the position of every member; several processes then read the members. Nothing is
    unpacked to disk. Members that belong to no sample are counted on stderr.

    Args:
        urls: a path, a URL or a brace list such as "shards/{000..099}.tar", several joined by "::"; or a folder of
            .tar files, or a pattern with * or ?, local or behind a URL.
        split: "all", "train", "val" or "test": the split that the metadata of an image name, else one by a hash.
            `corpus.splits` has the names of splits and the rules for a split that the names leave out.
        resolution: side of the resulting images in pixels.
        val_fraction, test_fraction: fractions of the images that the hash holds out.
        limit: largest number of samples to keep, evenly spread (None: all).
        classes, mask_ignore, mask_values, mask_colours: meaning of the pixel values of masks
            (`corpus.masks.mask_rule`); without names of classes, masks are ignored.
        image_suffixes: further suffixes of images.
        class_names: names of scenes that are given as numbers: a list, or a file with a list; None:
            `corpus.names.CLASS_FILES` next to the first shard, if there is one.
        bands, no_data, stretch, low, high: options for rasters, as in `corpus.raster.RasterOptions`.
        content_hash: detect changed images by their bytes, which requires reading all of them, instead of by shard.
        workers: number of decoding processes (None: one per core); the result does not depend on it.
        retries, timeout, storage: access to shards behind URLs, as in `corpus.remote.Access`; they do not change any
            result, and the content of `storage` is not written anywhere.
    Raises:
        UserError: no shards are given, or a shard cannot be found or reached.
    """

    urls: str | None = None
    split: str = "all"
    resolution: int = 64
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    limit: int | None = None
    classes: tuple[str, ...] = ()
    image_suffixes: tuple[str, ...] = ()
    class_names: Any = None
    mask_ignore: Any = None
    mask_values: Any = None
    mask_colours: Any = None
    content_hash: bool = False
    workers: int | None = field(default=None, metadata={"fingerprint": False})
    retries: int = field(default=5, metadata={"fingerprint": False})
    timeout: float = field(default=30.0, metadata={"fingerprint": False})
    storage: Any = field(default=None, repr=False, metadata={"fingerprint": False})
    name: str = "webdataset"

    def __post_init__(self) -> None:
        if not self.urls:
            raise UserError("corpus=webdataset needs shards: give for example corpus.urls='DIR/{000..009}.tar'")
        check(self.split, self.val_fraction, self.test_fraction, self.limit, self.resolution)
        if self.retries < 0 or self.timeout <= 0:
            raise UserError(
                f"corpus.retries={self.retries}, corpus.timeout={self.timeout}: give 0 or more retries and a time-out "
                "above 0 seconds"
            )
        _ = self.raster
        _ = self.mask_rule  # an invalid rule is refused before anything is read

    @property
    def version(self) -> dict[str, str]:
        """A digest of the size and time of change of every shard, and the names of the classes if there are any."""
        text = json.dumps([[public(shard), self._shard_stamp(shard)] for shard in self._shards])
        names = {"class_names": list(self._class_names)} if self._class_names else {}
        return {"shards": hashlib.sha256(text.encode()).hexdigest()[:16], **names}

    @cached_property
    def mask_rule(self) -> MaskRule:
        return mask_rule(self.classes, self.mask_ignore, self.mask_values, self.mask_colours)

    @property
    def mask_classes(self) -> tuple[str, ...]:
        return self.mask_rule.classes

    def manifest(self) -> pd.DataFrame:
        """Table with one row per sample, in the order of the shards: id, scene, caption, stamp and metadata.

        There is a column `copy_in` if images have exact copies in other splits.
        """
        shown = self.survey.stamp
        rows = [
            {"id": item.id, "scene": "", "caption": "", "stamp": item.stamp + shown, **item.metadata}
            for item in self._chosen
        ]
        copies = {} if self.split == "all" else self._splits[1]
        rows = [{**row, "copy_in": copies.get(row["id"], "")} for row in rows] if copies else rows
        return pd.DataFrame(rows, columns=None if rows else ["id", "scene", "caption", "stamp"])

    def reader(self, rows: np.ndarray) -> Callable[[], Iterator[np.ndarray | Sample | str]]:
        items = [self._chosen[row] for row in rows]
        entries = [(item.image, item.mask, item.problem) for item in items]
        reached = self._reached(entry.shard for item in items for entry in (item.image, item.mask) if entry)
        decoding = Decoding(self.resolution, self.raster, self.survey, self.mask_rule)
        return partial(_read_entries, entries, decoding, reached)

    @cached_property
    def survey(self) -> Survey:
        """Survey of images that are spread over the shards, independent of the split that is read."""
        entries = [item.image for item in self._items if item.image and item.image_suffix not in SHALLOW]
        entries = [entries[row] for row in spread(len(entries))]
        with closing(_Members(self._reached(entry.shard for entry in entries))) as members:
            members.plan(entries)
            return survey_files(_readable(members, entries), self.raster)

    @property
    def files(self) -> list[str]:
        """The shards."""
        return list(self._shards)

    def shards_of(self, rows: np.ndarray) -> list[str]:
        """The shards that contain some rows, in order."""
        return list(dict.fromkeys(public(self._chosen[row].shard) for row in rows))

    def originals(self, rows: np.ndarray) -> Iterator[tuple[bytes, str, tuple[bytes, str] | None]]:
        """Yield the bytes and suffix of each image member, and the bytes and suffix of its mask or None.

        Raises:
            UserError: a member no longer exists.
        """
        items = [self._chosen[row] for row in rows]
        parts = [entry for item in items for entry in (item.image, item.mask) if entry is not None]
        with closing(_Members(self._reached(entry.shard for entry in parts))) as members:
            members.plan(parts)
            for item in items:
                entries = ((item.image, item.image_suffix), (item.mask, item.mask_suffix))
                try:
                    parts = [(members.read(entry), suffix) for entry, suffix in entries if entry is not None]
                except Unreachable as error:
                    raise _gone(error) from None
                except (OSError, tarfile.TarError):
                    raise UserError(
                        f"{item.id} can no longer be read from {item.shard}: prune again, or restore the shard"
                    ) from None
                data, suffix = parts[0]
                yield data, honest_suffix(data, suffix), parts[1] if item.mask is not None else None

    @cached_property
    def _shards(self) -> list[str]:
        try:
            listed = [url for urls in str(self.urls).split("::") for url in braceexpand(urls)]
            shards = [shard for url in listed for shard in self._shards_at(url)]
        except UnbalancedBracesError:
            raise UserError(
                f"corpus.urls={public(str(self.urls))} is not a list of shards: check its braces, as in {{000..099}}"
            ) from None
        if len(set(shards)) < len(shards):
            raise UserError(f"corpus.urls={public(str(self.urls))} names a shard twice: name each shard once")
        return shards

    def _shard_stamp(self, shard: str) -> str:
        """Stamp of a shard, for detecting changes: its size and, if the file system knows it, time of change or tag."""
        metadata = self._metadata[shard] if is_remote(shard) else _looked_at(shard, self._access)
        tag = next((metadata[key] for key in TAGS if metadata.get(key)), "")
        return f"{metadata.get('size')}-{tag}"

    @cached_property
    def _metadata(self) -> dict[str, dict[str, Any]]:
        """Metadata of every shard behind a URL: from the listing, else from one request per shard."""
        far = [shard for shard in self._shards if is_remote(shard)]
        known = {shard: self._listed[shard] for shard in far if self._listed.get(shard, {}).get("size") is not None}
        others = [shard for shard in far if shard not in known]
        looked = in_threads(partial(_looked_at, access=self._access), others, AT_ONCE)
        looked = progress(looked, f"check shards of {self.name}", total=len(others), unit="shard")
        return {**known, **dict(zip(others, looked, strict=True))}

    @cached_property
    def _listed(self) -> dict[str, dict[str, Any]]:
        """Metadata of the shards that were found by a pattern or a folder behind a URL."""
        return {}

    def _shards_at(self, url: str) -> list[str]:
        """The shards of a folder, or of a pattern with * or ?, sorted; otherwise the URL itself."""
        if not is_remote(url):
            return _local_shards(url)
        pattern = is_pattern(url)
        if not pattern and as_file(url).endswith(".tar"):
            return [url]
        with _reported(url):
            if not pattern and not is_folder(url, self._access):
                return [url]
            result = files_below(url if pattern else url.rstrip("/") + "/", self._access, "" if pattern else ".tar")
        self._listed.update(result)
        return list(result) or [url]

    @cached_property
    def _access(self) -> Access:
        storage = OmegaConf.to_container(self.storage) if isinstance(self.storage, DictConfig) else self.storage
        tally = new_tally() if is_remote(str(self.urls)) else ""
        if tally:
            weakref.finalize(self, _removed, tally, os.getpid())
        return Access(int(self.retries), float(self.timeout), storage or None, tally)

    @property
    def network_notes(self) -> Iterator[str]:
        """Yield a line for stderr about the requests that were repeated since the last call."""
        line = repeated_since(self._access.tally) if self._access.tally else ""
        if line:
            yield line

    def _reached(self, shards: Iterable[str]) -> _Reached:
        far = {shard: self._metadata[shard].get("size") for shard in set(shards) if is_remote(shard)}
        return _Reached(self._access, far)

    @cached_property
    def _class_names(self) -> tuple[str, ...]:
        if self.class_names is not None:
            return chosen_classes(self.class_names)
        return _classes_beside(self._shards, self._access)

    @cached_property
    def _items(self) -> list[_Item]:
        """All samples and all problems, with unique ids."""
        items, passed, hollow = [], Counter(), []
        for shard, headers in zip(self._shards, self._headers(), strict=True):
            stamp = "" if self.content_hash else self._shard_stamp(shard)
            entries, problems = headers.entries, list(headers.problems)
            passed += headers.passed
            hollow += [] if entries or problems else [shard]
            result = samples([entry.name for entry in entries], [entry.kind for entry in entries])
            for sample in result:
                while problems and problems[0][0] <= sample.first:
                    items.append(problems.pop(0)[1])
                items += _rows(sample, entries, stamp, bool(self.mask_rule), self._class_names)
            items += [problem for _, problem in problems]
            passed += _passed_over(result, entries)
        captions = [item.captions for item in items if item.captions]
        if captions:
            notice(f"{self.name}: {len(captions)} of {len(items)} samples have captions ({sum(captions)} captions)")
        if hollow:
            notice(f"{self.name}: {len(hollow)} of {len(self._shards)} shards are empty, e.g. {hollow[0]}")
        if passed:
            notice(f"{self.name}: {sum(passed.values())} members ignored: {counted(passed)}")
        return _named(items)

    def _headers(self) -> Iterator[Headers]:
        """The headers of every shard, read by all workers, once for a run directory."""
        extra, reached = extra_suffixes(self.image_suffixes), self._reached(self._shards)
        requested = [
            HeaderRequest(
                shard, self._shard_stamp(shard), self.content_hash or (self.split != "all" and is_remote(shard))
            )
            for shard in self._shards
        ]
        known = [read_headers(one, extra) for one in requested]
        missing = [one for one, headers in zip(requested, known, strict=True) if headers is None]
        steps = [Step(partial(_looked_through, reached, tuple(extra)))]
        few = len(missing) < FEW_SHARDS
        chosen = LocalEngine() if few and not any(map(is_remote, self._shards)) else engine()
        result = chosen.run(steps, missing, 0 if few else self.workers)
        label = f"read headers of {self.name}"
        for one, headers in zip(progress(requested, label, unit="shard"), known, strict=True):
            if headers is None:
                headers = next(result).value
                keep_headers(one, extra, headers)
            yield headers

    @cached_property
    def _splits(self) -> tuple[list[str], dict[str, str]]:
        """The split of every sample, and, by id, the other splits with copies of a sample."""
        ids, names = [item.id for item in self._items], [str(item.metadata.get("split", "")) for item in self._items]
        firsts = self._firsts(ids)
        splits = assigned(self.name, ids, names, self.val_fraction, self.test_fraction, firsts)
        copies = zip(ids, elsewhere(self.name, splits, firsts), strict=True)
        return splits, {identifier: others for identifier, others in copies if others}

    def _firsts(self, ids: list[str]) -> np.ndarray:
        """For each sample, the first one by id with the same image: by digests for remote shards, else by bytes."""
        images = [item.image for item in self._items]
        if any(image is not None and image.digest for image in images):
            return by_key(ids, [image.digest if image is not None and image.digest else None for image in images])
        with closing(_Members(self._reached(image.shard for image in images if image is not None))) as members:

            def read(at: int, whole: bool) -> bytes:
                return ends(members.opened(images[at].shard), images[at].data, images[at].size, whole)

            sizes = [0 if image is None else image.size for image in images]
            return firsts_of(self.name, ids, sizes, read, (str(self.urls), self.version["shards"]))

    @cached_property
    def _chosen(self) -> list[_Item]:
        """The samples of the split, reduced to the limit."""
        items = self._items
        if self.split != "all":
            items = [item for item, split in zip(items, self._splits[0], strict=True) if split == self.split]
        for item in items:
            item.metadata.pop("split", "")
        return [items[row] for row in thinned(len(items), self.limit)]


#: Keys of file system metadata that change with a file.
TAGS = ("mtime", "ETag", "etag", "LastModified", "Last-Modified", "md5")
#: Cache of the headers of shards behind URLs, so that each shard is read once for all splits of a corpus.
_seen: dict[str, Headers] = {}


@dataclass(frozen=True)
class HeaderRequest:
    """Request for the headers of a shard, with its stamp, and whether digests are requested."""

    shard: str
    stamp: str
    digests: bool

    def key(self, extra: Sequence[str]) -> str:
        return fingerprint(
            format=2, shard=public(self.shard), stamp=self.stamp, digests=self.digests, extra=list(extra)
        )


@dataclass(frozen=True)
class Headers:
    """Content of the headers of a shard.

    Attributes:
        entries: entries of its members.
        problems: problems, each with the number of members before it.
        passed: suffixes of members that hold no bytes.
    """

    entries: list[_Entry]
    problems: list[tuple[int, _Item]]
    passed: Counter[str]

    def to_json(self) -> dict[str, Any]:
        entries = [[*astuple(entry)[1:4], entry.text.decode("latin-1"), *astuple(entry)[5:]] for entry in self.entries]
        problems = [[count, item.id, item.shard, item.problem] for count, item in self.problems]
        return {"entries": entries, "problems": problems, "passed": dict(self.passed)}

    @classmethod
    def of_json(cls, shard: str, value: Mapping[str, Any]) -> Headers:
        entries = [_Entry(shard, *row[:3], row[3].encode("latin-1"), *row[4:]) for row in value["entries"]]
        problems = [(count, _Item(id=name, shard=own, problem=why)) for count, name, own, why in value["problems"]]
        return cls(entries, problems, Counter(value["passed"]))


def _looked_through(reached: _Reached, extra: tuple[str, ...], requested: HeaderRequest) -> Headers:
    problems: list[tuple[int, _Item]] = []
    passed: Counter[str] = Counter()
    with _reported(requested.shard):
        entries = list(_members(requested.shard, reached, problems, passed, requested.digests, extra))
    return Headers(entries, problems, passed)


def read_headers(requested: HeaderRequest, extra: Sequence[str]) -> Headers | None:
    """Cached headers of a shard behind a URL, from this process or the run directory; None: nothing is cached."""
    key = requested.key(extra)
    path = _headers_file(key)
    if key not in _seen and path is not None and path.is_file():
        with contextlib.suppress(OSError, ValueError, EOFError):  # an unreadable cache is ignored
            return Headers.of_json(requested.shard, json.loads(gzip.decompress(path.read_bytes())))
    return _seen.get(key)


def keep_headers(requested: HeaderRequest, extra: Sequence[str], headers: Headers) -> None:
    """Cache the headers of a shard behind a URL, because they cost requests, or with digests all bytes of the shard."""
    if not is_remote(requested.shard):
        return
    path = _headers_file(requested.key(extra))
    if path is None:
        _seen[requested.key(extra)] = headers
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(f".{os.getpid()}.partial")
    partial_path.write_bytes(gzip.compress(json.dumps(headers.to_json()).encode(), 1, mtime=0))
    os.replace(partial_path, path)


def _headers_file(key: str) -> Path | None:
    folder = run_folder()
    return None if folder is None else folder / "shards" / f"{key}.json.gz"


@dataclass(frozen=True)
class _Reached:
    """Opens shards; `sizes` are the sizes of shards behind URLs, in bytes."""

    access: Access = field(default_factory=Access)
    sizes: Mapping[str, int | None] = field(default_factory=dict)

    def opened(self, shard: str, stretches: Sequence[tuple[int, int]] = ()) -> Any:
        if not is_remote(shard):
            return fsspec.open(shard, "rb").open()
        return RemoteFile(shard, self.access, self.sizes[shard], stretches)


@contextlib.contextmanager
def _reported(shard: str) -> Iterator[None]:
    """Context manager that converts errors of a file system into one line.

    Raises:
        UserError: the file system raised an error.
    """
    where = public(shard)
    try:
        yield
    except UserError as error:
        raise UserError(f"corpus.urls: {error}") from None
    except FileNotFoundError:
        raise UserError(f"corpus.urls: there is no shard {where}: check the path and the brace list") from None
    except PermissionError as error:
        if not is_remote(shard):
            raise UserError(f"corpus.urls: {where} cannot be opened ({error}): check its permissions") from None
        raise UserError(
            f"corpus.urls: {where} cannot be opened (no permission, or no credentials): {HOW_TO_GIVE}"
        ) from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"corpus.urls: {where} cannot be opened ({reason}): check the URL and the network") from None


def _looked_at(shard: str, access: Access) -> dict[str, Any]:
    """Metadata of a shard behind a URL.

    Raises:
        UserError: the shard does not exist or cannot be reached.
    """
    with _reported(shard):
        if is_remote(shard):
            return metadata_of(shard, access)
        system, path = fsspec.core.url_to_fs(shard)
        metadata = system.info(path)
        if metadata.get("type") == "directory":
            raise FileNotFoundError
        return metadata


def _gone(error: Unreachable) -> UserError:
    return UserError(f"{error}, after all retries: run the same command again to continue, or raise corpus.retries")


def _removed(path: str, owner: int) -> None:
    """Remove a file of the process `owner`; in any other process this does nothing."""
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _local_shards(url: str) -> list[str]:
    """The shards of a local folder, or of a pattern with * or ?, sorted; otherwise the path itself."""
    if Path(url).is_file() or url.startswith("file://"):
        return [url]
    if Path(url).is_dir():
        return sorted(str(path) for path in Path(url).glob("*.tar")) or [url]
    result = sorted(glob.glob(url)) if "*" in url or "?" in url else []
    return result or [url]


def _classes_beside(shards: Sequence[str], access: Access) -> tuple[str, ...]:
    """Names of the classes from a file next to the first shard.

    Raises:
        UserError: the network failed, so it is unknown whether there is such a file.
    """
    folder, far = as_file(shards[0]).rpartition("/")[0] if shards else "", is_remote(shards[0])
    for name in CLASS_FILES[:1] if far else CLASS_FILES:
        path = f"{folder}/{name}" if folder else name
        try:
            if far:
                return class_list(read_whole(path, access)[:LARGEST_TEXT])
            with fsspec.open(path, "rb") as file:
                return class_list(file.read(LARGEST_TEXT))
        except (Unreachable, Cut) as error:
            raise _gone(error) from None
        except Exception:  # there is no such file; servers report that in different ways
            continue
    return ()


def _named(items: list[_Item]) -> list[_Item]:
    """The items with unique ids; the second of two members of one name gets an id made from that of the first."""
    own = [item for item in items if item.key]
    requested = [encodable(item.id) for item in own]
    ids = unique_ids(requested, [encodable(item.key) for item in own], [item.shard for item in own])
    taken, given, last = set(ids), iter(ids), ""
    named = []
    for item in items:
        last = identifier = next(given) if item.key else encodable(item.id or last)
        number = 1
        while not item.key and identifier in taken:
            number += 1
            identifier = f"{last}#{number}"
        taken.add(identifier)
        named.append(replace(item, id=identifier))
    return named


def _passed_over(result: Sequence[Group], entries: Sequence[_Entry]) -> Counter[str]:
    """Number of members that are neither part of a row nor companions, by suffix."""
    pictured = (sample for sample in result if sample.image is not None)  # rows without an image list their members
    grouped = Counter(suffix_of(entries[at].name) for sample in pictured for at in sample.others)
    bare = (entry for entry in entries if entry.kind == "other" and "." not in entry.name.rpartition("/")[2])
    return grouped + Counter(suffix_of(entry.name) for entry in bare)


def _members(
    shard: str,
    reached: _Reached,
    problems: list[tuple[int, _Item]],
    passed: Counter[str],
    digests: bool,
    extra: Sequence[str],
) -> Iterator[_Entry]:
    """Yield the positions of the members of one shard, from its headers; several processes read the members later.

    A truncated shard may lack members of its last sample; its image is used if all bytes of the image exist.

    Args:
        shard: path or URL of the shard.
        reached: opens the shard.
        problems: list to which problems are added, with the number of members before each.
        passed: counter of the suffixes of members that hold no bytes.
        digests: also compute digests of the bytes of images and masks.
        extra: further suffixes of images.
    Raises:
        OSError: the shard cannot be read to its end, although it may be complete.
    """
    count, own_name = 0, public(shard)

    def wrong(identifier: str, problem: str) -> None:
        problems.append((count, _Item(id=identifier, shard=own_name, problem=problem)))

    with closing(reached.opened(shard)) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    kind = member_kind(member.name, None, extra)
                    if problem := _problem_of(member, kind):
                        wrong(f"{own_name}:{member.name}", problem)
                    elif not (member.isfile() or member.isdir()) and kind != "companion":
                        passed[suffix_of(member.name)] += 1  # a link, a pipe or a device
                    if problem or not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                        continue
                    count += 1
                    if kind == "?":
                        kind = member_kind(member.name, tar.extractfile(member).read(HEAD), extra)
                    short = kind in ("text", "metadata", "class") and member.size <= LARGEST_TEXT
                    hashed = digests and kind in ("image", "mask") and member.size <= LARGEST_MEMBER
                    data = tar.extractfile(member).read() if short or hashed else b""
                    digest = hashlib.blake2b(data, digest_size=8).hexdigest() if hashed else ""
                    text, entry = data if short else b"", (member.offset, tar.offset)
                    size = 0 if member.issparse() or kind != "image" else member.size
                    yield _Entry(shard, member.name, *entry, text, digest, kind, member.offset_data, size)
                whole = _ends_whole(file, tar)
        except (Unreachable, Refused, FileNotFoundError, PermissionError):
            raise
        except Exception:  # `tarfile` may raise any exception for broken headers
            whole = False
        if not whole and not count:
            wrong(own_name, COMPRESSED if _compressed(file) else BROKEN)
        elif not whole:
            wrong(f"{own_name}:end", CUT)


def _problem_of(member: tarfile.TarInfo, kind: str) -> str:
    """Why a member of a kind cannot be read; "" where it can, or is nothing to read."""
    if member.islnk() or member.issym():
        return LINK if kind in ("image", "mask") else ""
    name = PurePosixPath(member.name)
    if not member.isfile() or name.name.startswith("."):
        return ""
    if name.is_absolute() or ".." in name.parts:
        return UNSAFE
    return TOO_LARGE if kind not in ("?", "companion") and member.size > LARGEST_MEMBER else ""


def _compressed(file: Any) -> bool:
    """Whether a file begins like a gzip, bzip2, xz or zstd file."""
    file.seek(0)
    try:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"))
    except Cut:
        return False


def _ends_whole(file: Any, tar: tarfile.TarFile) -> bool:
    """Whether reading stopped at the real end of the archive: `tarfile` also stops at a damaged or truncated header.

    Tar marks the end with blocks of zeros; some writers leave them out and end after the last member.
    """
    file.seek(0, 2)
    size = file.tell()
    file.seek(min(tar.offset, size))
    rest = file.read(LONGEST_END + 1)
    return (
        size >= tar.offset
        and len(rest) <= LONGEST_END
        and rest.count(0) == len(rest)
        and (not rest or len(rest) >= 512)
    )


def _rows(
    sample: Group, entries: Sequence[_Entry], stamp: str, masks: bool, class_names: Sequence[str]
) -> Iterator[_Item]:
    """Yield the row of a sample, and one row for every duplicated member.

    `stamp` is the stamp of the shard; if it is empty, an image gets a digest of its bytes as its stamp.
    """
    at = lambda position: None if position is None else entries[position]  # noqa: E731
    image, mask, shard = at(sample.image), at(sample.mask) if masks else None, public(entries[0].shard)
    metadata = _json(entries[sample.metadata].text) if sample.metadata is not None else {}
    row = sample_captions([decoded(entries[text].text) for text in sample.texts], metadata)
    label = decoded(entries[sample.label].text) if sample.label is not None else ""
    folders = PurePosixPath(sample.key).parts[:-1]
    scene = row_scene(metadata, class_names) or scene_name(label, class_names)
    scene = scene or scene_name(folders[0] if folders else "", class_names)
    known = scalars(metadata)
    if metadata.get("split"):
        known["split"] = str(metadata["split"])
    met = ", ".join(sorted(set(sample.met))[:8])
    yield _Item(
        id=str(metadata.get("id") or sample.key),
        shard=shard,
        key=sample.key,
        stamp=_stamp(stamp, *(entry for entry in (image, mask) if entry)),
        image=image,
        image_suffix=suffix_of(image.name) if image else "",
        mask=mask,
        mask_suffix=suffix_of(mask.name) if mask else "",
        problem="" if image else f"{NO_IMAGE}: suffixes met {met}",
        captions=len(own_captions(row)),
        metadata={**known, "scene": scene, **caption_metadata(row, scene, label_list(metadata, class_names))},
    )
    for _ in sample.doubled:
        yield _Item(id="", shard=shard, problem=DUPLICATE)


def _stamp(shard: str, *entries: _Entry) -> str:
    return f"{shard}-{entries[0].start}" if shard and entries else shard + "+".join(entry.digest for entry in entries)


def _json(data: bytes) -> dict:
    try:
        metadata = json.loads(decoded(data) or "{}")
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


class _Members:
    """Reads members of shards; one shard is open at a time."""

    def __init__(self, reached: _Reached) -> None:
        self._shard, self._file, self._reached = "", None, reached
        self._parts: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def plan(self, entries: Iterable[_Entry]) -> None:
        """Announce what will be read, so that neighbouring members of a shard behind a URL take one request."""
        for entry in entries:
            if is_remote(entry.shard):
                self._parts[entry.shard].append((entry.start, entry.end))

    def read(self, entry: _Entry) -> bytes:
        """The bytes of a member; its header is read again, because the shard may have changed or the member be sparse.

        Raises:
            tarfile.ReadError: the shard ends before the member does, or the shard has changed.
        """
        file = self.opened(entry.shard)
        if (
            entry.end - entry.start > LARGEST_MEMBER + LARGEST_TEXT
        ):  # a broken header; reading would allocate that much memory
            raise tarfile.ReadError(f"{entry.name} is too large")
        file.seek(entry.start)
        stretch = io.BytesIO(file.read(entry.end - entry.start))
        try:
            with tarfile.open(fileobj=stretch, mode="r:") as tar:
                member = tar.next()
                if member is None or member.name != entry.name or not member.isfile():
                    raise tarfile.ReadError(f"no member {entry.name} at byte {entry.start}")
                return tar.extractfile(member).read()
        except (ValueError, TypeError, ArithmeticError, LookupError, MemoryError) as error:  # caused by a broken header
            raise tarfile.ReadError(f"the header of {entry.name} is broken") from error

    def opened(self, shard: str) -> Any:
        if self._shard != shard:
            self.close()
            self._file = self._reached.opened(shard, stretches_of(self._parts[shard]))
            self._shard = shard
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._shard, self._file = "", None


def _readable(members: _Members, entries: Sequence[_Entry]) -> Iterator[bytes]:
    for entry in entries:
        try:
            yield members.read(entry)
        except Unreachable as error:  # without these images, the survey might show all images differently
            raise _gone(error) from None
        except (OSError, tarfile.TarError):  # the image's row reports the error
            continue


def _read_entries(
    entries: Sequence[tuple[_Entry | None, _Entry | None, str]], decoding: Decoding, reached: _Reached
) -> Iterator[np.ndarray | Sample | str]:
    """Yield the images at some entries of shards.

    Raises:
        UserError: several consecutive images cannot be reached, so the network is down. Running the same command again
            when the network is back continues without loss.
    """
    failed = 0
    with closing(_Members(reached)) as members:
        members.plan(entry for image, mask, problem in entries if not problem for entry in (image, mask) if entry)
        for image_entry, mask_entry, problem in entries:
            if problem:
                yield problem
                continue
            part = ""
            try:
                data = members.read(image_entry)
                part = PREFIX
                mask = members.read(mask_entry) if mask_entry is not None else MISSING
            except Unreachable as error:
                failed += 1
                if failed >= GONE:
                    raise _gone(error) from None
                yield UNREACHABLE
            except FileNotFoundError:
                yield VANISHED
            except tarfile.TarError:
                yield part + CUT
            except PermissionError:
                yield NO_PERMISSION
            except OSError:
                yield UNREADABLE_FILE
            else:
                failed = 0
                yield decoding(data, mask)
