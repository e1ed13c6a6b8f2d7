"""Classification of files and shard members by name: which are images, what the others are, and which belong together.

All sources use the same list and rules. A file whose suffix is not in the list is classified by its first bytes.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

#: Suffixes of images. If the decoders of this machine cannot read an image, the manifest has a row with a reason.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".png", ".apng", ".tif", ".tiff", ".gtiff", ".webp", ".bmp",
    ".dib", ".gif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf", ".avif", ".avifs", ".heic", ".heif", ".ppm",
    ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".img", ".vrt", ".ntf", ".nitf",
)  # fmt: skip
#: Suffixes of images that have only red, green and blue bands of 8 bits.
SHALLOW = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".webp", ".bmp", ".dib", ".gif")
#: Suffix of NumPy arrays, which hold masks.
ARRAY_SUFFIX = ".npy"
TEXT_SUFFIXES = (".txt", ".caption", ".captions", ".text", ".cap")
METADATA_SUFFIX, CLASS_SUFFIX = ".json", ".cls"
#: Files with the names of the classes 0, 1, ..., one per line.
CLASS_FILES = ("classnames.txt", "class_names.txt", "classes.txt", "labels.txt")
#: Number of bytes that `image_suffix` needs.
HEAD = 64

#: Suffixes of files that belong to an image or to the system and contain no pixels, text or metadata.
_COMPANIONS = (
    ".aux.xml", ".tfw", ".tifw", ".tiffw", ".jgw", ".jpgw", ".jpegw", ".pgw", ".pngw", ".bpw", ".gfw", ".j2w", ".wld",
    ".prj", ".ovr", ".msk",
)  # fmt: skip
_COMPANION_NAMES = re.compile(
    r"(thumbs|ehthumbs)\.db|desktop\.ini|(readme|licen[sc]e|copying|notice|citation|changelog)([._-].*)?"
)
#: Words between the key and the suffix of a member that define its kind.
_IMAGE_WORDS = ("image", "img", "input", "rgb", "picture", "photo", "jpg", "jpeg", "png", "tif", "tiff", "webp")
MASK_WORDS = (
    "mask", "seg", "masks", "segmentation", "label", "labels", "lbl", "gt", "annotation", "target", "output",
)  # fmt: skip
#: Words that mark an image, not a mask, if the sample has no other image.
_WEAK_MASK_WORDS = {"target", "output"}
_OTHER_WORDS = ("caption", "captions", "text", "meta", "metadata", "class", "cls")
_WORDS = {*_IMAGE_WORDS, *MASK_WORDS, *_OTHER_WORDS}

_BEGINNINGS = {
    b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"GIF87a": ".gif", b"GIF89a": ".gif", b"II*\0": ".tif",
    b"MM\0*": ".tif", b"II+\0": ".tif", b"MM\0+": ".tif", b"\0\0\0\x0cjP  \r\n\x87\n": ".jp2",
    b"\xff\x4f\xff\x51": ".j2k", b"<VRTDataset": ".vrt", b"EHFA_HEADER_TAG": ".img", b"NITF0": ".ntf",
}  # fmt: skip
_BMP_HEADERS = tuple(bytes([size, 0, 0, 0]) for size in (12, 40, 52, 56, 64, 108, 124))
_BRANDS = {"avif": ".avif", "avis": ".avif", "heic": ".heic", "heix": ".heic", "hevc": ".heic", "mif1": ".heic"}
_NETPBM = {b"1": ".pbm", b"2": ".pgm", b"3": ".ppm", b"4": ".pbm", b"5": ".pgm", b"6": ".ppm"}
#: Groups of equivalent suffixes; a file keeps the suffix that it has.
_SAME = ((".jpg", ".jpeg"), (".tif", ".tiff"))


def suffix_of(name: str) -> str:
    """The last suffix of a path in lower case, with its dot; "" if there is none."""
    base = name.rpartition("/")[2]
    dot = base.rfind(".")
    return base[dot:].lower() if dot > 0 else ""


def image_suffix(head: bytes) -> str:
    """The usual suffix of the image format of a file, from its first `HEAD` bytes; "" if it is not an image."""
    for beginning, suffix in _BEGINNINGS.items():
        if head.startswith(beginning):
            return suffix
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12].decode("latin-1"), "")
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0" and head[14:18] in _BMP_HEADERS:
        return ".bmp"
    if re.match(rb"P[1-6]\s+(#|\d+\s)", head):
        return _NETPBM[head[1:2]]
    return ""


def honest_suffix(data: bytes, suffix: str) -> str:
    """The suffix for the format of an image's bytes; the given suffix if it is right or the format is unknown."""
    result = image_suffix(data[:HEAD])
    same = next((row for row in _SAME if result in row), (result,))
    return suffix if not result or suffix in same else result


