"""Inspection of a sample of a corpus before it is indexed: file formats, bands, values and reasons for failures."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from corpus.decoding import SHOWN, image_pixels
from corpus.index import Sample, Source
from corpus.masks import IGNORED, MISSING, MaskRule
from corpus.raster import DRIVERS, Pixels, RasterOptions, Survey, choose_bands, is_deep, opened, quiet_gdal, spread
from corpus.reading import Decoding

#: Largest number of scenes whose headers are described.
SCENES = 16
#: Largest number of bands that a description names.
NAMED_BANDS = 13


@dataclass
class Inspection:
    """Result of the inspection of some images.

    Attributes:
        images: the readable images, each uint8 [R, R, 3].
        reasons: number of unreadable images by reason.
        formats: number of files by description of their format.
        values: smallest and largest value of every kind of pixels deeper than 8 bits.
        classes: number of pixels of every mask value.
    """

    images: list[np.ndarray] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    values: dict[str, tuple[float, float]] = field(default_factory=dict)
    classes: Counter[int] = field(default_factory=Counter)

    @property
    def looked_at(self) -> int:
        return len(self.images) + sum(self.reasons.values())


def inspect(source: Source, rows: np.ndarray, result: Inspection) -> None:
    """Read some rows of a source as the index would, and add their properties to `result`.

    If the source gives access to its files, they are described and decoded from the same bytes, so nothing is read
    twice.
    """
    files = _files(source, rows) if hasattr(source, "originals") else {}
    options: RasterOptions = getattr(source, "raster", RasterOptions())
    rule: MaskRule = getattr(source, "mask_rule", MaskRule())
    decoding = Decoding(source.resolution, options, getattr(source, "survey", Survey()), rule)
    for row in rows.tolist():
        if row not in files:
            [sample] = source.reader(np.array([row]))()
        else:
            data, mask = files[row]
            result.formats[describe(data, options)] += 1
            pixels = image_pixels(data, options)
            if isinstance(pixels, Pixels) and is_deep(pixels.values.dtype):
                _widen(result.values, pixels)
            sample = decoding(data, mask)
        _note(result, sample)


def _note(result: Inspection, sample: np.ndarray | Sample | str) -> None:
    if isinstance(sample, str):
        result.reasons[sample] += 1
        return
    if isinstance(sample, Sample):
        values, counts = np.unique(sample.mask, return_counts=True)
        result.classes.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        sample = sample.image
    result.images.append(sample)


def _files(source: Source, rows: np.ndarray) -> dict[int, tuple[bytes, bytes | str]]:
    """The bytes of images and masks by row; unreadable rows are missing, and the reader gives the reason for them."""
    result = {}
    for row in rows.tolist():
        try:
            data, _, mask = next(iter(source.originals(np.array([row]))))
        except Exception:  # of many kinds; the reader meets it again and names it in `Inspection.reasons`
            continue
        result[row] = data, MISSING if mask is None else mask[0]
    return result


def _widen(values: dict[str, tuple[float, float]], pixels: Pixels) -> None:
    """Extend the smallest and largest values of a kind of pixels by one more image."""
    shown = pixels.values if pixels.valid is None else pixels.values[pixels.valid]
    if shown.size:
        low, high = values.get(pixels.kind, (np.inf, -np.inf))
        values[pixels.kind] = (min(low, float(np.nanmin(shown))), max(high, float(np.nanmax(shown))))


def describe(data: bytes, options: RasterOptions = SHOWN) -> str:
    """One-line description of an image file: format, data type, bands with their meaning and no-data value, no size.

    Args:
        options: choose the bands that are shown.
    """
    if data.startswith(tuple(DRIVERS)):
        try:
            with opened(data) as raster:
                if raster.driver != "PNG" or raster.dtypes[0] != "uint8":
                    return _raster(raster, options)
        except Exception:  # Pillow may be able to read it
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f"{image.format} {image.mode}"
    except Exception:
        return "no image that can be opened"


def describe_scenes(files: Sequence[Path], options: RasterOptions) -> Counter[str]:
    """Count the descriptions of the headers of at most `SCENES` evenly spread files."""
    import rasterio

    result: Counter[str] = Counter()
    for place in spread(len(files), SCENES):
        try:
            with quiet_gdal(), rasterio.open(files[place]) as raster:
                result[f"{_raster(raster, options)}, {raster.width} x {raster.height} px"] += 1
        except Exception:
            result["no scene that can be opened"] += 1
    return result


def _raster(raster: Any, options: RasterOptions) -> str:
    bands = choose_bands(raster, options)
    names = [name or use.name for name, use in zip(raster.descriptions, raster.colorinterp, strict=True)]
    shown = "" if isinstance(bands, str) else f"; shown: {', '.join(str(band) for band in bands.shown)}"
    place = "georeferenced" if raster.crs else "not georeferenced"
    no_data = f", no data {raster.nodata:g}" if raster.nodata is not None else ""
    listed = ", ".join(names[:NAMED_BANDS]) + (", …" if len(names) > NAMED_BANDS else "")
    count = f"{raster.count} band" + ("s" if raster.count > 1 else "")
    return f"{raster.driver} {raster.dtypes[0]}, {count} ({listed}{shown}), {place}{no_data}"


def levels(survey: Survey) -> list[str]:
    """Lines that say how each kind of pixels deeper than 8 bits is stretched, one line per kind."""
    return [
        f"{kind}: " + ", ".join(f"{low:.4g} to {high:.4g}" for low, high in ends)
        for kind, ends in survey.levels.items()
    ]


def shared_ground(splits: Mapping[str, pd.DataFrame]) -> dict[str, int]:
    """Number of ground cells that two splits share, by a key such as "test and train"; empty if none or unknown."""
    grounds = {name: set(table["ground"]) - {""} for name, table in splits.items() if "ground" in table}
    pairs = ((one, other) for one in grounds for other in grounds if one < other)
    return {f"{one} and {other}": len(both) for one, other in pairs if (both := grounds[one] & grounds[other])}


def class_fractions(classes: Counter[int], names: Sequence[str]) -> str:
    """Fractions of the classes among all pixels of the masks, as `water 61 %, forest 30 %, ignored 9 %`."""
    total = max(1, classes.total())
    named = {**dict(enumerate(names)), IGNORED: "ignored"}
    return ", ".join(f"{named.get(value, value)} {count / total:.0%}" for value, count in sorted(classes.items()))


def thumbnails(images: Sequence[np.ndarray], count: int = 8, side: int = 160) -> Image.Image:
    """Grid of evenly spread images, four per row, enlarged without smoothing."""
    rows = spread(len(images), count)
    across, gap = min(4, max(1, len(rows))), 4
    down = -(-len(rows) // across)
    sheet = Image.new("RGB", (across * (side + gap) - gap, down * (side + gap) - gap), "white")
    for position, row in enumerate(rows):
        picture = Image.fromarray(images[row]).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (position % across * (side + gap), position // across * (side + gap)))
    return sheet
