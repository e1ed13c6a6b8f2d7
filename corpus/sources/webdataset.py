"""Tar shards in the WebDataset convention, local or behind any URL that fsspec opens."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pandas as pd
from braceexpand import UnbalancedBracesError, braceexpand

from corpus.captions import caption_facts, encodable, scalars
from corpus.decoding import UNREADABLE_FILE, VANISHED, decode_image
from corpus.masks import MISSING, PREFIX, MaskRule, Sample, mask_rule, with_mask
from corpus.splits import assigned, check, thinned
from runtime.errors import UserError
from runtime.progress import progress

IMAGES = ("jpg", "jpeg", "png", "tif", "tiff", "webp", "bmp", "gif")
MASKS = tuple(f"{name}.{suffix}" for name in ("mask", "seg") for suffix in ("png", "tif", "tiff", "bmp"))
TEXTS = ("txt", "caption", "text")
FACTS = ("json", "cls")
KNOWN = {*IMAGES, *MASKS, *TEXTS, *FACTS}
#: The key of a member ends at the first dot of its last part.
NAME = re.compile(r"(?P<key>(?:.*/|)[^.]+)[.](?P<suffix>[^/]*)")
CUT = "shard cut in the middle"
BROKEN = "not a tar shard"
DUPLICATE = "duplicate key"
UNSAFE = "unsafe member name"
LINK = "a link, not followed"
COMPRESSED = "compressed shard"
NO_IMAGE = "no image in the sample"
TOO_LARGE = "member above 1 GiB"
#: Larger ones are no captions.
LARGEST_TEXT = 2**20
#: A sparse one of a few bytes can claim any size.
LARGEST_MEMBER = 2**30
#: Zeros after the last member; writers fill up to their own block size.
LONGEST_END = 2**22


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a member lies in its shard, from its header to the next one's; `text` has a short one that is no picture.

    `digest` is of the bytes, where they are asked for.
    """

    shard: str
    name: str
    start: int
    end: int
    text: bytes = field(default=b"", repr=False)
    digest: str = ""


