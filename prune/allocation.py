"""Allocation of a budget over groups: proportional to their sizes, uniform, or between the two."""

from __future__ import annotations

import numpy as np


def water_fill(capacities: np.ndarray, budget: int) -> np.ndarray:
    """The most even integer allocation within the capacities: every group gets min(capacity, level).

    The remainder that cannot be divided evenly goes to the groups of the largest capacities, ties to the first.

    Args:
        capacities: int [G], at least 0.
        budget: number to allocate, 0 <= budget <= sum(capacities).
    Returns:
        int64 [G] that sums to `budget`.
    Raises:
        ValueError: the budget is out of range.
    """
    capacities = np.asarray(capacities, dtype=np.int64)
    if not 0 <= budget <= capacities.sum():
        raise ValueError(f"budget {budget} does not fit capacities that sum to {capacities.sum()}")
    low, high = 0, int(capacities.max(initial=0))
    while low < high:  # the highest level that the budget can pay for
        middle = (low + high + 1) // 2
        if np.minimum(capacities, middle).sum() <= budget:
            low = middle
        else:
            high = middle - 1
    allocation = np.minimum(capacities, low)
    open_groups = np.flatnonzero(capacities > low)
    order = open_groups[np.argsort(-capacities[open_groups], kind="stable")]
    allocation[order[: budget - allocation.sum()]] += 1
    return allocation


def proportional(capacities: np.ndarray, budget: int) -> np.ndarray:
    """Integer allocation proportional to the capacities, by largest remainders. Returns int64 [G], sum `budget`."""
    capacities = np.asarray(capacities, dtype=np.int64)
    total = int(capacities.sum())
    if not 0 <= budget <= total:
        raise ValueError(f"budget {budget} does not fit capacities that sum to {total}")
    fractions = capacities * (budget / max(total, 1))
    allocation = np.minimum(np.floor(fractions).astype(np.int64), capacities)
    order = np.argsort(allocation - fractions, kind="stable")
    order = order[allocation[order] < capacities[order]]
    allocation[order[: budget - allocation.sum()]] += 1
    return allocation


def allocate(capacities: np.ndarray, budget: int, uniformity: float) -> np.ndarray:
    """Blend of `proportional` (uniformity 0) and `water_fill` (uniformity 1), see docs/method.md, section 3.

    Returns int64 [G] that sums to exactly `budget`; no group gets more than its capacity.
    """
    capacities = np.asarray(capacities, dtype=np.int64)
    even, fraction = water_fill(capacities, budget), proportional(capacities, budget)
    blend = uniformity * even + (1 - uniformity) * fraction
    allocation = np.floor(blend + 1e-9).astype(np.int64)
    order = np.argsort(allocation - blend, kind="stable")
    order = order[allocation[order] < capacities[order]]
    allocation[order[: budget - allocation.sum()]] += 1
    return allocation


def allocate_distinct(distinct: np.ndarray, capacities: np.ndarray, budget: int, uniformity: float) -> np.ndarray:
    """`allocate` over the distinct images of each group first; repetitions get the part of the budget that is left.

    Args:
        distinct: int [G], number of images of each group that repeat no other, at most the capacity.
        capacities: int [G], number of all images of each group.
        budget: number of images to allocate.
        uniformity: as in `allocate`.
    Returns:
        int64 [G] that sums to `budget`.
    """
    distinct, capacities = (np.asarray(counts, dtype=np.int64) for counts in (distinct, capacities))
    if budget <= distinct.sum():
        return allocate(distinct, budget, uniformity)
    return distinct + allocate(capacities - distinct, budget - int(distinct.sum()), uniformity)
