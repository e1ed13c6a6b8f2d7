"""Degradation to low resolution: equality with PIL and formulas, properties of the random chain; enlargement."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from scipy.ndimage import gaussian_filter
from tiny_networks import pictures

from downstream import degradation
from downstream.degradation import Blind, Linear, add_noise, degradation_of, degrade, low_resolution, reduce
from downstream.interpolation import enlarge
from runtime.application import CONFIGS
from runtime.errors import UserError


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", [f"downstream.super_resolution.{override}" for override in overrides])


def blind_options(**changes: object) -> Blind:
    return replace(degradation_of(config("degradation=blind")), **changes)


def noise(count: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------- area and bicubic


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_area_is_the_rounded_mean(factor: int) -> None:
    images = noise(3, 48, 24)
    exact = reduce(images.astype(np.float32), factor, "area")
    blocks = [images[:, y::factor, x::factor].astype(float) for y in range(factor) for x in range(factor)]
    np.testing.assert_allclose(exact, np.mean(blocks, axis=0), atol=1e-4)
    assert (degrade(images, factor) == np.floor(np.mean(blocks, axis=0) + 0.5)).all()
    assert (degrade(images, factor) == low_resolution(images, factor)).all()


def cubic_weights(side: int, factor: int) -> np.ndarray:
    """Keys' kernel with a = -0.5, widened by the factor, at the centres of the pixels; [side / factor, side]."""
    distance = (np.arange(side) + 0.5)[None] / factor - (np.arange(side // factor) + 0.5)[:, None]
    x = np.abs(distance)
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("factor", [2, 4])
def test_bicubic_agrees_with_the_antialiased_formula_and_pil_in_float_mode(factor: int) -> None:
    images = (pictures(4, size=64) * 0.6 + 50).astype(np.float32)[:, :, :48]  # no overshoots
    result = reduce(images, factor, "bicubic")
    expected = np.einsum("ih,nhwc,jw->nijc", cubic_weights(64, factor), images, cubic_weights(48, factor))
    np.testing.assert_allclose(result, expected, atol=1e-3)
    size = (48 // factor, 64 // factor)
    pil = [Image.fromarray(images[0, ..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(3)]
    np.testing.assert_allclose(result[0], np.stack([np.asarray(channel) for channel in pil], axis=-1), atol=1e-3)


def test_bicubic_of_8_bits_equals_pil_and_differs_from_floats_by_at_most_one_level() -> None:
    contrasts = (noise(20) > 127).astype(np.uint8) * 255  # their bicubic reduction overshoots nearly everywhere
    for images in (pictures(20, size=64), noise(20), contrasts):
        result = degrade(images, 4, Linear("bicubic"))
        assert (result[7] == np.asarray(Image.fromarray(images[7]).resize((16, 16), Image.Resampling.BICUBIC))).all()
        exact = reduce(images.astype(np.float32), 4, "bicubic")
        assert exact.min() >= 0 and exact.max() <= 255
        error = np.abs(exact.round() - result)
        assert error.max() <= 1 and (error > 0).mean() < 0.15


def test_sides_must_be_multiples_of_the_factor() -> None:
    for call in (degrade, low_resolution, lambda images, factor: reduce(images, factor, "bicubic")):
        with pytest.raises(UserError, match="factor=5 does not divide 64 x 64 px"):
            call(noise(1), 5)


def test_no_images_give_an_empty_result() -> None:
    for kind in (Linear("area"), Linear("bicubic"), blind_options()):
        assert degrade(noise(0), 4, kind).shape == (0, 16, 16, 3)
    assert reduce(noise(0).astype(np.float32), 4, "area").shape == (0, 16, 16, 3)


# ---------------------------------------------------------------- the random chain


def global_states() -> tuple[object, ...]:
    """States of the global random generators."""
    numpy_state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return random.getstate(), numpy_state["pos"], numpy_state["key"].tolist(), torch.get_rng_state().tolist()


def test_blind_degradation_depends_only_on_pixels_seed_and_number() -> None:
    images, blind = pictures(8, size=64), blind_options()
    states = global_states()
    whole = degrade(images, 4, blind)
    assert global_states() == states

    order = np.array([5, 2, 7])
    assert (degrade(images[order], 4, blind, order) == whole[order]).all()
    assert (degrade(images, 4, blind, range(8)) == whole).all()
    other_number, other_seed = degrade(images, 4, blind, range(8, 16)), degrade(images, 4, replace(blind, seed=1))
    for other in (other_number, other_seed):
        assert ((other != whole).mean((1, 2, 3)) > 0.3).all()
    with pytest.raises(ValueError, match="zip"):
        degrade(images, 4, blind, [1, 2])


@pytest.mark.parametrize(("factor", "height", "width"), [(2, 32, 48), (4, 64, 32), (8, 64, 64)])
def test_blind_degradation_has_the_size_of_the_low_resolution(factor: int, height: int, width: int) -> None:
    low = degrade(noise(6, height, width), factor, blind_options())
    assert low.shape == (6, height // factor, width // factor, 3) and low.dtype == np.uint8


def test_blind_degradation_does_not_shift_the_image() -> None:
    """The mean over many draws equals the area means; single draws are degraded, each in a different way."""
    images = gaussian_filter(np.random.default_rng(0).standard_normal((8, 64, 64, 3)), (0, 7, 7, 0))
    images = (128 + 40 * images / images.std()).clip(0, 255).astype(np.uint8)
    drawn = degrade(np.repeat(images, 80, axis=0), 4, blind_options()).astype(float).reshape(8, 80, 16, 16, 3)
    area, mean = low_resolution(images, 4).astype(float), drawn.mean(1)
    assert np.abs(mean.mean((0, 1, 2)) - area.mean((0, 1, 2))).max() < 1
    # the shift in low-resolution pixels, by least squares along the slope; a high-resolution pixel is 0.25 of them
    for axis in (1, 2):
        slope = np.gradient(area, axis=axis)[:, 2:-2, 2:-2]
        shift = (slope * (area - mean)[:, 2:-2, 2:-2]).sum() / np.square(slope).sum()
        assert abs(shift) < 0.05
    single = np.sqrt(np.square(drawn - area[:, None]).mean((2, 3, 4)))
    assert 2 < np.median(single) < 15 and np.quantile(single, 0.9) > 1.5 * np.quantile(single, 0.1)


def test_blur_kernels_have_sum_one_and_the_published_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges, generator, seen = blind_options().first, np.random.default_rng(0), []
    from downstream import basicsr_parts

    for name in ("bivariate_Gaussian", "bivariate_generalized_Gaussian", "bivariate_plateau"):
        made = getattr(basicsr_parts, name)

        def noted(*values: float, isotropic: bool, name: str = name, made=made) -> np.ndarray:
            seen.append((name, isotropic))
            return made(*values, isotropic=isotropic)

        monkeypatch.setattr(basicsr_parts, name, noted)
    kernels = [degradation._blur_kernel(ranges, generator) for _ in range(2000)]
    assert all(kernel.sum() == pytest.approx(1) and kernel.min() >= 0 for kernel in kernels)
    assert {len(kernel) for kernel in kernels} == set(range(7, 22, 2))
    fractions = [seen.count((name, isotropic)) / 2000 for name, isotropic in sorted(set(seen))]
    published = [0.25, 0.45, 0.03, 0.12, 0.03, 0.12]  # anisotropic before isotropic
    np.testing.assert_allclose(fractions, published, atol=0.04)
    symmetric = [np.abs(kernel - kernel[::-1, ::-1]).max() < 1e-9 for kernel in kernels]
    assert all(symmetric)  # then filter and convolution are equal


def test_sinc_kernels_have_negative_lobes() -> None:
    blind, generator = blind_options(cutoff=(0.5, 0.6)), np.random.default_rng(0)
    with np.errstate(all="raise"):
        kernels = [degradation._sinc_kernel(blind, (7, 21), generator) for _ in range(50)]
    assert all(kernel.sum() == pytest.approx(1) and kernel.min() < -0.001 for kernel in kernels)


def test_noise_is_as_strong_as_requested() -> None:
    generator = np.random.default_rng(0)
    first = replace(blind_options().first, noise=(8, 8), photons=(2000, 2000))
    levels = np.repeat(np.array([50, 100, 200], dtype=np.float32), 100)[:, None, None] * np.ones(
        (1, 200, 3), np.float32
    )

    def deviations(**chances: float) -> list[float]:
        noisy = degradation._noisy(levels, first, blind_options(**chances), generator) - levels
        grey = chances["grey_chance"] == 1
        assert np.allclose(noisy[..., :1], noisy, atol=1e-3) == grey
        return [noisy[part].std() for part in (slice(100), slice(100, 200), slice(200, 300))]

    for grey in (0.0, 1.0):
        np.testing.assert_allclose(deviations(gaussian_chance=1.0, grey_chance=grey), [8, 8, 8], rtol=0.05)
        shot = np.sqrt(255 * np.array([50, 100, 200]) / 2000)  # n photons have the deviation sqrt(n)
        np.testing.assert_allclose(deviations(gaussian_chance=0.0, grey_chance=grey), shot, rtol=0.05)


def test_jpeg_keeps_colours_in_their_channels() -> None:
    flat = np.full((16, 16, 3), (200, 90, 20), dtype=np.float32)
    ranges = replace(blind_options().first, jpeg=(75, 75))
    result = degradation._jpeg(flat, ranges, np.random.default_rng(0))
    assert np.abs(result - flat).max() < 4
    textured = noise(1)[0].astype(np.float32)
    qualities = [replace(ranges, jpeg=(quality, quality)) for quality in (30, 60, 95)]
    errors = [np.abs(degradation._jpeg(textured, one, np.random.default_rng(0)) - textured).mean() for one in qualities]
    assert errors[0] > errors[1] > errors[2] > 1


# ---------------------------------------------------------------- config, noise, enlargements


def test_configs_give_the_degradation_that_they_name() -> None:
    assert degradation_of(config()) == Linear("area")
    assert degradation_of(config("degradation=bicubic")) == Linear("bicubic")
    blind = degradation_of(config("degradation=blind", "blind.seed=5", "blind.first.sigma=[0.3,0.4]"))
    assert (blind.kind, blind.seed, blind.first.sigma) == ("blind", 5, (0.3, 0.4))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("degradation=sharp", "degradation=sharp is unknown: give area, bicubic or blind"),
        ("blind.first.sigma=[2,1]", r"blind.first.sigma=\[2, 1\]: give two positive numbers, the smaller one first"),
        ("blind.second.photons=[0,1]", r"blind.second.photons=\[0, 1\]: give two positive numbers"),
        ("blind.second.jpeg=50", "blind.second.jpeg=50: give two positive numbers"),
        ("blind.last_sides=[2,5]", r"blind.last_sides=\[2, 5\]: give two odd numbers, the smaller one first"),
        ("blind.sinc_chance=1.5", "blind.sinc_chance=1.5: give a number from 0 to 1"),
    ],
)
def test_a_wrong_config_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        degradation_of(config("degradation=blind", override))


def test_added_noise_has_the_deviation_of_its_image() -> None:
    low = np.full((3, 64, 64, 3), 128, dtype=np.uint8)
    noisy = add_noise(low, np.array([0, 5, 20]), np.random.default_rng(0))
    assert noisy.dtype == np.uint8 and (noisy[0] == 128).all()
    assert noisy[1].std() == pytest.approx(5, rel=0.03) and noisy[2].std() == pytest.approx(20, rel=0.03)
    assert np.abs(noisy.mean((1, 2, 3)) - 128).max() < 0.5
    assert (add_noise(low, np.array([0, 5, 20]), np.random.default_rng(0)) == noisy).all()
    edges = add_noise(np.full((1, 8, 8, 3), 250, dtype=np.uint8), np.array([60.0]), np.random.default_rng(0))
    assert edges.max() == 255 and edges.min() > 20  # clipped, not wrapped around


def test_enlargements_equal_those_of_pil() -> None:
    low = pictures(3)[:, :, :8]
    assert (enlarge(low, 4, "nearest") == low.repeat(4, axis=1).repeat(4, axis=2)).all()
    for kind, filtered in (("bicubic", Image.Resampling.BICUBIC), ("lanczos", Image.Resampling.LANCZOS)):
        result = enlarge(low, 4, kind)
        assert result.shape == (3, 64, 32, 3)
        assert (result[1] == np.asarray(Image.fromarray(low[1]).resize((32, 64), filtered))).all()
    assert enlarge(low[:0], 4, "bicubic").shape == (0, 64, 32, 3)
