"""Image files of any size, read and written in strips of rows.

PNG, JPEG and WebP are decoded at once, as uint8; TIFFs are read in windows. Every output is first written as a tiled
GeoTIFF, one row of blocks after the other; GDAL then copies it to the other formats line by line.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from corpus.masks import IGNORED
from corpus.raster import (
    Bands,
    Pixels,
    RasterOptions,
    Survey,
    choose_bands,
    has_data,
    is_deep,
    quiet_gdal,
    read_pixels,
    survey_of,
    to_rgb,
)
from runtime.errors import UserError
from runtime.notices import notice

if TYPE_CHECKING:
    from rasterio import Affine
    from rasterio.control import GroundControlPoint
    from rasterio.crs import CRS
    from rasterio.io import DatasetReader

RASTERS = (".tif", ".tiff")
#: GDAL's drivers and their options for the other formats, by the suffix of a file.
PICTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"QUALITY": 95}),
    ".jpeg": ("JPEG", {"QUALITY": 95}),
    ".webp": ("WEBP", {"LOSSLESS": "YES"}),
}
SUFFIXES = (*PICTURES, *RASTERS)
#: Longest side in pixels of the formats that have a limit.
LONGEST = {"JPEG": 65_500, "WEBP": 16_383}
#: Largest number of pixels of a picture that is decoded at once; larger ones are refused.
MOST_PIXELS = 2**29
#: Side of a written GeoTIFF's blocks; side of the overview from which levels are estimated; GDAL's cache in megabytes.
BLOCK, OVERVIEW, CACHE = 256, 512, 256
#: Largest number of different values in a mask.
MOST_VALUES = 2**16
_SHOWN = RasterOptions()
#: Factors by which Pillow scales values of 2 and 4 bits in grey PNGs to 0..255.
_SPREAD = {2: 85, 4: 17}
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class Strip(NamedTuple):
    """Rows of an image.

    Attributes:
        values: [h, W, 3] or [h, W].
        valid: bool [h, W], true where there is data; None: data everywhere.
    """

    values: np.ndarray
    valid: np.ndarray | None = None


@dataclass(frozen=True)
class Place:
    """Georeference of a raster, and its encoding of missing data.

    Attributes:
        empty: the value of a band for no data, 0..255; None: no such value.
        masked: whether a separate mask marks missing data.
    """

    crs: CRS | None = None
    transform: Affine | None = None
    control_points: tuple[Sequence[GroundControlPoint], CRS | None] = ((), None)
    empty: int | None = None
    masked: bool = False

    @property
    def known(self) -> bool:
        """Whether the ground location is known."""
        return self.crs is not None or self.transform is not None or bool(self.control_points[0])

    def enlarged(self, factor: int) -> Place:
        """The georeference after an enlargement: the same ground, with pixels of 1 / factor of the side."""
        from rasterio import Affine
        from rasterio.control import GroundControlPoint

        points, crs = self.control_points
        moved = [
            GroundControlPoint(point.row * factor, point.col * factor, point.x, point.y, point.z) for point in points
        ]
        transform = None if self.transform is None else self.transform * Affine.scale(1 / factor)
        return replace(self, transform=transform, control_points=(moved, crs))


class Source(Protocol):
    """An image that is read in strips.

    Attributes:
        place: None if the image is not a raster.
    """

    height: int
    width: int
    place: Place | None

    def rows(self, start: int, stop: int) -> Strip: ...


# ---------------------------------------------------------------- pictures, whole


@dataclass(frozen=True)
class Picture:
    """A decoded image, [H, W, 3] or [H, W], and the mask of its data."""

    values: np.ndarray
    valid: np.ndarray | None = None
    place: None = None

    @property
    def height(self) -> int:
        return self.values.shape[0]

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def rows(self, start: int, stop: int) -> Strip:
        return Strip(self.values[start:stop], None if self.valid is None else self.valid[start:stop])


def rgb_picture(image: Image.Image, name: str) -> Picture:
    """An opened image as colours uint8 [H, W, 3], upright; transparent pixels have no data.

    Conversions and omitted parts are reported in one line on stderr.

    Args:
        name: name of the image, for messages.
    Raises:
        UserError: it has two bands.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_MODES:
        notice(
            f"{name} is grey and deeper than 8 bits: its 2nd to 98th percentile becomes 0 to 255 in red, green and blue"
        )
        return Picture(_eight_bits(np.asarray(image)[..., None]))
    if image.mode in ("LA", "La"):
        raise UserError(_bands(name, 2))
    if image.mode in ("1", "L"):
        notice(f"{name} is grey: converted to red, green and blue")
    elif image.mode == "CMYK":
        notice(f"{name} is CMYK: converted to red, green and blue")
    elif image.mode in ("RGBA", "RGBa", "PA"):
        notice(f"{name}: its alpha band is left out")
    clear = image.mode in ("RGBA", "RGBa", "PA") or (image.mode == "P" and "transparency" in image.info)
    if not clear:
        return Picture(np.asarray(image if image.mode == "RGB" else image.convert("RGB")))
    values = np.asarray(image.convert("RGBA"))
    valid = values[..., 3] > 0
    return Picture(values[..., :3], None if valid.all() else valid)


