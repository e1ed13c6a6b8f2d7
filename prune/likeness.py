"""When two images count as duplicates: their pixels agree, and their locations and dates do not contradict it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from corpus.locations import ELSEWHERE, SAME, Locations
from runtime.errors import UserError

#: Smallest correlation of brightness at which two images are near-duplicates. Images of one location on two dates lie
#: below it, and so do two patches of one sea; a copy in another format, size or contrast stretch lies above it.
CORRELATION = 0.95
#: Smallest variation of brightness, in levels of 255, at which a correlation is meaningful.
LEAST_CONTRAST = 1.0
#: Kinds of pairs of images that correlate at `CORRELATION` or more.
NEAR_DUPLICATE, OTHER_DATE, LOOK_ALIKE = "near_duplicate", "same_location_other_date", "look_alike_elsewhere"
KINDS = (NEAR_DUPLICATE, OTHER_DATE, LOOK_ALIKE)
CHOICES = ("distinct", "duplicate")


@dataclass(frozen=True)
class PairRule:
    """Rule that says which images that look alike are duplicates.

    Args:
        other_date: "distinct" or "duplicate", for images of the same location on different dates.
        elsewhere: "distinct" or "duplicate", for images of known locations that share no ground.
    Raises:
        UserError: a value is neither "distinct" nor "duplicate".
    """

    other_date: str = "distinct"
    elsewhere: str = "distinct"

    def __post_init__(self) -> None:
        for name in ("other_date", "elsewhere"):
            if getattr(self, name) not in CHOICES:
                raise UserError(f"{name}={getattr(self, name)} is unknown: give {' or '.join(CHOICES)}")

    @property
    def counted(self) -> tuple[str, ...]:
        """The kinds of pairs that count as duplicates."""
        requested = {OTHER_DATE: self.other_date, LOOK_ALIKE: self.elsewhere}
        return tuple(kind for kind in KINDS if requested.get(kind, CHOICES[1]) == CHOICES[1])


def kinds(first: Locations, second: Locations, equal: np.ndarray, one_grid: bool) -> np.ndarray:
    """Kind of each pair of images that look alike, str [N]: one of `KINDS`.

    Images whose pixels are all equal are near-duplicates, whatever their locations and dates are.

    Args:
        first, second: locations of the N pairs.
        equal: bool [N], whether all pixels of the two images are equal.
        one_grid: as in `Locations.ground_of`.
    """
    ground = first.ground_of(second, one_grid)
    result = np.full(len(first), NEAR_DUPLICATE, dtype=object)
    result[(ground == SAME) & first.on_other_date(second)] = OTHER_DATE
    result[ground == ELSEWHERE] = LOOK_ALIKE
    result[equal] = NEAR_DUPLICATE
    return result


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation of the brightness of two images, uint8 [R, R, 3]; 0 if an image has almost no contrast."""
    return float(correlations(first[None], second[None])[0])


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`correlation` of N pairs of images uint8 [N, R, R, 3], float64 [N]; each value depends on its own pair only."""
    side = math.prod(first.shape[1:3])
    luma = [images.mean(axis=-1, dtype=np.float64).reshape(len(images), side) for images in (first, second)]
    spread = [values.std(axis=1) for values in luma]
    message = np.minimum(*spread) >= LEAST_CONTRAST
    one, other = (values - values.mean(axis=1, keepdims=True) for values in luma)
    return np.where(message, (one * other).mean(axis=1) / np.where(message, spread[0] * spread[1], 1), 0.0)


def same_pixels(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether all pixels of the two images of each pair, uint8 [N, R, R, 3], are equal; bool [N]."""
    return (first == second).all(axis=(1, 2, 3))


def names_in(texts: Sequence[str], name: str) -> int:
    """Number of texts, each a comma-separated list, that contain a name."""
    return sum(name in str(text).split(", ") for text in texts)
