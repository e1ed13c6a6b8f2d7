"""Compare new images ("arrivals") with a kept set and decide which of them are worth adding.

The answer depends on the set of arrivals only. The comparison of an image with the kept set does not depend on the
other arrivals, and among the arrivals a fixed priority decides. So the answer is the same for any number of parts and
any order in which the images arrive (docs/arrivals.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from corpus.locations import Locations
from prune.clusters import Points
from prune.likeness import CORRELATION, NEAR_DUPLICATE, OTHER_DATE, PairRule, correlations, kinds, same_pixels
from prune.neighbour_index import SAMPLE, nearest, new_index, paired_cosines
from runtime.progress import progress

#: Verdicts on an image; the first four are reasons not to add it.
UNREADABLE, LOW_ENTROPY, COPY, REDUNDANT = "unreadable", "low_entropy", "copy", "redundant"
WORTH, NOT_NEEDED = "worth_adding", "not_needed"
VERDICTS = (UNREADABLE, LOW_ENTROPY, COPY, NEAR_DUPLICATE, REDUNDANT, WORTH, NOT_NEEDED)
#: Preliminary verdict: none of the reasons applies beside the kept set; the other arrivals are not yet considered.
CANDIDATE = "candidate"
#: Images compared at a time, and pairs of images whose pixels are compared at a time.
BLOCK, PAIRS = 512, 256
#: Step to which the gain is rounded when arrivals are ordered: smaller differences reflect the encoder's rounding.
GAIN_STEP = 0.01


@dataclass(frozen=True)
class Gathered:
    """Several arrays as one concatenated array; only the requested rows are read."""

    parts: Sequence[np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(len(part) for part in self.parts), *self.parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """The values [K, ...] at some rows, given as int64 [K] or a slice."""
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else rows
        result = np.empty((len(rows), *self.shape[1:]), self.parts[0].dtype)
        start = 0
        for part in self.parts:
            inside = np.flatnonzero((rows >= start) & (rows < start + len(part)))
            result[inside] = part[rows[inside] - start]
            start += len(part)
        return result


@dataclass(frozen=True)
class ImageData:
    """The data of N images that a comparison needs.

    Attributes:
        points: unit embeddings [N, D].
        images: uint8 [N, R, R, 3].
        locations: the N locations.
    """

    points: Points
    images: np.ndarray | Gathered
    locations: Locations


@dataclass(frozen=True)
class Likeness:
    """The rule by which an arrival repeats another image.

    Attributes:
        similarity: float32 [S], for each scene the cosine from which an image is redundant.
        near: cosine from which pixels are compared.
        neighbours: number of nearest images that each arrival is compared with.
        rule: which images of other dates and locations count as duplicates.
    """

    similarity: np.ndarray
    near: float
    neighbours: int
    rule: PairRule


@dataclass(frozen=True)
class Repeats:
    """For each of n images, the image that it repeats.

    Attributes:
        verdict: object [n]: `COPY`, `NEAR_DUPLICATE`, `REDUNDANT`, or "" for none.
        match: int64 [n], row of the repeated image; -1: none.
        cosine: float32 [n], cosine to the repeated image.
        correlation: float32 [n], correlation of the brightness; NaN where it was not computed.
    """

    verdict: np.ndarray
    match: np.ndarray
    cosine: np.ndarray
    correlation: np.ndarray

    @classmethod
    def none(cls, count: int) -> Repeats:
        gaps = (np.full(count, np.nan, np.float32) for _ in range(2))
        return cls(np.full(count, "", object), np.full(count, -1), *gaps)

    def put(self, rows: np.ndarray, others: Repeats) -> None:
        """Overwrite some rows with the values of `others`."""
        for name in ("verdict", "match", "cosine", "correlation"):
            getattr(self, name)[rows] = getattr(others, name)


def repeats(
    mine: ImageData, rows: np.ndarray, theirs: ImageData, candidates: np.ndarray, cosines: np.ndarray, need: np.ndarray,
    likeness: Likeness,
) -> Repeats:  # fmt: skip
    """Find which of its candidates each image repeats.

    An image is a copy of a candidate if all pixels are equal. It is a near-duplicate if the cosine is at least
    `likeness.near` and the brightness correlates at `CORRELATION` or more, unless the locations are known to differ. It
    is redundant if the cosine is at least `need`. An image of the same location on another date is neither a
    near-duplicate nor redundant, unless `likeness.rule` says otherwise. The first verdict in this order counts, and
    among several candidates the nearest one.

    Args:
        mine: the images to judge.
        rows: int64 [n], rows of `mine`.
        theirs: the images to compare with.
        candidates: int64 [n, k], rows of `theirs`; -1: none.
        cosines: float32 [n, k], cosines to the candidates.
        need: float32 [n], cosine from which the image is redundant.
        likeness: the remaining thresholds.
    """
    count = len(candidates)
    order = np.argsort(-np.where(candidates < 0, -np.inf, cosines), axis=1, kind="stable")
    candidates, cosines = (np.take_along_axis(values, order, axis=1) for values in (candidates, cosines))
    there = candidates >= 0
    at, place = np.nonzero(there & (cosines >= np.minimum(need, likeness.near)[:, None]))
    other = candidates[at, place]
    equal, correlation = _compared(mine.images, rows[at], theirs.images, other)
    kind = kinds(mine.locations[rows[at]], theirs.locations[other], equal, one_grid=False)
    counted = np.isin(kind, likeness.rule.counted)
    another_date = (kind == OTHER_DATE) & ~counted
    close = cosines[at, place]
    rank = np.full(len(at), 3)
    rank[(close >= need[at]) & ~another_date] = 2
    rank[(correlation >= CORRELATION) & (close >= likeness.near) & counted] = 1
    rank[equal] = 0
    result = Repeats.none(count)
    best = np.lexsort((place, rank, at))
    best = best[np.concatenate([[True], np.diff(at[best]) > 0])] if len(best) else best
    best = best[rank[best] < 3]
    names = np.array([COPY, NEAR_DUPLICATE, REDUNDANT], dtype=object)
    own = Repeats(names[rank[best]], other[best], close[best], correlation[best].astype(np.float32))
    result.put(at[best], own)
    return result


def _compared(
    mine: np.ndarray | Gathered, rows: np.ndarray, theirs: np.ndarray | Gathered, others: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the images of each pair are equal, bool [m], and the correlation of their brightness, float64 [m]."""
    equal, correlation = np.zeros(len(rows), bool), np.zeros(len(rows))
    for start in range(0, len(rows), PAIRS):
        part = slice(start, start + PAIRS)
        first, second = mine[rows[part]], theirs[others[part]]
        equal[part], correlation[part] = same_pixels(first, second), correlations(first, second)
    return equal, correlation


