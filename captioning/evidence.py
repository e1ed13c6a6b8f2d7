"""Probability that a caption does not belong to its image, from statistics of pairs; docs/method.md, section 8."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, PolynomialFeatures, StandardScaler

#: Statistics are limited to this number of standard deviations.
MOST_DEVIATIONS = 8.0
#: Quantiles of the evidence of shuffled pairs below which pairs are counted; almost no matched pair lies below them.
QUANTILES = (0.2, 0.3, 0.4, 0.5)
#: Inverse strength of the L2 penalty of the regression.
PENALTY = 0.1
#: Number of parts of the images; the evidence of the pairs of a part comes from a regression on the other parts.
PARTS = 5


@dataclass(frozen=True)
class Evidence:
    """A learned log ratio of the densities of pairs and of shuffled pairs, up to a constant.

    Attributes:
        model: logistic regression of pairs against shuffled pairs, on statistics and their products.
        shuffled: float64 [P'], log ratios of the shuffled pairs, without rows with NaN.
        cross_fitted: float64 [P] and [P'], log ratios of the pairs and of the shuffled pairs, each from a regression
            that was not fitted to it. A regression puts the pairs that it was fitted to above their shuffled versions,
            mismatched or not.
    """

    model: Pipeline
    shuffled: np.ndarray
    cross_fitted: tuple[np.ndarray, np.ndarray]

    def __call__(self, statistics: np.ndarray) -> np.ndarray:
        """Log ratios float64 [P] for statistics [P, F]."""
        return self.model.decision_function(statistics)


def learn_evidence(observed: np.ndarray, shuffled: np.ndarray, image: np.ndarray | None = None) -> Evidence | None:
    """Distinguish pairs from shuffled pairs by a density ratio (Sugiyama, Suzuki and Kanamori 2012, chapter 4).

    The pairs include mismatched ones, which have the same distribution as shuffled pairs. So the learned ratio is an
    increasing function of the ratio of matched to shuffled pairs, and gives the same order.

    Args:
        observed: float [P, F], statistics of the pairs.
        shuffled: float [P, F], statistics of shuffled pairs of the same images; rows with NaN are left out.
        image: int64 [P], image of each pair; pairs of one image are in the same part. None: all images are different.
    Returns:
        the evidence; None if fewer than two pairs can be shuffled.
    """
    usable = ~np.isnan(shuffled).any(axis=1)
    if usable.sum() < 2 or len(observed) < 2:
        return None
    part = (np.arange(len(observed)) if image is None else image) % PARTS
    data, parts = (observed, shuffled[usable]), (part, part[usable])
    model = _regression(*data)
    crossed = [model.decision_function(values) for values in data]
    for number in range(PARTS):
        others = [values[own != number] for values, own in zip(data, parts, strict=True)]
        if min(map(len, others)) == 0:
            continue  # so few pairs are not informative
        fitted = _regression(*others)
        for result, values, own in zip(crossed, data, parts, strict=True):
            if (own == number).any():
                result[own == number] = fitted.decision_function(values[own == number])
    return Evidence(model, model.decision_function(data[1]), (crossed[0], crossed[1]))


def _regression(observed: np.ndarray, shuffled: np.ndarray) -> Pipeline:
    clip = FunctionTransformer(np.clip, kw_args={"a_min": -MOST_DEVIATIONS, "a_max": MOST_DEVIATIONS})
    model = make_pipeline(
        clip, PolynomialFeatures(2, include_bias=False), StandardScaler(), LogisticRegression(C=PENALTY, max_iter=300)
    )
    return model.fit(np.concatenate([observed, shuffled]), np.repeat([1, 0], [len(observed), len(shuffled)]))


@dataclass(frozen=True)
class Mismatch:
    """A fitted model of mismatched pairs.

    Attributes:
        fraction: fraction of mismatched pairs in all scenes together.
        by_scene: float64 [S], fraction of mismatched pairs in each scene.
        likelihood_ratio: function from evidence to the ratio of the densities of matched and of shuffled pairs.
    """

    fraction: float
    by_scene: np.ndarray
    likelihood_ratio: IsotonicRegression

    def probability(self, evidence: np.ndarray, scene: np.ndarray) -> np.ndarray:
        """Mismatch probability, float64 [P], of pairs with this evidence, float [P], in these scenes, int64 [P]."""
        fraction = self.by_scene[scene]
        density = np.maximum(self.likelihood_ratio.predict(evidence), 0)
        return fraction / np.maximum(fraction + (1 - fraction) * density, 1e-12)


def mismatched_fraction(evidence: np.ndarray, shuffled: np.ndarray) -> float:
    """Fraction of pairs that are mismatched, from the number of pairs where almost no matched pair lies (Storey 2002).

    Args:
        evidence: float [P], evidence of the pairs.
        shuffled: float [P'], evidence of shuffled pairs, at least one.
    """
    parts = [(evidence < np.quantile(shuffled, level)).mean() / level for level in QUANTILES]
    return float(np.clip(np.mean(parts), 0, 1))


def scene_fractions(
    evidence: np.ndarray, scene: np.ndarray, shuffled: np.ndarray, shuffled_scene: np.ndarray, scenes: int, prior: float
) -> np.ndarray:
    """`mismatched_fraction` of every scene, float64 [S], shrunk towards the mean over all pairs.

    Each scene is compared with its own shuffled pairs, because the evidence of captions of other scenes, and their
    number, depend on the scene.
    """
    everywhere = mismatched_fraction(evidence, shuffled)
    own, pairs = np.full(scenes, everywhere), np.bincount(scene, minlength=scenes)
    for number in np.flatnonzero(pairs):
        there = shuffled[shuffled_scene == number]
        if len(there):
            own[number] = mismatched_fraction(evidence[scene == number], there)
    mean = float(np.average(own, weights=pairs)) if pairs.sum() else everywhere
    return (pairs * own + prior * mean) / (pairs + prior)


def fit_mismatch(
    evidence: np.ndarray,
    scene: np.ndarray,
    shuffled: np.ndarray,
    shuffled_scene: np.ndarray,
    scenes: int,
    prior_pairs: float = 20.0,
) -> Mismatch:
    """Fit a mixture of matched and shuffled pairs: f = (1 - π) f_matched + π f_shuffled, where f_shuffled is known.

    The fractions π are estimated where f_matched is almost zero. The ratio f / f_shuffled comes from an isotonic
    regression of pairs against shuffled pairs on the evidence, and the ratio f_matched / f_shuffled follows from it. In
    this regression, shuffled pairs are weighted by the number of mismatched pairs in their scene.

    Args:
        evidence: float [P], evidence of the pairs.
        scene: int64 [P], scene of each pair, 0..`scenes` - 1.
        shuffled: float [P'], evidence of shuffled pairs, at least one.
        shuffled_scene: int64 [P'], scene of each shuffled pair.
        scenes: number of scenes.
        prior_pairs: weight of the fraction over all scenes in each scene, as a number of pairs.
    """
    fractions = scene_fractions(evidence, scene, shuffled, shuffled_scene, scenes, prior_pairs)
    fraction = float(fractions[scene].mean())
    weights = fractions[shuffled_scene] + 1e-6
    weights *= len(evidence) / weights.sum()
    values = np.concatenate([evidence, shuffled])
    labels = np.repeat([1.0, 0.0], [len(evidence), len(shuffled)])
    known = IsotonicRegression(y_min=1e-6, y_max=1 - 1e-6, out_of_bounds="clip")
    known.fit(values, labels, sample_weight=np.concatenate([np.ones(len(evidence)), weights]))
    grid = np.unique(values)
    chance = known.predict(grid)
    ratio = chance / (1 - chance)
    matched = IsotonicRegression(out_of_bounds="clip").fit(
        grid, np.maximum(ratio - fraction, 0) / max(1 - fraction, 1e-6)
    )
    return Mismatch(fraction, fractions, matched)
