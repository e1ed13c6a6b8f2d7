"""Distances between two sets of images, on the features of one frozen encoder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import t as student_t
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


def kernel_distance(features: np.ndarray, reference: np.ndarray, *, blocks: int = 23) -> tuple[float, float, float]:
    """Unbiased KID x 1000 with a 95 % interval (Binkowski et al. 2018: cubic polynomial kernel).

    torchmetrics' kernel and estimator on all images; the interval is the delete-one-block jackknife over both sets.
    The larger set is cut to the smaller one's size.

    Args:
        features: float [N, D]; reference: float [M, D].
        blocks: of the jackknife; a prime, so that no period in the order of the images falls in with it.
    Returns:
        value, low, high.
    """
    size = min(len(features), len(reference))
    distance = _kernel_estimate(features[:size], reference[:size])
    return _jackknife(distance, size, blocks)


def kernel_distance_difference(
    features: np.ndarray, other: np.ndarray, reference: np.ndarray, *, blocks: int = 23
) -> tuple[float, float, float]:
    """KID x 1000 of `features` minus that of `other`, with the 95 % interval of the difference.

    Paired: row i of both sets came from the same prompt and the same noise, and is left out of both together with row
    i of the reference. What the two sets share, the draw of prompts and reference images above all, cancels; two
    intervals that overlap may still hide a difference that this one shows.

    Args:
        features, other, reference: float [N, D].
    Returns:
        value, low, high.
    Raises:
        ValueError: the sets differ in size.
    """
    if not len(features) == len(other) == len(reference):
        raise ValueError(f"paired sets differ in size: {len(features)}, {len(other)}, {len(reference)}")
    first, second = _kernel_estimate(features, reference), _kernel_estimate(other, reference)
    return _jackknife(lambda rows: first(rows) - second(rows), len(reference), blocks)


def _kernel_estimate(features: np.ndarray, reference: np.ndarray) -> Callable[[torch.Tensor], float]:
    """KID x 1000 as a function of the rows, int64 [K], that both sets keep."""
    first, second = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (features, reference))
    kernels = poly_kernel(first, first), poly_kernel(first, second), poly_kernel(second, second)
    return lambda rows: 1000 * float(maximum_mean_discrepancy(*(kernel[rows][:, rows] for kernel in kernels)))


def _jackknife(estimate: Callable[[torch.Tensor], float], size: int, blocks: int) -> tuple[float, float, float]:
    """An estimate on all rows, and its 95 % delete-one-block interval by Student's t.

    Block b is every `blocks`-th row, so that sets ordered by scene leave out all scenes alike.
    """
    rows = torch.arange(size)
    blocks = min(blocks, size // 2)
    value = estimate(rows)
    without = [estimate(rows[rows % blocks != block]) for block in range(blocks)]
    error = float(np.sqrt((blocks - 1) * np.var(without)))
    reach = float(student_t.ppf(0.975, blocks - 1)) * error
    return value, value - reach, value + reach


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

    The Fréchet distance is `fid` on the encoder `inception` alone, whose name `encoders.inception.InceptionV3` keeps.
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