def nearest_and_repeated_kept(
    arrived: ImageData, rows: np.ndarray, scene: np.ndarray, kept: ImageData, index: faiss.Index, kept_rows: np.ndarray,
    likeness: Likeness,
) -> tuple[np.ndarray, np.ndarray, Repeats]:  # fmt: skip
    """Compare some arrivals with the kept images alone.

    Args:
        rows: int64 [n], rows of `arrived`.
        scene: int64 [n], scene of each arrival.
        index: faiss index of the kept images.
        kept_rows: int64 [K], row in `kept` of each image of the index.
    Returns:
        the row in `kept` of the nearest kept image, int64 [n]; the cosine to it, float32 [n]; and the kept images that
        the arrivals repeat.
    """
    closest, cosine, result = np.full(len(rows), -1), np.full(len(rows), np.nan, np.float32), Repeats.none(len(rows))
    for start in progress(range(0, len(rows), BLOCK), "compare with kept images", unit="block"):
        part = np.arange(start, min(start + BLOCK, len(rows)))
        vectors = arrived.points[rows[part]]
        positions = nearest(index, vectors, likeness.neighbours)
        candidates = np.where(positions < 0, -1, kept_rows[positions])
        cosines = _cosines(vectors, kept.points, candidates)
        best = np.argmax(np.where(candidates < 0, -np.inf, cosines), axis=1)
        closest[part], cosine[part] = (values[np.arange(len(part)), best] for values in (candidates, cosines))
        need = likeness.similarity[scene[part]]
        result.put(part, repeats(arrived, rows[part], kept, candidates, cosines, need, likeness))
    return closest, cosine, result


def _cosines(vectors: np.ndarray, points: Points, candidates: np.ndarray) -> np.ndarray:
    others = points[candidates.ravel().clip(0)].reshape(*candidates.shape, -1)
    return paired_cosines(vectors, others)


def priority(gain: np.ndarray, digest: np.ndarray, identifier: np.ndarray) -> np.ndarray:
    """The order in which arrivals are taken, int64 [n].

    The images farthest from the kept images come first, in steps of `GAIN_STEP`; ties are ordered by a digest of the
    pixels and then by id. The sort keys of an image do not depend on the other arrivals.
    """
    return np.lexsort((identifier, digest, -np.round(gain / GAIN_STEP)))


def among_arrivals(arrived: ImageData, rows: np.ndarray, scene: np.ndarray, likeness: Likeness) -> Repeats:
    """Find the arrivals that repeat an arrival of higher priority; an image that is itself a repetition does not count.

    Args:
        rows: int64 [n], rows of `arrived` in the order of their priority.
        scene: int64 [n], scene of each arrival.
    """
    result = Repeats.none(len(rows))
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(int)] if len(rows) else rows
    index = new_index(arrived.points[sample], len(rows))
    leaders = np.empty(0, dtype=np.int64)
    for start in progress(range(0, len(rows), BLOCK), "compare new images with each other", unit="block"):
        part = np.arange(start, min(start + BLOCK, len(rows)))
        vectors, need = arrived.points[rows[part]], likeness.similarity[scene[part]]
        positions = nearest(index, vectors, likeness.neighbours)
        candidates = np.where(positions < 0, -1, leaders[positions] if len(leaders) else -1)
        cosines = _cosines(vectors, arrived.points, candidates)
        result.put(part, repeats(arrived, rows[part], arrived, candidates, cosines, need, likeness))
        free = np.flatnonzero(result.verdict[part] == "")
        new = _first_of_block(arrived, rows[part], vectors, need, free, likeness, result, start)
        index.add(np.ascontiguousarray(vectors[new]))
        leaders = np.concatenate([leaders, rows[part][new]])
    return result


