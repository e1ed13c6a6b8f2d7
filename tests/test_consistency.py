"""Back-projection: its result reduces to the low-resolution image, and a consistent image stays unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from downstream.consistency import back_project
from downstream.degradation import Linear, degrade, reduce

FACTOR, ITERATIONS = 4, 10
KINDS = ("area", "bicubic")
IMAGES = ("smooth", "textured", "noisy", "contrasts", "saturated")


def images_of(name: str, seed: int = 0, count: int = 4, height: int = 64, width: int = 48) -> np.ndarray:
    """uint8 [N, H, W, 3]; in `saturated` images a third of the values are 255, in `contrasts` all are 0 or 255."""
    values = np.random.default_rng(seed).standard_normal((count, height, width, 3))
    if name == "contrasts":
        return np.where(values > 0, 255, 0).astype(np.uint8)
    blur, deviation, mean = {
        "smooth": (6, 40, 128), "textured": (0.8, 40, 128), "noisy": (0, 70, 128), "saturated": (3, 100, 200),
    }[name]  # fmt: skip
    values = gaussian_filter(values, (0, blur, blur, 0))
    return (mean + deviation * values / values.std()).round().clip(0, 255).astype(np.uint8)


def least_psnr(result: np.ndarray, low: np.ndarray) -> float:
    """PSNR in decibels of the worst image."""
    error = np.square(result.astype(float) - low).mean((1, 2, 3))
    return float(10 * np.log10(255**2 / np.maximum(error, 1e-10)).min())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IMAGES)
def test_the_result_reduces_to_the_low_resolution_image(name: str, kind: str) -> None:
    """Starting from a noisy copy of the truth with a wrong tint, and from a completely different image."""
    truth = images_of(name)
    low = degrade(truth, FACTOR, Linear(kind))
    noise = 15 * np.random.default_rng(1).standard_normal(truth.shape)
    for start in ((truth + 12 + noise).clip(0, 255), images_of(name, seed=2)):
        start = start.astype(np.float32)
        assert least_psnr(reduce(start, FACTOR, kind), low) < 35
        result = back_project(start, low, FACTOR, kind, ITERATIONS)
        assert result.dtype == np.float32 and result.min() >= 0 and result.max() <= 255
        assert least_psnr(reduce(result, FACTOR, kind), low) >= 60
        rounded = result.round().astype(np.uint8)
        assert least_psnr(degrade(rounded, FACTOR, Linear(kind)), low) >= 45


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IMAGES)
def test_a_consistent_image_is_not_changed(name: str, kind: str) -> None:
    truth = images_of(name).astype(np.float32)
    given = truth.copy()
    exact = back_project(given, reduce(truth, FACTOR, kind), FACTOR, kind, ITERATIONS)
    assert (exact == truth).all() and (given == truth).all()
    # a low-resolution image of eight bits is exact to half a level
    rounded = back_project(truth, degrade(truth.astype(np.uint8), FACTOR, Linear(kind)), FACTOR, kind, ITERATIONS)
    assert np.sqrt(np.square(rounded - truth).mean()) < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_a_colour_cast_is_removed_and_detail_is_kept(kind: str) -> None:
    truth = images_of("textured").astype(np.float32)
    truth = 30 + truth * (195 / 255)  # no value is near 0 or 255
    cast = truth + np.array([12, -12, 12], dtype=np.float32)
    result = back_project(cast, reduce(truth, FACTOR, kind), FACTOR, kind, ITERATIONS)
    np.testing.assert_allclose(result, truth, atol=0.05)


def test_the_exact_step_for_area_is_the_nearest_neighbour_enlargement() -> None:
    """Without smooth corrections, each pixel of a block is corrected by the error of the block's mean."""
    start = 100 + 0.2 * images_of("noisy").astype(np.float32)
    low = 90 + 0.3 * images_of("smooth", seed=3, height=16, width=12).astype(np.float32)
    rest = low - reduce(start, FACTOR, "area")
    expected = start + rest.repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)
    np.testing.assert_allclose(back_project(start, low, FACTOR, "area", 0), expected, atol=1e-3)


def test_the_correction_is_smooth() -> None:
    """Blocks are not visible: steps of the correction across their borders are no larger than inside."""
    truth = images_of("smooth", seed=4).astype(np.float32)
    start = np.full_like(truth, 128)
    change = back_project(start, reduce(truth, FACTOR, "area"), FACTOR, "area", ITERATIONS) - start
    steps = np.abs(np.diff(change, axis=1)).mean((0, 2, 3))
    border = np.arange(1, 64) % FACTOR == 0
    assert steps[border].mean() < 1.3 * steps[~border].mean()


def test_values_outside_the_range_are_clipped() -> None:
    start = np.full((1, 8, 8, 3), 260, dtype=np.float32)
    result = back_project(start, np.full((1, 2, 2, 3), 260, dtype=np.float32), FACTOR, "area", 0)
    assert (result == 255).all() and (start == 260).all()


def test_an_image_s_result_does_not_depend_on_the_others() -> None:
    truth, start = images_of("textured"), images_of("saturated", seed=5).astype(np.float32)
    low = degrade(truth, FACTOR)
    together = back_project(start, low, FACTOR, "area", ITERATIONS)
    for i in range(len(truth)):
        alone = back_project(start[i : i + 1], low[i : i + 1], FACTOR, "area", ITERATIONS)
        np.testing.assert_allclose(alone[0], together[i], atol=1e-3)
    assert back_project(start[:0], low[:0], FACTOR, "area", ITERATIONS).shape == (0, 64, 48, 3)
