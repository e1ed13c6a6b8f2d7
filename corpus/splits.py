"""Division of a corpus into splits: `train` to train on, `val` to tune on, `test` to publish results on.

A data set that names its splits keeps them. If it lacks a split, a hash of the id decides. The hash of an image does
not depend on which other images are added or removed. The rules are:

- no names: `test_fraction` of the images are test, `val_fraction` are val, the others train;
- only train (the name that a hub gives to a table without splits): the same;
- train and test: `val_fraction` of train is val;
- train and val: half of val becomes test, because images that were used for tuning must not be used for measuring;
- images with a name that is not in `NAMES` are held out as test.

If images have a location on Earth, the hash is of their ground cell instead of their id, so that overlapping images and
images of one location on different dates stay in one split.

The parts of a data set from a hub or from torchgeo define splits only if one of them is for training (`part_names`);
otherwise the hash decides for all images. In all other cases, an image that is named val or test is never trained on.

Images with identical bytes get the same split if the hash decides: the split of the first one by id, or the split that
the data set names for one of them. Copies that the data set itself puts into two splits are counted on stderr and
marked in the column `copy_in` of the manifest.
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

#: Smallest number of ground cells from which disjoint splits can be made.
FEWEST_CELLS = 5
SPLITS = ("all", "train", "val", "test")
#: Usual names of splits, without case, numbers, separators and the words of `_DECORATION`.
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

    The test ids do not depend on `val_fraction`. A larger fraction includes all ids of a smaller one.
    """
    number = _number(identifier)
    if number < test_fraction * 2**64:
        return "test"
    return "val" if number < (test_fraction + val_fraction) * 2**64 else "train"


def _number(identifier: str) -> int:
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big")


@cache
def split_of(name: str) -> str:
    """The split that a name refers to (`train2017`, `Testing`, `val_images`, `test-00000-of-00002`), "" for none.

    A name such as `trainA` is recognised as well.
    """
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
    """The split and the scene of an image by the names of its folders, "" for none.

    The split is the first folder that has the name of a split. The scene is the first folder that has neither the name
    of a split nor the name `images`.
    """
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
    """The split of every image by the rules of this module; one line on stderr reports deviations from named splits.

    If an image has a location, its ground cell is hashed instead of its id; an image across the border of two splits is
    in no split, "". If that leaves a split empty, the cells of the lowest hashes become test and the next ones val. If
    there are too few cells for that (`FEWEST_CELLS`), the ids are hashed.

    Args:
        corpus: its name, for the line.
        names: what the data set calls each image's split, "" where it says nothing.
        firsts: of each image the position of the first by id of those with the same bytes, int64 [N]; None: no two
            are the same.
        grounds: the cells of a common grid that each image touches, () for an image without a location; None: there
            are no locations.
    Returns:
        "train", "val" or "test" for every id, or "".
    """
    known = {name: split_of(name) or "test" for name in set(names) if name}
    unknown = sorted(name for name in known if not split_of(name))
    if unknown:
        notice(f"{corpus}: unknown split name {', '.join(unknown)}: its images are held out as test")
    nameless = sum(not name for name in names)
    if known and nameless:
        notice(f"{corpus}: {nameless} of {len(names)} images have no split name: a hash decides their split")
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
        notice(f"{corpus}: {border} images lie across the border of two splits and are in no split")
    counts = Counter(split for split, name in zip(splits, named, strict=True) if name == carved != "" and split)
    counts = {split: counts[split] for split in ("val", "test") if split != carved}
    taken = [f"{count} as {split}" for split, count in counts.items() if count]
    if taken:
        lacking = " and no ".join(split for split, count in counts.items() if count)
        notice(
            f"{corpus}: the data set has no {lacking} split: a hash of the id takes {' and '.join(taken)} from its "
            f"{carved} images"
        )
    return splits


def _by_ground(
    corpus: str,
    divide: Callable[..., list[str]],
    alone: Sequence[tuple[str, ...]],
    grounds: Sequence[tuple[str, ...]],
) -> list[str]:
    """Splits by the ground cells of images, or by their ids for images without a location or with too few cells.

    Args:
        divide: `_divided` without its arguments for the hashed keys and the hash function.
        alone: the id of every image, as a tuple of one.
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
        f"{corpus}: the georeferenced images lie in only {len(cells)} ground cells, too few for the splits: they are "
        "split by a hash of the id, so the splits may share ground"
    )
    return by_id


def _ranked(cells: Sequence[str]) -> Callable[[str, float, float], str]:
    """`hashed_split` for cells, sorted by hash: at least the first cell is test and at least the next one is val."""

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
    """The split of every image: the named one, or the one of its hashed keys; "" if the keys are in several splits.

    Args:
        hashed: keys of every image that are hashed: ground cells or the id.
        named: split that is named for every image; "" for none.
        firsts: position of the first image with the same bytes.
        carved: the named split that gives `fractions` of its images to val and test, by the hash.
        split_for: function (key, fraction of val, fraction of test) -> split of a key.
        all_fractions: fractions of val and test for images without a name.
        fractions: fractions of val and test for images of the split `carved`.
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
    """The named split that gives images to a missing split, "" for none, and the fractions for val and test."""
    if named == {"train"}:
        return "train", (val_fraction, test_fraction)
    if named == {"train", "test"}:
        return "train", (val_fraction, 0.0)
    if named == {"train", "val"}:
        return "val", (0.5, 0.5)
    return "", (0.0, 0.0)


def elsewhere(corpus: str, splits: Sequence[str], firsts: np.ndarray) -> list[str]:
    """For each image, the other splits with an image of the same bytes, "" for none; stderr gets one summary line."""
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
            f"{corpus}: {sum(shared.values())} images have exact copies in more than one split of the data set "
            f"({kinds}): measurements on them use images that were trained on"
        )
    return result


def copies_across_splits(manifest: pd.DataFrame) -> int:
    """Number of images of a split with identical bytes in another split."""
    return int((manifest["copy_in"] != "").sum()) if "copy_in" in manifest else 0


def part_names(parts: Iterable[str]) -> dict[str, str]:
    """The split that each part of a data set defines for its images; none if no part is for training."""
    parts = list(parts)
    trained = any(split_of(part) == "train" for part in parts)
    return {part: part if trained else "" for part in parts}


def check(split: str, val_fraction: float, test_fraction: float, limit: int | None, resolution: int) -> None:
    """Check the options that all sources share.

    Raises:
        UserError: the split is unknown, a fraction is below 0, the fractions leave no images for training, or the limit
            or the resolution is below 1.
    """
    if split not in SPLITS:
        raise UserError(f"corpus.split={split!r} is unknown: choose from {', '.join(SPLITS)}")
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
        raise UserError(f"corpus.resolution={resolution} is not an image size: give the side in pixels")


def thinned(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` evenly spread numbers of 0..count-1, int64, ascending."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).round().astype(int)
