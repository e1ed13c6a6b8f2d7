"""Distances between two sets of images, on the features of one frozen encoder."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two feature sets (Heusel et al. 2017, equation 6).

    tr sqrt(S1 S2) is the sum of the singular values of X1 X2' for centred features X / sqrt(n - 1), which is exact
    also with fewer images than dimensions; tests compare it with clean-fid's and torchmetrics' arithmetic.
    With n below D most of it is bias: compare only sets of the same size, and read KID beside it.

    Args:
        features: float [N, D]; reference: float [M, D].
    """
    first, second = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (features, reference))
    mean_first, mean_second = first.mean(0), second.mean(0)
    first = (first - mean_first) / (len(first) - 1) ** 0.5
    second = (second - mean_second) / (len(second) - 1) ** 0.5
    if len(first) > first.shape[1] and len(second) > second.shape[1]:  # D x D factors are smaller then
        first, second = torch.linalg.qr(first)[1], torch.linalg.qr(second)[1]
    cross = torch.linalg.svdvals(first @ second.T).sum()
    distance = (mean_first - mean_second).square().sum() + first.square().sum() + second.square().sum() - 2 * cross
    return max(0.0, float(distance))


def kernel_distance(features: np.ndarray, reference: np.ndarray, *, blocks: int = 10) -> tuple[float, float, float]:
    """Unbiased KID x 1000 with a 95 % interval (Binkowski et al. 2018: cubic polynomial kernel).

    torchmetrics' kernel and estimator on all images; the interval is the delete-one-block jackknife over both sets.
    The larger set is cut to the smaller one's size.

    Returns:
        value, low, high.
    """
    size = min(len(features), len(reference))
    first, second = (torch.from_numpy(np.asarray(x[:size], dtype=np.float64)) for x in (features, reference))
    k_xx, k_yy, k_xy = poly_kernel(first, first), poly_kernel(second, second), poly_kernel(first, second)
    value = 1000 * float(maximum_mean_discrepancy(k_xx, k_xy, k_yy))
    # block b is every `blocks`-th image, so that sets ordered by scene leave out all scenes alike
    blocks = min(blocks, size // 2)
    kept = [torch.arange(size)[torch.arange(size) % blocks != block] for block in range(blocks)]
    without = [1000 * float(maximum_mean_discrepancy(*(k[rows][:, rows] for k in (k_xx, k_xy, k_yy)))) for rows in kept]
    error = float(np.sqrt((blocks - 1) * np.var(without)))
    return value, value - 1.96 * error, value + 1.96 * error


def precision_recall(features: np.ndarray, reference: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019): share of one set inside the other's k-NN balls."""
    first, second = (torch.from_numpy(np.asarray(x, dtype=np.float32)) for x in (features, reference))
    between = torch.cdist(first, second)

    def radius(points: torch.Tensor) -> torch.Tensor:
        return torch.cdist(points, points).kthvalue(min(neighbours + 1, len(points)), dim=1).values

    precision = (between <= radius(second)[None]).any(1).float().mean()
    recall = (between <= radius(first)[:, None]).any(0).float().mean()
    return float(precision), float(recall)


def compare_features(features: np.ndarray, reference: np.ndarray, encoder: str) -> dict[str, float]:
    """All distances of two feature sets by their contract names, for example `fd_efficientnet_lite0`.

    The Fréchet distance is `fid` on the encoder `inception` alone, whose name `corpus.pretrained.InceptionV3` keeps.
    """
    kid, low, high = kernel_distance(features, reference)
    precision, recall = precision_recall(features, reference)
    return {
        "fid" if encoder == "inception" else f"fd_{encoder}": frechet_distance(features, reference),
        "kid_x1000": kid,
        "kid_x1000_low": low,
        "kid_x1000_high": high,
        "precision": precision,
        "recall": recall,
    }