def extra_suffixes(given: Iterable[str]) -> tuple[str, ...]:
    """The suffixes of the option `corpus.image_suffixes`, in lower case and with dots."""
    return tuple("." + str(suffix).lower().lstrip(".") for suffix in given)


def is_companion(name: str) -> bool:
    """Whether a file of this name is known to contain no pixels, text or metadata."""
    base = name.rpartition("/")[2].lower()
    return base.endswith(_COMPANIONS) or _COMPANION_NAMES.fullmatch(base) is not None


def kind_of(name: str, head: bytes | None, extra: Sequence[str] = ()) -> str:
    """Kind of a file or member: "image", "mask", "text", "metadata", "class", "companion", "other", or "?".

    Args:
        name: name of the file or member.
        head: its first bytes; None: they are not read yet, and a result "?" means that they are needed.
        extra: further suffixes of images besides `IMAGE_SUFFIXES`.
    """
    suffix = suffix_of(name)
    if suffix in IMAGE_SUFFIXES or suffix in extra:
        return "mask" if not _roles(name).isdisjoint(MASK_WORDS) else "image"
    if is_companion(name):
        return "companion"
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix in (METADATA_SUFFIX, CLASS_SUFFIX):
        return "metadata" if suffix == METADATA_SUFFIX else "class"
    if head is None:
        return "?"
    return "image" if image_suffix(head) else "other"


def member_kind(name: str, head: bytes | None, extra: Sequence[str] = ()) -> str:
    """`kind_of` for a member of a shard, in which an array with the name of a mask (`a.mask.npy`) is a mask."""
    array = suffix_of(name) == ARRAY_SUFFIX and not _roles(name).isdisjoint(MASK_WORDS)
    return "mask" if array else kind_of(name, head, extra)


@dataclass
class Group:
    """The members of one sample, by their positions in the shard.

    Attributes:
        first: position of the first member.
        doubled: members with the same name and suffix as an earlier member.
        others: members that are neither the image nor data about it.
        met: suffixes of all members.
    """

    key: str
    first: int
    image: int | None = None
    mask: int | None = None
    texts: list[int] = field(default_factory=list)
    metadata: int | None = None
    label: int | None = None
    doubled: list[int] = field(default_factory=list)
    others: list[int] = field(default_factory=list)
    met: list[str] = field(default_factory=list)


def samples(names: Sequence[str], kinds: Sequence[str]) -> list[Group]:
    """The samples of one shard, in the order of their first members; the members of a sample may lie anywhere in it.

    As in the WebDataset convention, the key is the name up to the first dot of its last part. The last suffix defines
    the kind of a member (`a.input.jpg` is an image). Words between key and suffix that name a kind belong to the
    suffix. If members of one key are images with different other words, these words are part of the key
    (`S2A.2019.tile1.jpg` and `S2A.2019.tile2.jpg`), and members without such words belong to all of these samples.

    Args:
        names: names of the members.
        kinds: kinds of the members, from `kind_of`, including "companion" and "other".
    """
    groups: dict[str, list[int]] = {}
    for position, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        if kind != "companion" and ("." in name.rpartition("/")[2] or kind == "image"):
            groups.setdefault(_split(name)[0], []).append(position)
    return [sample for key, members in groups.items() for sample in _of_key(key, members, names, kinds)]


def _of_key(key: str, members: list[int], names: Sequence[str], kinds: Sequence[str]) -> Iterator[Group]:
    stems = {position: _split(names[position])[1] for position in members}
    pictured = {stems[position] for position in members if kinds[position] == "image"}
    plain = "" in stems.values()
    if "" in pictured or not pictured or (plain and len(pictured) == 1):
        yield _sample(key, members, names, kinds)
        return
    of_stem: dict[str, list[int]] = {}
    for position, stem in stems.items():
        of_stem.setdefault(stem, []).append(position)
    shared = of_stem.pop("", [])
    for stem, own in of_stem.items():
        yield _sample(f"{key}.{stem}", sorted([*own, *shared]), names, kinds)