def mask_picture(image: Image.Image, colours: Mapping[int, int], name: str) -> Picture:
    """An opened mask unchanged: numbers [H, W], or colours uint8 [H, W, 3].

    An image with a palette gives its colours if all of them are known, otherwise its indices.

    Args:
        colours: the known colours, 0xRRGGBB.
        name: name of the mask, for messages.
    Raises:
        UserError: it has two bands.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("LA", "La"):
        raise UserError(_bands(name, 2))
    if image.mode in _DEEP_MODES:
        return Picture(np.asarray(image))
    if image.mode in ("1", "L"):
        return Picture(np.asarray(image).astype(np.uint8) // _SPREAD.get(image.info.get("depth"), 1))
    if image.mode == "P":
        indices = np.asarray(image)
        table = np.zeros((256, 3), np.uint8)
        given = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        table[: len(given)] = given
        used = _keys(table[pd.unique(indices.ravel())], coloured=True)
        return Picture(table[indices] if set(used.tolist()) <= set(colours) else indices)
    if image.mode in ("RGBA", "RGBa", "PA"):
        notice(f"{name}: its alpha band is left out")
    return Picture(np.asarray(image.convert("RGB")))


@contextlib.contextmanager
def _decoded(path: Path) -> Iterator[Image.Image]:
    """Open an image that is not a TIFF, also with more pixels than Pillow allows by default.

    Raises:
        UserError: it is not an image, is damaged or far too large.
    """
    allowed, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with _readable(path), Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(
                    f"{path} has {image.width} x {image.height} pixels: give it as a GeoTIFF, which is read in windows"
                )
            if image.format == "PNG":
                with open(path, "rb") as file:
                    image.info["depth"] = file.read(25)[24]
            image.load()
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = allowed


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Values [H, W, 1] of more than 8 bits as colours uint8 [H, W, 3], stretched between percentiles of a sample."""
    survey = survey_of([Pixels(values)], _SHOWN)
    parts = [to_rgb(Pixels(values[top : top + BLOCK]), _SHOWN, survey) for top in range(0, len(values), BLOCK)]
    return np.concatenate(parts)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Context that converts decoders' errors to a UserError of one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it") from error
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is no image, or damaged ({reason}): replace or remove it") from error


def _bands(name: str | Path, count: int) -> str:
    return f"{name} has {count} bands: give an image with red, green and blue, or with one band of grey"


# ---------------------------------------------------------------- rasters, in windows


