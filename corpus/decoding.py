"""Bytes of one image file to RGB pixels, or to the reason why there are none."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

EMPTY = "empty file"
VANISHED = "vanished"
NO_PERMISSION = "no permission to read"
NOT_A_FILE = "not a file"
UNREADABLE_FILE = "cannot be read from the disk"
NOT_AN_IMAGE = "not an image"
DAMAGED = "damaged or truncated"
TOO_MANY_PIXELS = "too many pixels"
#: Refused before a pixel is decoded; what Pillow, too, calls a decompression bomb.
MAX_PIXELS = 89_478_485
#: Percentiles between which pixels deeper than 8 bits are stretched to 0..255.
STRETCH = (2.0, 98.0)

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_GDAL_NO_DATA = 42113
_BITS = 258


def read_bytes(path: Path | str) -> bytes | str:
    """The bytes of a file, or the reason why there are none."""
    try:
        with open(path, "rb") as file:
            return file.read() or EMPTY
    except FileNotFoundError:
        return VANISHED
    except PermissionError:
        return NO_PERMISSION
    except IsADirectoryError:
        return NOT_A_FILE
    except OSError:
        return UNREADABLE_FILE


def read_image(path: Path | str, resolution: int) -> np.ndarray | str:
    """`decode_image` of a file."""
    data = read_bytes(path)
    return data if isinstance(data, str) else decode_image(data, resolution)


def decode_image(data: bytes, resolution: int) -> np.ndarray | str:
    """The central square of an image, upright (EXIF), first frame or page, as RGB uint8 [R, R, 3]; or a reason.

    Grey and float images deeper than 8 bits are stretched between percentiles of their own (`STRETCH`); what is
    transparent or no data becomes black. JPEGs decode to an eighth, a quarter or a half of their size where that is
    enough.
    """

    pixels = decode_jpeg(data, resolution)
    if pixels is not None:
        return square(pixels, resolution)

    def read(image: Image.Image) -> np.ndarray | str:
        depth = data[24] if image.format == "PNG" else max(getattr(image, "tag_v2", {}).get(_BITS, (8,)))
        if image.mode in ("RGB", "RGBA") and depth > 8:
            return NOT_AN_IMAGE  # Pillow would cut the lower byte off
        image.draft("RGB", (resolution, resolution))
        ImageOps.exif_transpose(image, in_place=True)
        return square(_rgb(image), resolution)

    found = _with_pillow(data, read)
    return _deep(data, resolution) if isinstance(found, str) and found == NOT_AN_IMAGE else found


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


def _deep(data: bytes, resolution: int) -> np.ndarray | str:
    """TIFFs and PNGs of several bands deeper than 8 bits, which Pillow does not know: the first three, or the first."""
    if data.startswith(b"\x89PNG") and data[24:25] == b"\x10":
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None or values.dtype != np.uint16 or values.ndim != 3:
            return DAMAGED
        planes = [stretch(values[..., band], np.ones(values.shape[:2], bool)) for band in (2, 1, 0)]
        return square(np.stack(planes, -1), resolution)
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return NOT_AN_IMAGE
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            if page.imagewidth * page.imagelength * page.samplesperpixel > MAX_PIXELS:
                return TOO_MANY_PIXELS
            values, axes = page.asarray(), page.axes
            bands = next((axes.index(name) for name in "SCQI" if name in axes), None)
            if values.ndim == 3 and bands is not None:
                values = np.moveaxis(values, bands, -1)
                values = values[..., :3] if values.shape[-1] >= 3 else values[..., 0]
            if values.ndim == 2:
                values = values[..., None]
            if values.ndim != 3:
                return DAMAGED
            tag = page.tags.get(_GDAL_NO_DATA)
            valid = _valid(values, tag and tag.value)
            planes = [stretch(values[..., band], valid[..., band]) for band in range(values.shape[-1])]
            return square(
                np.ascontiguousarray(np.broadcast_to(np.stack(planes, -1), (*values.shape[:2], 3))), resolution
            )
    except Exception:
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


def stretch(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Values of any depth to uint8, linearly between two percentiles (`STRETCH`) of the valid ones; others 0."""
    if not valid.any():
        return np.zeros(values.shape, dtype=np.uint8)
    low, high = np.percentile(values[valid], STRETCH)
    scaled = (np.where(valid, values, low).astype(np.float64) - low) * (255 / (high - low) if high > low else 0)
    return np.where(valid, np.clip(scaled.round(), 0, 255), 0).astype(np.uint8)


def _valid(values: np.ndarray, no_data: object) -> np.ndarray:
    """Where values are numbers and not what GDAL's tag names, bool."""
    valid = np.isfinite(values)
    with contextlib.suppress(ValueError):  # GDAL allows words there
        valid &= values != float(str("nan" if no_data is None else no_data).strip("\0 "))
    return valid


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of an opened image."""
    if image.mode in _DEEP_MODES:
        values = np.asarray(image)
        grey = stretch(values, _valid(values, getattr(image, "tag_v2", {}).get(_GDAL_NO_DATA)))
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", coloured.size, "black"), coloured))[..., :3]
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