def _first_of_block(
    arrived: ImageData, rows: np.ndarray, vectors: np.ndarray, need: np.ndarray, free: np.ndarray, likeness: Likeness,
    result: Repeats, start: int,
) -> np.ndarray:  # fmt: skip
    """Find the distinct images of a block, int64, and record the repetitions in `result`.

    `free` holds the positions of the images that repeat no image of an earlier block. A distinct image repeats no other
    image of its own block either.
    """
    products = vectors[free] @ vectors[free].T
    leads = np.zeros(len(free), dtype=bool)
    least = np.minimum(need, likeness.near)
    for number, at in enumerate(free):
        before = np.flatnonzero(leads[:number] & (products[number, :number] >= least[at] - 1e-3))
        before = before[np.argsort(-products[number, before], kind="stable")][: likeness.neighbours]
        leads[number] = True
        if len(before):
            candidates = rows[free[before]][None]
            cosines = _cosines(vectors[at : at + 1], arrived.points, candidates)
            own = repeats(arrived, rows[at : at + 1], arrived, candidates, cosines, need[at : at + 1], likeness)
            leads[number] = own.verdict[0] == ""
            result.put(np.array([start + at]), own)
    return free[leads]


def fill(kept: np.ndarray, available: np.ndarray, budget: int) -> np.ndarray:
    """How many arrivals of each scene to add so that the kept set becomes as even as possible over the scenes.

    This is water-filling on top of the images that are kept already. A remainder that cannot be divided evenly goes to
    the first scenes.

    Args:
        kept: int [S], kept images of each scene.
        available: int [S], arrivals of each scene that can be added.
        budget: number of images to add, at least 0.
    Returns:
        int64 [S], at most `available`, with the sum min(budget, sum of `available`).
    """
    kept, available = np.asarray(kept, np.int64), np.asarray(available, np.int64)
    budget = min(int(budget), int(available.sum()))
    low, high = 0, int((kept + available).max(initial=0))
    while low < high:  # the highest level that the budget can pay for
        middle = (low + high + 1) // 2
        if np.clip(middle - kept, 0, available).sum() <= budget:
            low = middle
        else:
            high = middle - 1
    added = np.clip(low - kept, 0, available)
    open_scenes = np.flatnonzero((kept + added <= low) & (added < available))
    added[open_scenes[: budget - added.sum()]] += 1
    return added


def first_of_scenes(scene: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mark the images that are among the first `counts[s]` images of their scene s, bool [n]; `counts` is int [S]."""
    order = np.argsort(scene, kind="stable")
    starts = np.searchsorted(scene[order], np.arange(len(counts)))
    chosen = np.empty(len(scene), dtype=bool)
    chosen[order] = np.arange(len(scene)) - starts[scene[order]] < counts[scene[order]]
    return chosen


def swaps(gain: np.ndarray, similarity: np.ndarray, neighbour: np.ndarray, order: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of an arrival and a kept image that it could replace, as long as the replacement improves the subset.

    The most redundant kept images are replaced first. The distance of the arrival to the kept set must exceed the
    distance of the replaced image to its nearest other kept image. A kept image is not replaced if its nearest kept
    image was replaced before.

    Args:
        gain: float [n], gain of each arrival, the best first.
        similarity: float [K], cosine of each kept image to its nearest other kept image.
        neighbour: int64 [K], position of that nearest image; -1: none.
        order: int64 [K], positions of the kept images, the most redundant first.
    Returns:
        pairs (position of an arrival, position of a kept image).
    """
    result: list[tuple[int, int]] = []
    gone: set[int] = set()
    for kept in order.tolist():
        if len(result) == len(gain) or gain[len(result)] <= 1 - similarity[kept]:
            break
        if neighbour[kept] in gone:  # its nearest image was replaced already
            continue
        gone.add(kept)
        result.append((len(result), kept))
    return result


def digests(images: np.ndarray, rows: Iterable[int]) -> np.ndarray:
    """Digest of the pixels of some images as 16 hex digits each, object [n]."""
    return np.array(
        [hashlib.blake2b(np.ascontiguousarray(images[row]), digest_size=8).hexdigest() for row in rows], object
    )


def counts_of(values: Any, names: Sequence[str]) -> dict[str, int]:
    """How often each of `names` occurs among the values, in the order of `names`."""
    values = np.asarray(values, dtype=object)
    return {name: int((values == name).sum()) for name in names}
