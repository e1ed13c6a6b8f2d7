"""Decoding of mask files into class numbers, with checks against the classes and the image.

A mask that does not fit its image makes the image unreadable with a reason, so that no error occurs later in training.
Ignored pixels have the value `IGNORED` in the array; they count in no loss and in no metric.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tifffile
from PIL import Image, UnidentifiedImageError

from corpus.decoding import DAMAGED, EMPTY, MAX_PIXELS, NOT_AN_IMAGE, TOO_MANY_PIXELS
from runtime.artefacts import plain
from runtime.errors import UserError

#: Value of a pixel that has no class.
IGNORED = 255
MOST_CLASSES = 255
MISSING = "missing"
#: Prefix of the reason if the image is readable but its mask is not.
PREFIX = "mask: "
NOTHING = "nothing but ignored pixels"
NO_PIXELS = "no pixels"
NOT_WHOLE = "values that are no whole numbers"
NO_COLOURS = "colours, but no corpus.mask_colours"
NO_NUMBERS = "numbers deeper than 8 bits, but corpus.mask_colours asks for colours"
DEEP_COLOURS = "colours deeper than 8 bits"
#: Suffixes of mask files in a folder.
SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg", ".webp", ".pgm", ".ppm", ".npy")

_MASK_ENDING = re.compile(r"[_.-](?:masks?|labels?|lbl|seg|gt|target)$", re.IGNORECASE)
_IMAGE_ENDING = re.compile(r"[_.-](?:images?|img|sat|rgb)$", re.IGNORECASE)
_HEX = re.compile(r"#?([0-9a-fA-F]{6})")
_TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NUMPY = b"\x93NUMPY"
_ORIENTATION, _BITS = 274, 258
#: Factors by which Pillow multiplies values of 2 and 4 bits to spread them over 0..255.
_SPREAD = {2: 85, 4: 17}
#: Functions that turn an array upright, by EXIF orientation.
_TURNS = {
    2: lambda mask: mask[:, ::-1],
    3: lambda mask: mask[::-1, ::-1],
    4: lambda mask: mask[::-1],
    5: lambda mask: mask.T,
    6: lambda mask: np.rot90(mask, -1),
    7: lambda mask: mask[::-1, ::-1].T,
    8: lambda mask: np.rot90(mask),
}


class Sample(NamedTuple):
    """A decoded image, uint8 [R, R, 3], and its mask, uint8 [R, R]."""

    image: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class MaskRule:
    """Meaning of the pixel values of mask files; an empty rule belongs to a corpus without masks.

    Attributes:
        classes: names of the class numbers 0, 1, …
        ignored: numbers in the file whose pixels have no class.
        numbers: class number, or `IGNORED`, for each number in the file; None: the file holds class numbers.
        colours: class number, or `IGNORED`, for each colour 0xRRGGBB; None: masks are not coloured.
    """

    classes: tuple[str, ...] = ()
    ignored: tuple[float, ...] = ()
    numbers: Mapping[float, int] | None = None
    colours: Mapping[int, int] | None = None

    def __bool__(self) -> bool:
        return bool(self.classes)

    def of_number(self, value: float) -> int | str:
        """The class number of a number in a file, or `IGNORED`, or the reason why it has none."""
        if any(value == ignored or (value != value and ignored != ignored) for ignored in self.ignored):
            return IGNORED
        if not (math.isfinite(value) and value == int(value)):
            return NOT_WHOLE
        if self.numbers is not None:
            return self.numbers.get(value, f"value {int(value)} is none of corpus.mask_values")
        return int(value) if 0 <= value < len(self.classes) else f"class {int(value)} of {len(self.classes)}"

    def of_colour(self, value: int) -> int | str:
        """The class number of a colour 0xRRGGBB, or `IGNORED`, or the reason why it has none."""
        known = self.colours or {}
        return known.get(value, f"colour #{value:06x} is none of the {len(known)}")


def mask_rule(classes: Sequence[str] = (), ignore: Any = None, values: Any = None, colours: Any = None) -> MaskRule:
    """Make the rule from the configuration keys `classes`, `mask_ignore`, `mask_values` and `mask_colours`.

    Args:
        classes: names of the classes; empty: the names in `values` or `colours`, in their order.
        ignore: a number, or a list of numbers and colours ("#rrggbb"), whose pixels are ignored.
        values: mapping from a number in the file to a class name or number; null: ignored.
        colours: mapping from a class name to its colour, [r, g, b] or "#rrggbb", or to a list of colours.
    Raises:
        UserError: there are too many classes, a class is unknown, or a number or a colour is invalid.
    """
    ignore, values, colours = plain(ignore), plain(values), plain(colours)
    for key, result in (("mask_values", values), ("mask_colours", colours)):
        if result is not None and not isinstance(result, dict):
            raise UserError(f"corpus.{key}={result} is not a mapping: see docs/corpora.md, Masks")
    if values is not None and colours is not None:
        raise UserError("corpus.mask_values and corpus.mask_colours exclude each other: give one of them")
    names = (classes,) if isinstance(classes, str) else tuple(str(name) for name in classes)
    if not names and colours is not None:
        names = tuple(colours)
    elif not names and values is not None:
        names = tuple(dict.fromkeys(name for name in values.values() if isinstance(name, str)))
    if len(names) > MOST_CLASSES:
        raise UserError(f"corpus.classes has {len(names)} names: masks hold at most {MOST_CLASSES} classes")
    if not names and any(option is not None for option in (ignore, values, colours)):
        raise UserError("the options corpus.mask_… need the class names: give corpus.classes=[water,forest,…]")
    listed = [] if ignore is None else ignore if isinstance(ignore, list) else [ignore]
    requested = {
        colour: IGNORED for item in listed if isinstance(item, str) for colour in _colours(item, "mask_ignore")
    }
    if requested and colours is None:
        raise UserError("corpus.mask_ignore contains colours: give corpus.mask_colours too")
    return MaskRule(
        classes=names,
        ignored=tuple(float(item) for item in listed if not isinstance(item, str) and _is_number(item, "mask_ignore")),
        numbers=None if values is None else {_key(key): _class_of(name, names) for key, name in values.items()},
        colours=None if colours is None else {**_by_colour(colours, names), **requested},
    )


def _is_number(item: Any, key: str) -> bool:
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return True
    raise UserError(f"corpus.{key} has {item}, which is not a number: give numbers, or colours as '#rrggbb'")


def _key(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"corpus.mask_values has the key {text}, which is not a number: {{0: name, 255: name}}"
        ) from None


def _class_of(name: Any, names: Sequence[str]) -> int:
    """The number of a class that is given by name or number; `IGNORED` for None."""
    if name is None:
        return IGNORED
    if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(names):
        return name
    if str(name) in names:
        return names.index(str(name))
    raise UserError(f"the mask class {name} is not in corpus.classes=[{','.join(names)}]: give one of these")


def _by_colour(colours: Mapping[str, Any], names: Sequence[str]) -> dict[int, int]:
    result: dict[int, int] = {}
    for name, given in colours.items():
        for colour in _colours(given, "mask_colours"):
            if result.setdefault(colour, _class_of(name, names)) != _class_of(name, names):
                raise UserError(
                    f"corpus.mask_colours gives #{colour:06x} to two classes: give each class its own colour"
                )
    return result


def _colours(given: Any, key: str) -> list[int]:
    """Colours 0xRRGGBB of a value "#rrggbb" or [r, g, b], or of a list of such values."""
    if isinstance(given, str) and (match := _HEX.fullmatch(given.strip())):
        return [int(match[1], 16)]
    if isinstance(given, list) and len(given) == 3 and all(isinstance(part, int) and 0 <= part < 256 for part in given):
        return [given[0] << 16 | given[1] << 8 | given[2]]
    if isinstance(given, list) and given and all(isinstance(part, (str, list)) for part in given):
        return [colour for part in given for colour in _colours(part, key)]
    raise UserError(f"corpus.{key} has {given}, which is not a colour: give [r,g,b] of 0 to 255, or '#rrggbb'")


# ------------------------------------------------------------------------------------------------------------ decoding


def with_mask(image: np.ndarray, resolution: int, rule: MaskRule, mask: bytes | str, stored: bytes) -> Sample | str:
    """A decoded image with its mask, or the reason why the mask is invalid.

    Args:
        image: the decoded image, uint8 [R, R, 3].
        resolution: side R in pixels.
        rule: meaning of the pixel values of the mask.
        mask: the bytes of the mask's file, or the reason why it cannot be read.
        stored: the bytes of the image's file, to compare the shapes of image and mask.
    """
    result = mask if isinstance(mask, str) else decode_mask(mask, rule, resolution, stored)
    return PREFIX + result if isinstance(result, str) else Sample(image, result)


def decode_mask(data: bytes, rule: MaskRule, resolution: int, image: bytes | None = None) -> np.ndarray | str:
    """The central square of a mask, uint8 [R, R] of class numbers and `IGNORED`, or the reason why it is invalid.

    The mask is resized by nearest neighbour. The values of a palette image are its indices, or its colours if the rule
    has `colours`. Transparency is ignored. A mask may be larger or smaller than its image, but it must have the same
    aspect ratio. The mask is turned by its EXIF orientation, or by that of the image if it has none.

    Args:
        data: the bytes of the mask's file.
        rule: meaning of the pixel values.
        resolution: side R in pixels.
        image: the bytes of the image's file; None: its shape is unknown.
    """
    if not data:
        return EMPTY
    read = _read(data, rule.colours is not None)
    if isinstance(read, str):
        return read
    values, own = read
    if not values.size:
        return NO_PIXELS
    classes = _classes(values, rule)
    if isinstance(classes, str):
        return classes
    upright = _upright(classes, own, None if image is None else _stored(image))
    if isinstance(upright, str):
        return upright
    side = min(upright.shape)
    rows, columns = (
        (length - side) // 2 + (np.arange(resolution) * 2 + 1) * side // (2 * resolution) for length in upright.shape
    )
    result = upright[np.ix_(rows, columns)]
    return NOTHING if (result == IGNORED).all() else result


#: Numbers [H, W] or colours uint8 [H, W, 3], and the EXIF orientation or None.
_Read = tuple[np.ndarray, int | None]


def _read(data: bytes, coloured: bool) -> _Read | str:
    try:
        return _from_numpy(data) if data.startswith(_NUMPY) else _from_pillow(data, coloured)
    except Image.DecompressionBombError:
        return TOO_MANY_PIXELS
    except Exception as error:  # decoders may raise any exception for unknown formats
        if data.startswith(_TIFFS):
            return _from_gdal(data, coloured)
        return NOT_AN_IMAGE if isinstance(error, UnidentifiedImageError) else DAMAGED


def _from_numpy(data: bytes) -> _Read | str:
    file = io.BytesIO(data)
    versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, kind = versions[np.lib.format.read_magic(file)](file)
    if math.prod(shape) > MAX_PIXELS:
        return TOO_MANY_PIXELS
    if kind.hasobject or math.prod(shape) * kind.itemsize > len(data) - file.tell():
        return DAMAGED
    values = np.load(io.BytesIO(data), allow_pickle=False)
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    return _banded(np.atleast_3d(values), None) if values.ndim in (2, 3) else f"{values.ndim} dimensions, not two"


def _from_pillow(data: bytes, coloured: bool) -> _Read | str:
    """Read a mask with Pillow.

    Raises:
        ValueError: the file is a TIFF with several bands of 16 bits, of which Pillow would drop the lower byte.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > MAX_PIXELS:
            return TOO_MANY_PIXELS
        tags = getattr(image, "tag_v2", None)
        bits = data[24] if image.format == "PNG" else max((tags or {}).get(_BITS, (8,)))
        if bits > 8 and image.mode[0] not in "IF":
            if tags is None:
                return DEEP_COLOURS
            raise ValueError(f"{image.mode} of {bits} bits")
        own = (image.getexif() if tags is None else tags).get(_ORIENTATION)
        own = own if tags is None or own is None else 1  # Pillow turns a TIFF while it loads it
        if image.mode[0] in "IF":
            return np.asarray(image), own
        if not coloured and image.mode in ("1", "L", "P", "LA", "PA"):
            values = np.atleast_3d(np.asarray(image))[..., 0].astype(np.uint8)
            return values // (_SPREAD.get(bits, 1) if image.mode == "L" else 1), own
        return np.asarray(image.convert("RGB")), own


