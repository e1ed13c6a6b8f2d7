"""Classification accuracy score: compared with a regression solved here; effect of images of wrong scenes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from eval.classification import PENALTY, classification_accuracy

SCENES = np.array(["ice", "sea", "town"])


def scenes_and_features(count: int, seed: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Labels [count], and features [count, 5] around a centre of each scene."""
    centres = np.random.default_rng(99).standard_normal((3, 5)) * 2
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 3, count)
    return SCENES[numbers], centres[numbers] + spread * random.standard_normal((count, 5))


def solved(features: np.ndarray, scenes: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Predictions at the optimum of the penalised multinomial likelihood, by scipy."""
    mean, deviation = features.mean(0), features.std(0)
    x, y = (features - mean) / deviation, (scenes[:, None] == SCENES).astype(float)

    def loss(flat: np.ndarray) -> float:
        weights, bias = flat[:15].reshape(5, 3), flat[15:]
        scores = x @ weights + bias
        return PENALTY * (logsumexp(scores, axis=1) - (scores * y).sum(1)).sum() + (weights**2).sum() / 2

    flat = minimize(loss, np.zeros(18), method="BFGS", options={"gtol": 1e-7}).x
    scores = (reference - mean) / deviation @ flat[:15].reshape(5, 3) + flat[15:]
    return SCENES[scores.argmax(1)]


def test_the_score_equals_the_accuracy_of_a_regression_solved_by_scipy() -> None:
    (scenes, features), (truth, reference) = scenes_and_features(90, 0), scenes_and_features(400, 1)
    expected = float((solved(features, scenes, reference) == truth).mean())
    assert 0.6 < expected < 0.98
    assert classification_accuracy(features, scenes, reference, truth) == pytest.approx(expected, abs=0.003)


def test_images_of_wrong_scenes_lower_the_score() -> None:
    (scenes, features), (truth, reference) = scenes_and_features(600, 0, 0.3), scenes_and_features(600, 1, 0.3)
    assert classification_accuracy(features, scenes, reference, truth) == 1
    shuffled = np.random.default_rng(0).permutation(scenes)
    assert classification_accuracy(features, shuffled, reference, truth) < 0.7
    turned = np.select([scenes == "ice", scenes == "sea"], ["sea", "town"], "ice")
    assert classification_accuracy(features, turned, reference, truth) == 0


def test_images_without_a_scene_are_ignored() -> None:
    (scenes, features), (truth, reference) = scenes_and_features(300, 0), scenes_and_features(300, 1)
    known = np.arange(300) % 3 > 0
    expected = classification_accuracy(features[known], scenes[known], reference[known], truth[known])
    result = classification_accuracy(features, np.where(known, scenes, ""), reference, np.where(known, truth, ""))
    assert result == expected


def test_the_score_is_undefined_without_two_training_scenes_or_any_test_scene() -> None:
    scenes, features = scenes_and_features(20, 0)
    none = np.full(20, "")
    assert classification_accuracy(features, np.full(20, "ice"), features, scenes) is None
    assert classification_accuracy(features, none, features, scenes) is None
    assert classification_accuracy(features, scenes, features, none) is None
