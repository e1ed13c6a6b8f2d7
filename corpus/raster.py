"""Conversion of the bands of a raster into colours of 8 bits, for all sources.

This module alone decides which bands are shown, where an image has no data, and which values become black and white.
Values deeper than 8 bits are stretched between two percentiles of a sample of the whole corpus, so that a calm sea
stays darker than a town. Values of 8 bits are not stretched unless a range is given.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime.errors import UserError
from runtime.quiet import native_stderr_closed

if TYPE_CHECKING:
    from rasterio.io import DatasetReader
    from rasterio.windows import Window

STRETCHES = ("percentile", "range", "none")
#: Percentiles of the sample that become 0 and 255.
PERCENTILES = (2.0, 98.0)
#: Number of images of a corpus that its levels are computed from, and number of pixels per image.
SAMPLE_IMAGES, SAMPLE_PIXELS = 128, 4096
#: Names of the red, green and blue bands, in this order, that data sets use.
COLOURS = (("red", "green", "blue"), ("r", "g", "b"), ("b4", "b3", "b2"))
#: A declared alpha band counts as one if at least this fraction of its pixels is fully transparent or fully opaque.
ALPHA_FRACTION = 0.9
#: First bytes of the formats that GDAL reads from memory, and the drivers for them. Other drivers might open further
#: files that the bytes refer to.
DRIVERS = {
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\0\0\0\x0cjP": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
    b"\x89PNG": "PNG",
    b"EHFA_HEADER_TAG": "HFA",
    b"NITF": "NITF",
}


@dataclass(frozen=True)
class RasterOptions:
    """Options for showing rasters.

    Attributes:
        bands: three bands for red, green and blue, or one for grey, each by number from 1, by description (B04) or by
            colour (red). None: the bands that the file calls red, green and blue; else the first three of three or four
            bands; else the first of one or two bands.
        no_data: a value that marks missing data, in addition to the one that the file declares; None: no further value.
        stretch: "percentile" (from the 2nd to the 98th percentile of a sample of the corpus, for values deeper than 8
            bits), "range" (from `low` to `high`), or "none" (values are 0..255).
        low, high: limits of "range", in the units of the file.
    Raises:
        UserError: options contradict each other.
    """

    bands: tuple[int | str, ...] | None = None
    no_data: float | None = None
    stretch: str = "percentile"
    low: float = 0.0
    high: float = 255.0

    def __post_init__(self) -> None:
        if self.bands is not None:
            object.__setattr__(self, "bands", tuple(self.bands))
            if len(self.bands) not in (1, 3):
                raise UserError(
                    f"corpus.bands={list(self.bands)}: name three bands for red, green and blue, or one for grey"
                )
            if any(isinstance(band, int) and band < 1 for band in self.bands):
                raise UserError(f"corpus.bands={list(self.bands)}: bands are counted from 1")
        if self.stretch not in STRETCHES:
            raise UserError(f"corpus.stretch={self.stretch} is unknown: take {', '.join(STRETCHES)}")
        if self.stretch == "range" and not self.low < self.high:
            raise UserError(f"corpus.low={self.low} is not below corpus.high={self.high}")

    @property
    def plain(self) -> bool:
        """Whether an ordinary picture of 8 bits is shown unchanged."""
        return self.bands is None and self.no_data is None and self.stretch != "range"


class Pixels(NamedTuple):
    """The chosen bands of one image.

    Attributes:
        values: [H, W, 1 or 3] in the data type of the file; complex values as magnitudes.
        valid: bool [H, W], whether a pixel has data; None: all pixels have.
        alpha: a declared alpha band, uint8 [H, W], or None.
        guess: the bands that were taken from a file that names none, for the user to check; "" if there was no guess.
    """

    values: np.ndarray
    valid: np.ndarray | None = None
    alpha: np.ndarray | None = None
    guess: str = ""

    @property
    def kind(self) -> str:
        """Kind of the image; images of one kind are stretched in the same way."""
        return f"{self.values.dtype.name} x {self.values.shape[-1]}"


@dataclass(frozen=True)
class Survey:
    """Result of a survey of a sample of a corpus; it defines how the whole corpus is shown.

    Attributes:
        levels: for each kind, the values of each band that become 0 and 255.
        alpha: for each kind, whether a declared alpha band is one; GDAL may also declare near infrared as alpha.
        notes: sentences on stderr about what the user should check.
    """

    levels: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    alpha: Mapping[str, bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def stamp(self) -> str:
        """A text that changes with the result of the survey; empty if nothing depends on it."""
        if not self.levels and not self.alpha:
            return ""
        text = json.dumps([sorted(self.levels.items()), sorted(self.alpha.items())])
        return "~" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def survey_of(images: Iterable[Pixels], options: RasterOptions) -> Survey:
    """Compute the levels of a corpus from a sample of its images; every image has the same weight."""
    values: dict[str, list[np.ndarray]] = {}
    alphas: dict[str, list[np.ndarray]] = {}
    guesses: set[str] = set()
    with native_stderr_closed():
        for image in images:
            guesses |= {image.guess} - {""}
            if options.stretch == "percentile" and is_deep(image.values.dtype):
                values.setdefault(image.kind, []).append(_sample(image))
            if image.alpha is not None:
                alphas.setdefault(image.kind, []).append(image.alpha[:: max(1, len(image.alpha) // 64)].ravel())
    levels = {kind: _levels(np.concatenate(parts)) for kind, parts in values.items()}
    doubt = "because the files do not name their colours: choose others with corpus.bands=[…]"
    notes = [f"{guess}, {doubt}" for guess in sorted(guesses)]
    notes += [
        f"images of {kind} are black: all sampled values are {result[0][0]:g}; set the levels with corpus.stretch=range"
        for kind, result in levels.items()
        if all(low == high for low, high in result)
    ]
    alpha = {kind: _is_alpha(np.concatenate(parts)) for kind, parts in alphas.items()}
    return Survey(levels, alpha, tuple(notes))


def spread(count: int, most: int = SAMPLE_IMAGES) -> list[int]:
    """At most `most` evenly spread numbers of 0..count-1: the images that a survey reads."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))}) if count else []


