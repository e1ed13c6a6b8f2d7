"""Metrics of images that each have a counterpart: the true image, a caption or a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from skimage.metrics import structural_similarity as image_ssim

from corpus.masks import IGNORED

#: Number of images by their true scene, then by the scene that CLIP recognises.
Confusion = Mapping[str, Mapping[str, int]]
#: Rounding to 8 bits alone leaves a mean squared error of 1/12: above this, two images cannot be distinguished.
LARGEST_PSNR = float(10 * np.log10(12 * 255**2))
#: Standard deviation of SSIM's Gaussian window in pixels; the window has 11 of them.
SSIM_SIGMA = 1.5
#: ITU-R BT.601 luma of R, G, B in 0..1, in the grey levels 16..235 of video (as MATLAB's rgb2ycbcr).
LUMA, LUMA_OF_BLACK = np.array([65.481, 128.553, 24.966]), 16.0
BATCH = 128


def _batches(images: np.ndarray, truth: np.ndarray) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    """Float64 [B, 3, H, W] pairs in 0..255."""
    if images.shape != truth.shape:
        raise ValueError(f"pairs differ in shape: {images.shape} and {truth.shape}")
    parts = (slice(start, start + BATCH) for start in range(0, len(images), BATCH))
    return [
        tuple(torch.from_numpy(np.array(x[part])).permute(0, 3, 1, 2).double() for x in (images, truth))
        for part in parts
    ]


def peak_signal_noise_ratio(images: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the pairs of the PSNR in dB over all pixels and channels of a pair (torchmetrics).

    The PSNR of a pair is limited to `LARGEST_PSNR`: one featureless ocean tile that is matched exactly would make the
    mean infinite.

    Args:
        images, truth: uint8 [N, H, W, 3].
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio as image_psnr  # slow to import

    values = [
        image_psnr(first, second, data_range=255.0, reduction="none", dim=(1, 2, 3)).clamp(max=LARGEST_PSNR)
        for first, second in _batches(images, truth)
    ]
    return float(torch.cat(values).mean())


def structural_similarity(images: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the pairs of the SSIM over the channels of a pair (Wang et al. 2004: Gaussian window, sigma 1.5).

    Computed with scikit-image, which uses a separable window and leaves out positions at which the window extends
    beyond the image.

    Args:
        images, truth: [N, H, W, C] in 0..255, H and W at least 11.
    """
    if images.shape != truth.shape:
        raise ValueError(f"pairs differ in shape: {images.shape} and {truth.shape}")
    values = [
        image_ssim(
            np.asarray(first, dtype=np.float64),
            np.asarray(second, dtype=np.float64),
            data_range=255.0,
            channel_axis=2,
            gaussian_weights=True,
            sigma=SSIM_SIGMA,
            use_sample_covariance=False,
        )
        for first, second in zip(images, truth, strict=True)
    ]
    return float(np.mean(values))


def luma(images: np.ndarray) -> np.ndarray:
    """BT.601 luma of images in 0..255, not rounded: float64 [N, H, W, 1] in 16..235 of [N, H, W, 3]."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images have the shape {images.shape}, not [N, H, W, 3]")
    return (np.asarray(images) @ LUMA)[..., None] / 255 + LUMA_OF_BLACK


def luma_peak_signal_noise_ratio(images: np.ndarray, truth: np.ndarray) -> float:
    """`peak_signal_noise_ratio` of the luma, as in super-resolution papers: the peak is 255, nothing is cropped.

    Args:
        images, truth: uint8 [N, H, W, 3].
    """
    return peak_signal_noise_ratio(luma(images), luma(truth))


def luma_structural_similarity(images: np.ndarray, truth: np.ndarray) -> float:
    """`structural_similarity` of the luma.

    Args:
        images, truth: uint8 [N, H, W, 3], H and W at least 11.
    """
    return structural_similarity(luma(images), luma(truth))


def feature_distance(features: np.ndarray, truth_features: np.ndarray) -> float:
    """Mean over the pairs of 1 - cosine of their features, float [N, D] each."""
    first, second = (np.asarray(x, dtype=np.float64) for x in (features, truth_features))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(np.mean(1 - (first * second).sum(1) / np.maximum(norms, 1e-12)))


def mean_score(scores: np.ndarray) -> float:
    """Mean of float [N]."""
    return float(np.mean(scores))


def scene_accuracy(confusion: Confusion) -> float | None:
    """Fraction of the images in which CLIP recognises the true scene; None if there are no images."""
    images = sum(sum(seen.values()) for seen in confusion.values())
    return sum(seen.get(scene, 0) for scene, seen in confusion.items()) / images if images else None


def mean_intersection_over_union(segmentation: np.ndarray, masks: np.ndarray, classes: int) -> float:
    """Intersection over union of all pixels together, averaged over the classes that occur (torchmetrics).

    Args:
        segmentation, masks: uint8 [N, H, W], values below `classes`; pixels whose mask is `corpus.masks.IGNORED` are
            left out.
        classes: number of classes.
    """
    from torchmetrics.functional.classification import multiclass_jaccard_index  # slow to import

    known = np.asarray(masks) != IGNORED
    result, truth = (torch.from_numpy(np.asarray(x)[known]).long() for x in (segmentation, masks))
    per_class = multiclass_jaccard_index(result, truth, classes, average="none")
    occurs = (torch.bincount(truth.flatten(), minlength=classes) > 0) | (
        torch.bincount(result.flatten(), minlength=classes) > 0
    )
    return float(per_class[occurs].mean())


def pixel_accuracy(segmentation: np.ndarray, masks: np.ndarray, classes: int) -> float:
    """Fraction of the pixels with the class of the mask, among the pixels that have a class in the mask."""
    known = np.asarray(masks) != IGNORED
    return float((segmentation[known] == masks[known]).mean())
