"""Assignment of scenes to images: classifiers and prototypes, and strata for images without a known scene."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestCentroid

from prune.clusters import Points
from prune.library import select_from_arrays
from prune.methods.rsprune import RSPrune
from prune.methods.scene_random import SceneRandom
from prune.scenes import CLASSIFIERS, SceneRule, fit_prototypes, held_out_accuracy, open_strata, tightness
from runtime.errors import UserError


def stretched(count: int, seed: int, classes: int = 4, dimensions: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Classes that differ in dimensions of small variance, where the nearest prototype errs; and labels."""
    generator = np.random.default_rng(seed)
    label = generator.integers(classes, size=count)
    points = generator.standard_normal((count, dimensions)) * np.where(np.arange(dimensions) < 12, 0.3, 2.0)
    points[:, :classes] += 1.2 * np.eye(classes)[label]
    return points.astype(np.float32), np.char.add("class ", label.astype(str))


def kinds_of(known: int, count: int = 8000, kinds: int = 60, dimensions: int = 48) -> tuple[np.ndarray, ...]:
    """Embeddings of kinds in groups of three, their kinds, and a reference of the first `known` kinds by group."""
    generator = np.random.default_rng(0)
    group = np.arange(kinds) // 3
    centres = generator.standard_normal((kinds // 3, dimensions))[group] + 0.7 * generator.standard_normal(
        (kinds, dimensions)
    )
    sizes = generator.permutation(np.arange(1, kinds + 1) ** -0.8)
    kind = generator.choice(kinds, count, p=sizes / sizes.sum())
    shown = np.repeat(np.arange(known), 12)
    noise = lambda n: 0.4 * generator.standard_normal((n, dimensions))  # noqa: E731
    embeddings, reference = centres[kind] + noise(count), centres[shown] + noise(len(shown))
    return embeddings.astype(np.float32), kind, reference.astype(np.float32), group[shown]


def evenness(kinds: np.ndarray, count: int) -> float:
    fractions = np.bincount(kinds, minlength=count) / len(kinds)
    fractions = fractions[fractions > 0]
    return float(-(fractions * np.log(fractions)).sum() / np.log(count))


def test_classifiers_are_more_accurate_than_prototypes_on_stretched_classes() -> None:
    reference, labels = stretched(600, 0)
    embeddings, truth = stretched(2000, 1)
    accuracy, message = {}, {}
    for classifier in CLASSIFIERS:
        method = SceneRandom(threshold_quantile=0.0, scene_classifier=classifier)
        result = select_from_arrays(method, embeddings, ratio=0.5, reference=reference, labels=labels)
        accuracy[classifier] = (result.scene == truth).mean()
        message[classifier] = result.diagnostics["scene_accuracy"]
    assert min(accuracy["lda"], accuracy["logistic"]) > accuracy["prototypes"] + 0.1
    for classifier in CLASSIFIERS:  # measured on halves, so with fewer images than in use
        assert message[classifier] == pytest.approx(accuracy[classifier], abs=0.06)


def test_the_held_out_accuracy_uses_images_outside_the_fit() -> None:
    """Random labels can be memorised, but not predicted."""
    generator = np.random.default_rng(2)
    points, labels = generator.standard_normal((300, 40)).astype(np.float32), generator.integers(3, size=300)
    for classifier in ("lda", "logistic"):
        assert held_out_accuracy(points, labels, classifier, seed=0) == pytest.approx(1 / 3, abs=0.1)
    assert fit_prototypes(points, labels.astype(str), 8, 0.0, seed=0).accuracy == pytest.approx(1 / 3, abs=0.1)
    apart = np.eye(3, 40, dtype=np.float32)[labels] + 0.01 * points
    by_library = NearestCentroid().fit(apart[:150], labels[:150]).score(apart[150:], labels[150:])
    assert fit_prototypes(apart, labels.astype(str), 1, 0.0, seed=0).accuracy == by_library == 1
    assert fit_prototypes(np.eye(3, 8), np.array(["a", "b", "c"]), 4, 0.0, seed=0).accuracy is None


def test_tightness_is_measured_on_images_outside_the_clustering() -> None:
    """For unit vectors in random directions of many dimensions, a cluster's centroid does not predict another image."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((4, 300))
    points = centres[np.arange(400) % 4] + 0.5 * generator.standard_normal((400, 300))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    expected = 1 / np.sqrt(1 + 0.25)  # |centre| / |centre + noise|; both norms concentrate in many dimensions
    assert tightness(points.astype(np.float32), 4, seed=0) == pytest.approx(expected, abs=0.01)
    lost = generator.standard_normal((400, 300))
    lost /= np.linalg.norm(lost, axis=1, keepdims=True)
    assert abs(tightness(lost.astype(np.float32), 4, seed=0)) < 0.15
    assert tightness(points[:15].astype(np.float32), 4, seed=0) == 1


@pytest.mark.parametrize("method", [RSPrune, SceneRandom])
def test_unknown_kinds_get_an_even_fraction_if_open_images_are_split(method: type) -> None:
    """Three quarters of the kinds are in no reference class; as one scene they would get a sixth of the budget."""
    embeddings, kind, reference, labels = kinds_of(known=15)
    result = {
        split: select_from_arrays(method(split_open=split), embeddings, ratio=0.85, reference=reference, labels=labels)
        for split in (False, True)
    }
    even = {split: evenness(kind[selection.kept], 60) for split, selection in result.items()}
    assert even[True] > 0.88 and even[True] > even[False] + 0.05
    assert len(set(kind[result[True].kept].tolist())) == 60
    names = set(result[True].scene) - set(map(str, range(5)))
    assert all(name.startswith("open ") for name in names) and 6 <= len(names) <= 30
    assert set(result[False].scene) - set(map(str, range(5))) == {"open"}
    assert len(result[True].kept) == len(result[False].kept) == 1200


def test_open_images_of_one_kind_are_one_stratum() -> None:
    generator = np.random.default_rng(0)
    points = Points((np.ones(16) + 0.05 * generator.standard_normal((500, 16))).astype(np.float32), np.zeros(16, "f4"))
    assert not open_strata(points, np.arange(500), 0.9, generator).any()
    assert open_strata(points, np.arange(500), 0.9999, generator).max() > 1


def test_splitting_open_images_changes_nothing_if_all_scenes_are_known() -> None:
    embeddings, _, reference, labels = kinds_of(known=60)
    kept = [
        select_from_arrays(
            RSPrune(threshold_quantile=0.0, split_open=split),
            embeddings,
            ratio=0.85,
            reference=reference,
            labels=labels,
        ).kept
        for split in (False, True)
    ]
    np.testing.assert_array_equal(*kept)


def test_an_unknown_classifier_is_refused() -> None:
    for refused in (SceneRule, lambda classifier: RSPrune(scene_classifier=classifier)):
        with pytest.raises(UserError, match="svm is unknown: take prototypes, lda, logistic"):
            refused(classifier="svm")
