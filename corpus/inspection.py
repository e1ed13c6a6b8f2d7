"""What a corpus holds, told from a sample of it before anything is indexed: kinds of files, bands, values, reasons."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from corpus.decoding import decode_image, image_pixels
from corpus.index import Sample, Source
from corpus.raster import DRIVERS, Pixels, RasterOptions, Survey, choose_bands, is_deep, opened

#: Images of a corpus that are looked at.
LOOKED_AT = 256


@dataclass(frozen=True)
class Inspection:
    """What a look at some images of a split found.

    Attributes:
        images: uint8 [K, R, R, 3] of those that can be read.
        reasons: why the others cannot, and how many.
        formats: what the files are, and how many; empty where the source does not hand out its files.
        values: smallest and largest value of every kind of deep pixels.
    """

    images: np.ndarray
    reasons: Counter[str]
    formats: Counter[str]
    values: dict[str, tuple[float, float]]


def inspect(source: Source, rows: np.ndarray) -> Inspection:
    """Read some rows of a source as the index would, and describe their files where the source hands them out.

    A file that is described is decoded from the same bytes: nothing is read twice.
    """
    images, reasons, formats = [], Counter(), Counter()
    values: dict[str, tuple[float, float]] = {}
    files = _files(source, rows) if hasattr(source, "originals") and not source.mask_classes else {}
    options, facts = getattr(source, "raster", RasterOptions()), getattr(source, "survey", Survey())
    for data in files.values():
        formats[describe(data)] += 1
        pixels = image_pixels(data, options)
        if isinstance(pixels, Pixels) and is_deep(pixels.values.dtype):
            _widen(values, pixels)
    found = [decode_image(data, source.resolution, options, facts) for data in files.values()]
    left = np.array([row for row in rows if int(row) not in files], dtype=np.int64)
    for image in (*found, *(source.reader(left)() if len(left) else ())):
        if isinstance(image, str):
            reasons[image] += 1
        else:
            images.append(image.image if isinstance(image, Sample) else image)
    side = source.resolution
    return Inspection(np.array(images, np.uint8).reshape(-1, side, side, 3), reasons, formats, values)


def _widen(values: dict[str, tuple[float, float]], pixels: Pixels) -> None:
    """Smallest and largest value of a kind, with those of one more image."""
    shown = pixels.values if pixels.valid is None else pixels.values[pixels.valid]
    if shown.size:
        low, high = values.get(pixels.kind, (np.inf, -np.inf))
        values[pixels.kind] = (min(low, float(shown.min())), max(high, float(shown.max())))


def describe(data: bytes) -> str:
    """Format, type, bands with their meaning, and no data of an image file, in one line without its size."""
    if data.startswith(tuple(DRIVERS)):
        try:
            with opened(data) as raster:
                if raster.driver != "PNG" or raster.dtypes[0] != "uint8":
                    return _raster(raster)
        except Exception:  # Pillow may know more of it
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f"{image.format} {image.mode}"
    except Exception:
        return "no image that can be opened"


def _raster(raster: object) -> str:
    bands = choose_bands(raster, RasterOptions())
    names = [name or use.name for name, use in zip(raster.descriptions, raster.colorinterp, strict=True)]
    shown = bands if isinstance(bands, str) else f"shown: {', '.join(str(band) for band in bands.shown)}"
    place = "with a place" if raster.crs else "without a place"
    no_data = f", no data {raster.nodata:g}" if raster.nodata is not None else ""
    listed = ", ".join(names[:13]) + (", …" if len(names) > 13 else "")
    return f"{raster.driver} {raster.dtypes[0]}, {raster.count} bands ({listed}; {shown}), {place}{no_data}"


def levels(facts: Survey) -> list[str]:
    """How each kind of deep pixels is stretched, one line a kind."""
    return [
        f"{kind}: " + ", ".join(f"{low:g} to {high:g}" for low, high in ends) for kind, ends in facts.levels.items()
    ]


def shared_ground(splits: dict[str, pd.DataFrame]) -> dict[str, int]:
    """Cells of ground that two splits both have, by "train and test"; empty where none are shared or known."""
    grounds = {name: set(table["ground"]) - {""} for name, table in splits.items() if "ground" in table}
    pairs = ((one, other) for one in grounds for other in grounds if one < other)
    return {f"{one} and {other}": len(both) for one, other in pairs if (both := grounds[one] & grounds[other])}


def thumbnails(images: np.ndarray, count: int = 8, side: int = 160) -> Image.Image:
    """Some images side by side, evenly spread over those given, enlarged without smoothing."""
    rows = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int))
    sheet = Image.new("RGB", (max(1, len(rows)) * (side + 4), side), "white")
    for position, row in enumerate(rows):
        picture = Image.fromarray(images[row]).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (position * (side + 4), 0))
    return sheet


def _files(source: Source, rows: np.ndarray) -> dict[int, bytes]:
    """The bytes of the rows' images; a row that cannot be read is missing, and its reader says why."""
    found = {}
    for row in rows.tolist():
        try:
            found[row] = next(iter(source.originals(np.array([row]))))[0]
        except Exception:
            continue
    return found
