"""A folder of images: scenes from sub-folders, captions from a JSON-lines file beside them, broken files counted."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from corpus.decoding import read_image
from corpus.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
_SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}


@dataclass(frozen=True)
class ImageFolder:
    """Images at any depth below `root`, cropped to their central square and resized.

    Where `root` has a folder `images`, only that one is read: masks and metadata lie beside it. Hidden files and
    folders are passed over, linked folders are not entered. The scene is the first sub-folder, a leading `train`,
    `test` or `val` left aside.

    Args:
        root: the folder.
        split: "all", "train" or "test". An image is of the split that its caption row names (`split`), else of the
            `train`, `test` or `val` folder it lies in, else of the one that a hash of its id gives; all that a row or
            folder names beside "train" is held out.
        resolution: side of the images handed on, in pixels.
        test_share: share of the images that the hash holds out.
        limit: keep at most so many images, evenly spread over the split in id order (None: all).
        workers: decoding processes (None: one a core); the result does not depend on it.
    Raises:
        UserError: no root given, not a folder, unknown split, no images, or a caption file that is no JSON lines.
    """

    root: str | None = None
    split: str = "all"
    resolution: int = 64
    test_share: float = 0.1
    limit: int | None = None
    workers: int | None = field(default=None, metadata={"fingerprint": False})
    name: str = "folder"

    def __post_init__(self) -> None:
        if self.root is None:
            raise UserError("corpus=folder reads no folder yet: say which one with corpus.root=DIR")
        if not self._root.is_dir():
            what = "is not a folder" if self._root.exists() else "does not exist"
            raise UserError(f"corpus.root={self.root} {what}: give a folder of images with corpus.root=DIR")
        if self.split not in ("all", "train", "test"):
            raise UserError(f"corpus.split={self.split!r} is unknown: a folder has the splits all, train and test")
        if self.resolution < 1:
            raise UserError(f"corpus.resolution={self.resolution} is no image size: give the side in pixels")
        if not 0 <= self.test_share < 1:
            raise UserError(f"corpus.test_share={self.test_share} is outside [0, 1): give the share to hold out")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"corpus.limit={self.limit} keeps nothing: give at least 1, or null for all")

    @property
    def version(self) -> dict[str, str]:
        """A digest of every file's path, size and time of change: any added, removed or rewritten file shows."""
        digest = hashlib.sha256()
        for file in (*self._files, *self._caption_files):
            try:
                facts = (self._root / file).stat()
                size, changed = facts.st_size, facts.st_mtime_ns
            except OSError:  # a dangling link, counted as unreadable later
                size, changed = -1, -1
            digest.update(f"{file}\0{size}\0{changed}\0".encode("utf-8", "surrogateescape"))
        return {"files": digest.hexdigest()[:16]}

    @property
    def mask_classes(self) -> tuple[str, ...]:
        return ()

    def manifest(self) -> pd.DataFrame:
        """One row an image, sorted by id: id (POSIX path below the root), scene and caption ("" for none)."""
        rows = [self._facts(file) for file in self._chosen]
        return pd.DataFrame(rows, columns=["id", "scene", "caption"])

    def reader(self, rows: np.ndarray) -> Callable[[], Iterator[np.ndarray | str]]:
        return partial(_read_files, self._root, [self._chosen[row] for row in rows], self.resolution)

    @property
    def _root(self) -> Path:
        return Path(str(self.root)).expanduser()

    @cached_property
    def _listing(self) -> tuple[list[str], list[str]]:
        """Image files and caption files as POSIX paths below the root, each sorted."""
        images, captions = [], []
        inside = self._root / "images"
        for folder, folders, files in os.walk(self._root, onerror=_refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if Path(folder) == self._root and inside.is_dir():
                folders[:] = ["images"]
                files = [name for name in files if name in CAPTION_FILES]
            below = Path(folder).relative_to(self._root)
            for name in files:
                if name in CAPTION_FILES:
                    captions.append((below / name).as_posix())
                elif not name.startswith(".") and name.lower().endswith(SUFFIXES):
                    images.append((below / name).as_posix())
        if not images:
            raise UserError(
                f"corpus.root={self.root} has no images ({', '.join(SUFFIXES)}) at any depth: give another folder"
            )
        return sorted(images), sorted(captions)

    @property
    def _files(self) -> list[str]:
        return self._listing[0]

    @property
    def _caption_files(self) -> list[str]:
        return self._listing[1]

    @cached_property
    def _rows(self) -> dict[str, dict]:
        """Caption rows by the image file they are about; the first row about an image counts."""
        known, rows = set(self._files), {}
        for file in self._caption_files:
            folder = PurePosixPath(file).parent
            for row in _read_rows(self._root / file):
                for candidate in (folder / row["file_name"], folder / "images" / row["file_name"]):
                    if candidate.as_posix() in known:
                        rows.setdefault(candidate.as_posix(), row)
                        break
        return rows

    @cached_property
    def _chosen(self) -> list[str]:
        """Files of the split, thinned to the limit."""
        files = [file for file in self._files if self.split in ("all", self._split_of(file))]
        if self.limit is not None and self.limit < len(files):
            files = [files[index] for index in np.linspace(0, len(files) - 1, self.limit).round().astype(int)]
        return files

    def _split_of(self, file: str) -> str:
        named = self._rows.get(file, {}).get("split")
        if named:
            return "train" if str(named).lower() == "train" else "test"
        folders = self._folders(file)
        if folders and folders[0].lower() in _SPLIT_FOLDERS:
            return _SPLIT_FOLDERS[folders[0].lower()]
        number = int.from_bytes(hashlib.sha256(_identifier(file).encode()).digest()[:8], "big")
        return "test" if number < self.test_share * 2**64 else "train"

    def _folders(self, file: str) -> tuple[str, ...]:
        """The folders an image lies in, below `root` or `root/images`."""
        folders = PurePosixPath(file).parts[:-1]
        return folders[1:] if folders and folders[0] == "images" else folders

    def _facts(self, file: str) -> tuple[str, str, str]:
        folders = self._folders(file)
        if folders and folders[0].lower() in _SPLIT_FOLDERS:
            folders = folders[1:]
        scene = _identifier(folders[0]) if folders else ""
        row = self._rows.get(file, {})
        captions = row.get("captions") or [row.get("text") or row.get("caption")]
        caption = captions if isinstance(captions, str) else captions[0]
        if not isinstance(caption, str) or not caption.strip():
            caption = f"a satellite image of {_words(scene)}" if scene else ""
        return _identifier(file), scene, caption.strip()


def _read_files(root: Path, files: Sequence[str], resolution: int) -> Iterator[np.ndarray | str]:
    for file in files:
        yield read_image(root / file, resolution)


def _read_rows(path: Path) -> Iterator[dict]:
    """The objects of a JSON-lines caption file, each with a `file_name`."""
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row["file_name"], str):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f'{path}, line {number}, is not a JSON object with a "file_name": mend or remove that line'
                ) from None
            yield row


def _identifier(text: str) -> str:
    """The text as valid Unicode: bytes of a file name that are no UTF-8 become \\xNN."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _words(name: str) -> str:
    """`BaseballField`, `baseball_field` and `baseball-field` to "baseball field"."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.sub(r"[\s_-]+", " ", spaced).strip().lower()


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed ({error.strerror}): make it readable or move it away")
