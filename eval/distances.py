"""Distances between two sets of images, on the features of one frozen encoder."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t as student_t

#: Smallest number of images for a distance: a jackknife needs two blocks of two images, a third neighbour four images.
FEWEST = 4


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


#: The result for sets that are too small.
UNDEFINED = Interval(float("nan"), float("nan"), float("nan"))


def too_few(*sets: np.ndarray) -> bool:
    """Whether one of the sets has fewer than `FEWEST` images, so that a distance between them is NaN."""
    return min(map(len, sets)) < FEWEST


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two feature sets (Heusel et al. 2017, equation 6).

    tr sqrt(S1 S2) is computed as the sum of the singular values of X1 X2' for centred features X / sqrt(n - 1). This is
    exact even with fewer images than dimensions; tests compare it with the results of clean-fid and torchmetrics. If n
    is below D, most of the value is bias: compare only sets of the same size, and consider KID as well.

    Args:
        features: float [N, D].
        reference: float [M, D].
    """
    if too_few(features, reference):
        return float("nan")
    first, second = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (features, reference))
    mean_first, mean_second = first.mean(0), second.mean(0)
    first = (first - mean_first) / (len(first) - 1) ** 0.5
    second = (second - mean_second) / (len(second) - 1) ** 0.5
    if len(first) > first.shape[1] and len(second) > second.shape[1]:  # the D x D factors are then smaller
        first, second = torch.linalg.qr(first)[1], torch.linalg.qr(second)[1]
    cross = torch.linalg.svdvals(first @ second.T).sum()
    distance = (mean_first - mean_second).square().sum() + first.square().sum() + second.square().sum() - 2 * cross
    return max(0.0, float(distance))


