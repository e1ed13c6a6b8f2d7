"""A folder of images: scenes from sub-folders, captions and masks from beside them, broken files counted."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from corpus.captions import caption_facts, scalars
from corpus.decoding import NO_MASK, decode_mask, read_bytes, read_image
from corpus.index import Sample
from corpus.splits import NAMES, assigned, check, thinned
from runtime.artefacts import file_stamp
from runtime.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif")
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")


@dataclass(frozen=True)
class ImageFolder:
    """Images at any depth below `root`, cropped to their central square and resized.

    Where `root` has a folder `images`, only that one is read: masks and metadata lie beside it. Hidden files and
    folders are passed over, linked folders are not entered. The scene is the first sub-folder, a leading one that is
    called as a split (`corpus.splits.NAMES`) left aside. A folder that cannot be listed is a row of the manifest whose
    reason says so.

    Args:
        root: the folder.
        split: "all", "train", "val" or "test". An image is of the split that its caption row names (`split`), else of
            the folder it lies in if that is called as a split, else of the one that a hash of its id gives;
            `corpus.splits` has the names, and the rule for a split that they leave out.
        resolution: side of the images handed on, in pixels.
        val_share, test_share: shares of the images that the hash holds out.
        limit: keep at most so many images, evenly spread over the split in id order (None: all).
        masks: folder of masks, named and placed like the images whatever their suffix, below `root` or a path of its
            own; None: there are none.
        classes: names of the mask values 0, 1, …; needed with `masks`.
        content_hash: an image has changed if its bytes have, all of which are read for it; otherwise if its size or
            time of change has.
        workers: decoding processes (None: one a core); the result does not depend on it.
    Raises:
        UserError: no root given, not a folder, unknown split, no images, a caption file that is no JSON lines, or
            masks without a folder or names.
    """

    root: str | None = None
    split: str = "all"
    resolution: int = 64
    val_share: float = 0.1
    test_share: float = 0.1
    limit: int | None = None
    masks: str | None = None
    classes: tuple[str, ...] = ()
    content_hash: bool = False
    workers: int | None = field(default=None, metadata={"fingerprint": False})
    name: str = "folder"

    def __post_init__(self) -> None:
        if self.root is None:
            raise UserError("corpus=folder reads no folder yet: say which one with corpus.root=DIR")
        if not self._root.is_dir():
            what = "is not a folder" if self._root.exists() else "does not exist"
            raise UserError(f"corpus.root={self.root} {what}: give a folder of images with corpus.root=DIR")
        check(self.split, self.val_share, self.test_share, self.limit, self.resolution)
        if self.masks is not None and not self._mask_root.is_dir():
            raise UserError(
                f"corpus.masks={self.masks} is no folder: give the folder of masks, below the root or elsewhere"
            )
        if self.masks is not None and not 0 < len(self.classes) <= 256:
            raise UserError("corpus.masks needs the names of the mask values: corpus.classes=[water,forest,…]")

    @property
    def version(self) -> dict[str, str]:
        """A digest of every file's path and stamp: any added, removed or rewritten file shows."""
        digest = hashlib.sha256()
        for file in (*self._files, *self._caption_files):
            digest.update(f"{file}\0{self._stamps[file]}\0".encode("utf-8", "surrogateescape"))
        return {"files": digest.hexdigest()[:16]}

    @property
    def mask_classes(self) -> tuple[str, ...]:
        return tuple(self.classes) if self.masks is not None else ()

    def manifest(self) -> pd.DataFrame:
        """One row an image, sorted by id: id (POSIX path below the root), scene, caption ("" for none), stamp.

        Also `captions` where an image has several, and the numbers and texts of its row in the caption file.
        """
        return pd.DataFrame(
            [{**self._facts(file), "stamp": self._stamps[file]} for file in self._chosen],
            columns=None if self._chosen else ["id", "scene", "caption", "stamp"],
        )

    def reader(self, rows: np.ndarray) -> Callable[[], Iterator[np.ndarray | Sample | str]]:
        files = [self._chosen[row] for row in rows]
        masks = None if self.masks is None else [self._mask_of(file) for file in files]
        return partial(_read_files, self._root, files, masks, self.resolution)

    def path(self, row: int) -> Path:
        """The file of a manifest row."""
        return self._root / self._chosen[row]

    def originals(self, rows: np.ndarray) -> Iterator[tuple[bytes, str, tuple[bytes, str] | None]]:
        """The bytes and suffix of every image file, and those of its mask or None.

        Raises:
            UserError: a file is no longer there.
        """
        for row in rows:
            path = self.path(row)
            mask = None if self.masks is None else self._mask_of(self._chosen[row])
            parts = [read_bytes(file) for file in (path, mask) if file is not None]
            for part in parts:
                if isinstance(part, str):
                    raise UserError(f"{path} cannot be read any more ({part}): prune again, or put it back")
            yield parts[0], path.suffix.lower(), None if mask is None else (parts[1], mask.suffix.lower())

    @property
    def _mask_root(self) -> Path:
        return self._root / Path(str(self.masks)).expanduser()

    def _mask_of(self, file: str) -> Path | None:
        """The mask whose path without suffix is the image's."""
        inside = PurePosixPath(file)
        if inside.parts[0] == "images":
            inside = inside.relative_to("images")
        return self._mask_files.get(inside.with_suffix("").as_posix())

    @cached_property
    def _mask_files(self) -> dict[str, Path]:
        found = {}
        for folder, _, files in os.walk(self._mask_root):
            for name in sorted(files):
                if name.lower().endswith(SUFFIXES):
                    path = Path(folder) / name
                    found.setdefault(path.relative_to(self._mask_root).with_suffix("").as_posix(), path)
        return found

    @cached_property
    def _stamps(self) -> dict[str, str]:
        """What changes with a file's bytes: a digest of them, or its size and time of change; a mask's with it."""
        stamps = {}
        for file in (*self._files, *self._caption_files):
            stamps[file] = file_stamp(self._root / file, self.content_hash)
            mask = None if self.masks is None or file in self._caption_files else self._mask_of(file)
            if mask is not None:
                stamps[file] += "+" + file_stamp(mask, self.content_hash)
        return stamps

    @property
    def _root(self) -> Path:
        return Path(str(self.root)).expanduser()

    @cached_property
    def _listing(self) -> tuple[list[str], list[str]]:
        """Image files and caption files as POSIX paths below the root, each sorted."""
        images, captions = [], []
        inside = self._root / "images"
        masks = None if self.masks is None else self._mask_root

        def closed(error: OSError) -> None:
            if Path(error.filename) == self._root:
                raise UserError(f"{self._root} cannot be listed ({error.strerror}): make it readable") from None
            images.append(Path(error.filename).relative_to(self._root).as_posix())  # a row whose reason says so

        followed = _Links(self._root)
        for folder, folders, files in os.walk(self._root, onerror=closed, followlinks=True):
            folders[:] = [
                name
                for name in folders
                if not (name.startswith(".") or Path(folder) / name == masks) and followed(Path(folder) / name)
            ]
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
        files = self._files
        if self.split != "all":
            ids, names = [_identifier(file) for file in files], [self._split_name(file) for file in files]
            splits = assigned(self.name, ids, names, self.val_share, self.test_share)
            files = [file for file, split in zip(files, splits, strict=True) if split == self.split]
        return [files[row] for row in thinned(len(files), self.limit)]

    def _split_name(self, file: str) -> str:
        """What an image's row or folder calls its split, or ""."""
        named = self._rows.get(file, {}).get("split")
        folders = self._folders(file)
        inside = folders[0] if folders and folders[0].lower() in NAMES else ""
        return str(named) if named else inside

    def _folders(self, file: str) -> tuple[str, ...]:
        """The folders an image lies in, below `root` or `root/images`."""
        folders = PurePosixPath(file).parts[:-1]
        return folders[1:] if folders and folders[0] == "images" else folders

    def _facts(self, file: str) -> dict[str, Any]:
        folders = self._folders(file)
        if folders and folders[0].lower() in NAMES:
            folders = folders[1:]
        scene = _identifier(folders[0]) if folders else ""
        row = self._rows.get(file, {})
        return {"id": _identifier(file), "scene": scene, **caption_facts(row, scene), **scalars(row)}


