"""Source for a folder of images: scenes from sub-folders, captions and masks from files next to the images."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from corpus.captions import (
    TABLE,
    caption_metadata,
    chosen_classes,
    class_list,
    decoded,
    label_list,
    own_captions,
    row_scene,
    sample_captions,
    scalars,
    scene_name,
    table_rows,
)
from corpus.copies import of_files
from corpus.decoding import EMPTY, read_bytes, stacked_tiff, survey_files
from corpus.footprints import grounds_of
from corpus.masks import MISSING, MaskRule, Sample, mask_rule, masks_in_same_folder, matching
from corpus.masks import SUFFIXES as MASK_SUFFIXES
from corpus.matching import Images, Rows
from corpus.names import (
    CLASS_FILES,
    HEAD,
    IMAGE_SUFFIXES,
    METADATA_SUFFIX,
    SHALLOW,
    counted,
    extra_suffixes,
    honest_suffix,
    image_suffix,
    kind_of,
    suffix_of,
)
from corpus.raster import Survey, spread
from corpus.reading import Decoding, Shown
from corpus.splits import assigned, check, elsewhere, folder_split, split_of, thinned
from corpus.stacks import grouped, place_of, scene_folders
from runtime.artefacts import file_stamp
from runtime.errors import UserError
from runtime.notices import notice


@dataclass(frozen=True)
class _Listing:
    """The files below a root, as sorted POSIX paths relative to the root.

    Attributes:
        beside: text and metadata files by the image that they accompany.
        passed_over: number of all other files, by suffix.
        stacked: files of the images with one file per band, by place; `images` contains the places.
        left_out: further files of these places.
    """

    images: list[str]
    tables: list[str]
    beside: dict[str, list[str]]
    classes: list[str]
    passed_over: Counter[str]
    stacked: dict[str, tuple[str, ...]]
    left_out: list[str]


@dataclass(frozen=True)
class ImageFolder(Shown):
    """Images at any depth below `root`, cropped to their central square and resized.

    A file is an image if it has a suffix of `corpus.names.IMAGE_SUFFIXES` or begins like an image. If `root`, or a
    folder with the name of a split, has a folder `images`, only that folder is read; masks and metadata lie next to it.
    Hidden files and folders are skipped. A linked folder is followed once, unless it leads back inside the root. The
    scene is the first sub-folder without the name of a split (`corpus.splits.split_of`), else the scene that the row of
    the image in a table names. A folder that cannot be listed becomes a row of the manifest with a reason. Files that
    are neither images nor data about images are counted on stderr.

    Captions and metadata come from tables (`corpus.captions.TABLE`) anywhere below the root or in its folder
    `annotations`, else from a text or JSON file with the name of the image next to it.

    Args:
        root: the folder.
        split: "all", "train", "val" or "test". The split of an image is the one that its row in a table names
            (`split`), else its folder if that has the name of a split, else one by a hash. The hash is of its ground
            cell if its file has a location (`corpus.footprints`), else of its id. `corpus.splits` has the names of
            splits and the rules for a split that the names leave out.
        resolution: side of the resulting images in pixels.
        val_fraction, test_fraction: fractions of the images that the hash holds out.
        limit: largest number of images to keep, evenly spread over the split in the order of ids (None: all).
        masks: folder of masks, arranged and named like the images (`corpus.masks.matching`), relative to `root` or an
            independent path; ".": the masks are next to the images; None: there are no masks.
        classes, mask_ignore, mask_values, mask_colours: meaning of the pixel values of masks
            (`corpus.masks.mask_rule`); `masks` requires the names of the classes.
        image_suffixes: further suffixes of images.
        class_names: names of scenes that are given as numbers: a list, or a file with a list; None:
            `corpus.names.CLASS_FILES` in the root, if there is one.
        bands, no_data, stretch, low, high: options for rasters, as in `corpus.raster.RasterOptions`. If bands are given
            by name (B04), files with one band each are stacked as well (`corpus.stacks`); the id is then their path
            without the band.
        content_hash: detect changed images by their bytes, which requires reading all files; otherwise by size and time
            of change.
        workers: number of decoding processes (None: one per core); the result does not depend on it.
    Raises:
        UserError: no root is given, it is not a folder, the split is unknown, there are no images, a caption table or a
            file of class names cannot be read, masks have no folder or no class names, or the files have one band each
            and `bands` is not given.
    """

    root: str | None = None
    split: str = "all"
    resolution: int = 64
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    limit: int | None = None
    masks: str | None = None
    classes: tuple[str, ...] = ()
    image_suffixes: tuple[str, ...] = ()
    class_names: Any = None
    mask_ignore: Any = None
    mask_values: Any = None
    mask_colours: Any = None
    content_hash: bool = False
    workers: int | None = field(default=None, metadata={"fingerprint": False})
    name: str = "folder"

    def __post_init__(self) -> None:
        if self.root is None:
            raise UserError("corpus=folder needs a folder of images: give corpus.root=DIR")
        if not self._root.is_dir():
            what = "is not a folder" if self._root.exists() else "does not exist"
            raise UserError(f"corpus.root={self.root} {what}: give a folder of images with corpus.root=DIR")
        check(self.split, self.val_fraction, self.test_fraction, self.limit, self.resolution)
        _ = self.raster
        if self.masks is not None and not self._mask_root.is_dir():
            raise UserError(
                f"corpus.masks={self.masks} is not a folder: give the folder of masks, below the root or elsewhere"
            )
        if self.masks is not None and not self.mask_rule:
            raise UserError("corpus.masks needs the names of the mask values: corpus.classes=[water,forest,…]")
        if self.masks is None and any(o is not None for o in (self.mask_ignore, self.mask_values, self.mask_colours)):
            raise UserError("the options corpus.mask_… need masks: give their folder with corpus.masks=DIR")

    @property
    def version(self) -> dict[str, str]:
        """A digest of the path and stamp of every file; it changes if a file is added, removed or rewritten."""
        digest = hashlib.sha256()
        for file in (*self._files, *self._about):
            digest.update(f"{file}\0{self._stamps[file]}\0".encode("utf-8", "surrogateescape"))
        if isinstance(self.class_names, str):
            digest.update(file_stamp(Path(self.class_names).expanduser(), content_hash=True).encode())
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
        """Table with one row per image, sorted by id.

        The columns are id (POSIX path relative to the root), scene, caption ("": none) and stamp. There are further
        columns for the numbers and texts of an image's row or JSON file, `captions` if an image has several, `ground`
        if most images have a location on Earth, and `copy_in` if images have exact copies in other splits. A report on
        the images goes to stderr.
        """
        self._report()
        return pd.DataFrame(
            [
                {**self._metadata(file), "stamp": self._stamps[file] + self.survey.stamp, **self._shared(file)}
                for file in self._chosen
            ],
            columns=None if self._chosen else ["id", "scene", "caption", "stamp"],
        )

    def reader(self, rows: np.ndarray) -> Callable[[], Iterator[np.ndarray | Sample | str]]:
        files = [self._chosen[row] for row in rows]
        parts = [self._listing.stacked.get(file, file) for file in files]
        masks = [self._masks.get(file) for file in files]
        decoding = Decoding(self.resolution, self.raster, self.survey, self.mask_rule)
        return partial(_read_files, self._root, parts, masks, decoding)

    @cached_property
    def survey(self) -> Survey:
        """Survey of files that are evenly spread over the folder, independent of the split that is read."""
        stacked = self._listing.stacked
        files = [file for file in self._files if file in stacked or suffix_of(file) not in SHALLOW]
        data = (_bytes_of(self._root, stacked.get(files[place], files[place])) for place in spread(len(files)))
        return survey_files((part for part in data if not isinstance(part, str)), self.raster)

    @property
    def files(self) -> list[Path]:
        """The files of all images, without masks."""
        stacked = self._listing.stacked
        return [self._root / part for file in self._files for part in stacked.get(file, (file,))]

    def path(self, row: int) -> Path:
        """The file of the image in a row of the manifest.

        Raises:
            UserError: the image has one file per band.
        """
        if self._chosen[row] in self._listing.stacked:
            raise UserError(f"{self._chosen[row]} has one file per band, so it cannot be linked: take to=folder")
        return self._root / self._chosen[row]

    def originals(self, rows: np.ndarray) -> Iterator[tuple[bytes, str, tuple[bytes, str] | None]]:
        """Yield the bytes and suffix of each image's file, and the bytes and suffix of its mask's file or None.

        An image with one file per band is converted into a GeoTIFF of the bands that are shown, with unchanged values.

        Raises:
            UserError: a file no longer exists.
        """
        for row in rows:
            file = self._chosen[row]
            mask = self._masks.get(file)
            image = _bytes_of(self._root, self._listing.stacked.get(file, file))
            parts = [image, *(() if mask is None else (read_bytes(mask),))]
            if not isinstance(image, (bytes, str)):
                parts[0] = stacked_tiff(image, self.raster)
            for part in parts:
                if isinstance(part, str):
                    raise UserError(f"{self._root / file} can no longer be read ({part}): prune again, or restore it")
            suffix = ".tif" if file in self._listing.stacked else honest_suffix(parts[0], Path(file).suffix.lower())
            yield parts[0], suffix, None if mask is None else (parts[1], mask.suffix.lower())

    @property
    def _mask_root(self) -> Path:
        return self._root / Path(str(self.masks)).expanduser()

    @cached_property
    def _masks(self) -> dict[str, Path]:
        """The file of the mask of each image that has one."""
        if self.masks is None:
            return {}
        root, listed = self._mask_root, self._listing.images
        if root in (self._root, self._root / "images"):
            pairs = masks_in_same_folder([*listed, *self._listing.left_out]).items()
            return {image: self._root / mask for image, mask in pairs if image in set(listed)}
        masks = [
            (Path(folder) / name).relative_to(root).as_posix()
            for folder, _, names in os.walk(root)
            for name in names
            if name.lower().endswith(MASK_SUFFIXES) and not name.startswith(".")
        ]
        positions = {file.removeprefix("images/"): file for file in listed}
        result = matching(positions, masks)
        if unused := sorted(set(masks) - set(result.values())):
            notice(f"{self.name}: masks: {len(unused):,} of {len(masks):,} files match no image (e.g. {unused[0]})")
        return {positions[image]: root / mask for image, mask in result.items()}

    @cached_property
    def _stamps(self) -> dict[str, str]:
        """Stamp of each image with its mask, for detecting changes: a digest of bytes, or size and time of change."""
        stamps = {}
        for file in (*self._files, *self._about):
            parts = self._listing.stacked.get(file, (file,))
            stamps[file] = "+".join(file_stamp(self._root / part, self.content_hash) for part in parts)
            if file in self._masks:
                stamps[file] += "+" + file_stamp(self._masks[file], self.content_hash)
        return stamps

    @property
    def _root(self) -> Path:
        return Path(str(self.root)).expanduser()

    @cached_property
    def _listing(self) -> _Listing:
        images, others, tables, passed = [], [], [], Counter()

        def closed(error: OSError) -> None:
            if Path(error.filename) == self._root:
                raise UserError(f"{self._root} cannot be listed ({error.strerror}): make it readable") from None
            images.append(Path(error.filename).relative_to(self._root).as_posix())  # becomes a row with a reason

        extra = extra_suffixes(self.image_suffixes)
        for folder, names, only in self._folders_below(closed):
            below = folder.relative_to(self._root).as_posix()
            for name in names:
                file = name if below == "." else f"{below}/{name}"
                kind = kind_of(name, None, extra)
                if TABLE.fullmatch(name.lower().rpartition("/")[2]):
                    tables.append(file)
                elif not only and (kind in ("image", "mask") or (kind == "?" and _begins_as_image(folder / name))):
                    images.append(file)
                elif kind in ("text", "metadata"):
                    others.append(file)
                elif not only and kind != "companion":
                    passed[suffix_of(name)] += 1
        if not images:
            raise UserError(
                f"corpus.root={self.root} has no images ({', '.join(IMAGE_SUFFIXES)}) at any depth: give another folder"
                + (f"; {sum(passed.values())} files are something else: {counted(passed)}" if passed else "")
            )
        stacked, left_out = grouped(self.name, self._root, sorted(images), self.bands)
        if stacked:
            gone = left_out | {file for files in stacked.values() for file in files}
            images = [*stacked, *(file for file in images if file not in gone)]
        beside = _beside(images, others, stacked)
        classes = [file for file in others if file.lower() in CLASS_FILES]
        known = {*classes, *(file for files in beside.values() for file in files)}
        passed.update(suffix_of(file) for file in others if file not in known)
        return _Listing(
            sorted(images), sorted(tables), beside, sorted(classes), passed, stacked=stacked, left_out=sorted(left_out)
        )

    def _folders_below(self, closed: Callable[[OSError], None]) -> Iterator[tuple[Path, list[str], bool]]:
        """Yield every folder, the names of its files, and whether only its tables and class names are used."""
        masks = None if self.masks is None else self._mask_root
        followed = _Links(self._root)
        for folder, folders, names in os.walk(self._root, onerror=closed, followlinks=True):
            here = Path(folder)
            folders[:] = [
                name for name in folders if not (name.startswith(".") or here / name == masks) and followed(here / name)
            ]
            only = (here == self._root or split_of(here.name) != "") and (here / "images").is_dir()
            if only:
                folders[:] = ["images"]
                if here == self._root:
                    yield self._root, _annotations(self._root), True
            yield here, [name for name in names if not name.startswith(".")], only

    @cached_property
    def _files(self) -> list[str]:
        masks = set(self._masks.values())
        return [file for file in self._listing.images if not masks or self._root / file not in masks]

    @property
    def _about(self) -> list[str]:
        """Files with captions, metadata or class names."""
        beside = sorted({file for files in self._listing.beside.values() for file in files})
        return [*self._listing.tables, *beside, *self._listing.classes]

    @cached_property
    def _tables(self) -> Rows:
        result = Rows(Images(self._root, self._files))
        for file in self._listing.tables:
            before = result.count
            for name, row in table_rows(str(self._root / file), _data(self._root / file)):
                result.add(name, row, PurePosixPath(file).parent.as_posix())
            if result.count == before:
                notice(f"{self.name}: {file} does not name its images: add a column or field file_name")
        return result

    @cached_property
    def _rows(self) -> dict[str, dict]:
        """Data about the images from tables and from the files that accompany them."""
        rows = self._tables.rows()
        for image, files in self._listing.beside.items():
            texts = [decoded(_data(self._root / file)) for file in files if suffix_of(file) != METADATA_SUFFIX]
            metadata = next(
                (_object(_data(self._root / file)) for file in files if suffix_of(file) == METADATA_SUFFIX), {}
            )
            row = {**metadata, **rows.get(image, {})}
            captions = own_captions(rows.get(image, {})) or sample_captions(texts, metadata)["captions"]
            rows[image] = {**row, "captions": captions}
        return rows

    @cached_property
    def _class_names(self) -> tuple[str, ...]:
        if self.class_names is None and self._listing.classes:
            return class_list(_data(self._root / self._listing.classes[0]))
        return chosen_classes(self.class_names)

    def _report(self) -> None:
        """Print one line on stderr for each kind of finding about the images."""
        captions = [len(texts) for row in self._rows.values() if (texts := own_captions(row))]
        if captions:
            notice(
                f"{self.name}: {len(captions)} of {len(self._files)} images have captions ({sum(captions)} captions)"
            )
        lost, rows = self._tables.lost, self._tables.count
        if lost:
            notice(f"{self.name}: {len(lost)} of {rows} caption rows match no image, e.g. {lost[0]!r}")
        passed = self._listing.passed_over
        if passed:
            notice(f"{self.name}: {sum(passed.values())} files ignored: {counted(passed)}")

    @property
    def _paths(self) -> list[Path]:
        """The file of every image; for an image with one file per band, the first of them."""
        return [self._root / self._listing.stacked.get(file, (file,))[0] for file in self._files]

    @cached_property
    def _grounds(self) -> list[tuple[str, ...]]:
        """The ground cells that every file touches, () for a file without a location."""
        return grounds_of(self.name, self._paths, (str(self._root), self.version["files"]))

    @cached_property
    def _cell(self) -> dict[str, str]:
        """The ground cell of every file, "" if it touches several; empty if most files have no location."""
        placed = sum(cells != () for cells in self._grounds)
        cells = (touched[0] if len(touched) == 1 else "" for touched in self._grounds)
        return dict(zip(self._files, cells, strict=True)) if 2 * placed > len(self._files) else {}

    @cached_property
    def _splits(self) -> tuple[list[str], dict[str, str]]:
        """The split of every file, and, for files with copies in other splits, these splits."""
        ids, names = [_identifier(file) for file in self._files], [self._split_name(file) for file in self._files]
        firsts = of_files(self.name, ids, self._paths, (str(self._root), self.version["files"]))
        splits = assigned(self.name, ids, names, self.val_fraction, self.test_fraction, firsts, self._grounds)
        copies = zip(self._files, elsewhere(self.name, splits, firsts), strict=True)
        return splits, {file: others for file, others in copies if others}

    @cached_property
    def _chosen(self) -> list[str]:
        """The files of the split, reduced to the limit."""
        files = self._files
        if self.split != "all":
            files = [file for file, split in zip(files, self._splits[0], strict=True) if split == self.split]
        return [files[row] for row in thinned(len(files), self.limit)]

    def _shared(self, file: str) -> dict[str, str]:
        """Ground cell of an image and other splits with a copy of it; all images have these columns, or none has."""
        copies = {} if self.split == "all" else self._splits[1]
        ground = {"ground": self._cell[file]} if self._cell else {}
        return {**ground, **({"copy_in": copies.get(file, "")} if copies else {})}

    def _split_name(self, file: str) -> str:
        """Name of the split in an image's row or folder, or ""."""
        named = self._rows.get(file, {}).get("split")
        return str(named) if named else folder_split(tuple(file.split("/")[:-1]))[0]

    def _metadata(self, file: str) -> dict[str, Any]:
        row = self._rows.get(file, {})
        folders = scene_folders(file) if file in self._listing.stacked else tuple(file.split("/")[:-1])
        folder = folder_split(folders)[1]
        scene = scene_name(_identifier(folder), self._class_names) or row_scene(row, self._class_names)
        captions = caption_metadata(row, scene, label_list(row, self._class_names))
        return {"id": _identifier(file), "scene": scene, **captions, **scalars(row)}


