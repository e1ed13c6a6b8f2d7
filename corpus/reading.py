"""What every source that holds files shares: one way from the bytes of an image, and of its mask, to an array."""

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
    """Fields of a source whose images may be rasters; `raster` holds them together."""

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
        resolution: side of the images, in pixels.
        survey: what a sample of the corpus says about how deep values are shown.
        masks: what is in the masks; empty: there are none.
    """

    resolution: int
    raster: RasterOptions
    survey: Survey
    masks: MaskRule

    def __call__(self, data: bytes | Sequence[bytes] | str, mask: bytes | str = MISSING) -> np.ndarray | Sample | str:
        """An image, with its mask where the corpus has masks, or the reason why there is none.

        Args:
            data, mask: the bytes of the files, or the reasons why there are none; of an image of one file a band, those
                of all its bands.
        """
        if isinstance(data, str):
            return data
        decode = decode_image if isinstance(data, bytes) else decode_stack
        image = decode(data, self.resolution, self.raster, self.survey)
        if isinstance(image, str) or not self.masks:
            return image
        return with_mask(image, self.resolution, self.masks, mask, data if isinstance(data, bytes) else data[0])
