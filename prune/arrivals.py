"""New images against a kept set: what each is beside it, and which of all that arrived are worth adding.

The answer is a function of the set of arrivals: what an image is beside the kept set does not depend on the other
arrivals, and among these a fixed priority decides. So it does not matter in how many parts and in which order they come
(docs/arrivals.md).
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

#: What an image is; the first four say why it is not to be added.
UNREADABLE, LOW_ENTROPY, COPY, REDUNDANT = "unreadable", "low_entropy", "copy", "redundant"
WORTH, NOT_NEEDED = "worth_adding", "not_needed"
VERDICTS = (UNREADABLE, LOW_ENTROPY, COPY, NEAR_DUPLICATE, REDUNDANT, WORTH, NOT_NEEDED)
#: Of an image that is none of these beside the kept set, until the others that arrived are looked at.
CANDIDATE = "candidate"
#: Images that are compared at a time, and pairs of images whose pixels are.
BLOCK, PAIRS = 512, 256
#: Steps of the gain by which arrivals are ordered: beyond these, it says more of the encoder's rounding than of images.
GAIN_STEP = 0.01


@dataclass(frozen=True)
class Gathered:
    """Arrays one after the other, of which only the rows requested are read."""

    parts: Sequence[np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(len(part) for part in self.parts), *self.parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """[K, ...] of rows int64 [K] or a slice."""
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else rows
        result = np.empty((len(rows), *self.shape[1:]), self.parts[0].dtype)
        start = 0
        for part in self.parts:
            inside = np.flatnonzero((rows >= start) & (rows < start + len(part)))
            result[inside] = part[rows[inside] - start]
            start += len(part)
        return result


@dataclass(frozen=True)
class Looks:
    """Images as they are compared.

    Attributes:
        points: unit embeddings [N, D].
        images: uint8 [N, R, R, 3].
        locations: N of them.
    """

    points: Points
    images: np.ndarray | Gathered
    locations: Locations


@dataclass(frozen=True)
class Likeness:
    """When an arrival repeats another image.

    Attributes:
        similarity: float32 [S], by scene, the cosine from which on it is redundant.
        near: cosine from which on pixels are compared.
        neighbours: images that each is compared with.
        rule: of other dates and locations.
    """

    similarity: np.ndarray
    near: float
    neighbours: int
    rule: PairRule


@dataclass(frozen=True)
class Repeats:
    """What images repeat.

    Attributes:
        verdict: object [n]: `COPY`, `NEAR_DUPLICATE`, `REDUNDANT`, or "" for none.
        match: int64 [n], the row of the other image, -1 for none.
        cosine: float32 [n] to it; correlation: float32 [n] of the brightness, NaN where it was not looked at.
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
        """Take those of some rows from another."""
        for name in ("verdict", "match", "cosine", "correlation"):
            getattr(self, name)[rows] = getattr(others, name)


