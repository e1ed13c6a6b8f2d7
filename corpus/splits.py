"""Which images are trained on and which are held out: `train`, `val` to tune on, `test` to publish.

A data set that names its splits keeps them. Where it leaves one out, a hash of the id decides, which is always the same
whatever images come or go:

- no names: `test_share` of the images are test, `val_share` are val, the others train;
- train alone: the same, which is what a hub calls a table without splits;
- train and test: `val_share` of train is val;
- train and val: half of val is test, for who tunes on held-out images has none left to measure on;
- a name that `NAMES` does not have is held out as test.

The parts of a data set of a hub or of torchgeo name splits only where one of them is to train on (`part_names`): else
the hash decides about all images. Otherwise no image that is named val or test is ever trained on.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from runtime.artefacts import is_main_process
from runtime.errors import UserError

SPLITS = ("all", "train", "val", "test")
#: What people call their splits, in lower case.
NAMES = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def hashed_split(identifier: str, val_share: float, test_share: float) -> str:
    """ "test" for about `test_share` of all ids, "val" for about `val_share`, "train" for the others.

    The test ids do not depend on `val_share`, and a larger share holds out the ids of a smaller one too.
    """
    number = int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big")
    if number < test_share * 2**64:
        return "test"
    return "val" if number < (test_share + val_share) * 2**64 else "train"


def assigned(corpus: str, ids: Sequence[str], names: Sequence[str], val_share: float, test_share: float) -> list[str]:
    """The split of every image, by the rules above; what is not as named is said on stderr, in one line.

    Args:
        corpus: its name, for the line.
        names: what the data set calls each image's split, "" where it says nothing.
    Returns:
        "train", "val" or "test" for every id.
    """
    known = {name: NAMES.get(name.strip().lower(), "test") for name in set(names) if name}
    unknown = sorted(name for name in known if name.strip().lower() not in NAMES)
    if unknown:
        _tell(f"{corpus}: no known split is called {', '.join(unknown)}: its images are held out as test")
    carved, shares = _missing(set(known.values()), val_share, test_share)
    splits, counts = [], {"val": 0, "test": 0}
    for identifier, name in zip(ids, names, strict=True):
        if not name:
            splits.append(hashed_split(identifier, val_share, test_share))
        elif known[name] == carved:
            splits.append(hashed_split(identifier, *shares))
            if splits[-1] != carved:
                counts[splits[-1]] += 1
        else:
            splits.append(known[name])
    taken = [f"{count} as {split}" for split, count in counts.items() if count]
    if taken:
        lacking = " and no ".join(split for split, count in counts.items() if count)
        _tell(
            f"{corpus}: the data set names no {lacking}: of its {carved} images a hash of the id takes "
            f"{' and '.join(taken)}"
        )
    return splits


def _missing(named: set[str], val_share: float, test_share: float) -> tuple[str, tuple[float, float]]:
    """The named split that gives images to one that is missing, "" for none, and the shares of val and test."""
    if named == {"train"}:
        return "train", (val_share, test_share)
    if named == {"train", "test"}:
        return "train", (val_share, 0.0)
    if named == {"train", "val"}:
        return "val", (0.5, 0.5)
    return "", (0.0, 0.0)


def part_names(parts: Iterable[str]) -> dict[str, str]:
    """What the parts of a data set name their images' split: nothing where none of them is to be trained on."""
    parts = list(parts)
    trained = any(NAMES.get(part.strip().lower()) == "train" for part in parts)
    return {part: part if trained else "" for part in parts}


@cache
def _tell(line: str) -> None:
    """Once, though every split of a corpus finds it out."""
    if is_main_process():
        print(line, file=sys.stderr, flush=True)


def check(split: str, val_share: float, test_share: float, limit: int | None, resolution: int) -> None:
    """Refuse what no source can do.

    Raises:
        UserError: an unknown split, shares below 0 or that leave nothing, a limit or a resolution below 1.
    """
    if split not in SPLITS:
        raise UserError(f"corpus.split={split!r} is unknown: there are the splits {', '.join(SPLITS)}")
    for name, share in (("val_share", val_share), ("test_share", test_share)):
        if not 0 <= share < 1:
            raise UserError(f"corpus.{name}={share} is outside [0, 1): give the share to hold out")
    if val_share + test_share >= 1:
        raise UserError(
            f"corpus.val_share={val_share} and corpus.test_share={test_share} leave nothing to train on: lower one"
        )
    if limit is not None and limit < 1:
        raise UserError(f"corpus.limit={limit} keeps nothing: give at least 1, or null for all")
    if resolution < 1:
        raise UserError(f"corpus.resolution={resolution} is no image size: give the side in pixels")


def thinned(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of 0..count-1, evenly spread and ascending, int64."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).round().astype(int)
