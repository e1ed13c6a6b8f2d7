"""From statistics of pairs to the probability that a caption is not of its image; docs/method.md, section 8."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, PolynomialFeatures, StandardScaler

#: Statistics beyond this many deviations count as this many.
MOST_DEVIATIONS = 8.0
#: Quantiles of the shuffled pairs' evidence below which pairs are counted: there next to no matched pair lies.
QUANTILES = (0.2, 0.3, 0.4, 0.5)
#: Inverse strength of the L2 penalty of the regression.
PENALTY = 0.1
#: Parts of the images; the evidence of a part's pairs is given by a regression on the others.
PARTS = 5


@dataclass(frozen=True)
class Evidence:
    """A learned log ratio: how much more often a pair looks so than a shuffled one does, up to a constant.

    Attributes:
        model: logistic regression of pairs against shuffled ones, on statistics and their products.
        shuffled: float64 [P'], the log ratios of the shuffled pairs, rows with NaN left out.
        cross_fitted: float64 [P] and [P'], log ratios of the pairs and of the shuffled ones, each by a regression that
            did not learn from it: one that did puts its pairs above their shuffled ones, mismatched or not.
    """

    model: Pipeline
    shuffled: np.ndarray
    cross_fitted: tuple[np.ndarray, np.ndarray]

    def __call__(self, statistics: np.ndarray) -> np.ndarray:
        """float64 [P] of statistics [P, F]."""
        return self.model.decision_function(statistics)


def learn_evidence(observed: np.ndarray, shuffled: np.ndarray, image: np.ndarray | None = None) -> Evidence | None:
    """Tell pairs from shuffled ones by a density ratio (Sugiyama, Suzuki and Kanamori 2012, chapter 4).

    The pairs hold mismatched ones themselves, which are distributed as the shuffled ones are. So the ratio is a growing
    function of that of matched to shuffled pairs, and orders them alike.

    Args:
        observed: float [P, F]; shuffled: float [P, F] of the same images, rows with NaN are left out.
        image: int64 [P], whose pairs are in one part; None: each pair is of another image.
    Returns:
        None where fewer than two pairs can be shuffled.
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
            continue  # as few pairs as that say nothing anyway
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
    """
    Attributes:
        fraction: of the pairs that are mismatched, in all scenes.
        by_scene: float64 [S], in every scene.
        likelihood_ratio: from evidence to the ratio of the densities of matched and of shuffled pairs.
    """

    fraction: float
    by_scene: np.ndarray
    likelihood_ratio: IsotonicRegression

    def probability(self, evidence: np.ndarray, scene: np.ndarray) -> np.ndarray:
        """Probability of pairs with this evidence float [P] in these scenes int64 [P] to be mismatched; float64 [P]."""
        fraction = self.by_scene[scene]
        density = np.maximum(self.likelihood_ratio.predict(evidence), 0)
        return fraction / np.maximum(fraction + (1 - fraction) * density, 1e-12)


def mismatched_fraction(evidence: np.ndarray, shuffled: np.ndarray) -> float:
    """The part of pairs that are shuffled, by how many fall where next to no matched pair does (Storey 2002).

    Args:
        evidence: float [P] of the pairs; shuffled: float [P'], at least one.
    """
    parts = [(evidence < np.quantile(shuffled, level)).mean() / level for level in QUANTILES]
    return float(np.clip(np.mean(parts), 0, 1))


def scene_fractions(
    evidence: np.ndarray, scene: np.ndarray, shuffled: np.ndarray, shuffled_scene: np.ndarray, scenes: int, prior: float
) -> np.ndarray:
    """`mismatched_fraction` of every scene by its own shuffled pairs, float64 [S], towards the mean over all pairs.

    By its own, since what a caption of another scene looks like depends on the scene, and so does how many there are.
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
    """A mixture of matched and shuffled pairs: f = (1 - π) f_matched + π f_shuffled, where f_shuffled is known.

    The fractions are found where f_matched is next to nothing; the ratio f / f_shuffled is the isotonic regression of
    pairs against shuffled ones on the evidence, from which that of f_matched follows. Shuffled pairs count in it as
    often as their scene has mismatched ones.

    Args:
        evidence: float [P]; scene: int64 [P], 0..`scenes` - 1.
        shuffled: float [P'], at least one; shuffled_scene: int64 [P'].
        prior_pairs: the fraction of all scenes counts in each scene as so many pairs.
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