def _from_gdal(data: bytes, coloured: bool) -> _Read | str:
    """Read a TIFF that Pillow does not support, for example with 64-bit floats or another codec."""
    import rasterio

    try:
        with (
            rasterio.Env(CPL_LOG_ERRORS="OFF", GDAL_PAM_ENABLED="NO"),
            rasterio.MemoryFile(data) as memory,
            memory.open(driver="GTiff") as raster,  # other formats may name other files
        ):
            if raster.width * raster.height * raster.count > MAX_PIXELS:
                return TOO_MANY_PIXELS
            values = np.moveaxis(raster.read(), 0, -1)
            if coloured and raster.colorinterp[0] == rasterio.enums.ColorInterp.palette:
                palette = np.zeros((max(256, int(values.max()) + 1), 3), np.uint8)
                for index, colour in raster.colormap(1).items():
                    palette[index] = colour[:3]
                values = palette[values[..., 0]]
    except Exception:
        return DAMAGED
    return _banded(values, (_stored(data) or (0, 0, None))[2])


def _banded(values: np.ndarray, own: int | None) -> _Read | str:
    """Values [H, W, C] as numbers if there is one band, or three equal bands; otherwise as colours."""
    bands = values.shape[2]
    if bands == 1 or (bands == 3 and (values == values[..., :1]).all()):
        return values[..., 0], own
    if bands in (3, 4):
        return DEEP_COLOURS if values.dtype != np.uint8 else (values[..., :3], own)
    return f"{bands} bands, not one"


