"""Which images are trained on and which are held out: `train`, `val` to tune on, `test` to publish.

A data set that names its splits keeps them. Where it leaves one out, a hash of the id decides, which is always the same
whatever images come or go:

- no names: `test_fraction` of the images are test, `val_fraction` are val, the others train;
- train alone: the same, which is what a hub calls a table without splits;
- train and test: `val_fraction` of train is val;
- train and val: half of val is test, for who tunes on held-out images has none left to measure on;
- a name that `NAMES` does not have is held out as test.

Where images have a place on Earth, the hash is of their cell of the ground instead, so that overlapping images and
other dates of one place are not split apart.

The parts of a data set of a hub or of torchgeo name splits only where one of them is to train on (`part_names`): else
the hash decides about all images. Otherwise no image that is named val or test is ever trained on.

Images of equal bytes are of one split wherever the hash decides: that of the first of them by id, or the one that the
data set names for one of them. Copies that the data set itself puts into two splits are counted, on stderr and in the
manifest's column `copy_in`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import numpy as np
import pandas as pd

from runtime.errors import UserError
from runtime.notices import notice

#: Cells of ground from which splits that share none can be made.
FEWEST_CELLS = 5
SPLITS = ("all", "train", "val", "test")
#: What people call their splits, without case, numbers, separators and the words of `_DECORATION`.
NAMES = {
    **dict.fromkeys(("train", "training", "trainset", "trainval", "trainvalid", "restval", "trn"), "train"),
    **dict.fromkeys(
        ("val", "valid", "validation", "validate", "valset", "minival", "dev", "devel", "development"), "val"
    ),
    **dict.fromkeys(("test", "testing", "testset", "testdev", "teststd", "tst", "eval", "evaluation"), "test"),
    **dict.fromkeys(("holdout", "heldout", "hold"), "test"),
}
_DECORATION = {
    "set", "split", "data", "image", "images", "img", "imgs", "photos", "pics", "rgb", "public", "private", "seen",
    "unseen", "challenge", "gt", "of", "a", "b", "c", "d",
}  # fmt: skip


def hashed_split(identifier: str, val_fraction: float, test_fraction: float) -> str:
    """ "test" for about `test_fraction` of all ids, "val" for about `val_fraction`, "train" for the others.

    The test ids do not depend on `val_fraction`, and a larger fraction holds out the ids of a smaller one too.
    """
    number = _number(identifier)
    if number < test_fraction * 2**64:
        return "test"
    return "val" if number < (test_fraction + val_fraction) * 2**64 else "train"


def _number(identifier: str) -> int:
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big")


@cache
def split_of(name: str) -> str:
    """The split that is called so (`train2017`, `Testing`, `val_images`, `trainA`, `test-00000-of-00002`), else ""."""
    if name.strip().lower() in NAMES:
        return NAMES[name.strip().lower()]
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_]+", name)
    if "".join(words) != re.sub(r"[\W\d_]+", "", name) or not words:
        return ""
    lower = [word.lower() for word in words]
    kept = [word for word in lower if word not in _DECORATION]
    return NAMES.get("".join(kept), "")


@cache
def folder_split(folders: tuple[str, ...]) -> tuple[str, str]:
    """The first of the folders an image lies in that is called as a split, "" for none, and its scene: the first that
    is called neither so nor `images`, "" for none."""
    named = next((folder for folder in folders if split_of(folder)), "")
    scene = next((folder for folder in folders if not split_of(folder) and folder != "images"), "")
    return named, scene


def assigned(
    corpus: str,
    ids: Sequence[str],
    names: Sequence[str],
    val_fraction: float,
    test_fraction: float,
    firsts: np.ndarray | None = None,
    grounds: Sequence[tuple[str, ...]] | None = None,
) -> list[str]:
    """The split of every image, by the rules above; what is not as named is reported on stderr, in one line.

    Where an image has a place, its cell of the ground is hashed instead of its id, and an image across the border of
    two splits is in none, "". Where that leaves a split empty, the cells of the lowest hashes are test, the next ones
    val; where there are too few cells for that (`FEWEST_CELLS`), the ids are hashed.

    Args:
        corpus: its name, for the line.
        names: what the data set calls each image's split, "" where it says nothing.
        firsts: of each image the position of the first by id of those with the same bytes, int64 [N]; None: no two
            are the same.
        grounds: the cells of a common grid that each image touches, () for one without a place; None: there are none.
    Returns:
        "train", "val" or "test" for every id, or "".
    """
    known = {name: split_of(name) or "test" for name in set(names) if name}
    unknown = sorted(name for name in known if not split_of(name))
    if unknown:
        notice(f"{corpus}: no known split is called {', '.join(unknown)}: its images are held out as test")
    nameless = sum(not name for name in names)
    if known and nameless:
        notice(f"{corpus}: {nameless} of {len(names)} images are named no split, others are: a hash decides about them")
    carved, fractions = _missing(set(known.values()), val_fraction, test_fraction)
    firsts = np.arange(len(ids)) if firsts is None else firsts
    named = [known[name] if name else "" for name in names]
    divide = partial(
        _divided,
        named=named,
        firsts=firsts,
        carved=carved,
        all_fractions=(val_fraction, test_fraction),
        fractions=fractions,
    )
    alone = [(identifier,) for identifier in ids]
    placed = grounds is not None and any(grounds)
    splits = _by_ground(corpus, divide, alone, grounds) if placed else divide(alone, split_for=hashed_split)
    if border := splits.count(""):
        notice(f"{corpus}: {border} images lie across the border of two splits' ground and are in none")
    counts = Counter(split for split, name in zip(splits, named, strict=True) if name == carved != "" and split)
    counts = {split: counts[split] for split in ("val", "test") if split != carved}
    taken = [f"{count} as {split}" for split, count in counts.items() if count]
    if taken:
        lacking = " and no ".join(split for split, count in counts.items() if count)
        notice(
            f"{corpus}: the data set names no {lacking}: of its {carved} images a hash of the id takes "
            f"{' and '.join(taken)}"
        )
    return splits


def _by_ground(
    corpus: str,
    divide: Callable[..., list[str]],
    alone: Sequence[tuple[str, ...]],
    grounds: Sequence[tuple[str, ...]],
) -> list[str]:
    """Splits by the cells that images touch, by their ids where an image has no place or there are too few cells.

    Args:
        divide: `_divided`, but for what is hashed and how.
        alone: of every image its id.
    """
    hashed = [cells or own for cells, own in zip(grounds, alone, strict=True)]
    splits, by_id = divide(hashed, split_for=hashed_split), divide(alone, split_for=hashed_split)
    cells = sorted({cell for touched in grounds for cell in touched}, key=_number)
    enough = len(cells) >= FEWEST_CELLS
    if enough and set(by_id) - set(splits):
        splits = divide(hashed, split_for=_ranked(cells))
    if enough and not set(by_id) - set(splits):
        return splits
    notice(
        f"{corpus}: the images with a place lie in {len(cells)} cells of ground, too few for the splits: a hash of the "
        "id splits them, and the splits may share ground"
    )
    return by_id


def _ranked(cells: Sequence[str]) -> Callable[[str, float, float], str]:
    """`hashed_split`, but of the cells, sorted by their number, at least the first is test and the next one val."""

    @cache
    def table(val_fraction: float, test_fraction: float) -> dict[str, str]:
        splits = [hashed_split(cell, val_fraction, test_fraction) for cell in cells]
        tests = max(splits.count("test"), int(test_fraction > 0))
        held_out = tests + max(splits.count("val"), int(val_fraction > 0))
        return {
            cell: "test" if position < tests else "val" if position < held_out else "train"
            for position, cell in enumerate(cells)
        }

    def split_for(key: str, val_fraction: float, test_fraction: float) -> str:
        return table(val_fraction, test_fraction).get(key) or hashed_split(key, val_fraction, test_fraction)

    return split_for


def _divided(
    hashed: Sequence[tuple[str, ...]],
    *,
    named: Sequence[str],
    firsts: np.ndarray,
    carved: str,
    split_for: Callable[[str, float, float], str],
    all_fractions: tuple[float, float],
    fractions: tuple[float, float],
) -> list[str]:
    """The split of every image: as named, or by what is hashed, "" where that falls into several splits.

    Args:
        named: "" where nothing is.
        carved: the named split of which the hash gives `fractions` to val and test; `all_fractions` is for what
            has no name.
        split_for: (key, fraction of val, fraction of test) -> the split of what is hashed.
    """
    of_copies: dict[int, set[str]] = {}
    for first, name in zip(firsts.tolist(), named, strict=True):
        of_copies.setdefault(first, set()).update([name] if name else [])
    splits = []
    for first, name in zip(firsts.tolist(), named, strict=True):
        of_them = of_copies[first]
        if not name and of_them - {carved}:
            splits.append(next(split for split in ("test", "val", "train") if split in of_them))
        elif name and name != carved:
            splits.append(name)
        else:
            by_hash = {split_for(key, *(fractions if of_them else all_fractions)) for key in hashed[first]}
            splits.append(by_hash.pop() if len(by_hash) == 1 else "")
    return splits


def _missing(named: set[str], val_fraction: float, test_fraction: float) -> tuple[str, tuple[float, float]]:
    """The named split that gives images to one that is missing, "" for none, and the fractions of val and test."""
    if named == {"train"}:
        return "train", (val_fraction, test_fraction)
    if named == {"train", "test"}:
        return "train", (val_fraction, 0.0)
    if named == {"train", "val"}:
        return "val", (0.5, 0.5)
    return "", (0.0, 0.0)


def elsewhere(corpus: str, splits: Sequence[str], firsts: np.ndarray) -> list[str]:
    """The other splits that hold an image of the same bytes, "" for none; their number is reported in one line."""
    held: dict[int, set[str]] = {}
    for first, split in zip(firsts.tolist(), splits, strict=True):
        held.setdefault(first, set()).add(split)
    order = {split: position for position, split in enumerate(SPLITS)}
    for group in held.values():
        group.discard("")
    result = [
        ", ".join(sorted(held[first] - {split}, key=order.get))
        for first, split in zip(firsts.tolist(), splits, strict=True)
    ]
    shared = Counter(" and ".join(sorted(group, key=order.get)) for group in held.values() if len(group) > 1)
    if shared:
        kinds = ", ".join(f"{names} {count}" for names, count in sorted(shared.items()))
        notice(
            f"{corpus}: {sum(shared.values())} images have exact copies in more than one split ({kinds}), as the data "
            "set names its splits: what is measured on them was trained on"
        )
    return result


def copies_across_splits(manifest: pd.DataFrame) -> int:
    """Images of a split whose bytes lie in another split, too."""
    return int((manifest["copy_in"] != "").sum()) if "copy_in" in manifest else 0


def part_names(parts: Iterable[str]) -> dict[str, str]:
    """What the parts of a data set name their images' split: nothing where none of them is to be trained on."""
    parts = list(parts)
    trained = any(split_of(part) == "train" for part in parts)
    return {part: part if trained else "" for part in parts}


def check(split: str, val_fraction: float, test_fraction: float, limit: int | None, resolution: int) -> None:
    """Refuse what no source can do.

    Raises:
        UserError: an unknown split, fractions below 0 or that leave nothing, a limit or a resolution below 1.
    """
    if split not in SPLITS:
        raise UserError(f"corpus.split={split!r} is unknown: there are the splits {', '.join(SPLITS)}")
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise UserError(f"corpus.{name}={fraction} is outside [0, 1): give the fraction to hold out")
    if val_fraction + test_fraction >= 1:
        raise UserError(
            f"corpus.val_fraction={val_fraction} and corpus.test_fraction={test_fraction} leave nothing to train "
            "on: lower one"
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