def _sample(key: str, members: list[int], names: Sequence[str], kinds: Sequence[str]) -> Group:
    sample, taken = Group(key, min(members)), set()
    result: dict[str, list[int]] = {}
    for position in members:
        name, kind = names[position], kinds[position]
        ending = name[len(_split(name)[0]) :].lower()
        sample.met.append(_printable(suffix_of(name)))
        if ending in taken and kind != "other":
            sample.doubled.append(position)
        else:
            result.setdefault(kind, []).append(position)
        taken.add(ending)
    plainest = lambda position: _rank(names[position])  # noqa: E731
    for kind, slot in (("image", "image"), ("mask", "mask"), ("metadata", "metadata"), ("class", "label")):
        first, *rest = sorted(result.get(kind, []), key=plainest) or [None]
        setattr(sample, slot, first)
        sample.others += rest
    if sample.image is None and sample.mask is not None and _roles(names[sample.mask]) <= _WEAK_MASK_WORDS:
        sample.image, sample.mask = sample.mask, None
    sample.texts = sorted(result.get("text", []), key=lambda at: TEXT_SUFFIXES.index(suffix_of(names[at])))
    sample.others += result.get("other", [])
    return sample


def _rank(name: str) -> tuple[int, int]:
    """Sort key: members without words come first, then members with more usual words."""
    roles = _roles(name)
    usual = (*_IMAGE_WORDS, *MASK_WORDS)
    return len(roles) + len(_split(name)[1]), min((usual.index(word) for word in roles if word in usual), default=0)


def _split(name: str) -> tuple[str, str]:
    """The key (up to the first dot of the last part), and the words before the suffix that do not name a kind."""
    folder, slash, base = name.rpartition("/")
    first, _, rest = base.partition(".")
    words = rest.split(".")[:-1]
    while words and words[-1].lower() in _WORDS:
        words.pop()
    return folder + slash + first, ".".join(words)


def _roles(name: str) -> set[str]:
    """The words before the suffix that name a kind, in lower case."""
    words, roles = name.rpartition("/")[2].split(".")[1:-1], set()  # usually empty
    while words and words[-1].lower() in _WORDS:
        roles.add(words.pop().lower())
    return roles


def unique_ids(requested: Sequence[str], keys: Sequence[str], shards: Sequence[str]) -> list[str]:
    """Unique ids of samples: the requested id if it is unique, else `<shard>/<key>`; further duplicates get "#2" etc.

    Args:
        requested: id that each sample asks for.
        keys: key of each sample in its shard.
        shards: path of each sample's shard.
    """
    names = _shard_names(sorted(set(shards)))
    repeated = {identifier for identifier, count in Counter(requested).items() if count > 1}
    taken, ids = set(requested) - repeated, []
    for identifier, key, shard in zip(requested, keys, shards, strict=True):
        if identifier in repeated:
            base = f"{names[shard]}/{key}" if names[shard] else key
            identifier, number = base, 1
            while identifier in taken:
                number += 1
                identifier = f"{base}#{number}"
            taken.add(identifier)
        ids.append(identifier)
    return ids


def _shard_names(shards: Sequence[str]) -> dict[str, str]:
    """The shortest unique trailing part of each path, without `.tar`."""
    parts = {shard: re.sub(r"\.tar$", "", shard).split("/") for shard in shards}
    names: dict[str, str] = {}
    for depth in range(1, max((len(part) for part in parts.values()), default=0) + 1):
        ends = {shard: "/".join(parts[shard][-depth:]) for shard in shards if shard not in names}
        counts = Counter(ends.values())
        names.update({shard: end for shard, end in ends.items() if counts[end] == 1})
    return {shard: names.get(shard, shard) for shard in shards}


def counted(suffixes: Mapping[str, int]) -> str:
    """Text such as `.csv 2, .mp4 12` with the eight most frequent suffixes."""
    shown = sorted(suffixes.items(), key=lambda pair: (-pair[1], pair[0]))
    more = [f"others {sum(count for _, count in shown[8:])}"] if len(shown) > 8 else []
    return ", ".join([*(f"{_printable(suffix)} {count}" for suffix, count in sorted(shown[:8])), *more])


def _printable(suffix: str) -> str:
    return (suffix or "none") if suffix.isprintable() else ascii(suffix)


def normal(name: str) -> str:
    """A name in one Unicode normal form, because operating systems decompose characters differently."""
    return unicodedata.normalize("NFC", name)
