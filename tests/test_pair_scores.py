"""Scores of image-text pairs compared with independent computations: the linear CLIP, statistics, evidence, scorers."""

from __future__ import annotations

import json
import re
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import subspace_angles
from scipy.stats import spearmanr
from synthetic_pairs import FOLDS, SMALL, corpus_of, material, swapped, world
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from captioning import pair_statistics as statistics_module
from captioning import scorers as scorers_module
from captioning.dual_encoder import DualEncoder, Reduction, fit_dual_encoder, hashed_words
from captioning.evidence import Mismatch, fit_mismatch, learn_evidence, mismatched_fraction
from captioning.pair_statistics import _drawn, pair_statistics
from captioning.pairs import Pairs, given_pairs
from captioning.scorers import FittedScorer, HubScorer, Material, OpenClipScorer, embed_with_clip
from captioning.scoring import score_pairs
from runtime.errors import UserError
from runtime.notices import notice
from train.text_encoder import clip_tokenizer

PLAIN = DualEncoder(dimensions=4, image_ridge=0, text_ridge=0, power=0)


@pytest.fixture(autouse=True)
def notices_again() -> None:
    notice.cache_clear()


def related(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 views [N, 6] and [N, 5] of three common variables."""
    random = np.random.default_rng(3)
    common = random.standard_normal((count, 3))
    first = common @ random.standard_normal((3, 6)) + 0.8 * random.standard_normal((count, 6))
    second = common @ random.standard_normal((3, 5)) + 0.8 * random.standard_normal((count, 5)) + 2
    return first.astype(np.float32), second.astype(np.float32)


def projected(options: DualEncoder, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    fitted = fit_dual_encoder(options, first, second, np.ones(len(first)))
    return (first - fitted.image_centre) @ fitted.image_map, (second - fitted.text_centre) @ fitted.text_map


# ---------------------------------------------------------------- the linear CLIP


def one_scene(evidence: np.ndarray, shuffled: np.ndarray) -> Mismatch:
    """The mismatch model for pairs of one scene."""
    return fit_mismatch(evidence, np.zeros(len(evidence), int), shuffled, np.zeros(len(shuffled), int), 1)


def test_correlations_without_ridge_equal_canonical_correlations() -> None:
    """They are the cosines of the angles between the column spaces (Björck and Golub 1973)."""
    first, second = related()
    expected = np.cos(subspace_angles(*((view - view.mean(0)).astype(np.float64) for view in (first, second))))
    ours, theirs = projected(PLAIN, first, second)
    result = (ours * theirs).mean(0)
    np.testing.assert_allclose(result, np.sort(expected)[::-1][:4], atol=2e-3)
    np.testing.assert_allclose(ours.T @ ours / len(ours), np.eye(4), atol=2e-3)  # of variance 1, uncorrelated
    np.testing.assert_allclose(theirs.T @ theirs / len(ours), np.eye(4), atol=2e-3)


def test_a_ridge_is_a_penalty_on_the_covariance() -> None:
    """The stationary points of the penalised problem, from an asymmetric eigenproblem."""
    first, second = ((view - view.mean(0)).astype(np.float64) for view in related())
    count = len(first)
    penalised = []
    for view, ridge in ((first, 0.7), (second, 0.2)):
        covariance = view.T @ view / count
        penalised.append(covariance + ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance)))
    cross = first.T @ second / count
    values = np.linalg.eigvals(np.linalg.solve(penalised[0], cross) @ np.linalg.solve(penalised[1], cross.T)).real
    ours, theirs = projected(replace(PLAIN, image_ridge=0.7, text_ridge=0.2), *related())
    np.testing.assert_allclose((ours * theirs).mean(0), np.sqrt(np.sort(values)[::-1][:4]), atol=2e-3)


def test_directions_are_scaled_by_a_power_of_their_correlation() -> None:
    first, second = related()
    ours, theirs = projected(PLAIN, first, second)
    scaled, also = projected(replace(PLAIN, power=3.0), first, second)
    correlations = (ours * theirs).mean(0)
    np.testing.assert_allclose((scaled * also).mean(0), correlations**4, rtol=1e-2)
    assert projected(replace(PLAIN, dimensions=2), first, second)[0].shape == (len(first), 2)


def test_weighted_pairs_count_as_repeated_pairs() -> None:
    first, second = related(80)
    weights = np.random.default_rng(0).integers(0, 4, 80)
    weighted = fit_dual_encoder(SMALL, first, second, weights.astype(float))
    repeated = fit_dual_encoder(SMALL, first.repeat(weights, 0), second.repeat(weights, 0), np.ones(weights.sum()))
    for encoded in ("images", "texts"):
        view = first if encoded == "images" else second
        one, other = (getattr(fitted, encoded)(view) for fitted in (weighted, repeated))
        np.testing.assert_allclose(np.abs((one * other).sum(1)), 1, atol=1e-4)
    equal = fit_dual_encoder(SMALL, first, second, np.ones(80))
    assert not np.allclose(np.abs((equal.images(first) * weighted.images(first)).sum(1)), 1, atol=1e-4)


def test_texts_of_unknown_words_are_zeros_and_others_have_length_one() -> None:
    features, captions, _ = world(60)
    reduction = Reduction.of(SMALL, features, captions, np.random.default_rng(0))
    known, unknown = reduction.texts(captions[:3]), reduction.texts(["zyx wvu", "", "?!"])
    assert known.any(axis=1).all() and not unknown.any()
    fitted = fit_dual_encoder(SMALL, reduction.images(features), reduction.texts(captions), np.ones(60))
    result = fitted.texts(np.concatenate([known, unknown]))
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), [1, 1, 1, 0, 0, 0], atol=1e-5)
    assert fitted.texts(known[:0]).shape == (0, 12) and fitted.images(reduction.images(features[:0])).shape == (0, 12)


def test_words_and_pairs_of_words_of_any_script_are_counted() -> None:
    counts = hashed_words(["Лес лес вода", "лес", "नदी", ""], 2**18)
    assert counts.sum(1).ravel().tolist() == [[5, 1, 1, 0]]
    assert counts[0].multiply(counts[1]).sum() == 2  # "лес" twice, ignoring case
    without_spaces = hashed_words(["森林和河", "河和 forest_2"], 2**18)
    assert without_spaces.sum(1).ravel().tolist() == [[7, 5]]  # letters and pairs of letters
    assert without_spaces[0].multiply(without_spaces[1]).sum() == 2


@pytest.mark.parametrize(
    ("features", "texts"),
    [
        (np.ones((8, 4)), ["a meadow"] * 8),
        (np.eye(8), ["a meadow"] * 8),
        (np.ones((8, 4)), ["a meadow", "a forest"] * 4),
        (np.eye(8), [chr(0x4E00 + row) * 3 for row in range(8)]),
        (np.eye(8, 1), ["word"] + ["other"] * 7),
    ],
    ids=["all alike", "one text", "one image", "no common word", "one feature"],
)
def test_degenerate_features_and_texts_give_finite_vectors(features: np.ndarray, texts: list[str]) -> None:
    reduction = Reduction.of(SMALL, features.astype(np.float32), texts, np.random.default_rng(0))
    images, words = reduction.images(features), reduction.texts(texts)
    fitted = fit_dual_encoder(SMALL, images, words, np.ones(8))
    assert np.isfinite(fitted.images(images)).all() and np.isfinite(fitted.texts(words)).all()


@pytest.mark.parametrize("options", [{"folds": 1}, {"folds": 0}, {"dimensions": 0}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        DualEncoder(**options)


# ---------------------------------------------------------------- out of fold


def embedded(scorer: FittedScorer, result: Material) -> tuple[np.ndarray, np.ndarray, Pairs]:
    pairs, _ = given_pairs(result.corpus.manifest)
    return *scorer.embed(result, pairs, pairs), pairs


def test_same_seed_gives_identical_embeddings_and_writes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = material(*world(80), tmp_path / "corpus")
    first, second, other = (embedded(FittedScorer(replace(SMALL, most_pairs=60), seed=s), result) for s in (1, 1, 2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])
    assert list(tmp_path.iterdir()) == []


def test_image_embeddings_of_a_fold_do_not_depend_on_its_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embeddings of a fold's images do not depend on the captions of that fold, bit for bit.

    The principal directions are fixed here: they depend on all texts, but not on their assignment. The next test covers
    them.
    """
    features, captions, scenes = world(120)
    reduction = Reduction.of(SMALL, features, captions, np.random.default_rng(0))
    monkeypatch.setattr(Reduction, "of", classmethod(lambda *_: reduction))
    before = material(features, captions, scenes, tmp_path)
    images, _, _ = embedded(FittedScorer(SMALL), before)
    for fold in range(FOLDS):
        inside = before.fold == fold
        changed = [captions[0] if own else text for own, text in zip(inside, captions, strict=True)]
        again, _, _ = embedded(FittedScorer(SMALL), material(features, changed, scenes, tmp_path))
        np.testing.assert_array_equal(again[inside], images[inside])
        assert all(not np.array_equal(again[before.fold == k], images[before.fold == k]) for k in range(5) if k != fold)


def test_scores_of_a_fold_do_not_depend_on_its_caption_assignment(tmp_path: Path) -> None:
    """The complete fit including its common directions: every caption is moved by one image inside its fold.

    The directions of texts come from one matrix with reordered rows, so rounding differs and signs may differ.
    Therefore the test compares the cosines of all images of the fold with all captions.
    """
    features, captions, scenes = world(120)
    options = replace(SMALL, text_directions=400)  # all directions of these texts
    before = material(features, captions, scenes, tmp_path)
    images, texts, _ = embedded(FittedScorer(options), before)
    inside = np.flatnonzero(before.fold == 2)
    moved = np.array(captions, dtype=object)
    moved[inside] = moved[np.roll(inside, 1)]
    again, others, _ = embedded(FittedScorer(options), material(features, moved.tolist(), scenes, tmp_path))
    cosines = images[inside] @ texts[np.roll(inside, 1)].T
    np.testing.assert_allclose(again[inside] @ others[inside].T, cosines, atol=5e-3)
    seen = np.flatnonzero(before.fold == 1)  # by an encoder that was fitted to the moved captions
    assert np.abs(again[seen] @ others[seen].T - images[seen] @ texts[seen].T).max() > 0.05


def test_captions_that_are_only_scored_do_not_change_the_fit(tmp_path: Path) -> None:
    features, captions, scenes = world(80)
    result = material(features, captions, scenes, tmp_path)
    given, _ = given_pairs(result.corpus.manifest)
    written = Pairs.of(np.arange(80), ["harbour with boats"] * 80, ["pen"] * 80, 1)
    pairs = given.joined(written)
    images, texts = FittedScorer(SMALL).embed(result, given, pairs)
    expected, own = FittedScorer(SMALL).embed(result, given, given)
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_allclose(texts[pairs.source == "given"], own, atol=1e-6)


def test_a_scorer_with_fewer_folds_embeds_all_images_and_texts(tmp_path: Path) -> None:
    """The images are divided once, for the scorer with the largest number of folds."""
    result = material(*world(80), tmp_path)
    images, texts, _ = embedded(FittedScorer(replace(SMALL, folds=2)), result)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)


