"""Ranks of images by a score that may have ties."""

from __future__ import annotations

import math

import numpy as np

#: Seed of the order among equal values. It is fixed so that ties do not change the state of a method's generator.
TIES_SEED = 0


def ascending(values: np.ndarray) -> np.ndarray:
    """Positions of the values from the lowest to the highest, int64 [n]; NaN comes last.

    Equal values are in a random order that is always the same; the order of the corpus would favour the images that it
    lists first. The permutation is drawn only if there are equal values; otherwise this is a plain sort.

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

    The number is ceil(quantile (count - 1)), because `numpy.quantile` interpolates between the values at the ranks
    around quantile (count - 1), counted from zero.

    Args:
        count: number of values.
        quantile: in [0, 1].
    """
    return math.ceil(round(quantile * max(0, count - 1), 9))  # rounded because 0.07 * 100 is 7.000000000000001
