"""Code that all sources of files share: conversion of the bytes of an image and of its mask into arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from corpus.decoding import decode_image, decode_stack
from corpus.masks import MISSING, MaskRule, Sample, with_mask
from corpus.raster import RasterOptions, Survey


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Fields of a source whose images may be rasters; the property `raster` combines them."""

    bands: tuple[int | str, ...] | None = None
    no_data: float | None = None
    stretch: str = "percentile"
    low: float = 0.0
    high: float = 255.0

    @cached_property
    def raster(self) -> RasterOptions:
        return RasterOptions(self.bands, self.no_data, self.stretch, self.low, self.high)


@dataclass(frozen=True)
class Decoding:
    """How the files of a corpus become arrays.

    Attributes:
        resolution: side of the images in pixels.
        survey: survey of the corpus, which defines how values deeper than 8 bits are shown.
        masks: meaning of the pixel values of masks; empty: there are no masks.
    """

    resolution: int
    raster: RasterOptions
    survey: Survey
    masks: MaskRule

    def __call__(self, data: bytes | Sequence[bytes] | str, mask: bytes | str = MISSING) -> np.ndarray | Sample | str:
        """Decode an image, with its mask if the corpus has masks, or return the reason why it is unreadable.

        Args:
            data: bytes of the image's file, or the reason why it cannot be read; for an image with one file per band,
                the bytes of all these files.
            mask: bytes of the mask's file, or the reason why it cannot be read.
        """
        if isinstance(data, str):
            return data
        decode = decode_image if isinstance(data, bytes) else decode_stack
        image = decode(data, self.resolution, self.raster, self.survey)
        if isinstance(image, str) or not self.masks:
            return image
        return with_mask(image, self.resolution, self.masks, mask, data if isinstance(data, bytes) else data[0])