def _classes(values: np.ndarray, rule: MaskRule) -> np.ndarray | str:
    """Class numbers uint8 [H, W] for the values of a file, or the reason why they are invalid."""
    if rule.colours is not None:
        if values.dtype not in (np.uint8, np.bool_):
            return NO_NUMBERS
        parts = values.astype(np.uint32) if values.ndim == 3 else np.repeat(values[..., None].astype(np.uint32), 3, 2)
        return _looked_up(parts[..., 0] << 16 | parts[..., 1] << 8 | parts[..., 2], rule.of_colour)
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            return NO_COLOURS
        values = values[..., 0]
    return _looked_up(values, rule.of_number)


def _looked_up(values: np.ndarray, class_of: Callable[[float], int | str]) -> np.ndarray | str:
    """Apply `class_of` once to each distinct value; returns uint8 [H, W] or the first reason that it gives."""
    if values.dtype.kind not in "buif":
        return NOT_WHOLE
    values = values.astype({"b": np.uint8, "f": np.float64}.get(values.dtype.kind, values.dtype.newbyteorder("=")))
    result = np.sort(pd.unique(values.ravel()))
    table = np.zeros(len(result), np.uint8)
    for position, value in enumerate(result.tolist()):
        number = class_of(value)
        if isinstance(number, str):
            return number
        table[position] = number
    return table[np.searchsorted(result, values)]