def _read_files(
    root: Path, files: Sequence[str], masks: Sequence[Path | None] | None, resolution: int
) -> Iterator[np.ndarray | Sample | str]:
    for position, file in enumerate(files):
        image = read_image(root / file, resolution)
        if masks is None or isinstance(image, str):
            yield image
            continue
        data = NO_MASK if masks[position] is None else read_bytes(masks[position])
        mask = data if isinstance(data, str) else decode_mask(data, resolution)
        yield f"mask: {mask}" if isinstance(mask, str) else Sample(image, mask)


class _Links:
    """Which folders below a root to go into: a link to one inside is met there anyway, one outside is followed once."""

    def __init__(self, root: Path) -> None:
        self._inside, self._seen = os.path.realpath(root), set()

    def __call__(self, folder: Path) -> bool:
        if not folder.is_symlink():
            return True
        target = os.path.realpath(folder)
        known = target in self._seen or os.path.commonpath([target, self._inside]) in (target, self._inside)
        self._seen.add(target)
        return not known


def _read_rows(path: Path) -> Iterator[dict]:
    """The objects of a JSON-lines caption file, each with a `file_name`."""
    try:
        opened = path.open(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable, or remove it") from None
    with opened as lines:
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
    if text.isprintable() and "\\" not in text:
        return text
    # a backslash of the name's own before such an escape is doubled, so that two names never give one id
    text = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\\\", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
