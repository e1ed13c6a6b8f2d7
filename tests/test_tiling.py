"""Tiles: positions, weights, noise, and blending, which is exact, without seams and in bounded memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from downstream.any_size import TileOptions, grid_of, upscaled, whole
from downstream.imagery import Picture, Strip
from downstream.tiling import (
    Grid,
    blended,
    ground_noise,
    in_context,
    padded_length,
    reflected,
    tile_fractions,
    tile_starts,
    tile_window,
)

OPTIONS = TileOptions(overlap=0.25, batch_size=8, seed=0)


class Repeat:
    """A restorer that repeats pixels, and adds a function of a tile's number and noise."""

    def __init__(self, side: int = 32, factor: int = 1, added: Callable[[int, np.ndarray], object] | None = None):
        self.side, self.factor, self.added = side, factor, added
        self.latent_shape = (4, side // 8, side // 8)
        self.tiles = 0

    def __call__(self, low: np.ndarray, noise: np.ndarray) -> np.ndarray:
        assert low.shape == (len(low), self.side // self.factor, self.side // self.factor, 3)
        assert noise.shape == (len(low), *self.latent_shape) and noise.dtype == np.float32
        drawn = low if self.factor == 1 else low.repeat(self.factor, axis=1).repeat(self.factor, axis=2)
        self.tiles += len(low)
        if self.added is None:
            return drawn
        first = self.tiles - len(low)
        return drawn + np.stack([np.float32(self.added(first + index, noise[index])) for index in range(len(low))])


def smooth(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack(
        [40 + 150 * rows / height, 200 - 120 * columns / width, 60 + 90 * (rows + columns) / (height + width)], -1
    )


def textured(height: int, width: int) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(0).standard_normal((height, width, 3)), (1, 1, 0))
    return 128 + 30 * noise / noise.std()


# ---------------------------------------------------------------- positions of tiles


@given(st.integers(1, 500), st.integers(1, 8), st.integers(0, 63), st.sampled_from([1, 2, 8]))
def test_tiles_cover_a_length_and_overlap_enough(length: int, cells: int, overlap: int, multiple: int) -> None:
    side = cells * multiple
    overlap = min(overlap, side - multiple)
    padded = padded_length(length, side, multiple)
    starts = tile_starts(padded, side, overlap, multiple)
    assert padded >= length and padded - length < max(side, multiple)
    assert starts[0] == 0 and starts[-1] == padded - side
    assert all(start % multiple == 0 for start in starts)
    steps = np.diff(starts)
    assert (steps > 0).all() and (steps <= side - overlap).all()
    fewest = 1 + -(-(padded - side) // ((side - overlap) // multiple * multiple))
    assert len(starts) == fewest


@pytest.mark.parametrize("arguments", [(10, 16, 0, 1), (20, 16, 4, 8), (32, 16, 16, 8), (32, 16, -1, 1)])
def test_impossible_tiles_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        tile_starts(*arguments)


@given(st.integers(1, 40), st.integers(1, 130))
def test_positions_beyond_the_end_are_mirrored_like_in_numpy(length: int, stop: int) -> None:
    padded = np.pad(np.arange(length), (0, max(0, stop - length)), mode="reflect")[:stop]
    assert reflected(0, stop, length).tolist() == padded.tolist()
    assert reflected(stop // 2, stop, length).tolist() == padded[stop // 2 :].tolist()


@given(st.integers(16, 400), st.sampled_from([0, 1, 8, 12, 15]))
def test_weights_are_positive_smooth_and_add_up_to_one(length: int, overlap: int) -> None:
    starts = tile_starts(length, 16, overlap)
    fractions, total = tile_fractions(starts, 16, overlap), np.zeros(length)
    for start, fraction in zip(starts, fractions, strict=True):
        total[start : start + 16] += fraction
    assert (fractions > 0).all() and np.abs(total - 1).max() < 1e-6
    window = tile_window(16, overlap)
    assert (window == window[::-1]).all() and window.min() > 0


def test_overlapping_tiles_have_squared_sine_and_cosine_weights() -> None:
    first, second = tile_fractions([0, 24], 32, 8)
    middles = np.pi / 2 * (np.arange(8) + 0.5) / 8
    assert np.allclose(first[24:], np.cos(middles) ** 2, atol=1e-6)
    assert np.allclose(second[:8], np.sin(middles) ** 2, atol=1e-6)


# ---------------------------------------------------------------- noise


@settings(max_examples=30)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 40), st.integers(1, 40))
def test_the_noise_of_a_cell_depends_only_on_its_place(top: int, left: int, height: int, width: int) -> None:
    everywhere = ground_noise(3, 0, 0, 100, 100, 2)
    window = ground_noise(3, top, left, height, width, 2)
    assert (window == everywhere[:, top : top + height, left : left + width]).all()


def test_the_noise_is_standard_normal_and_differs_between_seeds() -> None:
    noise = ground_noise(3, 0, 0, 100, 100, 4)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    flat = noise.reshape(4, -1)
    assert np.abs(np.corrcoef(np.concatenate([flat[:, :-1], flat[:, 1:]])) - np.eye(8)).max() < 0.05
    assert (ground_noise(4, 0, 0, 100, 100, 4) != noise).mean() > 0.99
    blocks = noise[0, :96, :96].reshape(6, 16, 6, 16).swapaxes(1, 2).reshape(36, -1)
    assert len({block.tobytes() for block in blocks}) == 36


# ---------------------------------------------------------------- blending


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 0.25, 0.6, 0.9]))
def test_repeated_pixels_are_blended_exactly(height: int, width: int, factor: int, overlap: float) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    drawn = whole(upscaled(Picture(picture), Repeat(factor=factor), TileOptions(overlap, 3, 0)))
    assert (drawn == picture.repeat(factor, axis=0).repeat(factor, axis=1)).all()