def is_deep(dtype: np.dtype) -> bool:
    """Whether values of this type need levels to be shown."""
    return dtype not in (np.uint8, np.bool_)


def to_rgb(image: Pixels, options: RasterOptions, survey: Survey) -> np.ndarray:
    """Convert the bands of an image into RGB uint8 [H, W, 3]; pixels without data and transparent pixels are black.

    For an image of a kind that the survey did not meet, the levels are computed from this image.
    """
    values = image.values
    if options.stretch == "range" or (options.stretch == "percentile" and is_deep(values.dtype)):
        if options.stretch == "range":
            levels = ((options.low, options.high),) * values.shape[-1]
        else:
            levels = survey.levels.get(image.kind) or _levels(_sample(image))
        low, high = np.array(levels, dtype=np.float64).T
        with np.errstate(over="ignore", invalid="ignore"):  # values near the largest number of the type
            values = (_finite(values) - low) * (255 / np.where(high > low, high - low, np.inf))
    if values.dtype != np.uint8:
        values = np.clip(_finite(values).round(), 0, 255).astype(np.uint8)
    if values.shape[-1] == 1:
        values = np.repeat(values, 3, axis=-1)
    if image.valid is not None and not image.valid.all():
        values = np.where(image.valid[..., None], values, np.uint8(0))
    if image.alpha is not None and survey.alpha.get(image.kind, _is_alpha(image.alpha)):
        values = over_black(values, image.alpha)
    return np.ascontiguousarray(values)