@dataclass(frozen=True, slots=True)
class _Item:
    """One sample, or one thing in a shard that cannot be one, as its `problem` says."""

    id: str
    stamp: str = ""
    image: _Place | None = None
    image_suffix: str = ""
    mask: _Place | None = None
    mask_suffix: str = ""
    problem: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WebDataset:
    """Samples of tar shards: members that share their name up to the first dot of its last part.

    An image (jpg, png, tif, …); if there are, a caption (`txt`), facts (`json`: id, caption or captions, scene,
    label, split, lon, lat, …), a class (`cls`) and a mask (`mask.png` or `seg.png`). The scene is the facts',
    else `cls`, else the first folder of the key. A first pass over the shards' headers finds every member's place;
    many processes then read from there. Nothing is unpacked to disk.

    Args:
        urls: a path, a URL or a brace list such as "shards/{000..099}.tar", several joined by "::".
        split: "all", "train", "val" or "test"; an image is of the split that its facts name, else of its hash's;
            `corpus.splits` has the names, and the rule for a split that they leave out.
        resolution: side of the images handed on, in pixels.
        val_share, test_share: shares of the images that the hash holds out.
        limit: keep at most so many samples, evenly spread (None: all).
        classes, mask_ignore, mask_values, mask_colours: what is in the masks (`corpus.masks.mask_rule`); no names of
            classes: masks are left alone.
        content_hash: an image has changed if its bytes have, all of which are read for it, not if its shard has.
        workers: decoding processes (None: one a core); the result does not depend on it.
    Raises:
        UserError: no shards given, or one cannot be found.
    """

    urls: str | None = None
    split: str = "all"
    resolution: int = 64
    val_share: float = 0.1
    test_share: float = 0.1
    limit: int | None = None
    classes: tuple[str, ...] = ()
    mask_ignore: Any = None
    mask_values: Any = None
    mask_colours: Any = None
    content_hash: bool = False
    workers: int | None = field(default=None, metadata={"fingerprint": False})
    name: str = "webdataset"

    def __post_init__(self) -> None:
        if not self.urls:
            raise UserError("corpus=webdataset reads no shards yet: say which with corpus.urls='DIR/{000..009}.tar'")
        check(self.split, self.val_share, self.test_share, self.limit, self.resolution)
        _ = self.mask_rule  # refused before anything is read

    @property
    def version(self) -> dict[str, str]:
        """A digest of every shard's size and time of change."""
        text = json.dumps([[shard, self._shard_stamp(shard)] for shard in self._shards])
        return {"shards": hashlib.sha256(text.encode()).hexdigest()[:16]}

    @cached_property
    def mask_rule(self) -> MaskRule:
        return mask_rule(self.classes, self.mask_ignore, self.mask_values, self.mask_colours)

    @property
    def mask_classes(self) -> tuple[str, ...]:
        return self.mask_rule.classes

    def manifest(self) -> pd.DataFrame:
        """One row a sample in the order of the shards: id (the facts', else the key), scene, caption, stamp, facts."""
        rows = [{"id": item.id, "scene": "", "caption": "", "stamp": item.stamp, **item.facts} for item in self._chosen]
        return pd.DataFrame(rows, columns=None if rows else ["id", "scene", "caption", "stamp"])

    def reader(self, rows: np.ndarray) -> Callable[[], Iterator[np.ndarray | Sample | str]]:
        items = [self._chosen[row] for row in rows]
        places = [(item.image, item.mask, item.problem) for item in items]
        return partial(_read_places, places, self.resolution, self.mask_rule)

    def originals(self, rows: np.ndarray) -> Iterator[tuple[bytes, str, tuple[bytes, str] | None]]:
        """The bytes and suffix of every image member, and those of its mask or None.

        Raises:
            UserError: a member is no longer there.
        """
        with closing(_Members()) as members:
            for row in rows:
                item = self._chosen[row]
                places = ((item.image, item.image_suffix), (item.mask, item.mask_suffix))
                try:
                    parts = [(members.read(place), suffix) for place, suffix in places if place is not None]
                except (OSError, tarfile.TarError):
                    raise UserError(
                        f"{item.id} cannot be read any more from {item.image.shard}: prune again, or put the shard back"
                    ) from None
                yield *parts[0], parts[1] if item.mask is not None else None

    @cached_property
    def _shards(self) -> list[str]:
        try:
            shards = [shard for urls in str(self.urls).split("::") for shard in braceexpand(urls)]
        except UnbalancedBracesError:
            raise UserError(
                f"corpus.urls={self.urls} is no list of shards: close its braces, as in {{000..099}}"
            ) from None
        if len(set(shards)) < len(shards):
            raise UserError(f"corpus.urls={self.urls} names a shard twice: name each once")
        return shards

    def _shard_stamp(self, shard: str) -> str:
        """What changes with a shard: its size and, where its file system knows, its time of change or tag."""
        try:
            system, path = fsspec.core.url_to_fs(shard)
            facts = system.info(path)
            if facts.get("type") == "directory":
                raise FileNotFoundError
        except FileNotFoundError:
            raise UserError(f"corpus.urls: there is no shard {shard}: check the path and the brace list") from None
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"corpus.urls: {shard} cannot be opened ({reason}): check the URL and the network"
            ) from error
        tag = next((facts[key] for key in ("mtime", "ETag", "etag", "LastModified", "md5") if facts.get(key)), "")
        return f"{facts.get('size')}-{tag}"

    @cached_property
    def _chosen(self) -> list[_Item]:
        """Samples of the split, thinned to the limit."""
        items, names, seen = [], [], {}
        for shard in progress(self._shards, f"read headers of {self.name}", unit="shard"):
            for item in _items(shard, "" if self.content_hash else self._shard_stamp(shard), bool(self.mask_rule)):
                identifier = item.id.encode("utf-8", "backslashreplace").decode()
                number = seen[identifier] = seen.get(identifier, 0) + 1
                if number > 1:  # ids are unique, so that none vanishes
                    while f"{identifier}#{number}" in seen:
                        number += 1
                    identifier = f"{identifier}#{number}"
                    seen[identifier] = 1
                    item = _Item(id=identifier, problem=item.problem or DUPLICATE)
                names.append(item.facts.pop("split", ""))
                items.append(replace(item, id=identifier))
        if self.split != "all":
            splits = assigned(self.name, [item.id for item in items], names, self.val_share, self.test_share)
            items = [item for item, split in zip(items, splits, strict=True) if split == self.split]
        return [items[row] for row in thinned(len(items), self.limit)]


def _items(shard: str, stamp: str, masks: bool) -> Iterator[_Item]:
    """The samples of one shard, in its order, and what is wrong with it.

    `stamp` is the shard's; empty: images are stamped with a digest of their bytes.
    """
    problems: list[_Item] = []
    for key, parts, doubled in _samples(_members(shard, problems, digests=not stamp)):
        yield from problems
        problems.clear()
        yield _item(key, parts, stamp, masks, doubled)
    yield from problems


def _samples(members: Iterable[_Place]) -> Iterator[tuple[str, dict[str, _Place], bool]]:
    """Key, members by suffix, and whether two have one suffix: neighbours whose names agree up to the first dot.

    The rule of the WebDataset convention. Files without a dot in their name play no part in it.
    """
    key, parts, doubled = None, {}, False
    for place in members:
        name = NAME.fullmatch(place.name)
        if name is None:
            continue
        if name["key"] != key:
            if key is not None:
                yield key, parts, doubled
            key, parts, doubled = name["key"], {}, False
        suffix = name["suffix"].lower()
        doubled = doubled or suffix in parts
        if suffix in KNOWN:
            parts.setdefault(suffix, place)
    if key is not None:
        yield key, parts, doubled


