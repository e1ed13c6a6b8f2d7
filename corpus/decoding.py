"""Bytes of one image file to RGB pixels, or to the reason why there are none."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from corpus.raster import (
    DRIVERS,
    Bands,
    Pixels,
    RasterOptions,
    Survey,
    choose_bands,
    has_data,
    missing_codec,
    opened,
    quiet_gdal,
    read_pixels,
    read_stack,
    survey_of,
    to_rgb,
)

EMPTY = "empty file"
VANISHED = "vanished"
NO_PERMISSION = "no permission to read"
NOT_A_FILE = "not a file"
TOO_LARGE = "file above 1 GiB"
UNREADABLE_FILE = "cannot be read from the disk"
UNREACHABLE = "cannot be reached over the network"
NOT_AN_IMAGE = "not an image"
DAMAGED = "damaged or truncated"
NO_DATA = "no data"
NO_HEIF = "no decoder for HEIF"
TOO_MANY_PIXELS = "too many pixels"
#: Larger files are not read into memory; one with a hole can claim any size.
LARGEST_FILE = 2**30
#: Refused before a pixel is decoded; what Pillow, too, calls a decompression bomb.
MAX_PIXELS = 89_478_485
#: How a single image is shown where nothing else is specified, and what is known of it then.
SHOWN, ALONE = RasterOptions(), Survey()

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_GDAL_NO_DATA, _BITS, _SAMPLES, _ORIENTATION = 42113, 258, 277, 274
#: Files that GDAL may read where Pillow cannot; a PNG that Pillow calls damaged is.
RASTERS = tuple(start for start, driver in DRIVERS.items() if driver != "PNG")
_PNG = b"\x89PNG"
_HEIF_BRANDS = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"avif", b"avis"))


#: What `read_bytes` gave while `reading_once` lasts.
_remembered: dict[str, bytes | str] | None = None


@contextmanager
def reading_once() -> Iterator[None]:
    """While this lasts, `read_bytes` keeps what it reads: for a look at a sample, from several sides."""
    global _remembered  # one process, one look
    _remembered = {}
    try:
        yield
    finally:
        _remembered = None


def read_bytes(path: Path | str) -> bytes | str:
    """The bytes of a file, or the reason why there are none."""
    if _remembered is None:
        return _read_bytes(path)
    if str(path) not in _remembered:
        _remembered[str(path)] = _read_bytes(path)
    return _remembered[str(path)]


def _read_bytes(path: Path | str) -> bytes | str:
    try:
        status = os.stat(path)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # a pipe or a device may have no end
            return NOT_A_FILE
        if status.st_size > LARGEST_FILE:
            return TOO_LARGE
        with open(path, "rb") as file:
            return file.read() or EMPTY
    except (FileNotFoundError, ValueError):  # a name with a zero byte names nothing
        return VANISHED
    except PermissionError:
        return NO_PERMISSION
    except IsADirectoryError:
        return NOT_A_FILE
    except OSError:
        return UNREADABLE_FILE


def read_image(
    path: Path | str, resolution: int, options: RasterOptions = SHOWN, survey: Survey = ALONE
) -> np.ndarray | str:
    """`decode_image` of a file."""
    data = read_bytes(path)
    return data if isinstance(data, str) else decode_image(data, resolution, options, survey)


def decode_image(
    data: bytes, resolution: int, options: RasterOptions = SHOWN, survey: Survey = ALONE
) -> np.ndarray | str:
    """The central square of an image, upright (EXIF), first frame or page, as RGB uint8 [R, R, 3]; or a reason.

    `corpus.raster` says which bands are shown and how deep values are stretched; what is transparent or no data is
    black. JPEGs decode to an eighth, a quarter or a half of their size where that is enough.
    """
    if options.plain:
        pixels = decode_jpeg(data, resolution)
        if pixels is not None:
            return square(pixels, resolution)
    return _squared(image_pixels(data, options, resolution), resolution, options, survey)


def decode_stack(
    parts: Sequence[bytes], resolution: int, options: RasterOptions = SHOWN, survey: Survey = ALONE
) -> np.ndarray | str:
    """`decode_image` of one file a band, of red, green and blue, or of grey."""
    return _squared(stack_pixels(parts, options), resolution, options, survey)


def _squared(image: Pixels | str, resolution: int, options: RasterOptions, survey: Survey) -> np.ndarray | str:
    if isinstance(image, str):
        return image
    if image.valid is not None and not image.valid.any():
        return NO_DATA
    return square(to_rgb(image, options, survey), resolution)


def stack_pixels(parts: Sequence[bytes], options: RasterOptions) -> Pixels | str:
    """The first bands of several files as one image, over the ground and at the pixel size of the first; or why not."""
    if not all(part.startswith(tuple(DRIVERS)) for part in parts):
        return NOT_AN_IMAGE
    try:
        with ExitStack() as files:
            rasters = [files.enter_context(opened(part)) for part in parts]
            if any(raster.width * raster.height > MAX_PIXELS for raster in rasters):
                return TOO_MANY_PIXELS
            bands = Bands(tuple(range(1, len(rasters) + 1)), None)
            return read_stack(rasters, bands, options, None, None)
    except Exception as error:  # GDAL raises whatever it likes on damaged files
        lacking = missing_codec(error)
        return f"no decoder: {lacking}" if lacking else DAMAGED


def stacked_tiff(parts: Sequence[bytes], options: RasterOptions) -> bytes | str:
    """One GeoTIFF of the first bands of several files, in their own values and at the first one's place; or a reason.

    Its bands are called as the options name them, so that these options show it, too.

    Pixels that have no data hold what the first file or the options say stands for that, 0 where nothing does.
    """
    import rasterio

    pixels = stack_pixels(parts, options)
    if isinstance(pixels, str):
        return pixels
    with opened(parts[0]) as first:
        place = {"crs": first.crs, "transform": first.transform}
        empty = first.nodata if options.no_data is None else options.no_data
    values = np.moveaxis(pixels.values, -1, 0)
    if pixels.valid is not None and not pixels.valid.all():
        empty = 0 if empty is None else empty
        values = np.where(pixels.valid, values, np.array(empty, values.dtype))
    count, height, width = values.shape
    shape = {"count": count, "height": height, "width": width, "dtype": values.dtype.name, "nodata": empty}
    colours = {"photometric": "rgb"} if count == 3 else {}
    with quiet_gdal(), rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", compress="deflate", **shape, **place, **colours) as raster:
            raster.write(values)
            for number, band in enumerate(options.bands or (), start=1):
                raster.set_band_description(number, str(band))
        return memory.read()


def image_pixels(data: bytes, options: RasterOptions, resolution: int | None = None) -> Pixels | str:
    """The chosen bands of an image before they are stretched, upright, or a reason.

    Pillow reads ordinary pictures of 8 bits, GDAL the rasters: TIFFs with further bands, deep values or tags of their
    own, JPEG 2000, deep PNGs in colour, and what Pillow does not know.

    Args:
        resolution: JPEGs may decode to a part of their size where both sides stay at least as long.
    """
    turned = 1

    def read(image: Image.Image) -> Pixels | None:
        nonlocal turned
        if not _ordinary(image, data, options):
            turned = image.getexif().get(_ORIENTATION, 1)
            return None
        image.draft("RGB", (resolution, resolution) if resolution else image.size)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in _DEEP_MODES:
            return _picked(np.asarray(image)[..., None], options)
        return _picked(_rgb(image), options)

    result = _with_pillow(data, read)
    if isinstance(result, Pixels):
        return result
    if result is None or (result in (NOT_AN_IMAGE, DAMAGED) and data.startswith(RASTERS)):
        return _raster_pixels(data, options, turned)
    return NO_HEIF if result == NOT_AN_IMAGE and data[4:12] in _HEIF_BRANDS else result


def survey_files(files: Iterable[bytes | Sequence[bytes]], options: RasterOptions) -> Survey:
    """What a sample of a corpus says about how all of it is shown; ordinary pictures say nothing.

    Args:
        files: of each image the bytes, or those of its bands.
    """

    def pixels(data: bytes | Sequence[bytes]) -> Pixels | str:
        if not isinstance(data, bytes):
            return stack_pixels(data, options)
        deep = data.startswith(RASTERS) or (data.startswith(_PNG) and data[24:25] == b"\x10")
        return image_pixels(data, options) if deep else NOT_AN_IMAGE

    return survey_of((image for image in map(pixels, files) if isinstance(image, Pixels)), options)


def _ordinary(image: Image.Image, data: bytes, options: RasterOptions) -> bool:
    """Whether Pillow gives all of an opened image: a picture of 8 bits, or a single deep band that is no TIFF."""
    if image.format == "JPEG2000":
        return False
    if image.format == "TIFF":
        tags = image.tag_v2
        depth, bands = max(tags.get(_BITS, (1,))), tags.get(_SAMPLES, 1)
        known = bands in (1, 3) or image.mode == "CMYK"
        known &= getattr(image, "n_frames", 1) == 1  # a further page may be the mask of the first
        return depth <= 8 and known and _GDAL_NO_DATA not in tags and options.bands is None
    return not (image.format == "PNG" and data[24] > 8 and image.mode not in _DEEP_MODES)


def _picked(values: np.ndarray, options: RasterOptions) -> Pixels | str:
    """The bands of a picture [H, W, 1 or 3] that was read without GDAL, which are red, green and blue, or grey."""
    if options.bands is not None:
        names = ("red", "green", "blue") if values.shape[-1] == 3 else ("gray",)
        positions = [names.index(band) + 1 if band in names else band for band in options.bands]
        if not all(isinstance(place, int) and place <= len(names) for place in positions):
            return f"has {len(names)} bands, not those of corpus.bands"
        values = values[..., [place - 1 for place in positions]]
    if options.no_data is None and values.dtype == np.uint8:
        return Pixels(values)
    valid = has_data(values, [options.no_data] * values.shape[-1])
    return Pixels(values, None if valid.all() else valid)


def _raster_pixels(data: bytes, options: RasterOptions, turned: int) -> Pixels | str:
    try:
        with opened(data) as raster:
            if raster.width * raster.height > MAX_PIXELS:
                return TOO_MANY_PIXELS
            bands = choose_bands(raster, options)
            if isinstance(bands, str):
                return bands
            result = read_pixels(raster, bands, options)
    except Exception as error:  # GDAL raises whatever it likes on damaged files
        lacking = missing_codec(error)
        return f"no decoder: {lacking}" if lacking else DAMAGED
    turn = lambda part: None if part is None else _upright(part, turned)  # noqa: E731
    return result._replace(values=turn(result.values), valid=turn(result.valid), alpha=turn(result.alpha))


def _upright(values: np.ndarray, turned: int) -> np.ndarray:
    """Turned as EXIF's orientation says, [H, W, …]."""
    if turned in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if turned in (3, 4, 7, 8):
        values = values[::-1]
    return values[:, ::-1] if turned in (2, 3, 6, 7) else values


