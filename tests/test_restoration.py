"""Metrics of outputs compared with input, truth and one another: by hand, by basicsr, by known changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from basicsr_oracle import calculate_niqe
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from skimage import data
from tiny_networks import pictures
from torchvision.models import alexnet

from encoders.perceptual import LEAST, PerceptualScorer, perceptual_scorer
from eval.metrics import METRICS, compute
from eval.pairs import LARGEST_PSNR
from eval.restoration import (
    FRACTIONS,
    colour_error,
    consistency,
    correctness_maps,
    diversity,
    hallucination,
    improvement,
    niqe,
    niqe_block,
    omission,
    reflectance,
    spatial,
    spectral,
    spread,
    spread_map,
    synthesis,
)
from runtime.errors import UserError

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")  # scikit-image ships them


def photographs(side: int) -> np.ndarray:
    """The middle of each photograph, uint8 [3, side, side, 3]."""
    result = []
    for name in PHOTOGRAPHS:
        image = getattr(data, name)()
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        result.append(image[top : top + side, left : left + side])
    return np.stack(result)


def noisy(images: np.ndarray, strength: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, strength, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def blurred(images: np.ndarray, width: float) -> np.ndarray:
    return gaussian_filter(images.astype(float), (0, width, width, 0)).round().astype(np.uint8)


# ---------------------------------------------------------------- NIQE


def test_niqe_agrees_with_basicsr_at_its_own_block_size():
    images = photographs(200)
    expected = [calculate_niqe(image[..., ::-1], crop_border=0) for image in images]  # it takes BGR
    assert np.ptp(expected) > 1
    assert [niqe(images[i : i + 1]) for i in range(3)] == pytest.approx(expected, rel=1e-5)
    assert niqe(images) == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("side", [64, 128, 288])
def test_noise_and_blur_increase_niqe(side):
    images = photographs(side)
    for image in images:
        clean = niqe(image[None])
        assert niqe(noisy(image[None], 15)) > clean
        assert niqe(blurred(image[None], 1.5)) > clean
    assert niqe(noisy(images, 30)) > niqe(noisy(images, 8))


def test_niqe_has_two_by_two_blocks_or_is_undefined():
    assert [niqe_block(side) for side in (16, 32, 63, 64, 127, 128, 191, 192, 512)] == [
        *(None, None, None, 32, 32, 64, 64, 96, 96)
    ]
    assert niqe(photographs(63)) is None
    flat = np.full((1, 64, 64, 3), 90, np.uint8)
    assert niqe(flat) is None
    images = photographs(64)
    assert niqe(np.concatenate([images, flat])) == niqe(images)
    half = images[:1].copy()
    half[:, :, 32:] = 90  # two blocks are left and measured
    assert np.isfinite(niqe(half))


# ---------------------------------------------------------------- against the input


def test_consistency_is_the_psnr_of_the_degraded_output():
    low = pictures(2, size=16)
    away = low.astype(np.float32) + np.array([0.1, 4], np.float32)[:, None, None, None]
    expected = 10 * np.log10(255**2 / np.array([0.01, 16]))
    assert consistency(away[:1], low[:1]) == pytest.approx(LARGEST_PSNR) and expected[0] > LARGEST_PSNR + 1
    assert consistency(away[1:], low[1:]) == pytest.approx(expected[1])
    assert consistency(away, low) == pytest.approx((LARGEST_PSNR + expected[1]) / 2)
    assert consistency(low, low) == pytest.approx(LARGEST_PSNR)


def test_reflectance_equals_a_hand_computed_value():
    low = np.full((2, 4, 4, 3), 100, np.uint8)
    degraded = low.astype(float) + np.array([2.55, -7.65])[:, None, None, None]
    assert reflectance(degraded, low) == pytest.approx((0.01 + 0.03) / 2)


def test_spectral_angle_equals_hand_computed_values():
    low = np.zeros((1, 2, 2, 3), np.uint8)
    degraded = low.copy()
    low[0, 0], degraded[0, 0] = [[100, 0, 0], [50, 50, 0]], [[0, 200, 0], [50, 0, 0]]  # 90 and 45 degrees
    low[0, 1, 0], degraded[0, 1, 0] = [10, 20, 30], [20, 40, 60]  # brighter, with the same colour
    low[0, 1, 1] = [10, 20, 30]  # against black: no angle
    assert spectral(degraded, low) == pytest.approx((90 + 45 + 0) / 3)
    assert spectral(low, low) == 0
    assert spectral(np.zeros_like(low), low) is None


def test_spatial_finds_a_known_shift():
    image = photographs(280).astype(float)

    def reduced(dy: int, dx: int) -> np.ndarray:
        part = image[:, 12 + dy : 268 + dy, 12 + dx : 268 + dx]
        return part.reshape(3, 64, 4, 64, 4, 3).mean((2, 4))

    low = reduced(0, 0).round().astype(np.uint8)
    assert spatial(low, low) == 0
    assert spatial(reduced(0, 0), low) == pytest.approx(0, abs=0.02)
    for dy, dx in ((4, 0), (2, 0), (-4, 8)):
        assert spatial(reduced(dy, dx), low) == pytest.approx(np.hypot(dy, dx) / 4, abs=0.12)


def test_flat_images_have_no_shift():
    images = photographs(64)
    flat = np.full((1, 64, 64, 3), 90, np.uint8)
    assert spatial(flat, images[:1]) is None and spatial(noisy(flat, 0.3), flat) is None
    moved = np.roll(images, 1, axis=1)
    assert spatial(np.concatenate([moved, flat]), np.concatenate([images, flat])) == spatial(moved, images) > 0.5


def test_synthesis_measures_the_difference_from_the_enlarged_input():
    images = photographs(64)
    soft = blurred(images, 2)
    assert synthesis(soft, soft) == 0
    assert synthesis(images, soft) > synthesis(blurred(images, 1), soft) > 0
    assert synthesis(np.full_like(soft, 0), np.full_like(soft, 51)) == pytest.approx(0.2)


# ---------------------------------------------------------------- against the truth


def test_colour_error_compares_the_mean_colour_of_each_image():
    truth = np.full((2, 8, 8, 3), 100, np.uint8)
    images = truth.copy()
    images[0] += np.array([3, 0, 6], np.uint8)  # (3 + 0 + 6) / 3
    images[1, :4] += 10
    images[1, 4:] -= 10  # another image of the same mean colour
    assert colour_error(images, truth) == pytest.approx(3 / 2)
    assert colour_error(pictures(4), pictures(4)[::-1]) > 0


def scores_by_the_formula(image: np.ndarray, truth: np.ndarray, enlarged: np.ndarray) -> np.ndarray:
    """Hallucination, omission and improvement of one pixel of colours [3], by the formulas of the paper and package."""
    reference = np.abs(truth - enlarged).mean()
    d_im, d_om = np.abs(image - truth).mean() / reference, np.abs(image - enlarged).mean() / reference
    bend = 1 - np.exp(-0.05 * (d_im + d_om - 1))
    scores = np.array([np.exp(-0.05 * d_im * d_om), d_om + d_im * bend, d_im + d_om * bend])
    return np.exp(-scores / 0.25) / np.exp(-scores / 0.25).sum()


def test_correctness_follows_its_formula():
    truth = photographs(64)
    enlarged, images = blurred(truth, 2), noisy(blurred(truth, 1), 4)
    result = correctness_maps(images, truth, enlarged)
    assert result.shape == truth.shape and result.dtype == np.float32
    counts = np.isfinite(result).all(-1)
    np.testing.assert_array_equal(counts, np.isfinite(result).any(-1))
    np.testing.assert_allclose(result[counts].sum(-1), 1, atol=1e-6)
    assert 0.25 <= counts.mean() < 0.9
    checked = 0
    for place in np.argwhere(counts)[::97]:
        colours = [x[tuple(place)].astype(float) for x in (images, truth, enlarged)]
        if (colours[1] != colours[2]).any():
            np.testing.assert_allclose(result[tuple(place)], scores_by_the_formula(*colours), atol=1e-6)
            checked += 1
    assert checked > 20


def test_hallucination_omission_and_improvement_are_distinguished():
    truth = photographs(64)
    enlarged = blurred(truth, 2)
    invented = noisy(enlarged, 60)
    by_output = {"improvement": truth, "omission": enlarged, "hallucination": invented}
    functions = {"hallucination": hallucination, "omission": omission, "improvement": improvement}
    assert tuple(functions) == FRACTIONS
    for expected, images in by_output.items():
        fractions = {name: function(images, truth, enlarged) for name, function in functions.items()}
        assert max(fractions, key=fractions.get) == expected and fractions[expected] > 0.6
        assert sum(fractions.values()) == pytest.approx(1)
        means = [np.nanmean(image, (0, 1)) for image in correctness_maps(images, truth, enlarged)]
        assert list(fractions.values()) == pytest.approx(np.mean(means, axis=0), abs=1e-5)


def test_all_detail_added_to_a_flat_truth_is_hallucination():
    flat = np.full((1, 16, 16, 3), 90, np.uint8)
    assert hallucination(flat, flat, flat) is None
    images = flat.copy()
    images[0, 4:8] = 120
    maps = correctness_maps(images, flat, flat)
    np.testing.assert_array_equal(maps[0, 4:8], np.broadcast_to([1, 0, 0], (4, 16, 3)))
    assert np.isnan(maps[0, :4]).all() and np.isnan(maps[0, 8:]).all()
    assert hallucination(images, flat, flat) == 1
    # an image without detail is excluded from the mean
    both = [np.concatenate(pair) for pair in ((images, flat), (flat, flat), (flat, flat))]
    assert hallucination(*both) == 1


# ---------------------------------------------------------------- samples


def test_spread_equals_hand_computed_values():
    samples = np.zeros((2, 3, 4, 4, 3), np.uint8)
    samples[0, 2, 1, 2] = [30, 30, 0]  # one pixel of one image: 0, 0, 30 in two channels
    deviation = np.sqrt((2 * 10**2 + 20**2) / 2)
    expected = np.zeros((2, 4, 4))
    expected[0, 1, 2] = deviation * 2 / 3
    result = spread_map(samples)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert spread(samples) == pytest.approx(expected.mean())
    assert spread(samples[:, :1]) is None
    with pytest.raises(ValueError, match="two or more"):
        spread_map(samples[:, :1])


def test_spread_equals_the_noise_for_any_number_of_samples():
    samples = np.random.default_rng(0).normal(128, 12, (1, 64, 24, 24, 3)).round().astype(np.uint8)
    assert spread(samples) == pytest.approx(12, rel=0.02)
    variances = [np.square(spread_map(samples[:, :k, :, :, :1].repeat(3, -1))).mean() for k in (2, 8, 64)]
    assert variances == pytest.approx([144, 144, 144], rel=0.1)


def test_diversity_equals_hand_computed_values():
    features = np.array([[[1, 0], [0, 2], [-3, 0]], [[1, 1], [2, 2], [5, 5]]], float)
    assert diversity(features) == pytest.approx((np.mean([1, 2, 1]) + 0) / 2)
    assert diversity(features[:, :1]) is None
    assert compute({"sample_features": features}, of={"encoder": "e"}) == {"diversity_e": pytest.approx(2 / 3)}


# ---------------------------------------------------------------- all metrics


def test_shapes_that_do_not_fit_are_refused():
    images = pictures(3, size=16)
    for pair in (consistency, reflectance, spectral, spatial, synthesis, colour_error):
        with pytest.raises(ValueError, match="differ in shape"):
            pair(images, images[:2])
        with pytest.raises(ValueError, match="not \\[N, H, W, 3\\]"):
            pair(images[..., :2], images[..., :2])
    for fraction in (hallucination, omission, improvement, correctness_maps):
        with pytest.raises(ValueError, match="differ in shape"):
            fraction(images, images, images[:, ::2])
    for of in (spread, spread_map):
        with pytest.raises(ValueError, match="not \\[N, k, H, W, 3\\]"):
            of(images)
    with pytest.raises(ValueError, match="not \\[N, k, D\\]"):
        diversity(images[..., 0, 0])


def test_the_registry_computes_all_metrics_of_the_available_inputs():
    truth = photographs(64)
    enlarged = blurred(truth, 2)
    low = truth.reshape(3, 16, 4, 16, 4, 3).mean((2, 4)).round().astype(np.uint8)
    of_low = {"consistency", "reflectance", "spectral", "spatial"}
    assert set(compute({"degraded": low, "low": low}, of={})) == of_low
    known = {"images": enlarged, "truth": truth, "enlarged": enlarged, "degraded": low.astype(np.float32), "low": low}
    result = compute(known, of={})
    pairs = {"psnr", "ssim", "psnr_y", "ssim_y", "colour_error"}
    assert set(result) == of_low | pairs | set(FRACTIONS) | {"niqe", "synthesis"}
    assert None not in result.values()
    assert all(METRICS[name].shown in ("evaluation", "file") for name in result)


# ---------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """The convolutions of a random AlexNet of torchvision, as safetensors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = alexnet(weights=None).features.state_dict()
    path = tmp_path_factory.mktemp("lpips") / "alexnet.safetensors"
    save_file({f"features.{key}": value for key, value in state.items()}, path)
    return path