@dataclass(frozen=True)
class Raster:
    """An opened GeoTIFF as colours uint8 [h, W, 3].

    Attributes:
        survey: the levels for values of more than 8 bits, and whether a declared alpha band really is one.
    """

    path: Path
    dataset: DatasetReader
    bands: Bands
    survey: Survey

    @property
    def height(self) -> int:
        return self.dataset.height

    @property
    def width(self) -> int:
        return self.dataset.width

    @property
    def place(self) -> Place:
        first = self.bands.shown[0] - 1
        dtype, no_data = np.dtype(self.dataset.dtypes[first]), self.dataset.nodatavals[first]
        masked = _has_mask(self.dataset, first + 1) or self._is_alpha(dtype)
        fits = dtype == np.uint8 and no_data is not None and 0 <= no_data <= 255 and no_data == int(no_data)
        may_lack = not masked and (no_data is not None or dtype.kind == "f")
        return _place(self.dataset, int(no_data) if fits else 0 if may_lack else None, masked)

    def rows(self, start: int, stop: int) -> Strip:
        """Read a range of rows.

        Raises:
            UserError: the file is damaged there.
        """
        with _readable(self.path):
            pixels = read_pixels(self.dataset, self.bands, _SHOWN, _window(self.dataset, start, stop))
        valid = np.ones(pixels.values.shape[:2], bool) if pixels.valid is None else pixels.valid
        if pixels.alpha is not None and self._is_alpha(pixels.values.dtype):
            valid = valid & (pixels.alpha > 0)
        colours = to_rgb(pixels._replace(valid=None, alpha=None), _SHOWN, self.survey)
        return Strip(colours, None if valid.all() else valid)

    def _is_alpha(self, dtype: np.dtype) -> bool:
        return self.survey.alpha.get(f"{dtype.name} x {len(self.bands.shown)}", False)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Source]:
    """An image file as colours uint8; conversions and omitted parts are reported in one line on stderr.

    Raises:
        UserError: it is not an image, is damaged, or has an unsupported number of bands.
    """
    if path.suffix.lower() not in RASTERS:
        with _decoded(path) as image:
            picture = rgb_picture(image, str(path))
        yield picture
        return
    with _opened(path) as dataset:
        if dataset.count == 2 or dataset.count > 4:
            raise UserError(_bands(path, dataset.count))
        with _readable(path):
            bands = choose_bands(dataset, _SHOWN)
            shape = (min(dataset.height, OVERVIEW), min(dataset.width, OVERVIEW))
            pixels = read_pixels(dataset, bands, _SHOWN, shape=shape)
            raster = Raster(path, dataset, bands, survey_of([pixels], _SHOWN))
        _say_what_changes(raster, pixels)
        yield raster


def _say_what_changes(raster: Raster, pixels: Pixels) -> None:
    if pixels.values.shape[-1] == 1:
        notice(f"{raster.path} is grey: converted to red, green and blue")
    if raster.dataset.count == 4:
        alpha = raster.bands.alpha is not None and raster.survey.alpha.get(pixels.kind, False)
        shown = ", ".join(map(str, raster.bands.shown))
        notice(
            f"{raster.path}: its alpha band is left out, transparent pixels have no data"
            if alpha
            else f"{raster.path}: bands {shown} are taken as red, green, blue, the other one is left out"
        )
    if is_deep(pixels.values.dtype):
        levels = raster.survey.levels[pixels.kind]
        low, high = (", ".join(f"{level[end]:g}" for level in levels) for end in (0, 1))
        notice(f"{raster.path} is {pixels.values.dtype.name}: {low} become 0 and {high} become 255")