def decode_jpeg(data: bytes, resolution: int | None = None) -> np.ndarray | None:
    """An ordinary JPEG as uint8 [H, W, 3] in half of Pillow's time and bit for bit alike; None: Pillow must judge.

    Ordinary is a whole file in YCbCr without EXIF (which might turn it), of which the decoder has nothing to complain.

    Args:
        resolution: decode to an eighth, a quarter or a half where both sides stay at least as long.
    """
    if not data.startswith(b"\xff\xd8\xff") or b"Exif\0" in data:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours != "YCbCr" or height * width > MAX_PIXELS:
            return None
        part = max((part for part in (2, 4, 8) if resolution and min(height, width) // part >= resolution), default=1)
        return simplejpeg.decode_jpeg(
            data, colorspace="RGB", min_height=-(-height // part), min_width=-(-width // part), min_factor=part
        )
    except ValueError:
        return None


def _with_pillow(data: bytes, read: Callable[[Image.Image], np.ndarray]) -> np.ndarray | str:
    """What `read` makes of the opened image, or the reason why it cannot."""
    if not data:
        return EMPTY
    try:
        with Image.open(io.BytesIO(data)) as image:
            return TOO_MANY_PIXELS if image.width * image.height > MAX_PIXELS else read(image)
    except Image.DecompressionBombError:
        return TOO_MANY_PIXELS
    except UnidentifiedImageError:
        return NOT_AN_IMAGE
    except Exception:  # decoders raise whatever they like on damaged files
        return DAMAGED


def square(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """The central square of uint8 [H, W, 3], resized to [R, R, 3] without aliasing.

    At less than a half by the mean over areas; from there to its own size by linear interpolation after a Gaussian of
    half the excess scale (scikit-image's rule), for which OpenCV needs less time; enlarged, bicubic.
    """
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    pixels = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    if side == resolution:
        return pixels
    if resolution < side < 2 * resolution:
        blurred = cv2.GaussianBlur(pixels, (0, 0), (side / resolution - 1) / 2)
        return cv2.resize(blurred, (resolution, resolution), interpolation=cv2.INTER_LINEAR)
    kernel = cv2.INTER_AREA if side > resolution else cv2.INTER_CUBIC
    return cv2.resize(pixels, (resolution, resolution), interpolation=kernel)


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of an opened image."""
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", coloured.size, "black"), coloured))[..., :3]
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