def test_blended_strips_follow_the_rows_of_tiles() -> None:
    grid = Grid(height=75, width=40, side=32, overlap=8, multiple=8)
    tiles = [[(column, np.full((32, 32, 3), row)) for column in range(2)] for row in range(3)]
    strips = list(blended(grid, tiles))
    assert grid.rows == [0, 24, 48] and grid.columns == [0, 8] and len(grid) == 6
    assert [strip.shape for strip in strips] == [(24, 40, 3), (24, 40, 3), (27, 40, 3)]
    assert all(strip.dtype == np.float32 for strip in strips)
    image = np.concatenate(strips)
    assert np.allclose(image[:24], 0) and np.allclose(image[32:48], 1) and np.allclose(image[56:], 2)
    assert (np.diff(image, axis=0) > -1e-6).all()


def step_ratio(image: np.ndarray, grid: Grid) -> float:
    """Mean absolute step across the borders of tiles, rows and columns, relative to that at all other places."""
    at_borders, elsewhere = [], []
    for axis, starts in ((0, grid.rows), (1, grid.columns)):
        steps = np.abs(np.diff(image.astype(float), axis=axis)).mean(axis=(1 - axis, 2))
        ends = {place for start in starts for place in (start - 1, start + grid.side - 1)}
        border = np.isin(np.arange(len(steps)), sorted(ends))
        at_borders.append(steps[border])
        elsewhere.append(steps[~border])
    return float(np.concatenate(at_borders).mean() / np.concatenate(elsewhere).mean())


def offsets(number: int, noise: np.ndarray) -> object:
    return np.random.default_rng(number).uniform(-6, 6, (1, 1, 3))


def detail(number: int, noise: np.ndarray) -> object:
    """Detail from the noise, different near a tile's ends as by a decoder's padding, and an offset per tile."""
    drawn = gaussian_filter(noise[:3].repeat(8, axis=1).repeat(8, axis=2), (0, 6, 6))
    return 20 * drawn.transpose(1, 2, 0) + offsets(number, noise)


@pytest.mark.parametrize("ground", [smooth, textured])
@pytest.mark.parametrize("added", [offsets, detail])
def test_no_seam_is_visible(ground: Callable[[int, int], np.ndarray], added: Callable) -> None:
    picture = Picture(ground(300, 420).round().astype(np.uint8))
    grid = grid_of(picture, Repeat(side=64), 0.25)
    image = whole(upscaled(picture, Repeat(side=64, added=added), OPTIONS))
    assert step_ratio(image, grid) < 1.02
    seams = whole(upscaled(picture, Repeat(side=64, added=added), TileOptions(0.0, 8, 0)))
    if ground is smooth:  # to show that the measure detects seams
        assert step_ratio(seams, grid_of(picture, Repeat(side=64), 0.0)) > 1.5


