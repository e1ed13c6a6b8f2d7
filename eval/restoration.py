"""Metrics of images made from an input: against the input, against the truth, and among samples of one input.

The families reflectance, spectral, spatial, synthesis and correctness are those of Aybar et al. 2024 (opensr-test);
docs/method.md describes where the definitions differ. Pixel values divided by 255 are used as reflectances.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from eval.pairs import peak_signal_noise_ratio
from runtime.basicsr_alias import basicsr_module

#: Sides of the blocks of NIQE in pixels; the authors use the first one.
NIQE_BLOCKS = (96, 64, 32)
#: Smallest number of blocks along the shorter side: the covariance of a single block is undefined.
NIQE_BLOCKS_ALONG = 2
#: Number of steps per pixel in the search of a shift.
SHIFT_STEPS = 20
#: Standard deviation in grey levels below which an image is too flat to detect a shift.
FLAT = 1.0
#: The fractions of a pixel that the output changes or should have changed, in the order of `correctness_maps`.
FRACTIONS = ("hallucination", "omission", "improvement")
#: Defaults of opensr-test 1.3.3: bend of the three scores, temperature of the softmin, quantile of pixels left out.
SCORE_BEND = 0.05
TEMPERATURE = 0.25
QUIET_QUANTILE = 0.75


def _pairs(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Float64 [H, W, 3] pairs of two arrays [N, H, W, 3].

    Raises:
        ValueError: the arrays differ in shape or are not colour images.
    """
    _check_colour(first, second)
    return ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(first, second, strict=True))


def _check_colour(*arrays: np.ndarray) -> None:
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1:
        raise ValueError(f"sets of images differ in shape: {', '.join(map(str, shapes))}")
    if len(shapes[0]) != 4 or shapes[0][-1] != 3:
        raise ValueError(f"images have the shape {shapes[0]}, not [N, H, W, 3]")


def _mean(values: list[float]) -> float | None:
    """Mean of the finite values; None where there are none."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else None


# ---------------------------------------------------------------- an image alone


def niqe(images: np.ndarray) -> float | None:
    """Mean NIQE (Mittal et al. 2013), computed with basicsr and its parameters of pristine photographs, on BT.601 luma.

    The side of a block is `niqe_block` pixels. Images with fewer than two textured blocks are left out.

    Args:
        images: uint8 [N, H, W, 3].
    Returns:
        the mean, lower is more natural; None below 64 px, or if all images are left out.
    """
    block = niqe_block(min(images.shape[1:3]))
    return None if block is None else _mean([_niqe(image, block) for image in images])


def niqe_block(side: int) -> int | None:
    """Side of the largest block of `NIQE_BLOCKS` that fits two by two into an image; None if none does."""
    return next((block for block in NIQE_BLOCKS if block * NIQE_BLOCKS_ALONG <= side), None)


def _niqe(image: np.ndarray, block: int) -> float:
    """NIQE of uint8 [H, W, 3]; NaN where it is undefined."""
    luma = basicsr_module("utils").rgb2ycbcr(np.ascontiguousarray(image), y_only=True).astype(np.float32)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # blocks without texture, which basicsr leaves out
        try:
            return basicsr_module("metrics.niqe").niqe(luma, *_pristine(), block, block)
        except np.linalg.LinAlgError:  # no covariance: fewer than two blocks are left
            return np.nan


@lru_cache(maxsize=1)
def _pristine() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [1, 36] and covariance [36, 36] of the features of pristine photographs, and the 7 x 7 window."""
    with np.load(Path(basicsr_module("metrics.niqe").__file__).with_name("niqe_pris_params.npz")) as file:
        return file["mu_pris_param"], file["cov_pris_param"], file["gaussian_window"]


# ---------------------------------------------------------------- against the input


def consistency(degraded: np.ndarray, low: np.ndarray) -> float:
    """Mean PSNR in dB of the degraded output against the low-resolution input, limited in the same way as `psnr`.

    Args:
        degraded: the output, degraded again, uint8 or float [N, h, w, 3] in 0..255.
        low: uint8 [N, h, w, 3].
    """
    _check_colour(degraded, low)
    return peak_signal_noise_ratio(degraded, low)


