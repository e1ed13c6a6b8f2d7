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
from corpus.decoding import decode_image, read_bytes
from corpus.masks import MISSING, MaskRule, Sample, beside, mask_rule, matching, with_mask
from corpus.masks import SUFFIXES as MASK_SUFFIXES
from corpus.splits import NAMES, assigned, check, thinned
from runtime.artefacts import file_stamp
from runtime.errors import UserError
from runtime.notices import notice

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
        masks: folder of masks, placed and named like the images (`corpus.masks.matching`), below `root` or a path of
            its own; "." where they lie beside the images; None: there are none.
        classes, mask_ignore, mask_values, mask_colours: what is in the masks (`corpus.masks.mask_rule`); `masks` needs
            the names of the classes.
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
    mask_ignore: Any = None
    mask_values: Any = None
    mask_colours: Any = None
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
        if self.masks is not None and not self.mask_rule:
            raise UserError("corpus.masks needs the names of the mask values: corpus.classes=[water,forest,…]")
        if self.masks is None and any(o is not None for o in (self.mask_ignore, self.mask_values, self.mask_colours)):
            raise UserError("corpus.mask_… is about masks: say where they are with corpus.masks=DIR")

    @property
    def version(self) -> dict[str, str]:
        """A digest of every file's path and stamp: any added, removed or rewritten file shows."""
        digest = hashlib.sha256()
        for file in (*self._files, *self._caption_files):
            digest.update(f"{file}\0{self._stamps[file]}\0".encode("utf-8", "surrogateescape"))
        return {"files": digest.hexdigest()[:16]}

    @cached_property
    def mask_rule(self) -> MaskRule:
        if self.masks is None:
            return MaskRule()
        return mask_rule(self.classes, self.mask_ignore, self.mask_values, self.mask_colours)

    @property
    def mask_classes(self) -> tuple[str, ...]:
        return self.mask_rule.classes

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
        masks = [self._masks.get(file) for file in files]
        return partial(_read_files, self._root, files, masks, self.mask_rule, self.resolution)

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
            mask = self._masks.get(self._chosen[row])
            parts = [read_bytes(file) for file in (path, mask) if file is not None]
            for part in parts:
                if isinstance(part, str):
                    raise UserError(f"{path} cannot be read any more ({part}): prune again, or put it back")
            yield parts[0], path.suffix.lower(), None if mask is None else (parts[1], mask.suffix.lower())

    @property
    def _mask_root(self) -> Path:
        return self._root / Path(str(self.masks)).expanduser()

    @cached_property
    def _masks(self) -> dict[str, Path]:
        """The file of the mask of each image that has one."""
        if self.masks is None:
            return {}
        root, listed = self._mask_root, self._listing[0]
        if root in (self._root, self._root / "images"):
            return {image: self._root / mask for image, mask in beside(listed).items()}
        masks = [
            (Path(folder) / name).relative_to(root).as_posix()
            for folder, _, names in os.walk(root)
            for name in names
            if name.lower().endswith(MASK_SUFFIXES) and not name.startswith(".")
        ]
        places = {file.removeprefix("images/"): file for file in listed}
        found = matching(places, masks)
        if unused := sorted(set(masks) - set(found.values())):
            notice(f"{self.name}: masks: {len(unused):,} of {len(masks):,} files match no image (e.g. {unused[0]})")
        return {places[image]: root / mask for image, mask in found.items()}

    @cached_property
    def _stamps(self) -> dict[str, str]:
        """What changes with a file's bytes: a digest of them, or its size and time of change; a mask's with it."""
        stamps = {}
        for file in (*self._files, *self._caption_files):
            stamps[file] = file_stamp(self._root / file, self.content_hash)
            if file in self._masks:
                stamps[file] += "+" + file_stamp(self._masks[file], self.content_hash)
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

    @cached_property
    def _files(self) -> list[str]:
        masks = set(self._masks.values())
        return [file for file in self._listing[0] if not masks or self._root / file not in masks]

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
    root: Path, files: Sequence[str], masks: Sequence[Path | None], rule: MaskRule, resolution: int
) -> Iterator[np.ndarray | Sample | str]:
    for file, mask in zip(files, masks, strict=True):
        data = read_bytes(root / file)
        image = data if isinstance(data, str) else decode_image(data, resolution)
        if rule and not isinstance(image, str):
            yield with_mask(image, resolution, rule, MISSING if mask is None else read_bytes(mask), data)
        else:
            yield image


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
