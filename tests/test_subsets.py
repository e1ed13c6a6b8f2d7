"""Metrics of a subset compared with known cases and brute force."""

from __future__ import annotations

import numpy as np
import pytest

from eval.subsets import knee, scene_entropy, vendi_score


def test_vendi_score_counts_distinct_kinds():
    assert vendi_score(np.eye(7)) == pytest.approx(7)
    assert vendi_score(np.ones((5, 3)) / np.sqrt(3)) == pytest.approx(1)
    assert vendi_score(np.repeat(np.eye(4), 6, axis=0)) == pytest.approx(4)  # more images than dimensions


def test_scene_entropy_is_one_where_scenes_are_even():
    assert scene_entropy(np.array(["a", "b", "c"] * 4, dtype=object), 3) == pytest.approx(1)
    assert scene_entropy(np.array(["a"] * 9, dtype=object), 3) == pytest.approx(0)
    assert scene_entropy(np.array(["a", "b", "", ""], dtype=object), 2) == pytest.approx(1)


def test_the_knee_is_at_the_bend_of_a_curve():
    kept = np.linspace(0.05, 1, 20)
    assert kept[knee(kept, np.minimum(kept, 0.3))] == pytest.approx(0.3, abs=0.05)
    assert kept[knee(kept, -np.minimum(kept, 0.3))] == pytest.approx(0.3, abs=0.05)  # decreasing, such as a distance