def _upright(mask: np.ndarray, own: int | None, stored: tuple[int, int, int | None] | None) -> np.ndarray | str:
    """The mask turned like its image, or the reason why it does not fit the image.

    Args:
        own: EXIF orientation in the mask's file.
        stored: height, width and EXIF orientation in the image's file.
    """
    mask = _TURNS[own](mask) if own in _TURNS else mask
    if stored is None:
        return mask
    height, width, turn = stored
    seen = (width, height) if turn in (5, 6, 7, 8) else (height, width)
    as_stored = turn in _TURNS and own not in _TURNS and _alike(mask.shape, (height, width))
    if as_stored and (own is None or not _alike(mask.shape, seen)):
        return _TURNS[turn](mask)
    if _alike(mask.shape, seen):
        return mask
    return f"{mask.shape[1]} x {mask.shape[0]} for an image of {seen[1]} x {seen[0]}"


def _alike(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two shapes have the same aspect ratio, up to the rounding of the smaller one."""
    small, large = sorted((first, second))
    return abs(small[1] - large[1] * small[0] / large[0]) < 1 and abs(small[0] - large[0] * small[1] / large[1]) < 1


def _stored(image: bytes) -> tuple[int, int, int | None] | None:
    """Height, width and EXIF orientation from the header of an image's file; None: unknown."""
    try:
        if image.startswith(_TIFFS):
            with tifffile.TiffFile(io.BytesIO(image)) as file:
                page = file.pages[0]
                tag = page.tags.get(_ORIENTATION)
                return page.imagelength, page.imagewidth, None if tag is None else int(tag.value)
        with Image.open(io.BytesIO(image)) as opened:
            given = (
                opened.format != "PNG" or b"eXIf" in image or b"tiff:Orientation" in image
            )  # otherwise Pillow would decode the image
            return opened.height, opened.width, opened.getexif().get(_ORIENTATION) if given else None
    except Exception:  # in this format only the decoder knows the shape
        return None


# -------------------------------------------------------------------------------------------------------------- folders


def matching(images: Iterable[str], masks: Iterable[str]) -> dict[str, str]:
    """Match images and masks by the names of their files; returns the mask of each image that has one.

    A mask matches if the names are equal except for the suffix; if the mask's name has a usual ending for masks
    (`x_mask.png`, `x-label.tif`, `x.seg.png`) or the image's name a usual ending for images (`x_sat.jpg`); or if the
    mask's name contains the whole name of the image (`x.jpg.png`).

    Args:
        images: POSIX paths relative to the folder of images.
        masks: POSIX paths relative to the folder of masks.
    """
    plain_names: dict[str, str] = {}
    ended: dict[str, str] = {}
    for mask in sorted(masks):
        name = _name(mask)
        plain_names.setdefault(name, mask)
        if base := _MASK_ENDING.sub("", name):
            ended.setdefault(base, mask)
    result = {}
    for image in images:
        name = _name(image)
        base = _IMAGE_ENDING.sub("", name)
        positions = ((plain_names, name), (ended, name), (ended, base), (plain_names, image))
        if mask := next((names[key] for names, key in positions if key in names), None):
            result[image] = mask
    return result


def masks_in_same_folder(files: Sequence[str]) -> dict[str, str]:
    """The mask of each image if both are in one folder: masks are the files whose names have a usual mask ending."""
    masks = [file for file in files if _MASK_ENDING.search(_name(file))]
    known = set(masks)
    return matching((file for file in files if file not in known), masks)


def _name(file: str) -> str:
    return PurePosixPath(file).with_suffix("").as_posix()
