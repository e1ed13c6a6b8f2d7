"""Decoding of the bytes of an image file into RGB pixels, or into the reason why the image is unreadable."""

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
#: Larger files are not read into memory; a sparse file can claim any size.
LARGEST_FILE = 2**30
#: Images with more pixels are refused before decoding; the value is Pillow's limit for decompression bombs.
MAX_PIXELS = 89_478_485
#: Default options for showing a single image, and the survey that applies to it: none.
SHOWN, ALONE = RasterOptions(), Survey()

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_GDAL_NO_DATA, _BITS, _SAMPLES, _ORIENTATION = 42113, 258, 277, 274
#: First bytes of files that GDAL may read where Pillow cannot; a PNG that Pillow reports as damaged is damaged.
RASTERS = tuple(start for start, driver in DRIVERS.items() if driver != "PNG")
_PNG = b"\x89PNG"
_HEIF_BRANDS = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"avif", b"avis"))


#: Results of `read_bytes` inside `reading_once`.
_remembered: dict[str, bytes | str] | None = None


@contextmanager
def reading_once() -> Iterator[None]:
    """Context manager in which `read_bytes` caches what it reads, for several inspections of the same sample."""
    global _remembered  # the cache is used by one inspection in one process
    _remembered = {}
    try:
        yield
    finally:
        _remembered = None


def read_bytes(path: Path | str) -> bytes | str:
    """The bytes of a file, or the reason why it cannot be read."""
    if _remembered is None:
        return _read_bytes(path)
    if str(path) not in _remembered:
        _remembered[str(path)] = _read_bytes(path)
    return _remembered[str(path)]


def _read_bytes(path: Path | str) -> bytes | str:
    try:
        status = os.stat(path)
        if not (
            stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        ):  # reading a pipe or a device may never end
            return NOT_A_FILE
        if status.st_size > LARGEST_FILE:
            return TOO_LARGE
        with open(path, "rb") as file:
            return file.read() or EMPTY
    except (FileNotFoundError, ValueError):  # ValueError: the name has a zero byte
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
    """`decode_image` for the file at `path`."""
    data = read_bytes(path)
    return data if isinstance(data, str) else decode_image(data, resolution, options, survey)


def decode_image(
    data: bytes, resolution: int, options: RasterOptions = SHOWN, survey: Survey = ALONE
) -> np.ndarray | str:
    """The central square of an image as RGB uint8 [R, R, 3], or the reason why the image is unreadable.

    The image is turned upright by its EXIF orientation; of several frames or pages the first is used. `corpus.raster`
    defines which bands are shown and how values deeper than 8 bits are stretched. Transparent and no-data pixels are
    black. A JPEG is decoded at an eighth, a quarter or a half of its size if that is large enough.
    """
    if options.plain:
        pixels = decode_jpeg(data, resolution)
        if pixels is not None:
            return square(pixels, resolution)
    return _squared(image_pixels(data, options, resolution), resolution, options, survey)


def decode_stack(
    parts: Sequence[bytes], resolution: int, options: RasterOptions = SHOWN, survey: Survey = ALONE
) -> np.ndarray | str:
    """`decode_image` for an image with one file per band: red, green and blue, or grey."""
    return _squared(stack_pixels(parts, options), resolution, options, survey)


def _squared(image: Pixels | str, resolution: int, options: RasterOptions, survey: Survey) -> np.ndarray | str:
    if isinstance(image, str):
        return image
    if image.valid is not None and not image.valid.any():
        return NO_DATA
    return square(to_rgb(image, options, survey), resolution)


def stack_pixels(parts: Sequence[bytes], options: RasterOptions) -> Pixels | str:
    """The first bands of several files as one image, with the extent and pixel size of the first file; or a reason."""
    if not all(part.startswith(tuple(DRIVERS)) for part in parts):
        return NOT_AN_IMAGE
    try:
        with ExitStack() as files:
            rasters = [files.enter_context(opened(part)) for part in parts]
            if any(raster.width * raster.height > MAX_PIXELS for raster in rasters):
                return TOO_MANY_PIXELS
            bands = Bands(tuple(range(1, len(rasters) + 1)), None)
            return read_stack(rasters, bands, options, None, None)
    except Exception as error:  # GDAL may raise any exception for damaged files
        lacking = missing_codec(error)
        return f"no decoder: {lacking}" if lacking else DAMAGED


