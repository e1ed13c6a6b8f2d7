"""Enlarge images of any size, or draw images from masks, tile by tile.

The second part finds the input files of the commands upscale and synthesize, and writes their results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt

from corpus.masks import IGNORED
from downstream.consistency import back_project
from downstream.drawing import Synthesizer
from downstream.imagery import (
    BLOCK,
    RASTERS,
    SUFFIXES,
    Source,
    Strip,
    check_size,
    write_image,
    written_beside,
)
from downstream.restoration import Restorer
from downstream.tiling import Grid, blended, ground_noise, in_context, reflected
from runtime.errors import UserError
from runtime.notices import notice
from runtime.progress import progress

#: Makes images float32 [1, H, W, 3] consistent with low-resolution images uint8 [1, H/f, W/f, 3].
Agree = Callable[[np.ndarray, np.ndarray], np.ndarray]
#: Receives the number of tiles that have just been finished.
Advance = Callable[[int], object]


@dataclass(frozen=True)
class TileOptions:
    """How an image is divided into tiles.

    Attributes:
        overlap: smallest overlap of neighbouring tiles, as a fraction of a tile's side.
        batch_size: number of tiles drawn at once.
        seed: seed of the tiles' initial noise.
    Raises:
        UserError: a value is not a number, or is too small.
    """

    overlap: float
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        number = isinstance(self.overlap, int | float) and not isinstance(self.overlap, bool)
        if not (number and 0 <= self.overlap < 1):
            raise UserError(f"overlap={self.overlap}: give a fraction of a tile's side, 0 to less than 1")
        for name, least in (("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value}: give a whole number of at least {least}")


def grid_of(source: Source, model: Restorer | Synthesizer, overlap: float) -> Grid:
    """The tiles that a model draws for a source.

    Args:
        overlap: smallest overlap of neighbouring tiles, as a fraction of a tile's side. It is reduced if necessary, so
            that tiles advance by at least one latent cell.
    """
    factor = getattr(model, "factor", 1)
    multiple = math.lcm(_cell(model), factor)
    pixels = min(round(overlap * model.side), model.side - multiple)
    return Grid(source.height * factor, source.width * factor, model.side, pixels, multiple)


#: Rows of the input above and below a strip that the consistency step uses; back-projection by bicubic is local.
CONTEXT = 8


def agreeing(restorer: Restorer) -> dict[str, Any]:
    """Arguments for `upscaled` that make strips consistent with their input; {} if the restorer's consistency is off.

    Blending needs this step: each tile is consistent, but the blending weights vary inside an input pixel.
    """
    options = restorer.options
    if not options.consistency:
        return {}

    def agree(images: np.ndarray, low: np.ndarray) -> np.ndarray:
        return back_project(images.astype(np.float32), low, restorer.factor, options.kind, options.consistency)

    return {"agree": agree, "context": CONTEXT}


def upscaled(
    source: Source,
    restorer: Restorer,
    options: TileOptions,
    *,
    agree: Agree | None = None,
    context: int = 0,
    advance: Advance = lambda tiles: None,
) -> Iterator[Strip]:
    """Enlarge an image; yields strips uint8 [h, W, 3] from top to bottom.

    Before a tile is drawn, pixels without data are filled from the nearest pixel with data, so that the values of
    missing pixels have no effect.

    Args:
        agree: makes a strip consistent with its input again; None: no such step.
        context: rows of the input above and below a strip that `agree` uses.
        advance: receives the number of tiles that have just been finished.
    """
    factor, top = restorer.factor, 0
    grid = grid_of(source, restorer, options.overlap)
    strips = blended(grid, _Tiles(source, restorer, grid, options, advance).rows())
    for part, above, below in in_context(strips, context * factor):
        bottom = top + len(part) - above - below
        if agree is not None:
            low = filled(source.rows((top - above) // factor, (bottom + below) // factor))
            part = agree(part[None], low[None])[0]
        valid = source.rows(top // factor, bottom // factor).valid
        if valid is not None:
            valid = valid.repeat(factor, axis=0).repeat(factor, axis=1)
        yield Strip(_eight_bits(part[above : len(part) - below]), valid)
        top = bottom


def synthesized(
    source: Source, synthesizer: Synthesizer, options: TileOptions, *, advance: Advance = lambda tiles: None
) -> Iterator[Strip]:
    """Draw the image of a mask of class numbers; yields strips uint8 [h, W, 3] from top to bottom.

    Mask pixels without data are given to the model as pixels without a class; in the image, they have no data either.
    """
    grid, top = grid_of(source, synthesizer, options.overlap), 0
    for part in blended(grid, _Tiles(source, synthesizer, grid, options, advance).rows()):
        yield Strip(_eight_bits(part), source.rows(top, top + len(part)).valid)
        top += len(part)


def whole(strips: Iterable[Strip]) -> np.ndarray:
    """All strips as one image uint8 [H, W, 3]."""
    return np.concatenate([strip.values for strip in strips])


def filled(strip: Strip) -> np.ndarray:
    """Fill the pixels of a strip that have no data; returns its values.

    In colours [h, W, 3], they get the value of the nearest pixel with data, or 0 if no pixel has data. In class numbers
    [h, W], they get 255, which means no class.
    """
    values, valid = strip
    if valid is None:
        return values
    if values.ndim == 2:
        return np.where(valid, values, np.uint8(IGNORED))
    if not valid.any():
        return np.zeros_like(values)
    nearest = distance_transform_edt(~valid, return_distances=False, return_indices=True)
    return values[tuple(nearest)]


def _cell(model: Restorer | Synthesizer) -> int:
    """Side of a latent cell in pixels of the drawn image."""
    return model.side // model.latent_shape[1]


def _eight_bits(values: np.ndarray) -> np.ndarray:
    rounded = np.rint(values)
    return np.clip(rounded, 0, 255, out=rounded).astype(np.uint8)


@dataclass(frozen=True)
class _Tiles:
    """The tiles of a source, drawn row by row."""

    source: Source
    model: Restorer | Synthesizer
    grid: Grid
    options: TileOptions
    advance: Advance

    @property
    def factor(self) -> int:
        return getattr(self.model, "factor", 1)

    def rows(self) -> Iterator[Iterator[tuple[int, np.ndarray]]]:
        """For each row of the grid its tiles, in the format of `blended`."""
        grid, cell = self.grid, _cell(self.model)
        columns = reflected(0, grid.padded_width // self.factor, self.source.width)
        cells = (grid.side // cell, grid.padded_width // cell, self.model.latent_shape[0])
        for top in grid.rows:
            rows = reflected(top // self.factor, (top + grid.side) // self.factor, self.source.height)
            first = int(rows.min())
            strip = self.source.rows(first, int(rows.max()) + 1)
            values = filled(strip)[rows - first][:, columns]
            valid = None if strip.valid is None else strip.valid[rows - first][:, columns]
            noise = ground_noise(self.options.seed, top // cell, 0, *cells)
            yield self._row(Strip(values, valid), noise)

    def _row(self, strip: Strip, noise: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The tiles of a row with their column numbers.

        Tiles without any data are not drawn: for images the pixels of the input are repeated, for masks there is no
        tile.
        """
        factor, side, cell = self.factor, self.grid.side, _cell(self.model)

        def low(array: np.ndarray, number: int) -> np.ndarray:
            left = self.grid.columns[number] // factor
            return array[:, left : left + side // factor]

        def noise_of(number: int) -> np.ndarray:
            left = self.grid.columns[number] // cell
            return noise[..., left : left + side // cell]

        numbers = range(len(self.grid.columns))
        drawn = [number for number in numbers if strip.valid is None or low(strip.valid, number).any()]
        for number in sorted(set(numbers) - set(drawn)):
            if strip.values.ndim == 3:  # an image; for a mask there is no tile, and the result is black here
                yield number, low(strip.values, number).repeat(factor, axis=0).repeat(factor, axis=1)
            self.advance(1)
        for start in range(0, len(drawn), self.options.batch_size):
            batch = drawn[start : start + self.options.batch_size]
            tiles = np.stack([low(strip.values, number) for number in batch])
            yield from zip(batch, self.model(tiles, np.stack([noise_of(number) for number in batch])), strict=True)
            self.advance(len(batch))


# ---------------------------------------------------------------- files and folders


class Job(NamedTuple):
    """An image file and the file for its result."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Translation:
    """What a command does with every image.

    Attributes:
        opened: opens a file as a source.
        grid: returns the tiles that are drawn for a source.
        drawn: (source, advance) -> strips of the result.
        factor: side of the result over side of the source.
        label: label of the progress bar.
    """

    opened: Callable[[Path], AbstractContextManager[Source]]
    grid: Callable[[Source], Grid]
    drawn: Callable[[Source, Advance], Iterable[Strip]]
    factor: int
    label: str


def jobs_of(source: Any, target: Any, option: str, suffix: Callable[[Path], str]) -> list[Job]:
    """The images of a file or folder and the paths of their results; the tree of a folder is kept.

    Args:
        source, target: values of the options `option` and `out`.
        option: name of the option, for messages.
        suffix: returns the suffix of the result of a file in a folder.
    Raises:
        UserError: there is no such file or folder, it is empty, or the target already exists.
    """
    if source is None or target is None:
        missing = option if source is None else "out"
        raise UserError(f"{missing}=… is missing: give {option}=PATH out=PATH, an image or a folder of images")
    source, target = Path(str(source)).expanduser(), Path(str(target)).expanduser()
    if not source.exists():
        raise UserError(f"{option}={source}: there is no such file or folder")
    jobs = _in_folder(source, target, option, suffix) if source.is_dir() else [Job(source, target)]
    for path, key in ((source, option), (target, "out")):
        if not source.is_dir() and path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{key}={path}: give a file that ends in {', '.join(SUFFIXES)}")
    if _is_taken(target, folder=source.is_dir()):
        raise UserError(f"out={target} already exists and is not empty: give another path, or remove it")
    return jobs


def _in_folder(source: Path, target: Path, option: str, suffix: Callable[[Path], str]) -> list[Job]:
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{option}={source} holds no image ({', '.join(SUFFIXES)}): give a folder of images")
    jobs = [Job(path, target / path.relative_to(source).with_suffix(suffix(path))) for path in files]
    taken: dict[Path, Path] = {}
    for job in jobs:
        if (other := taken.setdefault(job.target, job.source)) != job.source:
            raise UserError(f"{other} and {job.source} would both become {job.target}: rename one of them")
    return jobs


def _is_taken(target: Path, folder: bool) -> bool:
    if target.is_dir():
        return not folder or any(target.iterdir())
    return target.exists() and (folder or target.stat().st_size > 0)


def translate(jobs: Sequence[Job], target: Path, translation: Translation) -> None:
    """Check all images, then write the result of every job.

    Args:
        target: the file, or the folder of all results; it appears only when everything is done.
    Raises:
        UserError: an image is damaged or in an unknown format.
    """
    tiles = sum(_checked(job, translation) for job in progress(jobs, "check", unit="image"))
    if len(jobs) > 1:
        notice(f"{translation.label}: {len(jobs):,} images in {tiles:,} tiles")
    with progress((), translation.label, total=tiles, unit="tile") as bar:
        if [job.target for job in jobs] == [target]:
            _write(jobs[0].source, target, translation, bar.update)
            return
        with written_beside(target) as partial:
            for job in jobs:
                _write(job.source, partial / job.target.relative_to(target), translation, bar.update)


def _checked(job: Job, translation: Translation) -> int:
    """Check that an image is complete; returns the number of its tiles."""
    with translation.opened(job.source) as source:
        check_size(job.target, source.height * translation.factor, source.width * translation.factor)
        if source.place is not None:  # other images have been decoded when opened
            for start in range(0, source.height, BLOCK):
                source.rows(start, min(start + BLOCK, source.height))
        if source.place is not None and source.place.known and job.target.suffix.lower() not in RASTERS:
            notice(f"{job.target} cannot store the georeference of {job.source}: only a .tif can")
        return len(translation.grid(source))


def _write(path: Path, target: Path, translation: Translation, advance: Advance) -> None:
    factor = translation.factor
    with translation.opened(path) as source:
        place = None if source.place is None else source.place.enlarged(factor)
        strips = translation.drawn(source, advance)
        write_image(target, strips, source.height * factor, source.width * factor, place)