def by_hand(path: Path, images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """LPIPS (Zhang et al. 2018, equation 1) with torchvision's AlexNet and the package's weights of the channels."""
    import torchmetrics.functional.image as functional
    from safetensors.torch import load_file

    with torch.random.fork_rng():
        layers = alexnet(weights=None).features
    layers.load_state_dict({key.removeprefix("features."): value for key, value in load_file(path).items()})
    channels = torch.load(
        Path(functional.__file__).parent / "lpips_models/alex.pth", map_location="cpu", weights_only=True
    )
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    first, second = (
        ((torch.tensor(x).float() / 127.5 - 1 - shift) / scale).permute(0, 3, 1, 2) for x in (images, truth)
    )
    result = torch.zeros(len(images))
    with torch.no_grad():
        for index, layer in enumerate(layers[:12]):
            first, second = layer(first.clone()), layer(second.clone())
            if index in (1, 4, 7, 9, 11):
                a, b = (torch.nn.functional.normalize(x, dim=1) for x in (first, second))
                weight = channels[f"lin{(1, 4, 7, 9, 11).index(index)}.model.1.weight"].view(1, -1, 1, 1)
                result += ((a - b).square() * weight).sum(1).mean((1, 2))
    return result.numpy()


def test_lpips_follows_its_formula(weights):
    scorer = perceptual_scorer(str(weights))
    assert isinstance(scorer, PerceptualScorer)
    truth = photographs(64)
    images = np.stack([noisy(truth[:1], 10)[0], blurred(truth[1:2], 2)[0], truth[2]])
    result = scorer.scores(images, truth)
    assert result.dtype == np.float32 and result.shape == (3,)
    np.testing.assert_allclose(result, by_hand(weights, images, truth), rtol=1e-4, atol=1e-7)
    assert result[0] > 0 and result[1] > 0 and result[2] == 0
    assert compute({"lpips_scores": result}, of={}) == {"lpips": pytest.approx(result.mean())}


def test_lpips_reads_torch_files_and_keeps_the_random_state(weights, tmp_path):
    from safetensors.torch import load_file

    torch.save(load_file(weights), tmp_path / "alexnet.pth")
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    scorer = perceptual_scorer(str(tmp_path / "alexnet.pth"))
    assert torch.equal(torch.random.get_rng_state(), before)
    pair = photographs(LEAST), pictures(3, size=LEAST)
    np.testing.assert_array_equal(scorer.scores(*pair), perceptual_scorer(str(weights)).scores(*pair))
    with pytest.raises(UserError, match=f"images of at least {LEAST} px"):
        scorer.scores(pair[0][:, 1:], pair[1][:, 1:])
    with pytest.raises(ValueError, match="differ in shape"):
        scorer.scores(pair[0], pair[1][:2])


def test_lpips_needs_weights_and_invalid_ones_give_a_one_line_error(weights, tmp_path):
    assert perceptual_scorer(None) is None
    broken, other, text = (tmp_path / name for name in ("broken.safetensors", "other.safetensors", "text.pth"))
    broken.write_bytes(weights.read_bytes()[:1000])
    save_file({"features.0.weight": torch.zeros(2, 2)}, other)
    text.write_text("no weights", encoding="utf-8")
    for path in (tmp_path / "gone.pth", broken, other, text):
        with pytest.raises(UserError, match=r"eval\.lpips") as refused:
            perceptual_scorer(str(path))
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