def stacked_tiff(parts: Sequence[bytes], options: RasterOptions) -> bytes | str:
    """One GeoTIFF with the first bands of several files, or the reason why there is none.

    The values are not changed; the location is that of the first file. The bands get the names in the options, so the
    same options show the result. Pixels without data get the no-data value of the first file or of the options, or 0 if
    neither defines one.
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
    """The chosen bands of an image, upright and before they are stretched, or the reason why it is unreadable.

    Pillow reads ordinary pictures of 8 bits. GDAL reads rasters: TIFFs with more bands, values deeper than 8 bits or
    raster tags, JPEG 2000, colour PNGs deeper than 8 bits, and formats that Pillow does not support.

    Args:
        data: bytes of the image's file.
        options: how rasters are shown.
        resolution: a JPEG may be decoded at a reduced size if both sides stay at least this long.
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
    """Survey of a sample that defines how the whole corpus is shown; ordinary 8-bit pictures are not considered.

    Args:
        files: for each image its bytes, or the bytes of the files of its bands.
        options: how rasters are shown.
    """

    def pixels(data: bytes | Sequence[bytes]) -> Pixels | str:
        if not isinstance(data, bytes):
            return stack_pixels(data, options)
        deep = data.startswith(RASTERS) or (data.startswith(_PNG) and data[24:25] == b"\x10")
        return image_pixels(data, options) if deep else NOT_AN_IMAGE

    return survey_of((image for image in map(pixels, files) if isinstance(image, Pixels)), options)


def _ordinary(image: Image.Image, data: bytes, options: RasterOptions) -> bool:
    """Whether Pillow reads an image completely: a picture of 8 bits, or one deeper band in another format than TIFF."""
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
    """The chosen bands of a picture [H, W, 1 or 3] that was read without GDAL: red, green and blue, or grey."""
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
    except Exception as error:  # GDAL may raise any exception for damaged files
        lacking = missing_codec(error)
        return f"no decoder: {lacking}" if lacking else DAMAGED
    turn = lambda part: None if part is None else _upright(part, turned)  # noqa: E731
    return result._replace(values=turn(result.values), valid=turn(result.valid), alpha=turn(result.alpha))


def _upright(values: np.ndarray, turned: int) -> np.ndarray:
    """The array [H, W, …] turned by its EXIF orientation."""
    if turned in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if turned in (3, 4, 7, 8):
        values = values[::-1]
    return values[:, ::-1] if turned in (2, 3, 6, 7) else values


def decode_jpeg(data: bytes, resolution: int | None = None) -> np.ndarray | None:
    """Decode an ordinary JPEG to uint8 [H, W, 3], in half of Pillow's time and bit for bit equal; None: use Pillow.

    An ordinary JPEG is a complete file in YCbCr without EXIF data (which might turn the image) that the decoder reads
    without warnings.

    Args:
        data: bytes of the file.
        resolution: decode at an eighth, a quarter or a half of the size if both sides stay at least this long.
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
    """The result of `read` for the opened image, or the reason why the image is unreadable."""
    if not data:
        return EMPTY
    try:
        with Image.open(io.BytesIO(data)) as image:
            return TOO_MANY_PIXELS if image.width * image.height > MAX_PIXELS else read(image)
    except Image.DecompressionBombError:
        return TOO_MANY_PIXELS
    except UnidentifiedImageError:
        return NOT_AN_IMAGE
    except Exception:  # decoders may raise any exception for damaged files
        return DAMAGED


def square(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """The central square of uint8 [H, W, 3], resized to [R, R, 3] without aliasing.

    A reduction to less than half of the size uses the mean over areas. A smaller reduction uses linear interpolation
    after a Gaussian filter of half the excess scale (scikit-image's rule), computed with OpenCV, which is faster. An
    enlargement is bicubic.
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
    """The pixels of an opened image as RGB uint8 [H, W, 3]."""
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", coloured.size, "black"), coloured))[..., :3]
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
