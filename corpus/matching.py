"""Matching of the rows of caption tables with images, for different spellings of an image's path."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from corpus.captions import own_captions
from corpus.names import IMAGE_SUFFIXES, normal, suffix_of

#: Value for a key that several images share.
_SEVERAL = ""


class Images:
    """The images below a root, which can be found by different spellings of their paths.

    The spellings are tried in this order; each counts only if it leads to exactly one image:

    1. the path as it is written;
    2. with `./`, `..` and backslashes resolved, and relative to the root even if it is absolute or begins with the
       name of the root;
    3. in the other Unicode normal form;
    4. in another case or without `images/`;
    5. with fewer folders than the path of the image;
    6. with another image suffix, or without a suffix.
    """

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self._root, self._files = root, files
        self._exact = set(files)

    def find(self, name: str, folder: str) -> tuple[str, bool] | None:
        """Find the image that `name` refers to in a table in `folder` ("." for the root).

        Returns:
            the path of the image, and whether `name` is its exact path; None if no image or more than one matches.
        """
        for place in (posixpath.join(folder, name), posixpath.join(folder, "images", name)):
            if posixpath.normpath(place) in self._exact:
                return posixpath.normpath(place), True
        positions = list(self._candidates(name, folder))
        for table, key in ((self._by_form, normal), (self._loose, _loose_key), (self._stems, _stem_key)):
            for place, sure in positions:
                if file := table.get(key(place), _SEVERAL):
                    return file, sure and table is self._by_form
            if table is self._loose and (result := self._below(name, folder)):
                return result, False
        return None

    def _candidates(self, name: str, folder: str) -> Iterator[tuple[str, bool]]:
        """Paths below the root that the name may refer to, the most likely first, and whether each is exact."""
        name = re.sub(r"^file://", "", name).replace("\\", "/")
        if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
            yield from self._of_absolute(posixpath.normpath(name))
            return
        own = os.path.abspath(self._root)
        for start in dict.fromkeys((folder, ".")):
            place = posixpath.normpath(posixpath.join(own, start, name))
            if place.startswith(own.rstrip("/") + "/"):
                yield posixpath.relpath(place, own), True
        parts, above = posixpath.normpath(name).split("/"), [part.casefold() for part in Path(own).parts]
        for count in range(min(len(parts) - 1, len(above)), 0, -1):
            if [part.casefold() for part in parts[:count]] == above[-count:]:
                yield "/".join(parts[count:]), True

    def _of_absolute(self, name: str) -> Iterator[tuple[str, bool]]:
        """Candidates for an absolute path: relative to the root, after the root's name, or without leading folders."""
        for own in dict.fromkeys((os.path.abspath(self._root), os.path.realpath(self._root))):
            if name.startswith(own.rstrip("/") + "/"):
                yield posixpath.relpath(name, own), True
        parts = name.split("/")
        called = os.path.basename(os.path.abspath(self._root)).casefold()
        for at in range(len(parts) - 2, -1, -1):
            if parts[at].casefold() == called:
                yield "/".join(parts[at + 1 :]), False
        for at in range(1, len(parts) - 1):
            yield "/".join(parts[at:]), False

    def _below(self, name: str, folder: str) -> str:
        """The only image below the table's folder whose path ends with this name, "" if there is not exactly one."""
        name = posixpath.normpath(name.replace("\\", "/"))
        file = "" if name.startswith(("/", "..")) else self._tails.get(_loose_key(name), _SEVERAL)
        inside = folder in (".", "annotations") or file.startswith(folder + "/")
        return file if inside else ""

    @cached_property
    def _by_form(self) -> dict[str, str]:
        return _one_each((normal(file), file) for file in self._files)

    @cached_property
    def _loose(self) -> dict[str, str]:
        return _one_each((_loose_key(file), file) for file in self._files)

    @cached_property
    def _stems(self) -> dict[str, str]:
        return _one_each((_stem_key(file), file) for file in self._files)

    @cached_property
    def _tails(self) -> dict[str, str]:
        """Files by every trailing part of their paths."""
        parts = ((_loose_key(file).split("/"), file) for file in self._files)
        return _one_each(("/".join(part[at:]), file) for part, file in parts for at in range(1, len(part)))


def _one_each(pairs: Iterator[tuple[str, str]]) -> dict[str, str]:
    result: dict[str, str] = {}
    for key, file in pairs:
        result[key] = file if result.get(key, file) == file else _SEVERAL
    return result


def _loose_key(path: str) -> str:
    return "/".join(part for part in normal(path).casefold().split("/") if part != "images")


def _stem_key(path: str) -> str:
    key = _loose_key(path)
    suffix = suffix_of(key)
    return key[: -len(suffix)] if suffix in IMAGE_SUFFIXES else key


class Rows:
    """Rows of tables by image: metadata of the first row, captions of all rows, and the rows that match no image."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self._of: dict[str, list[tuple[bool, dict[str, Any]]]] = {}
        self.count, self.lost = 0, []

    def add(self, name: str, row: dict[str, Any], folder: str) -> None:
        """Add a row of a table in `folder` for the image that `name` refers to."""
        self.count += 1
        result = self._images.find(name, folder)
        if result is None:
            self.lost.append(name)
        else:
            self._of.setdefault(result[0], []).append((result[1], row))

    def rows(self) -> dict[str, dict[str, Any]]:
        """One row per image with all its captions; if a row names an image exactly, approximate matches are ignored."""
        return {file: _merged(rows) for file, rows in self._of.items()}


def _merged(rows: Sequence[tuple[bool, Mapping[str, Any]]]) -> dict[str, Any]:
    if len(rows) == 1:
        return dict(rows[0][1])
    exact = any(sure for sure, _ in rows)
    kept = [row for sure, row in rows if sure or not exact]
    merged: dict[str, Any] = {}
    for row in reversed(kept):
        merged |= {key: value for key, value in row.items() if value not in (None, "")}
    captions = list(dict.fromkeys(text for row in kept for text in own_captions(row)))
    return {**merged, "captions": captions} if captions else merged
