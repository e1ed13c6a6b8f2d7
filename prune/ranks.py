"""Ranks of images by a score, where scores may be equal."""

from __future__ import annotations

import math

import numpy as np

#: Seed of the order among equal values. Fixed: a method's own generator must not depend on whether there are any.
TIES_SEED = 0


def ascending(values: np.ndarray) -> np.ndarray:
    """Positions of the values from the lowest to the highest, int64 [n]; NaN comes last.

    Equal values stand in a random order that is always the same, since the order of the corpus would favour what it
    lists first. The permutation is drawn only if there are equal values; without any this is a plain sort.

    Args:
        values: float [n].
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    if not (ordered[1:] == ordered[:-1]).any():
        return order
    shuffled = np.random.default_rng(TIES_SEED).permutation(len(values))
    return shuffled[np.argsort(values[shuffled], kind="stable")]


def below_quantile(count: int, quantile: float) -> int:
    """How many of `count` different values lie strictly below their linearly interpolated quantile.

    That is ceil(quantile (count - 1)): `numpy.quantile` lies between the values of the ranks around
    quantile (count - 1), counted from zero.

    Args:
        quantile: in [0, 1].
    """
    return math.ceil(round(quantile * max(0, count - 1), 9))  # rounded, since 0.07 * 100 is 7.000000000000001