def _members(shard: str, problems: list[_Item], digests: bool) -> Iterator[_Place]:
    """Where the files of one shard lie, by its headers: they are read later, by many processes and more than once.

    A shard that is cut may lack members of its last sample; the image, if it has all its bytes, is read all the same.
    """
    found = False
    with fsspec.open(shard, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    name = PurePosixPath(member.name)
                    suffix = name.name.partition(".")[2].lower()
                    if (member.islnk() or member.issym()) and suffix in IMAGES:
                        problems.append(_Item(id=f"{shard}:{member.name}", problem=LINK))
                    if not member.isfile() or name.name.startswith("."):
                        continue
                    if name.is_absolute() or ".." in name.parts:
                        problems.append(_Item(id=f"{shard}:{member.name}", problem=UNSAFE))
                        continue
                    if suffix in KNOWN and member.size > LARGEST_MEMBER:
                        problems.append(_Item(id=f"{shard}:{member.name}", problem=TOO_LARGE))
                        continue
                    found = True
                    short = suffix in (*TEXTS, *FACTS) and member.size <= LARGEST_TEXT
                    hashed = digests and suffix in KNOWN
                    data = tar.extractfile(member).read() if short or hashed else b""
                    digest = hashlib.blake2b(data, digest_size=8).hexdigest() if hashed else ""
                    yield _Place(shard, member.name, member.offset, tar.offset, data if short else b"", digest)
                whole = _ends_whole(file, tar)
        except (tarfile.TarError, EOFError, OSError):
            whole = False
    if not whole and not found:
        problems.append(_Item(id=shard, problem=COMPRESSED if _compressed(shard) else BROKEN))
    elif not whole:
        problems.append(_Item(id=f"{shard}:end", problem=CUT))


def _compressed(shard: str) -> bool:
    """Whether it begins as gzip, bzip2, xz or zstd files do."""
    with fsspec.open(shard, "rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"))


def _ends_whole(file: Any, tar: tarfile.TarFile) -> bool:
    """Whether the archive's end is where reading ended: `tarfile` takes a damaged or cut header for the end, too.

    Tar marks it with blocks of zeros; some writers leave them out and end after the last member.
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


def _item(key: str, sample: dict[str, _Place], stamp: str, masks: bool, doubled: bool) -> _Item:
    image = next((suffix for suffix in sample if suffix in IMAGES), None)
    mask = next((suffix for suffix in MASKS if suffix in sample), None) if masks else None
    texts = {suffix: place.text for suffix, place in sample.items()}
    facts = _json(texts.get("json", b""))
    captions = next((texts[suffix].decode("utf-8", "replace") for suffix in TEXTS if suffix in texts), None)
    folders = PurePosixPath(key).parts[:-1]
    scene = facts.get("scene", facts.get("label", texts.get("cls", b"").decode("utf-8", "replace").strip()))
    scene = encodable(str(scene)) if scene not in ("", None) else folders[0] if folders else ""
    row = facts if captions is None or facts.get("captions") else {"text": captions}
    known = scalars(facts)
    if facts.get("split"):
        known["split"] = str(facts["split"])
    return _Item(
        id=str(facts.get("id") or key),
        stamp=_stamp(stamp, *(sample[suffix] for suffix in (image, mask) if suffix)),
        image=sample[image] if image else None,
        image_suffix=f".{image}" if image else "",
        mask=sample[mask] if mask else None,
        mask_suffix=f".{mask.rsplit('.')[-1]}" if mask else "",
        problem=DUPLICATE if doubled else "" if image else NO_IMAGE,
        facts={**known, "scene": scene, **caption_facts(row, scene)},
    )


def _stamp(shard: str, *places: _Place) -> str:
    return f"{shard}-{places[0].start}" if shard and places else shard + "+".join(place.digest for place in places)


def _json(data: bytes) -> dict:
    try:
        facts = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


class _Members:
    """Reads members of shards, of which one is open at a time."""

    def __init__(self) -> None:
        self._shard, self._file = "", None

    def read(self, place: _Place) -> bytes:
        """The bytes of a member, by its own header, since the shard may have changed or the member be sparse.

        Raises:
            tarfile.ReadError: the shard ends before the member does, or is another one by now.
        """
        if self._shard != place.shard:
            self.close()
            self._file = fsspec.open(place.shard, "rb").open()
            self._shard = place.shard
        self._file.seek(place.start)
        stretch = io.BytesIO(self._file.read(place.end - place.start))
        with tarfile.open(fileobj=stretch, mode="r:") as tar:
            member = tar.next()
            if member is None or member.name != place.name or not member.isfile():
                raise tarfile.ReadError(f"no member {place.name} at byte {place.start}")
            return tar.extractfile(member).read()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._shard, self._file = "", None


def _read_places(
    places: Sequence[tuple[_Place | None, _Place | None, str]], resolution: int, rule: MaskRule
) -> Iterator[np.ndarray | Sample | str]:
    """Images at places in shards."""
    with closing(_Members()) as members:
        for image_place, mask_place, problem in places:
            if problem:
                yield problem
                continue
            part = ""
            try:
                data = members.read(image_place)
                part = PREFIX
                mask = members.read(mask_place) if mask_place is not None else MISSING
            except FileNotFoundError:
                yield VANISHED
                continue
            except tarfile.TarError:
                yield part + CUT
                continue
            except OSError:
                yield UNREADABLE_FILE
                continue
            image = decode_image(data, resolution)
            if rule and not isinstance(image, str):
                yield with_mask(image, resolution, rule, mask, data)
            else:
                yield image
