"""When two images count as one: their pixels agree, and neither place nor date says otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from corpus.locations import ELSEWHERE, SAME, Locations
from runtime.errors import UserError

#: Two images are near-duplicates where their brightness correlates at least so. Two dates of a place stay below, and
#: so do two patches of one sea; a copy in another format, size or stretch does not.
CORRELATION = 0.95
#: Levels of 255 by which brightness must vary for it to say anything.
LEAST_CONTRAST = 1.0
#: What a pair of images is that correlate so.
NEAR_DUPLICATE, OTHER_DATE, LOOK_ALIKE = "near_duplicate", "same_location_other_date", "look_alike_elsewhere"
KINDS = (NEAR_DUPLICATE, OTHER_DATE, LOOK_ALIKE)
CHOICES = ("distinct", "duplicate")


@dataclass(frozen=True)
class PairRule:
    """Which images that look alike are duplicates.

    Args:
        other_date: of the same place on another date: "distinct" or "duplicate".
        elsewhere: of locations that are known and share no ground: the same.
    Raises:
        UserError: another word.
    """

    other_date: str = "distinct"
    elsewhere: str = "distinct"

    def __post_init__(self) -> None:
        for name in ("other_date", "elsewhere"):
            if getattr(self, name) not in CHOICES:
                raise UserError(f"{name}={getattr(self, name)} is unknown: give {' or '.join(CHOICES)}")

    @property
    def counted(self) -> tuple[str, ...]:
        """The kinds of pairs that are duplicates."""
        requested = {OTHER_DATE: self.other_date, LOOK_ALIKE: self.elsewhere}
        return tuple(kind for kind in KINDS if requested.get(kind, CHOICES[1]) == CHOICES[1])


def kinds(first: Locations, second: Locations, equal: np.ndarray, one_grid: bool) -> np.ndarray:
    """What each pair of images is, str [N], if the two look alike: one of `KINDS`.

    Images that are equal in every pixel are near-duplicates whatever is reported of their locations and dates.

    Args:
        equal: bool [N].
        one_grid: as in `Locations.ground_of`.
    """
    ground = first.ground_of(second, one_grid)
    result = np.full(len(first), NEAR_DUPLICATE, dtype=object)
    result[(ground == SAME) & first.on_other_date(second)] = OTHER_DATE
    result[ground == ELSEWHERE] = LOOK_ALIKE
    result[equal] = NEAR_DUPLICATE
    return result


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of the brightness of two images, uint8 [R, R, 3]; 0 where one is plain."""
    return float(correlations(first[None], second[None])[0])


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`correlation` of every pair of uint8 [N, R, R, 3], float64 [N]; a pair's does not depend on the others."""
    side = math.prod(first.shape[1:3])
    luma = [images.mean(axis=-1, dtype=np.float64).reshape(len(images), side) for images in (first, second)]
    spread = [values.std(axis=1) for values in luma]
    message = np.minimum(*spread) >= LEAST_CONTRAST
    one, other = (values - values.mean(axis=1, keepdims=True) for values in luma)
    return np.where(message, (one * other).mean(axis=1) / np.where(message, spread[0] * spread[1], 1), 0.0)


def same_pixels(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether the images of each pair of uint8 [N, R, R, 3] are equal, bool [N]."""
    return (first == second).all(axis=(1, 2, 3))


def names_in(texts: Sequence[str], name: str) -> int:
    """How many of comma-separated lists hold a name."""
    return sum(name in str(text).split(", ") for text in texts)