@dataclass(frozen=True)
class _MaskRaster:
    """An opened GeoTIFF of numbers [h, W] or colours uint8 [h, W, 3], unchanged."""

    path: Path
    dataset: DatasetReader
    palette: np.ndarray | None = None

    @property
    def height(self) -> int:
        return self.dataset.height

    @property
    def width(self) -> int:
        return self.dataset.width

    @property
    def place(self) -> Place:
        masked = _has_mask(self.dataset, 1)
        lacks = not masked and self.dataset.nodatavals[0] is not None
        return _place(self.dataset, 0 if lacks else None, masked)

    def rows(self, start: int, stop: int) -> Strip:
        window = _window(self.dataset, start, stop)
        with _readable(self.path):
            shown = [1] if self.dataset.count == 1 else [1, 2, 3]
            values = np.moveaxis(self.dataset.read(shown, window=window), 0, -1)
            valid = has_data(values, [self.dataset.nodatavals[band - 1] for band in shown])
            if _has_mask(self.dataset, 1):
                valid &= self.dataset.read_masks(1, window=window) > 0
        values = values if len(shown) == 3 else values[..., 0]
        if self.palette is not None:
            values = self.palette[np.minimum(values, 255)]
        return Strip(values, None if valid.all() else valid)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[DatasetReader]:
    """Open a GeoTIFF with a bounded cache of GDAL.

    Raises:
        UserError: it is not a GeoTIFF, or is damaged.
    """
    import rasterio

    with _gdal(), contextlib.ExitStack() as stack:
        with _readable(path):
            dataset = stack.enter_context(rasterio.open(path, driver="GTiff"))
        yield dataset