def repeats(
    mine: Looks, rows: np.ndarray, theirs: Looks, candidates: np.ndarray, cosines: np.ndarray, need: np.ndarray,
    likeness: Likeness,
) -> Repeats:  # fmt: skip
    """Which of its candidates each image repeats.

    An image is a copy of one that is equal in every pixel; a near-duplicate of one at a cosine of at least `near` whose
    brightness correlates at `CORRELATION`, unless their locations are known to differ; redundant beside one at a cosine
    of at least `need`. The same place on another date is none of the last two, unless `likeness.rule` says otherwise.
    The first of these counts, and of several images the nearest.

    Args:
        rows: int64 [n] of `mine`.
        candidates: int64 [n, k] rows of `theirs`, -1: none.
        cosines: float32 [n, k].
        need: float32 [n].
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


def beside_kept(
    arrived: Looks, rows: np.ndarray, scene: np.ndarray, kept: Looks, index: faiss.Index, kept_rows: np.ndarray,
    likeness: Likeness,
) -> tuple[np.ndarray, np.ndarray, Repeats]:  # fmt: skip
    """What each of some arrivals is beside the kept images alone.

    Args:
        rows: int64 [n] of `arrived`; scene: int64 [n].
        index: of the kept images; kept_rows: int64 [K], their rows in `kept`.
    Returns:
        the nearest kept image, int64 [n] row of `kept`, the cosine to it, float32 [n], and what the arrivals repeat.
    """
    closest, cosine, result = np.full(len(rows), -1), np.full(len(rows), np.nan, np.float32), Repeats.none(len(rows))
    for start in progress(range(0, len(rows), BLOCK), "compare with what is kept", unit="block"):
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
    """The order in which arrivals are taken, int64 [n]: what lies farthest from the kept images first, in steps of
    `GAIN_STEP`, then by a digest of the pixels, then by id. It depends on each image alone."""
    return np.lexsort((identifier, digest, -np.round(gain / GAIN_STEP)))


def among_arrivals(arrived: Looks, rows: np.ndarray, scene: np.ndarray, likeness: Likeness) -> Repeats:
    """Which arrivals repeat one of higher priority that repeats none itself.

    Args:
        rows: int64 [n] of `arrived` in the order of their priority; scene: int64 [n].
    """
    result = Repeats.none(len(rows))
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(int)] if len(rows) else rows
    index = new_index(arrived.points[sample], len(rows))
    leaders = np.empty(0, dtype=np.int64)
    for start in progress(range(0, len(rows), BLOCK), "compare what arrived", unit="block"):
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
    arrived: Looks, rows: np.ndarray, vectors: np.ndarray, need: np.ndarray, free: np.ndarray, likeness: Likeness,
    result: Repeats, start: int,
) -> np.ndarray:  # fmt: skip
    """Of images of a block that repeat none before it those that repeat none in it, int64; `result` gets the rest."""
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
    """How many of each scene's arrivals to add so that the kept set becomes as even as it can: water-filling on top.

    What does not divide goes to the first scenes.

    Args:
        kept, available: int [S]; budget: at least 0.
    Returns:
        int64 [S], at most `available`, of sum min(budget, sum of `available`).
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
    """Whether each of some images, in order, is among the first `counts` [S] of its scene, bool [n]."""
    order = np.argsort(scene, kind="stable")
    starts = np.searchsorted(scene[order], np.arange(len(counts)))
    chosen = np.empty(len(scene), dtype=bool)
    chosen[order] = np.arange(len(scene)) - starts[scene[order]] < counts[scene[order]]
    return chosen


def swaps(gain: np.ndarray, similarity: np.ndarray, neighbour: np.ndarray, order: np.ndarray) -> list[tuple[int, int]]:
    """Which arrival could take which kept image's place, the most redundant first, while the subset gains by it.

    An arrival must lie farther from what is kept than the image whose place it takes lies from its nearest other. Of
    two kept images that are redundant beside one another only one goes.

    Args:
        gain: float [n] of the arrivals, the best first.
        similarity: float [K], cosine of each kept image to its nearest other; neighbour: int64 [K], that one or -1.
        order: int64 [K], the kept images by their redundancy.
    Returns:
        pairs of the position of an arrival and that of a kept image.
    """
    result: list[tuple[int, int]] = []
    gone: set[int] = set()
    for kept in order.tolist():
        if len(result) == len(gain) or gain[len(result)] <= 1 - similarity[kept]:
            break
        if neighbour[kept] in gone:  # it is alone now
            continue
        gone.add(kept)
        result.append((len(result), kept))
    return result


def digests(images: np.ndarray, rows: Iterable[int]) -> np.ndarray:
    """16 hex digits of the pixels of some images, object [n]."""
    return np.array(
        [hashlib.blake2b(np.ascontiguousarray(images[row]), digest_size=8).hexdigest() for row in rows], object
    )


def counts_of(values: Any, names: Sequence[str]) -> dict[str, int]:
    """How many of each name, in their order."""
    values = np.asarray(values, dtype=object)
    return {name: int((values == name).sum()) for name in names}
