"""Metrics of pairs of images: compared with results by hand, by basicsr, and by the formulas of the papers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from basicsr_oracle import calculate_psnr, calculate_ssim, rgb2ycbcr
from scipy.ndimage import gaussian_filter
from tiny_networks import pictures

from eval.pairs import (
    LARGEST_PSNR,
    feature_distance,
    luma,
    luma_peak_signal_noise_ratio,
    luma_structural_similarity,
    mean_intersection_over_union,
    peak_signal_noise_ratio,
    pixel_accuracy,
    structural_similarity,
)


def damaged(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Image i with noise of standard deviation 2 + 6 i."""
    noise = np.random.default_rng(seed).standard_normal(images.shape)
    strength = 2 + 6 * np.arange(len(images))[:, None, None, None]
    return (images + strength * noise).round().clip(0, 255).astype(np.uint8)


def test_psnr_of_known_errors() -> None:
    truth = np.full((2, 16, 16, 3), 100, dtype=np.uint8)
    images = truth.copy()
    images[0] += 5
    images[1, :8] -= 20
    expected = [10 * np.log10(255**2 / 25), 10 * np.log10(255**2 / 200)]
    assert peak_signal_noise_ratio(images, truth) == pytest.approx(np.mean(expected))


def test_psnr_and_ssim_agree_with_basicsr() -> None:
    truth = pictures(6, size=40)
    images = damaged(truth)
    pairs = list(zip(images, truth, strict=True))
    psnr = [calculate_psnr(*pair, crop_border=0) for pair in pairs]
    ssim = [calculate_ssim(*pair, crop_border=0) for pair in pairs]
    assert np.ptp(psnr) > 10 and np.ptp(ssim) > 0.1
    assert peak_signal_noise_ratio(images, truth) == pytest.approx(np.mean(psnr), abs=1e-6)
    assert structural_similarity(images, truth) == pytest.approx(np.mean(ssim), abs=1e-6)


def test_luma_agrees_with_basicsr() -> None:
    truth = pictures(6, size=40)
    images = damaged(truth)
    as_float = np.stack([rgb2ycbcr((image / 255).astype(np.float32), y_only=True) * 255 for image in images])
    np.testing.assert_allclose(luma(images)[..., 0], as_float, atol=1e-3)
    assert luma(np.array([[[[0, 0, 0], [255, 255, 255]]]], np.uint8)).ravel() == pytest.approx([16, 235])
    pairs = [(image[..., ::-1], real[..., ::-1]) for image, real in zip(images, truth, strict=True)]  # it takes BGR
    psnr = [calculate_psnr(*pair, crop_border=0, test_y_channel=True) for pair in pairs]
    ssim = [calculate_ssim(*pair, crop_border=0, test_y_channel=True) for pair in pairs]
    assert np.ptp(psnr) > 10 and np.ptp(ssim) > 0.1
    assert luma_peak_signal_noise_ratio(images, truth) == pytest.approx(np.mean(psnr), abs=1e-3)
    assert luma_structural_similarity(images, truth) == pytest.approx(np.mean(ssim), abs=1e-4)
    # independent noise of the channels partly averages out, so luma and RGB differ
    assert luma_peak_signal_noise_ratio(images, truth) > peak_signal_noise_ratio(images, truth) + 1
    assert luma_peak_signal_noise_ratio(truth, truth) == pytest.approx(LARGEST_PSNR)
    with pytest.raises(ValueError, match="not \\[N, H, W, 3\\]"):
        luma(truth[..., :2])


def test_psnr_is_the_mean_over_images_and_not_that_of_the_pooled_error() -> None:
    """With a pooled error, one bad image would outweigh all good ones."""
    truth = np.full((4, 16, 16, 3), 100, dtype=np.uint8)
    images = truth + np.array([1, 1, 1, 50], dtype=np.uint8)[:, None, None, None]
    single = [peak_signal_noise_ratio(images[i : i + 1], truth[i : i + 1]) for i in range(4)]
    pooled = 10 * np.log10(255**2 / np.square(images.astype(float) - truth).mean())
    assert peak_signal_noise_ratio(images, truth) == pytest.approx(np.mean(single))
    assert peak_signal_noise_ratio(images, truth) > pooled + 10
    # for any composition of batches
    many, of = np.tile(images, (40, 1, 1, 1)), np.tile(truth, (40, 1, 1, 1))
    assert peak_signal_noise_ratio(many, of) == pytest.approx(np.mean(single))


def test_equal_images_have_the_largest_psnr_and_an_ssim_of_one() -> None:
    images = pictures(2)
    assert peak_signal_noise_ratio(images, images) == pytest.approx(LARGEST_PSNR)
    assert structural_similarity(images, images) == pytest.approx(1.0)
    assert pytest.approx(58.92, abs=0.01) == LARGEST_PSNR


def test_ssim_follows_its_formula() -> None:
    """Wang et al. 2004: Gaussian window of 11 px and 1.5 px, valid positions, the mean over channels."""
    first, second = pictures(1, 0, 32).astype(float), pictures(1, 1, 32).astype(float)
    second = 0.6 * first + 0.4 * second
    first, second = first.round(), second.round()

    def blur(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, (0, 1.5, 1.5, 0), radius=(0, 5, 5, 0))[:, 5:-5, 5:-5]

    a, b = blur(first), blur(second)
    covariance = blur(first * second) - a * b
    variances = blur(first**2) - a**2 + blur(second**2) - b**2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * a * b + c1) * (2 * covariance + c2) / ((a**2 + b**2 + c1) * (variances + c2))).mean()
    result = structural_similarity(first.astype(np.uint8), second.astype(np.uint8))
    assert 0.2 < result < 0.95
    assert result == pytest.approx(expected, abs=1e-4)


def test_pairs_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        peak_signal_noise_ratio(pictures(2), pictures(3))


def test_segmentation_metrics_equal_hand_computed_values() -> None:
    masks = np.array([[[0, 0, 1, 1], [0, 0, 1, 1]], [[2, 2, 2, 2], [0, 0, 0, 0]]], dtype=np.uint8)
    result = masks.copy()
    result[0, 0, 0] = 1  # class 0: 7 of 8 found; class 1: 4 of 5
    result[1, 0, :2] = 0  # class 2: 2 of 4; class 0: 7 of 10 together
    assert pixel_accuracy(result, masks, 4) == pytest.approx(13 / 16)
    # class 3 does not occur and is not counted
    assert mean_intersection_over_union(result, masks, 4) == pytest.approx((7 / 10 + 4 / 5 + 2 / 4) / 3)
    assert mean_intersection_over_union(masks, masks, 4) == 1


def test_feature_distance_equals_a_hand_computed_value() -> None:
    features, truth = np.array([[1.0, 0], [0, 2], [3, 3]]), np.array([[5.0, 0], [1, 0], [0, 1]])
    assert feature_distance(features, truth) == pytest.approx((0 + 1 + (1 - np.sqrt(0.5))) / 3)


def test_basicsr_is_imported_in_one_place(repository: Path) -> None:
    folders = ("runtime", "corpus", "encoders", "prune", "train", "downstream", "eval", "report", "scripts", "tests")
    sources = {path: path.read_text(encoding="utf-8") for name in folders for path in (repository / name).rglob("*.py")}
    this = Path(__file__).name
    alias = [path.name for path, text in sources.items() if "functional_tensor" in text and path.name != this]
    assert alias == ["basicsr_alias.py"]
    direct = [path.name for path, text in sources.items() if re.search(r"^\s*(from|import) basicsr\b", text, re.M)]
    assert direct == []
