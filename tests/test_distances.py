"""Distances compared with known Gaussians, the libraries' results and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cleanfid import fid
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel

from eval.distances import (
    density_coverage,
    extrapolated_frechet_distance,
    frechet_distance,
    kernel_distance,
    kernel_distance_difference,
    precision_recall,
)


def gaussians(count: int, dimensions: int = 12, shift: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    mix = random.standard_normal((dimensions, dimensions))
    return random.standard_normal((count, dimensions)), shift + random.standard_normal((count, dimensions)) @ mix


def test_frechet_distance_of_known_gaussians():
    random = np.random.default_rng(0)
    first = random.standard_normal((200_000, 2))
    second = np.array([3.0, 0.0]) + random.standard_normal((200_000, 2)) * [2, 1]
    # |m1 - m2|^2 + sum (s1 - s2)^2 for commuting covariances
    assert frechet_distance(first, second) == pytest.approx(9 + 1, rel=0.02)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [500, 40, 9])
def test_frechet_distance_agrees_with_torchmetrics(count):
    first, second = gaussians(count)
    moments = [(torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x.T))) for x in (first, second)]
    expected = float(_compute_fid(*moments[0], *moments[1]))
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_agrees_with_clean_fid():
    first, second = gaussians(500)
    expected = fid.frechet_distance(first.mean(0), np.cov(first.T), second.mean(0), np.cov(second.T))
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("count", [60, 100])
def test_the_extrapolated_distance_is_closer_to_the_true_distance(count):
    """For two Gaussians with a known distance: the mean over draws, and most single draws."""
    dimensions, shift, scale = 12, 0.4, 1.3
    truth = dimensions * (shift**2 + (scale - 1) ** 2)
    plain, extrapolated = [], []
    for seed in range(40):
        random = np.random.default_rng(seed)
        first = random.standard_normal((count, dimensions))
        second = shift + scale * random.standard_normal((count, dimensions))
        plain.append(frechet_distance(first, second))
        extrapolated.append(extrapolated_frechet_distance(first, second, seed=seed))
    plain, extrapolated = np.array(plain), np.array(extrapolated)
    errors = [3 * result.std() / np.sqrt(len(result)) for result in (plain, extrapolated)]
    assert plain.mean() - truth > 2 * errors[0]
    assert abs(extrapolated.mean() - truth) < errors[1]
    assert np.mean(abs(extrapolated - truth) < abs(plain - truth)) > 0.7


def test_the_extrapolated_distance_is_the_intercept_of_a_line_over_one_by_n():
    first, second = gaussians(90)
    sizes = [45, 51, 58, 64, 71, 77, 84, 90]
    generator = np.random.default_rng([3, 320])
    drawn = [(first[generator.permutation(90)[:n]], second[generator.permutation(90)[:n]]) for n in sizes]
    x, y = 1 / np.array(sizes), np.array([frechet_distance(*pair) for pair in drawn])
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    result = extrapolated_frechet_distance(first, second, seed=3)
    assert result == pytest.approx(y.mean() - slope * x.mean(), rel=1e-6)
    assert result == extrapolated_frechet_distance(first, second, seed=3)
    assert result != extrapolated_frechet_distance(first, second, seed=4)
    assert np.isnan(extrapolated_frechet_distance(first[:7], second))


def test_kernel_distance_agrees_with_brute_force():
    first, second = gaussians(60)
    size, dimensions = first.shape

    def kernel(x, y):
        return (x @ y / dimensions + 1) ** 3

    within = sum(kernel(x[i], x[j]) for x in (first, second) for i in range(size) for j in range(size) if i != j)
    between = sum(kernel(x, y) for x in first for y in second)
    expected = 1000 * (within / (size * (size - 1)) - 2 * between / size**2)
    value, low, high = kernel_distance(first, second)
    assert value == pytest.approx(expected, rel=1e-9)
    assert low < value < high


def test_the_interval_is_the_jackknife_of_torchmetrics_estimates():
    """Every block in turn is left out of both sets, and the library's estimator computes the distance again."""
    first, second = (torch.from_numpy(x) for x in gaussians(50))
    blocks = 7

    def estimate(kept: torch.Tensor) -> float:
        x, y = first[kept], second[kept]
        return 1000 * float(maximum_mean_discrepancy(poly_kernel(x, x), poly_kernel(x, y), poly_kernel(y, y)))

    rows = torch.arange(50)
    without = [estimate(rows[rows % blocks != block]) for block in range(blocks)]
    error = np.sqrt((blocks - 1) * np.var(without))
    value, low, high = kernel_distance(first.numpy(), second.numpy(), blocks=blocks)
    assert value == pytest.approx(estimate(rows), rel=1e-9)
    assert (high - low) / 2 == pytest.approx(2.446912 * error, rel=1e-6)  # Student's t of 6 degrees of freedom, 97.5 %


def test_kernel_distance_is_unbiased_and_its_interval_covers_the_true_value():
    covered = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        value, low, high = kernel_distance(random.standard_normal((80, 6)), random.standard_normal((80, 6)))
        covered.append((low <= 0 <= high, value))
    hits, values = zip(*covered, strict=True)
    assert np.mean(hits) > 0.85
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_the_interval_of_a_paired_difference_is_narrower_and_covers_the_expectation():
    """Two sets with the same noise in their images; one is at a slightly larger distance."""
    differences, intervals, alone = [], [], []
    for seed in range(40):
        random = np.random.default_rng(seed)
        reference, noise = random.standard_normal((2, 200, 4))
        near, far = noise + 0.3, noise * 1.1 + 0.4
        value, *interval = kernel_distance_difference(far, near, reference)
        first, second = kernel_distance(far, reference), kernel_distance(near, reference)
        assert value == pytest.approx(first[0] - second[0])
        differences.append(value)
        intervals.append(interval)
        alone.append(first[2] - first[1])
    low, high = np.transpose(intervals)
    expected = np.mean(differences)  # the estimator is unbiased
    assert np.mean((low <= expected) & (expected <= high)) > 0.85
    assert np.mean(high - low) < np.mean(alone)


def test_paired_sets_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="differ in size: 5, 4, 5"):
        kernel_distance_difference(np.ones((5, 2)), np.ones((4, 2)), np.ones((5, 2)))


def test_precision_and_recall_of_nested_sets():
    random = np.random.default_rng(0)
    wide = random.uniform(-1, 1, (400, 2))
    narrow = random.uniform(-0.3, 0.3, (400, 2))
    precision, recall = precision_recall(narrow, wide)
    assert precision > 0.95 and recall < 0.3
    assert precision_recall(wide, wide) == (1, 1)
    assert precision_recall(wide + 10, wide) == (0, 0)


def test_density_and_coverage_agree_with_brute_force():
    random = np.random.default_rng(0)
    features, reference = random.standard_normal((40, 3)), random.standard_normal((30, 3))
    radius = [sorted(np.linalg.norm(reference - x, axis=1))[5] for x in reference]
    inside = np.array([[np.linalg.norm(x - y) <= r for y in features] for x, r in zip(reference, radius, strict=True)])
    density, coverage = density_coverage(features, reference)
    assert density == pytest.approx(inside.sum() / (5 * 40))
    assert coverage == pytest.approx(inside.any(axis=1).mean())


def test_a_set_covers_itself_and_nothing_far_away():
    points = np.random.default_rng(0).standard_normal((60, 4))
    assert density_coverage(points, points)[1] == 1
    assert density_coverage(points + 100, points) == (0, 0)
    assert density_coverage(points[:1], points)[1] < 0.3