def test_unreadable_images_are_zeros_and_scenes_are_used_only_if_labelled(tmp_path: Path) -> None:
    features, captions, scenes = world(80)
    result = material(features, captions, scenes, tmp_path)
    result.corpus.manifest.loc[3, "readable"] = False
    images, texts, pairs = embedded(FittedScorer(SMALL), result)
    assert not images[3].any() and images[4].any() and len(texts) == len(pairs) == 79
    unlabelled, _, _ = embedded(FittedScorer(SMALL), replace(result, labelled=False))
    without, _, _ = embedded(FittedScorer(replace(SMALL, scene_scale=0.0)), result)
    np.testing.assert_array_equal(unlabelled, without)
    assert not np.allclose(images, without, atol=1e-2)


# ---------------------------------------------------------------- statistics


def unit(count: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@dataclass(frozen=True)
class Made:
    """Arguments of `pair_statistics`: 40 images, some with two captions; three scenes, one of them with one image."""

    images: np.ndarray
    texts: np.ndarray
    image_of: np.ndarray
    fold: np.ndarray
    scene: np.ndarray
    partner: np.ndarray

    @classmethod
    def of(cls) -> Made:
        random = np.random.default_rng(5)
        image_of = np.sort(np.concatenate([np.arange(40), np.arange(0, 40, 3)]))
        scene = np.where(np.arange(40) == 7, 2, random.integers(0, 2, 40))
        partner = random.random(len(image_of)) < 0.8
        return cls(unit(40, 1), unit(len(image_of), 2), image_of, np.arange(40) % 2, scene, partner)

    def __call__(self, seed: int = 0) -> statistics_module.PairStatistics:
        return pair_statistics(**vars(self), generator=np.random.default_rng(seed))

    def partners(self, pair: int, same: bool) -> list[int]:
        """The pairs of other images of the fold that are compared, of the image's scene or of other scenes."""
        own = self.image_of[pair]
        return [
            other
            for other in np.flatnonzero(self.partner)
            if self.image_of[other] != own
            and self.fold[self.image_of[other]] == self.fold[own]
            and (self.scene[self.image_of[other]] == self.scene[own]) == same
        ]

    def columns(self, pair: int, caption: int) -> list[float]:
        """The four statistics of a pair's image with a caption."""
        left_out = {self.image_of[pair], self.image_of[caption]}
        cosine = float(self.images[self.image_of[pair]] @ self.texts[caption])
        inside, outside = self.partners(pair, True), self.partners(pair, False)
        if not inside and not any(self.partner[self.image_of == self.image_of[pair]]):
            inside = outside  # its scene has no partner at all
        result = []
        for others in (outside, inside):
            others = [other for other in others if self.image_of[other] not in left_out]
            by_caption = [float(self.images[self.image_of[pair]] @ self.texts[other]) for other in others]
            by_image = [float(self.images[self.image_of[other]] @ self.texts[caption]) for other in others]
            for values in (by_caption, by_image):
                result.append((cosine - np.mean(values)) / np.std(values) if len(values) > 1 else 0.0)
        return result


def test_statistics_equal_those_of_a_plain_loop() -> None:
    made = Made.of()
    result = made()
    count = len(made.image_of)
    np.testing.assert_allclose(result.cosine, (made.images[made.image_of] * made.texts).sum(1), atol=1e-6)
    expected = [made.columns(pair, pair) for pair in range(count)]
    np.testing.assert_allclose(result.observed, expected, atol=2e-4)


def test_shuffled_pairs_have_the_caption_of_another_image_of_the_right_scene() -> None:
    made = Made.of()
    result = made()
    for same, values in ((True, result.same), (False, result.other)):
        for pair, row in enumerate(values):
            possible = [made.columns(pair, other) for other in made.partners(pair, same)]
            if not possible or not made.partner[pair]:
                assert np.isnan(row).all()
                continue
            assert np.abs(np.array(possible) - row).max(1).min() < 2e-4
    assert np.isnan(result.same[made.image_of == 7]).all() and not np.isnan(result.same).all()


def test_partners_are_drawn_uniformly_and_never_from_the_same_image() -> None:
    image_of = np.array([0, 1, 1, 1, 2, 4, 4])
    partners = np.array([0, 1, 2, 3, 5, 6])
    for pair in range(7):
        drawn = _drawn(np.full(12_000, pair), partners, image_of, np.random.default_rng(0))
        expected = partners[image_of[partners] != image_of[pair]]
        names, counts = np.unique(drawn, return_counts=True)
        np.testing.assert_array_equal(names, expected)
        np.testing.assert_allclose(counts * len(expected) / 12_000, 1, atol=0.08)
    alone = _drawn(np.array([1, 2]), np.array([1, 2, 3]), image_of, np.random.default_rng(0))
    none = _drawn(np.array([0]), np.empty(0, np.int64), image_of, np.random.default_rng(0))
    assert alone.tolist() == [-1, -1] and none.tolist() == [-1]


def test_pairs_that_are_not_partners_do_not_change_statistics_of_others() -> None:
    """Otherwise a good caption could be lost because another image was described again."""
    made = Made.of()
    given = made.partner
    alone = replace(made, texts=made.texts[given], image_of=made.image_of[given], partner=np.ones(given.sum(), bool))
    whole, part = made(), alone()
    for name in ("cosine", "observed", "same", "other"):
        np.testing.assert_allclose(getattr(whole, name)[given], getattr(part, name), atol=1e-4, err_msg=name)


def test_statistics_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made.of()
    whole = made()
    monkeypatch.setattr(statistics_module, "BLOCK", 3)
    for name, values in vars(made()).items():
        np.testing.assert_allclose(values, getattr(whole, name), atol=1e-4, err_msg=name)


def test_statistics_of_sampled_partners_approximate_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    features = unit(900, 3)
    made = Made(features, unit(900, 4), np.arange(900), np.zeros(900, int), np.arange(900) % 2, np.ones(900, bool))
    whole, sampled = [], []
    for size, into in ((900, whole), (100, sampled)):
        monkeypatch.setattr(statistics_module, "SAMPLE", size)
        into.append(made().observed)
    assert not np.allclose(whole[0], sampled[0], atol=1e-3)
    np.testing.assert_allclose(np.corrcoef(whole[0].ravel(), sampled[0].ravel())[0, 1], 1, atol=0.02)


def test_a_single_scene_is_compared_only_with_itself() -> None:
    made = replace(Made.of(), scene=np.zeros(40, int))
    result = made()
    np.testing.assert_array_equal(result.observed[:, :2], result.observed[:, 2:])
    assert np.isnan(result.other).all() and np.isfinite(result.same[made.partner]).all() and result.observed.any()


def test_an_empty_set_of_pairs_has_empty_statistics() -> None:
    none = Made(unit(3, 0), unit(0, 0), np.empty(0, int), np.zeros(3, int), np.zeros(3, int), np.empty(0, bool))
    assert none().observed.shape == (0, 4)


# ---------------------------------------------------------------- evidence


def mixture(fraction: float, count: int = 6000, gap: float = 3.0, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Statistics of pairs [P, 4] with a fraction of shuffled ones, those of shuffled pairs, and the shuffled mask."""
    random = np.random.default_rng(seed)
    wrong = random.random(count) < fraction
    observed = random.standard_normal((count, 4)) + gap * ~wrong[:, None]
    return observed, random.standard_normal((count, 4)), wrong


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("gap", [2.0, 3.0])
def test_the_fraction_of_mismatched_pairs_is_estimated(fraction: float, gap: float) -> None:
    observed, shuffled, wrong = mixture(fraction, 20_000, gap)
    assert mismatched_fraction(*learn_evidence(observed, shuffled).cross_fitted) == pytest.approx(
        wrong.mean(), abs=0.03
    )


def test_few_pairs_do_not_bias_the_mismatched_fraction() -> None:
    """A regression that was fitted to a pair ranks it above its shuffled ones; the fraction was 0.06 too low here."""
    errors = []
    for seed in range(12):
        observed, shuffled, wrong = mixture(0.3, 500, seed=seed)
        errors.append(mismatched_fraction(*learn_evidence(observed, shuffled).cross_fitted) - wrong.mean())
    assert np.mean(errors) == pytest.approx(0, abs=0.03)


def test_pairs_of_an_image_are_in_one_cross_fitting_fold() -> None:
    """Five equal pairs per image: in separate folds, each would be scored by a fit to its own copies."""
    random = np.random.default_rng(0)
    observed, shuffled = (random.standard_normal((40, 12)).repeat(5, 0) for _ in range(2))
    together = learn_evidence(observed, shuffled, np.arange(40).repeat(5)).cross_fitted
    apart = learn_evidence(observed, shuffled).cross_fitted
    assert np.mean(apart[0]) - np.mean(apart[1]) > 1 + np.mean(together[0]) - np.mean(together[1])


@pytest.mark.parametrize(("fraction", "least"), [(0.3, 0.95), (0.05, 0.95)])
def test_mismatched_pairs_are_found(fraction: float, least: float) -> None:
    observed, shuffled, wrong = mixture(fraction)
    evidence = learn_evidence(observed, shuffled)
    result = one_scene(*evidence.cross_fitted)
    flagged = result.probability(evidence(observed), np.zeros(6000, int)) > 0.5
    assert wrong[flagged].mean() >= least and flagged[wrong].mean() >= least


@pytest.mark.parametrize("count", [60, 600, 6000])
def test_at_most_5_percent_are_flagged_if_all_pairs_match(count: int) -> None:
    for seed in range(3):
        observed, shuffled, _ = mixture(0, count, seed=seed)
        evidence = learn_evidence(observed, shuffled)
        result = one_scene(*evidence.cross_fitted)
        assert (result.probability(evidence(observed), np.zeros(count, int)) > 0.5).mean() <= 0.05


def test_the_mismatch_probability_falls_with_the_evidence_and_is_calibrated() -> None:
    """It is monotone and between 0 and 1, and its sum is the number of mismatched pairs."""
    observed, shuffled, wrong = mixture(0.4, 20_000, gap=1.2)
    evidence = learn_evidence(observed, shuffled)
    values = evidence(observed)
    probability = one_scene(*evidence.cross_fitted).probability(values, np.zeros(20_000, int))
    assert (np.diff(probability[np.argsort(values)]) <= 1e-12).all() and np.ptp(probability) > 0.9
    assert probability.min() >= 0 and probability.max() <= 1
    assert probability.sum() == pytest.approx(wrong.sum(), rel=0.05)
    for low, high in ((0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9)):
        near = (probability > low) & (probability <= high)
        assert wrong[near].mean() == pytest.approx(probability[near].mean(), abs=0.12)


def test_evidence_orders_pairs_like_the_true_likelihood_ratio() -> None:
    """This also holds for unequal deviations: that of the shuffled pairs is twice as large."""
    random = np.random.default_rng(0)
    observed, shuffled = random.standard_normal((8000, 4)) + 1.5, 2 * random.standard_normal((8000, 4))
    evidence = learn_evidence(observed, shuffled)
    points = random.standard_normal((500, 4)) + 0.7
    exact = (-((points - 1.5) ** 2) / 2 + points**2 / 8).sum(1)
    assert spearmanr(evidence(points), exact).statistic > 0.99


def test_scenes_with_enough_pairs_get_their_own_mismatched_fraction() -> None:
    random = np.random.default_rng(0)
    scene = np.repeat([0, 1, 2, 3], [4000, 4000, 4, 0])
    wrong = random.random(8004) < np.array([0.05, 0.6, 1.0, 0.0])[scene]
    evidence = random.standard_normal(8004) + 4 * ~wrong
    result = fit_mismatch(evidence, scene, random.standard_normal(8004), scene, 4)
    assert result.fraction == pytest.approx(wrong.mean(), abs=0.03)
    np.testing.assert_allclose(result.by_scene[:2], [0.05, 0.6], atol=0.03)
    assert abs(result.by_scene[2] - result.fraction) < abs(result.by_scene[2] - 1)  # four pairs are little evidence
    assert result.by_scene[3] == pytest.approx(result.fraction, abs=0.01)
    middle = np.full(4, 2.0)
    probability = result.probability(middle, np.arange(4))
    assert probability[0] < probability[3] < probability[1]


def test_indistinguishable_pairs_are_not_flagged_as_mismatched() -> None:
    evidence = learn_evidence(np.zeros((50, 4)), np.zeros((50, 4)))
    result = one_scene(*evidence.cross_fitted)
    assert result.fraction == 0 and not result.probability(np.zeros(50), np.zeros(50, int)).any()


def test_too_few_pairs_give_no_evidence_model() -> None:
    observed, shuffled, _ = mixture(0.2, 20)
    missing = np.where(np.arange(20)[:, None] < 19, np.nan, shuffled)
    assert learn_evidence(observed, missing) is None and learn_evidence(observed[:1], shuffled) is None
    half = np.where(np.arange(20)[:, None] < 10, np.nan, shuffled)
    assert np.isfinite(learn_evidence(observed, half).shuffled).all()


# ---------------------------------------------------------------- complete scoring


def test_swapped_captions_are_found_in_a_corpus(tmp_path: Path) -> None:
    features, captions, scenes = world(900)
    dirty, wrong = swapped(captions, scenes, 0.3)
    result = material(features, dirty, scenes, tmp_path / "corpus")
    given, _ = given_pairs(result.corpus.manifest)
    scored = score_pairs(result, given, given, (FittedScorer(SMALL),), 0, tmp_path)
    flagged = scored.table["mismatch"].to_numpy() > 0.5
    assert wrong[flagged].mean() >= 0.95 and flagged[wrong].mean() >= 0.95
    assert np.mean(list(scored.fractions.values())) == pytest.approx(0.3, abs=0.06)
    clean = material(features, captions, scenes, tmp_path / "clean")
    given, _ = given_pairs(clean.corpus.manifest)
    scored = score_pairs(clean, given, given, (FittedScorer(SMALL),), 0, tmp_path)
    assert (scored.table["mismatch"] > 0.5).mean() <= 0.05


def test_a_duplicated_scorer_does_not_change_the_scores(tmp_path: Path) -> None:
    result = material(*world(100), tmp_path / "corpus")
    given, _ = given_pairs(result.corpus.manifest)
    one = score_pairs(result, given, given, (FittedScorer(SMALL),), 0, tmp_path)
    two = score_pairs(result, given, given, (FittedScorer(SMALL), FittedScorer(SMALL, name="again")), 0, tmp_path)
    assert list(two.table) == ["cosine_fitted", "cosine_again", "evidence", "fit", "mismatch"]
    np.testing.assert_allclose(two.table[["evidence", "fit"]], one.table[["evidence", "fit"]], atol=1e-4)


def test_fit_is_lower_for_captions_of_other_images_of_the_scene(tmp_path: Path) -> None:
    """Captions with the right scene and another image's objects: no mismatch, but a worse fit."""
    features, captions, scenes = world(900)
    vague, wrong = swapped(captions, np.arange(900), 0.2)
    vague = [
        text.replace(text.split()[0], scene, 1) if other else text
        for text, scene, other in zip(vague, scenes, wrong, strict=True)
    ]
    result = material(features, vague, scenes, tmp_path / "corpus")
    given, _ = given_pairs(result.corpus.manifest)
    table = score_pairs(result, given, given, (FittedScorer(SMALL),), 0, tmp_path).table
    fit = table["fit"].to_numpy()
    assert np.mean(fit[wrong][:, None] < fit[~wrong][None]) > 0.9
    assert (table["mismatch"][wrong] > 0.5).mean() < 0.2


# ---------------------------------------------------------------- CLIPs


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A random CLIP of `transformers` for images of 32 px and captions of 16 tokens."""
    folder = tmp_path_factory.mktemp("clip")
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shared, "vocab_size": 49408, "max_position_embeddings": 16, "bos_token_id": 49406,
            "eos_token_id": 49407, "pad_token_id": 49407}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config={**shared, "image_size": 32, "patch_size": 16})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    clip_tokenizer(16).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


def pictured(captions: list[str], directory: Path, side: int = 32) -> tuple[Material, Pairs]:
    corpus = corpus_of(captions, ["forest"] * len(captions), directory, side)
    corpus.manifest.loc[1, "readable"] = False
    result = Material(
        corpus, np.zeros((len(captions), 1)), "", np.zeros(len(captions), int), ("forest",), True,
        np.zeros(len(captions), int),
    )  # fmt: skip
    return result, given_pairs(corpus.manifest)[0]


def test_a_hub_scorer_of_a_folder_embeds_like_transformers(clip_folder: Path, tmp_path: Path, capsys) -> None:
    captions = ["a forest", "a lake", "a forest", "sand " * 40]
    result, pairs = pictured(captions, tmp_path)
    scorer = HubScorer("tiny", str(clip_folder))
    images, texts = scorer.embed(result, pairs, pairs)
    assert "1 of 2 different captions are longer than tiny reads, and are truncated\n" in capsys.readouterr().err
    assert not images[1].any() and len(texts) == 3
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), clip_tokenizer(16)
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    words = tokenizer([captions[row] for row in (0, 2, 3)], padding="max_length", truncation=True, return_tensors="pt")
    pixels = processor(list(result.corpus.images[[0, 2, 3]]), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(input_ids=words.input_ids, pixel_values=pixels).logits_per_image / model.logit_scale.exp()
    np.testing.assert_allclose(images[[0, 2, 3]].astype(float) @ texts.T.astype(float), logits, atol=3e-3)


def test_a_missing_clip_folder_gives_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no CLIP for captioning.scorers.mine at .*nowhere") as error:
        _ = HubScorer("mine", str(tmp_path / "nowhere")).key
    assert "\n" not in str(error.value)


ARCHITECTURE = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory) -> Path:
    """Weights of an open_clip architecture, tiny and random, in the published format."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "tiny-test.json").write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(folder / "tiny-test.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = open_clip.create_model("tiny-test").state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "plain.safetensors")
    torch.save(weights, folder / "plain.pt")
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights.items()}}
    torch.save(wrapped, folder / "wrapped.pt")
    torch.save({"weights": weights, "made_in": Path("here")}, folder / "objects.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"state_dict": {0: torch.ones(1)}}, folder / "numbers.pt")
    torch.save({name: value for name, value in weights.items() if "visual" not in name}, folder / "half.pt")
    (folder / "text.pt").write_text("<html>404</html>")
    (folder / "text.safetensors").write_text("<html>404</html>")
    (folder / "empty.pt").touch()
    return folder


def test_all_formats_of_open_clip_weights_give_the_same_embeddings(
    open_clip_folder: Path, tmp_path: Path, capsys
) -> None:
    captions = ["a forest", "a lake", "Forests, and ROADS", "sand " * 40]
    result, pairs = pictured(captions, tmp_path)
    results = [
        OpenClipScorer("tiny", "tiny-test", str(open_clip_folder / name)).embed(result, pairs, pairs)
        for name in ("plain.safetensors", "plain.pt", "wrapped.pt")
    ]
    assert capsys.readouterr().err == "1 of 3 different captions are longer than tiny reads, and are truncated\n"
    for images, texts in results[1:]:
        np.testing.assert_array_equal(images, results[0][0])
        np.testing.assert_array_equal(texts, results[0][1])
    model = open_clip.create_model("tiny-test").eval()
    model.load_state_dict(torch.load(open_clip_folder / "plain.pt", weights_only=True))
    mean, std = (torch.tensor(value)[:, None, None] for value in (open_clip.OPENAI_DATASET_MEAN,
                                                                  open_clip.OPENAI_DATASET_STD))  # fmt: skip
    pixels = (torch.from_numpy(result.corpus.images[[0, 2, 3]]).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        seen = model.encode_image(pixels, normalize=True)
        read = model.encode_text(
            open_clip.get_tokenizer("tiny-test")([captions[row] for row in (0, 2, 3)]), normalize=True
        )
    images, texts = (values.astype(float) for values in results[0])
    np.testing.assert_allclose(images[[0, 2, 3]] @ texts.T, seen @ read.T, atol=3e-3)
    assert not images[1].any()


@pytest.mark.parametrize(
    ("architecture", "file", "reason"),
    [
        ("tiny-test", "gone.pt", "no such file"),
        ("tiny-test", "objects.pt", "not a file that contains only tensors"),
        ("tiny-test", "text.pt", "not a file that contains only tensors"),
        ("tiny-test", "empty.pt", "not a file that contains only tensors"),
        ("tiny-test", "text.safetensors", "header"),
        ("tiny-test", "list.pt", "no named tensors"),
        ("tiny-test", "numbers.pt", "no named tensors"),
        ("tiny-test", "half.pt", "its weights are not those of tiny-test"),
        ("unheard-of", "plain.pt", "unheard-of"),
    ],
)
def test_an_invalid_clip_file_gives_a_one_line_error(
    open_clip_folder: Path, architecture: str, file: str, reason: str
) -> None:
    scorer = OpenClipScorer("mine", architecture, str(open_clip_folder / file))
    with pytest.raises(UserError, match=rf"no CLIP for captioning\.scorers\.mine at .*{re.escape(reason)}") as error:
        _ = scorer.key
    assert "\n" not in str(error.value)


def test_truncated_texts_are_counted_with_a_transformers_tokenizer(open_clip_folder: Path, tmp_path: Path) -> None:
    clip_tokenizer(20).save_pretrained(tmp_path / "words")
    text = {**ARCHITECTURE["text_cfg"], "hf_tokenizer_name": str(tmp_path / "words")}
    (tmp_path / "tiny-words.json").write_text(json.dumps({**ARCHITECTURE, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-words.json")
    clip = OpenClipScorer("words", "tiny-words", str(open_clip_folder / "plain.pt")).clip()
    assert clip.cut(["short", "sand " * 18, "sand " * 19, "sand " * 400]) == 2


def test_the_key_of_a_scorer_depends_on_its_weights(open_clip_folder: Path, tmp_path: Path) -> None:
    weights = torch.load(open_clip_folder / "plain.pt", weights_only=True)
    torch.save({name: value + 1 for name, value in weights.items()}, tmp_path / "other.pt")
    keys = [OpenClipScorer("a", "tiny-test", str(path)).key for path in (open_clip_folder / "plain.pt",
                                                                         tmp_path / "other.pt")]  # fmt: skip
    assert keys[0] != keys[1] and all(keys)


def test_one_long_caption_does_not_increase_the_memory_of_the_others(tmp_path: Path) -> None:
    """A fixed-width array of 2,000 captions would take 160 MB here."""

    class Counted:
        name = "counted"

        def cut(self, texts: list[str]) -> int:
            return 0

        def image_embeddings(self, images: np.ndarray) -> torch.Tensor:
            return torch.ones(len(images), 2)

        text_embeddings = image_embeddings

        def clip(self) -> Counted:
            return self

    captions = [f"caption {number}" for number in range(2000)] + ["x" * 20_000]
    result, pairs = pictured(captions, tmp_path, side=2)
    tracemalloc.start()
    _, texts = embed_with_clip(Counted(), result, pairs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert texts.shape == (2000, 2) and peak < 2e7
    assert scorers_module.TEXTS < 2000  # more than one batch
