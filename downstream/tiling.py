"""Images of any size as overlapping tiles: positions, weights and noise of the tiles, and blending in strips.

Lengths are in pixels of the drawn image unless specified otherwise. The code never holds more of an image than one row
of tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

#: Side in latent cells of a block of noise that one generator draws.
BLOCK = 16


@dataclass(frozen=True)
class Grid:
    """Positions of the tiles of an image.

    Attributes:
        height, width: of the image.
        side: of a tile.
        overlap: smallest overlap of two neighbours, before rounding up to `multiple`.
        multiple: all positions are multiples of it; it divides the side.
    """

    height: int
    width: int
    side: int
    overlap: int
    multiple: int

    @cached_property
    def rows(self) -> list[int]:
        """Top positions of the rows of tiles."""
        return tile_starts(self.padded_height, self.side, self.overlap, self.multiple)

    @cached_property
    def columns(self) -> list[int]:
        """Left positions of the columns of tiles."""
        return tile_starts(self.padded_width, self.side, self.overlap, self.multiple)

    @property
    def padded_height(self) -> int:
        return padded_length(self.height, self.side, self.multiple)

    @property
    def padded_width(self) -> int:
        return padded_length(self.width, self.side, self.multiple)

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.rows) * len(self.columns)


def padded_length(length: int, side: int, multiple: int) -> int:
    """The smallest length that holds a tile and is a multiple of `multiple`, which divides `side`."""
    return max(side, -(-length // multiple) * multiple)


def tile_starts(length: int, side: int, overlap: int, multiple: int = 1) -> list[int]:
    """Starts of the fewest tiles that cover a length, evenly spread; the first is 0, the last tile ends at the length.

    Args:
        length, side: multiples of `multiple`, the length at least the side.
        overlap: smallest overlap of two neighbours; rounded up so that tiles start at multiples of `multiple`.
    Raises:
        ValueError: the length is too short or not a multiple, or the overlap is so large that tiles would not advance.
    """
    if length < side or length % multiple or side % multiple:
        raise ValueError(f"length {length}, side {side}: give multiples of {multiple}, the first at least the second")
    most = (side - overlap) // multiple
    if overlap < 0 or most < 1:
        raise ValueError(f"overlap {overlap}: give 0 to {side - multiple}")
    steps = (length - side) // multiple
    gaps = -(-steps // most)
    return [number * steps // gaps * multiple for number in range(gaps)] + [length - side]


def reflected(start: int, stop: int, length: int) -> np.ndarray:
    """Map positions start..stop-1 of a sequence that is mirrored at its ends to 0..length-1, int64."""
    if length == 1:
        return np.zeros(stop - start, np.int64)
    period = 2 * (length - 1)
    positions = np.arange(start, stop) % period
    return np.minimum(positions, period - positions)


def tile_window(side: int, overlap: int) -> np.ndarray:
    """Weights of a tile's pixels along an axis, float64 [side]: raised cosine ramps of the overlap, never zero."""
    if overlap == 0:
        return np.ones(side)
    to_end = np.minimum(np.arange(side), np.arange(side)[::-1]) + 0.5
    return np.sin(np.pi / 2 * np.minimum(to_end / overlap, 1)) ** 2


def tile_fractions(starts: list[int], side: int, overlap: int) -> np.ndarray:
    """Weights of tiles along an axis that add up to one at every pixel, float32 [tiles, side].

    The weights of a tile in two dimensions are the product over both axes, and add up to one as well.
    """
    window = tile_window(side, overlap)
    total = np.zeros(starts[-1] + side)
    for start in starts:
        total[start : start + side] += window
    return np.stack([window / total[start : start + side] for start in starts]).astype(np.float32)


def ground_noise(seed: int, top: int, left: int, height: int, width: int, channels: int) -> np.ndarray:
    """Standard normal float32 [channels, height, width] of a window of latent cells.

    The noise of a cell depends only on the seed, the number of channels and the cell's row and column in the image, so
    overlapping tiles start from the same noise in their overlap.

    Args:
        top, left: position of the window, in cells from the image's first cell.
    """
    noise = np.empty((channels, height, width), np.float32)
    for block_row in range(top // BLOCK, -(-(top + height) // BLOCK)):
        down, rows = _common(block_row * BLOCK, top, height)
        for block_column in range(left // BLOCK, -(-(left + width) // BLOCK)):
            right, columns = _common(block_column * BLOCK, left, width)
            generator = np.random.default_rng([seed, block_row, block_column])
            block = generator.standard_normal((channels, BLOCK, BLOCK), dtype=np.float32)
            noise[:, rows, columns] = block[:, down, right]
    return noise


def _common(block: int, start: int, length: int) -> tuple[slice, slice]:
    """The intersection of a block of cells and a window: its slice in the block, and in the window."""
    first, last = max(block, start), min(block + BLOCK, start + length)
    return slice(first - block, last - block), slice(first - start, last - start)


def blended(grid: Grid, tile_rows: Iterable[Iterable[tuple[int, np.ndarray]]]) -> Iterator[np.ndarray]:
    """Blend a grid's tiles; yields the image in strips from top to bottom, each complete when the next row begins.

    Args:
        tile_rows: for each of `grid.rows` its tiles with their column numbers: [side, side, 3] of any type.
    Yields:
        float32 [h, width, 3]; the heights add up to that of the image.
    """
    side = grid.side
    across, down = (tile_fractions(starts, side, grid.overlap) for starts in (grid.columns, grid.rows))
    waiting = np.zeros((side, grid.padded_width, 3), np.float32)
    ends = [*grid.rows[1:], grid.padded_height]
    for fractions, top, end, tiles in zip(down, grid.rows, ends, tile_rows, strict=True):
        for column, tile in tiles:
            left = grid.columns[column]
            waiting[:, left : left + side] += tile * (fractions[:, None] * across[column])[..., None]
        yield waiting[: min(end, grid.height) - top, : grid.width].copy()
        done = end - top
        waiting[: side - done] = waiting[done:]
        waiting[side - done :] = 0


def in_context(strips: Iterable[np.ndarray], rows: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Each strip [h, W, …] extended by up to `rows` rows of the image above it and of the strip below it.

    Yields:
        the extended strip, and the numbers of added rows above and below it.
    """
    above: np.ndarray | None = None
    strip: np.ndarray | None = None
    for after in itertools.chain(strips, [None]):
        if strip is not None:
            above = strip[:0] if above is None else above
            below = strip[:0] if after is None else after[:rows]
            part = np.concatenate([above, strip, below]) if rows else strip
            yield part, len(above), len(below)
            seen = part[: len(part) - len(below)]
            above = seen[max(0, len(seen) - rows) :]
        strip = after
