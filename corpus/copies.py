"""Detection of images with identical bytes, without reading most files completely."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from corpus.decoding import LARGEST_FILE
from runtime.progress import progress

#: Number of bytes at either end that are compared before whole files are.
END = 4096
#: Number of results to keep, so that the splits of one corpus share one search.
_KEPT = 4
_answers: dict[Hashable, np.ndarray] = {}


def firsts_of(
    corpus: str, ids: Sequence[str], sizes: Sequence[int], read: Callable[[int, bool], bytes], key: Hashable
) -> np.ndarray:
    """For each image, the position of the first image by id that has the same bytes, int64 [N].

    Images of equal size are compared by both ends; images whose ends agree are compared completely.

    Args:
        corpus: name of the corpus, for messages.
        ids: ids of the N images.
        sizes: size of each image in bytes; an image of size 0 is left out.
        read: (position, whole) -> all bytes of an image, or the bytes of its ends (`ends`); an image for which it
            raises an OSError is left out.
        key: everything that the result depends on; the result is kept under this key for the next call.
    """
    if key not in _answers:
        while len(_answers) >= _KEPT:
            _answers.pop(next(iter(_answers)))
        _answers[key] = _result(corpus, ids, sizes, read)
    return _answers[key]


def _result(corpus: str, ids: Sequence[str], sizes: Sequence[int], read: Callable[[int, bool], bytes]) -> np.ndarray:
    keys: list[Hashable] = [size or None for size in sizes]
    for whole in (False, True):
        again = [at for at in _repeated(keys) if not whole or sizes[at] > 2 * END]
        for at in progress(again, f"search for exact copies in {corpus}", unit="image"):
            try:
                keys[at] = (keys[at], hashlib.blake2b(read(at, whole), digest_size=16).digest())
            except OSError:
                keys[at] = None
    return by_key(ids, keys)


def _repeated(keys: Sequence[Hashable]) -> list[int]:
    groups = defaultdict(list)
    for at, key in enumerate(keys):
        if key is not None:
            groups[key].append(at)
    return sorted(at for group in groups.values() if len(group) > 1 for at in group)


def by_key(ids: Sequence[str], keys: Iterable[Hashable]) -> np.ndarray:
    """For each image, the position of the first image by id with the same key, int64 [N]; None equals no other key."""
    first: dict[Hashable, int] = {}
    listed = list(keys)
    for at, key in enumerate(listed):
        if key is not None and (key not in first or ids[at] < ids[first[key]]):
            first[key] = at
    return np.array([at if key is None else first[key] for at, key in enumerate(listed)], dtype=np.int64)


def ends(file: BinaryIO, start: int, size: int, whole: bool) -> bytes:
    """The bytes of an image inside an open file: all of them if `whole`, otherwise those at both ends."""
    file.seek(start)
    if whole or size <= 2 * END:
        return file.read(size)
    head = file.read(END)
    file.seek(start + size - END)
    return head + file.read(END)


def of_files(corpus: str, ids: Sequence[str], files: Sequence[Path | None], key: Hashable) -> np.ndarray:
    """`firsts_of` for local files; an image without a file (None) equals no other."""
    sizes = [0 if file is None else _size(file) for file in files]

    def read(at: int, whole: bool) -> bytes:
        with open(files[at], "rb") as file:
            return ends(file, 0, sizes[at], whole)

    return firsts_of(corpus, ids, sizes, read, key)


def _size(file: Path) -> int:
    try:
        size = file.stat().st_size if file.is_file() else 0
    except OSError:
        return 0
    return 0 if size > LARGEST_FILE else size  # the manifest reports that it is too large