@contextlib.contextmanager
def _gdal() -> Iterator[None]:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with quiet_gdal(), rasterio.Env(GDAL_CACHEMAX=CACHE, GDAL_TIFF_INTERNAL_MASK=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _window(dataset: DatasetReader, start: int, stop: int) -> Any:
    from rasterio.windows import Window

    return Window(0, start, dataset.width, stop - start)


def _has_mask(dataset: DatasetReader, band: int) -> bool:
    """Whether a band has its own mask, in addition to a value for no data and an alpha band."""
    from rasterio.enums import MaskFlags

    flags = dataset.mask_flag_enums[band - 1]
    return MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags


def _place(dataset: DatasetReader, empty: int | None, masked: bool) -> Place:
    transform = None if dataset.transform.is_identity else dataset.transform
    return Place(dataset.crs, transform, dataset.gcps, empty, masked)


# ---------------------------------------------------------------- masks


@dataclass(frozen=True)
class Mask:
    """A mask as class numbers uint8 [h, W]; 255: no class.

    Attributes:
        of: source of its numbers or colours.
        coloured: whether `of` gives colours.
        keys: all occurring numbers, or colours 0xRRGGBB; int64, ascending.
        classes: uint8, the class of each key.
    """

    of: Source
    coloured: bool
    keys: np.ndarray
    classes: np.ndarray

    @property
    def height(self) -> int:
        return self.of.height

    @property
    def width(self) -> int:
        return self.of.width

    @property
    def place(self) -> Place | None:
        return self.of.place

    def rows(self, start: int, stop: int) -> Strip:
        strip = self.of.rows(start, stop)
        valid = np.ones(strip.values.shape[:2], bool) if strip.valid is None else strip.valid
        result = np.full(valid.shape, IGNORED, np.uint8)
        result[valid] = self.classes[np.searchsorted(self.keys, _keys(strip.values[valid], self.coloured))]
        return Strip(result, strip.valid)


@contextlib.contextmanager
def open_mask(path: Path, names: Sequence[str], colours: Mapping[int, int]) -> Iterator[Mask]:
    """Open a mask file after scanning it once.

    Args:
        names: names of the classes, indexed by their numbers.
        colours: class number, or 255, by colour 0xRRGGBB.
    Raises:
        UserError: it is not a mask, is damaged, has an unsupported number of bands, or has labels that the model lacks.
    """
    if path.suffix.lower() not in RASTERS:
        with _decoded(path) as image:
            picture = mask_picture(image, colours, str(path))
        yield checked_mask(picture, names, colours, str(path))
        return
    with _opened(path) as dataset:
        if dataset.count == 2 or dataset.count > 4:
            raise UserError(f"{path} has {dataset.count} bands: give a mask with one band, or with red, green and blue")
        if dataset.count == 4:
            notice(f"{path}: its fourth band is left out")
        raster = _MaskRaster(path, dataset)
        if dataset.count == 1 and dataset.colorinterp[0].name == "palette":
            table = np.zeros((256, 3), np.uint8)
            for index, colour in dataset.colormap(1).items():
                table[min(index, 255)] = colour[:3]
            coloured = replace(raster, palette=table)
            raster = coloured if set(_occurring(coloured, True).tolist()) <= set(colours) else raster
        yield checked_mask(raster, names, colours, str(path))


def checked_mask(source: Source, names: Sequence[str], colours: Mapping[int, int], name: str) -> Mask:
    """A source of numbers or colours as class numbers.

    Args:
        names, colours: as in `open_mask`.
        name: name of the mask, for messages.
    Raises:
        UserError: a value in it is not a class of the model.
    """
    try:
        coloured = source.rows(0, 1).values.ndim == 3
        keys = _occurring(source, coloured)
        return Mask(source, coloured, keys, classes_of(keys, coloured, len(names), colours))
    except Unknown as error:
        listed = f"0 ({names[0]}) to {len(names) - 1} ({names[-1]})"
        raise UserError(
            f"{name} has {error}: the model has {len(names)} classes, {listed}, 255 is unknown; give these numbers or "
            "the colours of the run's palette.json"
        ) from None


class Unknown(ValueError):
    """A value in a mask is not a class."""


def classes_of(keys: np.ndarray, coloured: bool, count: int, colours: Mapping[int, int]) -> np.ndarray:
    """The class of each number, or colour 0xRRGGBB, that occurs in a mask, uint8; 255: no class.

    If all colours are grey but not all are known, they are read as numbers.

    Args:
        keys: int64.
        count: number of classes.
        colours: class number, or 255, by colour.
    Raises:
        Unknown: there is no such class.
    """
    if coloured:
        unknown = [f"#{key:06x}" for key in keys.tolist() if key not in colours]
        if not unknown:
            return np.array([colours[key] for key in keys.tolist()], np.uint8)
        if (keys != (keys & 255) * 0x010101).any():
            raise Unknown(f"{'an unknown colour' if len(unknown) == 1 else 'unknown colours'} {_some(unknown)}")
        keys = keys & 255
    unknown = [str(key) for key in keys.tolist() if not 0 <= key < count and key != IGNORED]
    if unknown:
        raise Unknown(f"{'an unknown label' if len(unknown) == 1 else 'unknown labels'} {_some(unknown)}")
    return keys.astype(np.uint8)


def _some(values: Sequence[str], most: int = 6) -> str:
    return ", ".join(values[:most]) + (f" and {len(values) - most:,} more" if len(values) > most else "")


def _occurring(source: Source, coloured: bool) -> np.ndarray:
    """All numbers, or colours 0xRRGGBB, that occur in pixels with data, int64, ascending.

    Raises:
        Unknown: `_keys` cannot convert them, or there are more than `MOST_VALUES`.
    """
    result = np.zeros(0, np.int64)
    for start in range(0, source.height, BLOCK):
        strip = source.rows(start, min(start + BLOCK, source.height))
        values = strip.values if strip.valid is None else strip.values[strip.valid]
        result = np.union1d(result, pd.unique(_keys(values, coloured).ravel()).astype(np.int64))
        if len(result) > MOST_VALUES:
            raise Unknown(f"more than {MOST_VALUES:,} different values")
    return result


def _keys(values: np.ndarray, coloured: bool) -> np.ndarray:
    """Convert integers [...] unchanged, or colours [..., 3] to 0xRRGGBB, int32.

    Raises:
        Unknown: numbers that are not integers, or colours of more than 8 bits.
    """
    if coloured:
        if values.dtype != np.uint8:
            raise Unknown("colours deeper than 8 bits")
        red, green, blue = np.moveaxis(values, -1, 0).astype(np.int32)
        return red << 16 | green << 8 | blue
    if values.dtype.kind == "f" and not (values == np.floor(values)).all():
        raise Unknown("values that are no whole numbers")
    if values.dtype.kind not in "buif":
        raise Unknown(f"values of type {values.dtype.name}")
    return values


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A temporary path for a file or folder next to the target; it replaces the target when the context ends.

    Raises:
        UserError: nothing can be written there.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
        if target.is_dir():  # an empty folder
            target.rmdir()
        os.replace(partial, target)
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def check_size(target: Path, height: int, width: int) -> None:
    """Refuse sizes that a file's format does not support.

    Raises:
        UserError: a side is too long.
    """
    driver = PICTURES.get(target.suffix.lower(), ("GTiff", {}))[0]
    most = LONGEST.get(driver, 2**31 - 1)
    if max(height, width) > most:
        raise UserError(
            f"{target} would have {width} x {height} px, but {driver} allows only {most} px a side: give the name of a "
            ".tif or .png"
        )


def write_image(target: Path, strips: Iterable[Strip], height: int, width: int, place: Place | None) -> None:
    """Write strips of colours uint8 as an image in the format of the target's suffix.

    Pixels without data are black in a picture; in a GeoTIFF they are encoded as `place` defines.

    Args:
        height, width: sides of the image in pixels.
        place: georeference and encoding of missing data, for a GeoTIFF; None: no georeference.
    Raises:
        UserError: nothing can be written there.
    """
    import rasterio.shutil

    with _gdal(), written_beside(target) as partial:
        if target.suffix.lower() in RASTERS:
            _write_raster(partial, strips, height, width, place or Place())
            return
        driver, options = PICTURES[target.suffix.lower()]
        raster = partial.with_name(partial.name + ".tif")
        try:
            _write_raster(raster, strips, height, width, Place())
            rasterio.shutil.copy(raster, partial, driver=driver, **options)
        finally:
            raster.unlink(missing_ok=True)


def _write_raster(path: Path, strips: Iterable[Strip], height: int, width: int, place: Place) -> None:
    import rasterio
    from rasterio.windows import Window

    points, crs = place.control_points
    where = {"gcps": points, "crs": crs} if points else {"transform": place.transform, "crs": place.crs}
    blocks = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "interleave": "pixel", "bigtiff": "IF_SAFER"}
    kind = {"dtype": "uint8", "count": 3, "photometric": "rgb", "compress": "deflate", "predictor": 2}
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, nodata=place.empty, **where, **kind, **blocks
    ) as dataset:
        top = 0
        for strip in regrouped(strips, BLOCK):  # whole blocks, because a partial block would be compressed twice
            window = Window(0, top, width, len(strip.values))
            dataset.write(np.moveaxis(with_gaps(strip, place.empty), -1, 0), window=window)
            if place.masked:
                valid = np.ones(strip.values.shape[:2], bool) if strip.valid is None else strip.valid
                dataset.write_mask(valid.astype(np.uint8) * 255, window=window)
            top += len(strip.values)


