"""Which images are held out, where a corpus does not say so itself."""

from __future__ import annotations

import hashlib

import numpy as np

from runtime.errors import UserError

SPLITS = ("all", "train", "test")
#: What people call their splits; everything that is not trained on is held out.
NAMES = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}


def hashed_split(identifier: str, test_share: float) -> str:
    """ "test" for about `test_share` of all ids, "train" for the others: always the same, whatever comes or goes."""
    number = int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big")
    return "test" if number < test_share * 2**64 else "train"


def check(split: str, test_share: float, limit: int | None, resolution: int) -> None:
    """Refuse what no source can do.

    Raises:
        UserError: an unknown split, a share outside [0, 1), a limit or a resolution below 1.
    """
    if split not in SPLITS:
        raise UserError(f"corpus.split={split!r} is unknown: there are the splits {', '.join(SPLITS)}")
    if not 0 <= test_share < 1:
        raise UserError(f"corpus.test_share={test_share} is outside [0, 1): give the share to hold out")
    if limit is not None and limit < 1:
        raise UserError(f"corpus.limit={limit} keeps nothing: give at least 1, or null for all")
    if resolution < 1:
        raise UserError(f"corpus.resolution={resolution} is no image size: give the side in pixels")


def thinned(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of 0..count-1, evenly spread and ascending, int64."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).round().astype(int)
