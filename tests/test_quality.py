"""Measures of a subset against known cases and brute force."""

from __future__ import annotations

import numpy as np
import pytest

from eval.quality import density_coverage, knee, scene_entropy, vendi_score


def test_vendi_counts_the_kinds():
    assert vendi_score(np.eye(7)) == pytest.approx(7)
    assert vendi_score(np.ones((5, 3)) / np.sqrt(3)) == pytest.approx(1)
    assert vendi_score(np.repeat(np.eye(4), 6, axis=0)) == pytest.approx(4)  # more images than dimensions


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


def test_scene_entropy_is_one_where_scenes_are_even():
    assert scene_entropy(np.array(["a", "b", "c"] * 4, dtype=object), 3) == pytest.approx(1)
    assert scene_entropy(np.array(["a"] * 9, dtype=object), 3) == pytest.approx(0)
    assert scene_entropy(np.array(["a", "b", "", ""], dtype=object), 2) == pytest.approx(1)


def test_the_knee_is_where_a_curve_turns():
    kept = np.linspace(0.05, 1, 20)
    assert kept[knee(kept, np.minimum(kept, 0.3))] == pytest.approx(0.3, abs=0.05)
    assert kept[knee(kept, -np.minimum(kept, 0.3))] == pytest.approx(0.3, abs=0.05)  # falling, such as a distance