def with_gaps(strip: Strip, empty: int | None) -> np.ndarray:
    """The colours of a strip; pixels without data get the value `empty` in all bands, or 0 if it is None.

    If a pixel with data has the value `empty` in a band, the value is changed by one.
    """
    values = strip.values
    if empty is not None:
        values = np.where(values == empty, np.uint8(empty + 1 if empty < 255 else 254), values)
    return values if strip.valid is None else np.where(strip.valid[..., None], values, np.uint8(empty or 0))


def regrouped(strips: Iterable[Strip], height: int) -> Iterator[Strip]:
    """The same rows in strips of the given height; the last strip has the remaining rows."""
    waiting: list[Strip] = []
    for strip in strips:
        waiting.append(strip)
        while sum(len(part.values) for part in waiting) >= height:
            whole = _joined(waiting)
            yield _cut(whole, 0, height)
            waiting = [_cut(whole, height, len(whole.values))]
    whole = _joined(waiting)
    if len(whole.values):
        yield whole


def _joined(strips: Sequence[Strip]) -> Strip:
    values = np.concatenate([strip.values for strip in strips])
    if all(strip.valid is None for strip in strips):
        return Strip(values)
    valid = [np.ones(s.values.shape[:2], bool) if s.valid is None else s.valid for s in strips]
    return Strip(values, np.concatenate(valid))


def _cut(strip: Strip, start: int, stop: int) -> Strip:
    return Strip(strip.values[start:stop], None if strip.valid is None else strip.valid[start:stop])
