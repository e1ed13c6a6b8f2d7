"""Waste in a subset, measured on pixels: near-duplicates and images of low information.

Neither encoders nor the local entropy are used here, so that no method is judged by the quantities that it prunes by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.fft import dct

from runtime.ranges import check_images

#: Number of images read at a time.
BLOCK = 256
#: Largest number of different bits, of 64, in hashes of near-duplicates (measured rates: docs/method.md, section 5).
NEAR_DUPLICATE_BITS = 8
#: Fraction of the corpus, the images with the smallest JPEG files, that counts as low in information.
LOW_INFORMATION = 0.2
#: Quality of the JPEGs whose size is measured, without chroma subsampling.
JPEG_QUALITY = 75

_HASHED_SIDE = 32  # side in pixels to which an image is resized before the DCT
_HASH_SIDE = 8  # frequencies kept in each direction


@dataclass(frozen=True)
class ImageRows:
    """Rows of an image array, usually a memory map; rows are read when they are accessed.

    Attributes:
        images: uint8 [N, H, W, 3].
        rows: int64 [K].
    """

    images: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        """uint8 [k, H, W, 3]."""
        return np.asarray(self.images[self.rows[part]])


def near_duplicate_fraction(images: np.ndarray | ImageRows, bits: int = NEAR_DUPLICATE_BITS) -> float:
    """Fraction of images for which the perceptual hash of another image differs in at most `bits` of 64 bits; exact.

    Args:
        images: uint8 [N, H, W, 3].
        bits: largest number of different bits.
    Raises:
        UserError: the array has another shape or dtype.
    """
    return float((nearest_hash(perceptual_hashes(images)) <= bits).mean()) if len(images) else 0.0


def low_information_fraction(
    images: np.ndarray | ImageRows, corpus_sample: np.ndarray | ImageRows, quantile: float = LOW_INFORMATION
) -> float:
    """Fraction of images that compress to as few bytes as the lowest `quantile` of the corpus.

    Several images of the sample may have the size at the quantile. Images of this size count with the fraction that
    lies below the quantile in the sample, so that a sample measured against itself gives exactly `quantile`.

    Args:
        images: uint8 [N, H, W, 3].
        corpus_sample: uint8 [M, H, W, 3], readable images of the corpus before pruning, drawn at random.
        quantile: fraction of the corpus that counts as low in information.
    """
    if len(images) == 0:
        return 0.0
    known, values = np.sort(jpeg_bytes_per_pixel(corpus_sample)), jpeg_bytes_per_pixel(images)
    below, up_to = (np.searchsorted(known, values, side) / len(known) for side in ("left", "right"))
    tied = up_to > below
    fraction = (quantile - below) / np.where(tied, up_to - below, 1)
    return float(np.where(tied, fraction.clip(0, 1), below < quantile).mean())


def perceptual_hashes(images: np.ndarray | ImageRows) -> np.ndarray:
    """DCT perceptual hash of every image, uint64 [N]; the same bits as `imagehash.phash` of ImageHash 4.3.

    The luma is resized to 32 x 32 px and transformed by a two-dimensional DCT-II. Each of the 8 x 8 lowest frequencies
    gives one bit, which is set if the coefficient exceeds their median (Krawetz 2011, "Looks Like It"). The
    coefficients are stored by rows, beginning with the highest bit of the first byte.

    Args:
        images: uint8 [N, H, W, 3].
    Raises:
        UserError: the array has another shape or dtype.
    """
    if not isinstance(images, ImageRows):
        images = np.asarray(images)
        check_images(images)
    hashes = np.empty(len(images), dtype=np.uint64)
    for start, block in _blocks(images):
        side = (_HASHED_SIDE, _HASHED_SIDE)
        grey = (Image.fromarray(image).convert("L") for image in block)
        luma = [np.asarray(image.resize(side, Image.Resampling.LANCZOS)) for image in grey]
        spectrum = dct(dct(np.stack(luma).astype(np.float64), axis=1), axis=2)
        lowest = spectrum[:, :_HASH_SIDE, :_HASH_SIDE].reshape(len(block), -1)
        bits = np.packbits(lowest > np.median(lowest, axis=1, keepdims=True), axis=1)
        hashes[start : start + len(block)] = bits.view(np.uint64)[:, 0]
    return hashes


def nearest_hash(hashes: np.ndarray) -> np.ndarray:
    """Hamming distance of every hash to the nearest other hash, int64 [N]; 65 if there is no other.

    Every pair is compared once; memory is `BLOCK` x N x 8 bytes.

    Args:
        hashes: uint64 [N].
    """
    nearest = np.full(len(hashes), 65, dtype=np.int64)
    for start in range(0, len(hashes), BLOCK):
        rows = slice(start, start + BLOCK)
        distances = np.bitwise_count(hashes[rows, None] ^ hashes[None, start:])
        np.fill_diagonal(distances, 65)  # an image and itself
        nearest[rows] = np.minimum(nearest[rows], distances.min(axis=1))
        nearest[start:] = np.minimum(nearest[start:], distances.min(axis=0))
    return nearest


def jpeg_bytes_per_pixel(images: np.ndarray | ImageRows) -> np.ndarray:
    """Bytes per pixel of every image as a JPEG of quality `JPEG_QUALITY`, headers included, float64 [N].

    Args:
        images: uint8 [N, H, W, 3].
    """
    import simplejpeg  # imported here: near-duplicates do not need it

    sizes = [
        len(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=JPEG_QUALITY, colorsubsampling="444"))
        / (image.shape[0] * image.shape[1])
        for _, block in _blocks(images)
        for image in block
    ]
    return np.array(sizes, dtype=np.float64)


def _blocks(images: np.ndarray | ImageRows) -> Iterator[tuple[int, np.ndarray]]:
    """The images, `BLOCK` at a time, with the position of the first."""
    for start in range(0, len(images), BLOCK):
        yield start, images[start : start + BLOCK]