def over_black(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blend colours uint8 [H, W, 3] with an alpha band uint8 [H, W] over black."""
    from PIL import Image

    picture = Image.fromarray(np.dstack([colours, alpha]), "RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture))[..., :3]


def has_data(values: np.ndarray, no_data: Sequence[float | None]) -> np.ndarray:
    """Where an image has data, bool [H, W]: no band is NaN, and not all bands have their no-data value.

    Args:
        values: [H, W, C].
        no_data: no-data value of every band, or None.
    """
    valid = np.isfinite(values).all(axis=-1)
    empty = np.ones(valid.shape, bool)
    for band, value in enumerate(no_data):
        empty &= False if value is None else values[..., band] == _as_type(value, values.dtype)
    return valid & ~empty


# ----------------------------------------------------------------------------------------------------- through GDAL


class Bands(NamedTuple):
    """Numbers of the bands of a raster, from 1: the bands to show, and the declared alpha band or None.

    `guess` has the same meaning as in `Pixels`.
    """

    shown: tuple[int, ...]
    alpha: int | None
    guess: str = ""


@contextmanager
def quiet_gdal() -> Iterator[None]:
    """Context manager in which GDAL prints no messages and reads no sidecar files."""
    import rasterio

    with rasterio.Env(CPL_LOG_ERRORS="OFF", GDAL_PAM_ENABLED="NO", CPL_LOG="/dev/null"):
        yield


def choose_bands(raster: DatasetReader, options: RasterOptions) -> Bands | str:
    """The bands to show, or the reason why they cannot be determined."""
    from rasterio.enums import ColorInterp

    uses = [use.name for use in raster.colorinterp]
    alpha = raster.count if raster.count in (2, 4) and uses[-1] == ColorInterp.alpha.name else None
    names = [_key(name or "") for name in raster.descriptions]
    if options.bands is not None:
        result = [_number(band, names, uses) for band in options.bands]
        if all(0 < number <= raster.count for number in result):
            return Bands(tuple(result), alpha if alpha not in result else None)
        missing = next(
            band for band, number in zip(options.bands, result, strict=True) if not 0 < number <= raster.count
        )
        if isinstance(missing, int):
            return f"has {raster.count} bands, not {missing}"
        known = ", ".join(name for name in raster.descriptions if name) or f"{raster.count} without names"
        return f"has no band {missing}, but {known}"
    for requested in COLOURS:
        for where in (uses, names):
            if set(requested) <= set(where):
                return Bands(tuple(where.index(colour) + 1 for colour in requested), alpha)
    others = raster.count - (alpha is not None)
    if raster.count <= 2:
        return Bands((1,), alpha, "band 1 of 2 is shown in grey" if others == 2 else "")
    if raster.count <= 4:
        guess = "bands 1, 2, 3 of 4 are shown as red, green, blue" if others == 4 else ""
        return Bands((1, 2, 3), alpha, guess)
    return f"has {raster.count} bands: choose three with corpus.bands"


def read_pixels(
    raster: DatasetReader, bands: Bands, options: RasterOptions, window: Window | None = None, shape: Any = None
) -> Pixels:
    """Read the chosen bands of a raster or of a window of it; with `shape` (rows, columns), at a reduced size."""
    from rasterio.enums import MaskFlags

    where = {"window": window, "out_shape": shape and tuple(shape)}
    read = raster.read(list(bands.shown), **{**where, "out_shape": shape and (len(bands.shown), *shape)})
    values = np.moveaxis(read, 0, -1)
    valid = has_data(values, [raster.nodatavals[band - 1] for band in bands.shown])
    if options.no_data is not None:
        valid &= has_data(values, [options.no_data] * len(bands.shown))
    flags = raster.mask_flag_enums[bands.shown[0] - 1]
    if MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
        valid &= raster.read_masks(bands.shown[0], **where) > 0
    alpha = None if bands.alpha is None else _eight_bits(raster.read(bands.alpha, **where))
    values, clear = _shown(raster, bands, values)
    whole = clear is None and valid.all()
    return Pixels(values, None if whole else valid & (True if clear is None else ~clear), alpha, bands.guess)


def _shown(raster: DatasetReader, bands: Bands, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert values for display: magnitudes of complex values, palette colours, full range of fewer than 8 bits.

    Also returns where a palette colour is transparent.
    """
    if np.iscomplexobj(values):
        with np.errstate(over="ignore"):
            return np.abs(values), None
    if len(bands.shown) == 1 and raster.colorinterp[bands.shown[0] - 1].name == "palette":
        table = np.zeros((256, 4), np.uint8)
        for index, colour in raster.colormap(bands.shown[0]).items():
            table[min(index, 255)] = colour
        colours = table[np.minimum(values[..., 0], 255)]
        return colours[..., :3], colours[..., 3] == 0
    bits = int(raster.tags(bands.shown[0], ns="IMAGE_STRUCTURE").get("NBITS", 8))
    if values.dtype == np.uint8 and bits < 8:
        return (values.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8), None
    return values, None


def read_stack(
    rasters: Sequence[DatasetReader], bands: Bands, options: RasterOptions, window: Window | None, shape: Any
) -> Pixels:
    """`read_pixels` for one raster, or for several rasters with one file per band.

    Of several files, the first bands are read with the extent of the first file. Files of another resolution are
    resampled to that of the first file: `window` is in pixels of the first file, `shape` is the shape of the result.
    """
    from rasterio.windows import Window

    first = rasters[0]
    if len(rasters) == 1:
        return read_pixels(first, bands, options, window, shape)
    window = window or Window(0, 0, first.width, first.height)
    parts = []
    for raster in rasters:
        across, down = raster.width / first.width, raster.height / first.height
        own = Window(window.col_off * across, window.row_off * down, window.width * across, window.height * down)
        rows = shape or (round(window.height), round(window.width))
        parts.append(read_pixels(raster, Bands((1,), None), options, own, rows))
    values = np.concatenate([part.values for part in parts], axis=-1)
    valid = np.logical_or.reduce([np.ones(values.shape[:2], bool) if p.valid is None else p.valid for p in parts])
    return Pixels(values, valid & np.isfinite(values).all(axis=-1))


@contextmanager
def opened(data: bytes) -> Iterator[DatasetReader]:
    """Open a raster from the bytes of its file, which must begin with one of the keys of `DRIVERS`."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    driver = next(driver for start, driver in DRIVERS.items() if data.startswith(start))
    with quiet_gdal(), warnings.catch_warnings(), rasterio.MemoryFile(data) as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(driver=driver) as raster:
            yield raster


def missing_codec(error: BaseException) -> str:
    """The codec that GDAL lacks to decode a file, from an error and its causes; empty if it lacks none."""
    seen: BaseException | None = error
    while seen is not None:
        text = " ".join(str(seen).split())
        if re.search(r"codec|compression|not compiled|not supported|unsupported", text, re.IGNORECASE):
            return text.rsplit(": ", 1)[-1].strip(". ")[:80].encode("ascii", "replace").decode()
        seen = seen.__cause__ or seen.__context__
    return ""


# ------------------------------------------------------------------------------------------------------------ details


def _key(name: str) -> str:
    """A band's name in a normal form without case and leading zeros: B04, b4 and Band 4 are the same."""
    name = re.sub(r"^band[ _]?(?=\d)", "b", name.strip().lower())
    return re.sub(r"^b0+(?=\d)", "b", name)


def _number(band: int | str, names: Sequence[str], uses: Sequence[str]) -> int:
    """Number of a band, from 1; 0 if there is no band of this name."""
    if isinstance(band, int):
        return band
    if band.isdecimal():
        return int(band)
    key = _key(band)
    return next((where.index(key) + 1 for where in (names, uses) if key in where), 0)


def _sample(image: Pixels) -> np.ndarray:
    """At most `SAMPLE_PIXELS` evenly spread pixels that have data, [K, C]."""
    values = image.values if image.valid is None else image.values[image.valid][:, None]
    values = values.reshape(-1, values.shape[-1])
    if image.valid is None:
        values = values[np.isfinite(values).all(axis=1)]
    return values[:: -(-len(values) // SAMPLE_PIXELS) or 1]


def _levels(values: np.ndarray) -> tuple[tuple[float, float], ...]:
    if not len(values):
        return ((0.0, 1.0),) * values.shape[-1]
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.percentile(values.astype(np.float64), PERCENTILES, axis=0)
    return tuple((float(start), float(end)) for start, end in zip(low, high, strict=True))


def _is_alpha(alpha: np.ndarray) -> bool:
    """Whether a declared alpha band is plausible: nearly all pixels are transparent or opaque, not all transparent."""
    return bool(alpha.any()) and float(np.isin(alpha, (0, 255)).mean()) >= ALPHA_FRACTION


def _eight_bits(alpha: np.ndarray) -> np.ndarray:
    """Convert an alpha band of any type to uint8."""
    if alpha.dtype == np.uint8:
        return alpha
    full = np.iinfo(alpha.dtype).max if np.issubdtype(alpha.dtype, np.integer) else 1.0
    return np.clip(np.rint(alpha.astype(np.float64) * (255 / full)), 0, 255).astype(np.uint8)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), nan=0.0)


def _as_type(value: float, dtype: np.dtype) -> Any:
    """A no-data value in the type of the pixels; unchanged if the type cannot hold it, so that no pixel equals it."""
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        whole = np.isfinite(value) and float(value).is_integer() and limits.min <= value <= limits.max
        return dtype.type(int(value)) if whole else np.nan
    with np.errstate(over="ignore"):
        return dtype.type(value)