def reflectance(degraded: np.ndarray, low: np.ndarray) -> float:
    """Mean absolute error of the degraded output against the input in 0..1; arrays as for `consistency`."""
    return float(np.mean([np.abs(a - b).mean() / 255 for a, b in _pairs(degraded, low)]))


def spectral(degraded: np.ndarray, low: np.ndarray) -> float | None:
    """Mean angle in degrees between the colours of a pixel in the degraded output and in the input.

    The mean is taken over the pixels of an image, then over images. Black has no angle, so pixels that are black in
    either image are left out. The arrays are those of `consistency`.
    """
    return _mean([_spectral_angle(a, b) for a, b in _pairs(degraded, low)])


def _spectral_angle(first: np.ndarray, second: np.ndarray) -> float:
    known = (first != 0).any(-1) & (second != 0).any(-1)
    first, second = first[known], second[known]
    # computed from sine and cosine, because the arc cosine is inexact for small angles
    sine, cosine = np.linalg.norm(np.cross(first, second), axis=-1), (first * second).sum(-1)
    return float(np.rad2deg(np.arctan2(sine, cosine)).mean()) if known.any() else np.nan


def spatial(degraded: np.ndarray, low: np.ndarray) -> float | None:
    """Mean length of the shift between the degraded output and the input, in low-resolution pixels.

    The shift is found by scikit-image's phase cross-correlation of the mean over channels under a Hann window, in steps
    of 1/20 pixel. Images that are flat (`FLAT`) in the output or the input have no shift and are left out. The arrays
    are those of `consistency`.
    """
    return _mean([_shift(a.mean(-1), b.mean(-1)) for a, b in _pairs(degraded, low)])


def _shift(moved: np.ndarray, fixed: np.ndarray) -> float:
    """Length of the shift between two images, float [h, w]; NaN if either is flat."""
    # imported here: every command imports this module, and these imports take seconds
    from skimage.filters import window
    from skimage.registration import phase_cross_correlation

    if min(moved.std(), fixed.std()) < FLAT:
        return np.nan
    # without the window, the image's border correlates with itself and holds the shift at zero
    fade = window("hann", fixed.shape)
    moved, fixed = ((image - image.mean()) * fade for image in (moved, fixed))
    return float(np.linalg.norm(phase_cross_correlation(fixed, moved, upsample_factor=SHIFT_STEPS)[0]))


def synthesis(images: np.ndarray, enlarged: np.ndarray) -> float:
    """Mean absolute difference, in 0..1, between the output and the interpolated input.

    Args:
        images, enlarged: uint8 [N, H, W, 3].
    """
    return float(np.mean([np.abs(a - b).mean() / 255 for a, b in _pairs(images, enlarged)]))


# ---------------------------------------------------------------- against the truth


def colour_error(images: np.ndarray, truth: np.ndarray) -> float:
    """Absolute difference between the mean colours of output and truth in grey levels, mean over channels and images.

    Args:
        images, truth: uint8 [N, H, W, 3].
    """
    return float(np.mean([np.abs(a.mean((0, 1)) - b.mean((0, 1))).mean() for a, b in _pairs(images, truth)]))


def hallucination(images: np.ndarray, truth: np.ndarray, enlarged: np.ndarray) -> float | None:
    """Fraction of detail in the output that is not in the truth; see `correctness_maps`."""
    return _fraction(FRACTIONS.index("hallucination"), images, truth, enlarged)


def omission(images: np.ndarray, truth: np.ndarray, enlarged: np.ndarray) -> float | None:
    """Fraction of detail of the truth that is not in the output; see `correctness_maps`."""
    return _fraction(FRACTIONS.index("omission"), images, truth, enlarged)


def improvement(images: np.ndarray, truth: np.ndarray, enlarged: np.ndarray) -> float | None:
    """Fraction of detail of the truth that is in the output and not in the input; see `correctness_maps`."""
    return _fraction(FRACTIONS.index("improvement"), images, truth, enlarged)


def _fraction(index: int, *sets: np.ndarray) -> float | None:
    """One of the fractions: the mean over the valid pixels of an image, then over images that have valid pixels."""
    fractions = (image[..., index] for image in _correctness(*sets))
    return _mean(
        [float(fraction[np.isfinite(fraction)].mean()) for fraction in fractions if np.isfinite(fraction).any()]
    )