def test_overlapping_tiles_start_from_the_same_noise() -> None:
    """Therefore tiles that depend only on their noise are blended to the same image as one single tile."""
    ground = Picture(np.full((96, 96, 3), 128, np.uint8))
    added = lambda number, noise: 20 * noise[:3].repeat(8, axis=1).repeat(8, axis=2).transpose(1, 2, 0)  # noqa: E731
    image = whole(upscaled(ground, Repeat(added=added), OPTIONS))
    cells = ground_noise(0, 0, 0, 12, 12, 4)[:3].transpose(1, 2, 0)
    expected = np.clip(np.rint(128 + 20 * cells), 0, 255).repeat(8, axis=0).repeat(8, axis=1)
    assert np.abs(image - expected).max() <= 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 5))
def test_strips_include_rows_of_their_neighbours(heights: list[int], rows: int) -> None:
    image = np.arange(sum(heights))[:, None]
    ends = np.cumsum(heights)
    result = list(in_context(np.split(image, ends[:-1]), rows))
    for (part, above, below), start, end, after in zip(result, [0, *ends[:-1]], ends, [*heights[1:], 0], strict=True):
        assert above == min(rows, start) and below == min(rows, after)
        assert (part == image[start - above : end + below]).all()


@pytest.mark.parametrize("context", [0, 3])
def test_a_strip_is_made_to_agree_with_its_input(context: int) -> None:
    """With area means and a correction that reads its neighbours, the result equals that of the whole image."""
    picture = np.random.default_rng(0).integers(20, 230, (50, 33, 3), dtype=np.uint8)

    def means(images: np.ndarray) -> np.ndarray:
        count, height, width, _ = images.shape
        return images.reshape(count, height // 4, 4, width // 4, 4, 3).mean(axis=(2, 4))

    def agree(images: np.ndarray, low: np.ndarray) -> np.ndarray:
        assert images.dtype == np.float32 and low.dtype == np.uint8
        missing = low - means(images)
        if context:
            missing = gaussian_filter(missing, (0, 0.5, 0.5, 0), truncate=4, mode="nearest")
        return images + missing.repeat(4, axis=1).repeat(4, axis=2)

    model = Repeat(factor=4, added=detail)
    image = whole(upscaled(Picture(picture), model, OPTIONS, agree=agree, context=context))
    alone = np.concatenate(list(blended_strips(picture)))[None]
    expected = agree(alone, picture[None])[0]
    assert np.abs(image - np.clip(np.rint(expected), 0, 255)).max() <= 1
    if not context:
        assert np.abs(means(image[None].astype(float))[0] - picture).max() < 0.51


def blended_strips(picture: np.ndarray) -> list[np.ndarray]:
    """The strips in `upscaled` before the consistency step."""
    kept: list[np.ndarray] = []
    model = Repeat(factor=4, added=detail)
    list(upscaled(Picture(picture), model, OPTIONS, agree=lambda images, _: kept.append(images[0].copy()) or images))
    return kept


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("height", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_ten_thousand_pixels_take_bounded_memory(height: int) -> None:
    class Ground:
        """A pattern that is generated when read."""

        width, place = 10_000, None

        def __init__(self) -> None:
            self.height = height

        def rows(self, start: int, stop: int) -> Strip:
            rows = (np.arange(start, stop) % 251).astype(np.uint8)[:, None, None]
            return Strip(np.broadcast_to(rows, (stop - start, self.width, 3)))

    top = 0
    tracemalloc.start()
    for strip in upscaled(Ground(), Repeat(side=64), TileOptions(0.125, 8, 0)):
        assert (strip.values == Ground().rows(top, top + len(strip.values)).values).all()
        top += len(strip.values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert top == height
    assert peak < 50e6, f"{peak / 1e6:.0f} MB"  # the whole image has 300 MB as uint8 and 1,200 MB as floats