def _begins_as_image(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return image_suffix(file.read(HEAD)) != ""
    except OSError:
        return False


def _annotations(root: Path) -> list[str]:
    """Tables in the folder `annotations` next to the folder of images, as in COCO."""
    try:
        names = sorted(os.listdir(root / "annotations"))
    except OSError:
        return []
    return [f"annotations/{name}" for name in names if TABLE.fullmatch(name.lower())]


def _beside(images: Sequence[str], others: Sequence[str], positions: Collection[str]) -> dict[str, list[str]]:
    """Text and metadata files by the image of the same name, with or without its suffix; metadata also by a stack."""
    stems = {file[: -len(suffix_of(file))] if suffix_of(file) else file: file for file in reversed(images)}
    stems.update({file: file for file in images})
    result: dict[str, list[str]] = {}
    for file in sorted(others):
        image = stems.get(file[: -len(suffix_of(file))])
        if image is None and positions and suffix_of(file) == METADATA_SUFFIX:
            image = place_of(file, positions)
        if image is not None:
            result.setdefault(image, []).append(file)
    return result


def _data(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: the file cannot be read.
    """
    data = read_bytes(path)
    if isinstance(data, bytes):
        return data
    if data != EMPTY:
        raise UserError(f"{path} cannot be read ({data}): make it readable, or remove it")
    return b""


def _object(data: bytes) -> dict[str, Any]:
    try:
        result = json.loads(decoded(data) or "{}")
    except (ValueError, RecursionError):
        return {}
    return result if isinstance(result, dict) else {}


def _bytes_of(root: Path, file: str | tuple[str, ...]) -> bytes | list[bytes] | str:
    """The bytes of a file, or of each of several files, or the reason why one cannot be read."""
    if isinstance(file, str):
        return read_bytes(root / file)
    parts = [read_bytes(root / part) for part in file]
    return next((part for part in parts if isinstance(part, str)), parts)


def _read_files(
    root: Path, files: Sequence[str | tuple[str, ...]], masks: Sequence[Path | None], decoding: Decoding
) -> Iterator[np.ndarray | Sample | str]:
    for file, mask in zip(files, masks, strict=True):
        needed = bool(decoding.masks) and mask is not None
        yield decoding(_bytes_of(root, file), read_bytes(mask) if needed else MISSING)


class _Links:
    """Decides which folders below a root are searched.

    A link to a folder inside the root is not followed, because the folder itself is searched; a link to a folder
    outside is followed once.
    """

    def __init__(self, root: Path) -> None:
        self._inside, self._seen = os.path.realpath(root), set()

    def __call__(self, folder: Path) -> bool:
        if not folder.is_symlink():
            return True
        target = os.path.realpath(folder)
        known = target in self._seen or os.path.commonpath([target, self._inside]) in (target, self._inside)
        self._seen.add(target)
        return not known


def _identifier(text: str) -> str:
    """The text as valid Unicode: bytes of a file name that are not UTF-8 become \\xNN."""
    if text.isprintable() and "\\" not in text:
        return text
    # a backslash in the name before text like such an escape is doubled, so that different names give different ids
    text = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\\\", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