def extrapolated_frechet_distance(
    features: np.ndarray, reference: np.ndarray, *, sizes: int = 8, seed: int = 0
) -> float:
    """Fréchet distance extrapolated to infinitely many images (Chong and Forsyth 2020).

    The bias of the distance is linear in 1 / n to first order. The result is the value at 1 / n = 0 of a least-squares
    line through the distances of random subsets of n images. The paper fixes the statistics of 50,000 real images; here
    both sets are reduced to n images, because a held-out set is as small as the other one. Below n = D, terms of higher
    order leave a part of the bias.

    Args:
        features: float [N, D].
        reference: float [M, D].
        sizes: number of values of n, from half of the smaller set to the whole of it.
        seed: seed of the subsets.
    Returns:
        the distance, which may be negative due to sampling; NaN if half of the smaller set is too small.
    """
    size = min(len(features), len(reference))
    if size < 2 * FEWEST:
        return float("nan")
    counts = np.unique(np.linspace(size // 2, size, sizes).round().astype(np.int64))
    generator = np.random.default_rng([seed, 320])
    result = []
    for count in counts:
        first, second = (x[generator.permutation(len(x))[:count]] for x in (features, reference))
        result.append(frechet_distance(first, second))
    return float(np.polyfit(1 / counts, result, 1)[1])


def kernel_distance(features: np.ndarray, reference: np.ndarray, *, blocks: int = 23) -> Interval:
    """Unbiased KID x 1000 with a 95 % interval (Binkowski et al. 2018: cubic polynomial kernel).

    The interval is computed by a delete-one-block jackknife over both sets. The larger set is reduced to the size of
    the smaller one.

    Args:
        features: float [N, D].
        reference: float [M, D].
        blocks: number of blocks of the jackknife; a prime, so that it shares no period with the order of the images.
    """
    if too_few(features, reference):
        return UNDEFINED
    size = min(len(features), len(reference))
    blocks = min(blocks, size // 2)
    return _jackknife(_estimates(_block_sums(features[:size], reference[:size], blocks)))


def weighted_kernel_distance(
    features: np.ndarray, weights: np.ndarray, reference: np.ndarray, *, blocks: int = 23
) -> Interval:
    """`kernel_distance` of a weighted set: the distance of images drawn in proportion to their weights.

    The estimate is unbiased: sum over i != j of w_i w_j k_ij / ((sum w)^2 - sum w^2) is the mean kernel of two
    different images. All images of both sets are used, because the estimate does not depend on the sizes.

    Args:
        features: float [N, D].
        weights: float [N], at least 0; more than one must be positive.
        reference: float [M, D].
        blocks: number of blocks of the jackknife.
    """
    if too_few(features, reference):
        return UNDEFINED
    blocks = min(blocks, len(features) // 2, len(reference) // 2)
    return _jackknife(_estimates(_block_sums(features, reference, blocks, weights)))


def kernel_distance_difference(
    features: np.ndarray, other: np.ndarray, reference: np.ndarray, *, blocks: int = 23
) -> Interval:
    """KID x 1000 of `features` minus that of `other`, with the 95 % interval of the difference.

    The interval is paired: row i of both sets has the same prompt and the same noise, and the jackknife leaves it out
    of both sets together with row i of the reference. Variation that both sets share, mainly the draw of prompts and
    reference images, cancels. So this interval may show a difference even if the two separate intervals overlap.

    Args:
        features, other, reference: float [N, D].
    Raises:
        ValueError: the sets differ in size.
    """
    if not len(features) == len(other) == len(reference):
        raise ValueError(f"paired sets differ in size: {len(features)}, {len(other)}, {len(reference)}")
    if too_few(reference):
        return UNDEFINED
    blocks = min(blocks, len(reference) // 2)
    first, second = (_estimates(_block_sums(x, reference, blocks)) for x in (features, other))
    return _jackknife(first - second)


class _BlockSums(NamedTuple):
    """Weighted sums of the kernel over pairs of blocks, float64 [B, B] each, and sums of the weights of each block.

    Block b has every B-th row, so that in sets ordered by scene each block contains all scenes. The sums within a set
    omit the diagonal. `mass` [2, B] is the sum of the weights of each set, `squares` [2, B] the sum of their squares.
    """

    first: np.ndarray
    between: np.ndarray
    second: np.ndarray
    mass: np.ndarray
    squares: np.ndarray


def _block_sums(
    features: np.ndarray, reference: np.ndarray, blocks: int, weights: np.ndarray | None = None
) -> _BlockSums:
    from torchmetrics.image.kid import poly_kernel  # slow to import

    sets = [torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (features, reference)]
    members = [torch.nn.functional.one_hot(torch.arange(len(x)) % blocks, blocks).double() for x in sets]
    if weights is not None:
        members[0] = members[0] * torch.from_numpy(np.asarray(weights, dtype=np.float64))[:, None]

    def summed(one: int, other: int) -> np.ndarray:
        kernel = poly_kernel(sets[one], sets[other])
        if one == other:
            kernel.fill_diagonal_(0)
        return (members[one].T @ kernel @ members[other]).numpy()

    mass = np.stack([member.sum(0).numpy() for member in members])
    squares = np.stack([member.square().sum(0).numpy() for member in members])
    return _BlockSums(summed(0, 0), summed(0, 1), summed(1, 1), mass, squares)


def _estimates(sums: _BlockSums) -> np.ndarray:
    """KID x 1000 on all rows, and without each block in turn: float64 [1 + B]."""

    def without(pairs: np.ndarray) -> np.ndarray:
        left_out = pairs.sum(0) + pairs.sum(1) - np.diag(pairs)
        return pairs.sum() - np.concatenate([[0.0], left_out])

    def rest(values: np.ndarray) -> np.ndarray:
        return values.sum(1, keepdims=True) - np.concatenate([np.zeros((2, 1)), values], axis=1)

    mass, pairs = rest(sums.mass), rest(sums.mass) ** 2 - rest(sums.squares)
    within = without(sums.first) / pairs[0] + without(sums.second) / pairs[1]
    return 1000 * (within - 2 * without(sums.between) / (mass[0] * mass[1]))


def _jackknife(estimates: np.ndarray) -> Interval:
    """The first estimate, and its 95 % delete-one-block interval by Student's t from the others."""
    value, without = float(estimates[0]), estimates[1:]
    blocks = len(without)
    error = float(np.sqrt((blocks - 1) * np.var(without)))
    reach = float(student_t.ppf(0.975, blocks - 1)) * error
    return Interval(value, value - reach, value + reach)


def precision_recall(features: np.ndarray, reference: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019): fraction of one set inside the other's k-NN balls."""
    if too_few(features, reference):
        return float("nan"), float("nan")
    first, second = (torch.from_numpy(np.asarray(x, dtype=np.float32)) for x in (features, reference))
    between = torch.cdist(first, second)

    def radius(points: torch.Tensor) -> torch.Tensor:
        return torch.cdist(points, points).kthvalue(min(neighbours + 1, len(points)), dim=1).values

    inside_reference = (between <= radius(second)[None]).any(1).float().mean()
    inside_features = (between <= radius(first)[:, None]).any(0).float().mean()
    return float(inside_reference), float(inside_features)


def precision(features: np.ndarray, reference: np.ndarray) -> float:
    """The first of `precision_recall`."""
    return precision_recall(features, reference)[0]


def recall(features: np.ndarray, reference: np.ndarray) -> float:
    """The second of `precision_recall`."""
    return precision_recall(features, reference)[1]


def density_coverage(features: np.ndarray, reference: np.ndarray, neighbours: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, equations 5 and 6) on the k-NN balls of the reference images.

    Density is the mean number of reference balls that an image lies in, divided by k; it exceeds 1 if images crowd in
    the dense parts. Coverage is the fraction of reference balls that contain at least one image.

    Args:
        features: float [N, D].
        reference: float [M, D].
        neighbours: the number k of nearest neighbours that defines the radius of a ball.
    """
    if too_few(reference):
        return float("nan"), float("nan")
    features, reference = (np.ascontiguousarray(x, dtype=np.float32) for x in (features, reference))
    neighbours = min(neighbours, len(reference) - 1)
    # with float64 sums, so that an image equal to a reference image lies at distance zero
    radius = np.sort(_squared_distances(reference, reference), axis=1)[:, neighbours]
    inside = _squared_distances(reference, features) <= radius[:, None]
    return float(inside.sum() / (neighbours * len(features))), float(inside.any(axis=1).mean())


def density(features: np.ndarray, reference: np.ndarray) -> float:
    """The first of `density_coverage`."""
    return density_coverage(features, reference)[0]


def coverage(features: np.ndarray, reference: np.ndarray) -> float:
    """The second of `density_coverage`."""
    return density_coverage(features, reference)[1]


def _squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = first.astype(np.float64), second.astype(np.float64)
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return np.maximum(squares, 0)
