"""Images of equal bytes, found without reading most of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from corpus.decoding import LARGEST_FILE
from runtime.progress import progress

#: Bytes of either end that are compared before the whole.
END = 4096
#: The last answers, so that the splits of one corpus do not each look for them.
_KEPT = 4
_answers: dict[Hashable, np.ndarray] = {}


def firsts_of(
    corpus: str, ids: Sequence[str], sizes: Sequence[int], read: Callable[[int, bool], bytes], key: Hashable
) -> np.ndarray:
    """Of each image the position of the first by id among those with the same bytes, int64 [N].

    Those of one size are compared by both ends, those that agree there by the whole.

    Args:
        sizes: bytes of each image; 0: left out.
        read: (position, whole) -> all bytes of an image or those of its ends (`ends`); an OSError leaves it out.
        key: what the answer depends on; it is kept for the next call.
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
        for at in progress(again, f"look for copies in {corpus}", unit="image"):
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
    """Of each image the position of the first by id among those with the same key, int64 [N]; None is like no other."""
    first: dict[Hashable, int] = {}
    listed = list(keys)
    for at, key in enumerate(listed):
        if key is not None and (key not in first or ids[at] < ids[first[key]]):
            first[key] = at
    return np.array([at if key is None else first[key] for at, key in enumerate(listed)], dtype=np.int64)


def ends(file: BinaryIO, start: int, size: int, whole: bool) -> bytes:
    """The bytes of an image that lies in an open file, or those of both its ends."""
    file.seek(start)
    if whole or size <= 2 * END:
        return file.read(size)
    head = file.read(END)
    file.seek(start + size - END)
    return head + file.read(END)


def of_files(corpus: str, ids: Sequence[str], files: Sequence[Path | None], key: Hashable) -> np.ndarray:
    """`firsts_of` of files on the disk; None is like no other."""
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
    return 0 if size > LARGEST_FILE else size  # its row says that it is too large