def correctness_maps(images: np.ndarray, truth: np.ndarray, enlarged: np.ndarray) -> np.ndarray:
    """The fractions of hallucination, omission and improvement in every pixel (Aybar et al. 2024), by `FRACTIONS`.

    Args:
        images, truth: uint8 [N, H, W, 3].
        enlarged: the interpolated input, uint8 [N, H, W, 3].
    Returns:
        float32 [N, H, W, 3]; the three fractions sum to 1, or are NaN in pixels without detail in all three images.
    """
    return np.stack(list(_correctness(images, truth, enlarged)))


def _correctness(images: np.ndarray, truth: np.ndarray, enlarged: np.ndarray) -> Iterator[np.ndarray]:
    _check_colour(images, truth, enlarged)
    return (
        _fractions(*(np.asarray(x, np.float64) for x in each)) for each in zip(images, truth, enlarged, strict=True)
    )


def _fractions(image: np.ndarray, truth: np.ndarray, enlarged: np.ndarray) -> np.ndarray:
    """Float32 [H, W, 3] of one image, by `FRACTIONS`."""
    to_truth, to_input, needed = (
        np.abs(a - b).mean(-1) for a, b in ((image, truth), (image, enlarged), (truth, enlarged))
    )
    loudest = np.maximum(np.maximum(to_truth, to_input), needed)
    counts = loudest > np.quantile(needed, QUIET_QUANTILE, method="lower")
    # where truth and input are equal, no change is needed, so any change is hallucination (an infinite ratio)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        missed, changed = to_truth / needed, to_input / needed
        bend = -np.expm1(-SCORE_BEND * (missed + changed - 1))
        scores = np.stack([np.exp(-SCORE_BEND * missed * changed), changed + missed * bend, missed + changed * bend])
        weights = np.exp(-scores / TEMPERATURE)
        fractions = np.where(counts, weights / weights.sum(0), np.nan)
    return np.moveaxis(fractions, 0, -1).astype(np.float32)


# ---------------------------------------------------------------- among samples of one input


def spread(samples: np.ndarray) -> float | None:
    """Mean of `spread_map` over pixels and images, in grey levels; None for fewer than two samples per input.

    Args:
        samples: uint8 [N, k, H, W, 3], k samples of every input.
    """
    _check_samples(samples)
    return _mean([float(_deviation(of_one).mean()) for of_one in samples]) if samples.shape[1] > 1 else None


def spread_map(samples: np.ndarray) -> np.ndarray:
    """Variation of the samples of one input in every pixel, float32 [N, H, W] in grey levels.

    The value is the standard deviation over the samples, averaged over the channels. It uses k - 1 degrees of freedom,
    so that results for different numbers of samples can be compared.

    Args:
        samples: uint8 [N, k, H, W, 3], k at least 2.
    Raises:
        ValueError: there are fewer than two samples.
    """
    _check_samples(samples)
    if samples.shape[1] < 2:
        raise ValueError(f"{samples.shape[1]} sample an input has no spread: give two or more")
    return np.stack([_deviation(of_one) for of_one in samples])


def _check_samples(samples: np.ndarray) -> None:
    if samples.ndim != 5 or samples.shape[-1] != 3:
        raise ValueError(f"samples have the shape {samples.shape}, not [N, k, H, W, 3]")


def _deviation(samples: np.ndarray) -> np.ndarray:
    """Float32 [H, W] of uint8 [k, H, W, 3]."""
    return np.std(samples, axis=0, ddof=1, dtype=np.float64).mean(-1).astype(np.float32)


def diversity(sample_features: np.ndarray) -> float | None:
    """Mean of 1 - cosine over pairs of samples of one input, then over inputs; None for fewer than two samples.

    Args:
        sample_features: float [N, k, D].
    """
    if sample_features.ndim != 3:
        raise ValueError(f"features of samples have the shape {sample_features.shape}, not [N, k, D]")
    count = sample_features.shape[1]
    if count < 2:
        return None
    features = np.asarray(sample_features, dtype=np.float64)
    features = features / np.maximum(np.linalg.norm(features, axis=2, keepdims=True), 1e-12)
    first, second = np.triu_indices(count, 1)
    return float(np.mean(1 - np.einsum("nkd,nld->nkl", features, features)[:, first, second]))
