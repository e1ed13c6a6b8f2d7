"""Distances against known Gaussians, the libraries' arithmetic and brute force."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from cleanfid import fid
from torchmetrics.image.fid import _compute_fid

from eval import generated as measure
from eval.generate import starting_noise
from eval.metrics import (
    compare_features,
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


def test_kernel_distance_is_unbiased_and_its_interval_covers():
    covered = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        value, low, high = kernel_distance(random.standard_normal((80, 6)), random.standard_normal((80, 6)))
        covered.append((low <= 0 <= high, value))
    hits, values = zip(*covered, strict=True)
    assert np.mean(hits) > 0.85
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_a_paired_difference_is_sharper_than_two_intervals_and_covers():
    """Two sets that share their images' noise, one a little farther off than the other."""
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


def test_paired_sets_have_one_size():
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


def test_names_say_which_encoder():
    names = compare_features(*gaussians(30), "efficientnet_lite0")
    assert "fd_efficientnet_lite0" in names and "fid" not in names


def test_noise_of_an_image_does_not_depend_on_the_others():
    torch.testing.assert_close(starting_noise(3, (4, 2, 2), 5), starting_noise(8, (4, 2, 2), 5)[:3], rtol=0, atol=0)
    assert not torch.equal(starting_noise(1, (4, 2, 2), 5), starting_noise(1, (4, 2, 2), 6))


def test_what_is_seen_in_images_of_each_scene(monkeypatch):
    """Images of no known scene have nothing to be compared with, and one scene alone cannot be mistaken."""
    manifest = pd.DataFrame({"scene": ["sea", "", "ice", "ice", "sea"], "caption": ["a", "b", "c", "d", "e"]})
    corpus = SimpleNamespace(manifest=manifest, readable=np.ones(5, dtype=bool))
    held = SimpleNamespace(corpus=corpus, rows=np.array([4, 3, 1, 2]))
    text = SimpleNamespace(clip=object(), tokenizer=None, clip_pixels=None)
    asked = []

    def recognise(clip, tokenizer, images, described, pixels):
        asked.append((images.tolist(), {name: texts[-1] for name, texts in described.items()}))
        return np.array(["ice", "ice", "sea"])[: len(images)]

    monkeypatch.setattr(measure, "recognise_scenes", recognise)
    found = measure.scene_confusion(text, held, np.arange(4))
    assert asked == [([0, 1, 3], {"ice": "d", "sea": "e"})]
    assert found == {"ice": {"ice": 1, "sea": 1}, "sea": {"ice": 1}}
    assert measure.scene_accuracy(found) == pytest.approx(1 / 3)
    corpus.manifest = manifest.assign(scene="sea")
    assert measure.scene_confusion(text, held, np.arange(4)) is None
    assert measure.scene_confusion(SimpleNamespace(clip=None), held, np.arange(4)) is None
