"""Leaks between the splits of a corpus: copied files, and images that look alike pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from corpus.index import Corpus, Sample, Source
from corpus.locations import Locations
from corpus.splits import copies_across_splits, thinned
from eval.waste import BLOCK, NEAR_DUPLICATE_BITS, perceptual_hashes
from prune.likeness import (
    CORRELATION,
    LOOK_ALIKE,
    OTHER_DATE,
    PairRule,
    correlations,
    kinds,
    names_in,
    same_pixels,
)
from report.page import SampleGrid
from runtime.artefacts import read_json, stage, write_json
from runtime.notices import notice
from runtime.progress import progress

#: The table of pairs in a stage's directory, worst first, its counts, and the images of the worst pairs.
PAIRS, COUNTS, WORST = "pairs.parquet", "leaks.json", "worst.npy"
#: Number of pairs whose images are stored for the report.
SHOWN = 12
#: Number of nearest images by hash whose pixels are compared: plain images of any location have similar hashes.
CANDIDATES = 8
#: Largest number of images of the corpus that are compared, evenly spread: hashing millions would take hours.
MOST_OF_CORPUS = 50_000
_last_hashes: dict[tuple[str, int], np.ndarray] = {}


@dataclass(frozen=True)
class Looked:
    """The N images of a split that are compared.

    Attributes:
        ids: object [N], image ids.
        images: uint8 [M, R, R, 3], possibly a memory map.
        rows: int64 [N], row in `images` of each of the N images.
        hashes: uint64 [N], perceptual hashes.
        locations: the N locations.
    """

    ids: np.ndarray
    images: np.ndarray
    rows: np.ndarray
    hashes: np.ndarray
    locations: Locations

    def __len__(self) -> int:
        return len(self.ids)


def leaks(
    corpus: Corpus, held_out: Mapping[str, Source], most: int, runs: Path | str, rule: PairRule | None = None
) -> dict[str, Any]:
    """Count the held-out images that also occur in the pruned split, and the images that val and test share.

    Args:
        corpus: the split to prune.
        held_out: val and test, by name.
        most: largest number of images of each held-out split that are compared, evenly spread; for the corpus the
            limit is `MOST_OF_CORPUS`.
        runs: directory of the stages.
        rule: which images of other dates and locations count as duplicates; None: none of them.
    Returns:
        A dictionary. `exact_copies` is the number of images of the pruned split with identical bytes in another split.
        `held_out` has the counts of each held-out split against the pruned split, by name. `val_test` has the counts
        of val against test, if both exist. The counts of a pair of splits are: `looked_at`, held-out images that were
        compared; `exact_copies`, how many of all held-out images have identical bytes in the other split;
        `near_duplicates`, `same_location_other_date` and `look_alike_elsewhere`, how many of the compared images look
        like an image of the other split, by kind; and `pairs`, path of the table of these pairs, relative to `runs`.
    """
    rule = PairRule() if rule is None else rule
    read = cache(lambda name: _held_out(held_out[name], most))  # read only if a stage must be built
    result: dict[str, Any] = {"exact_copies": copies_across_splits(corpus.manifest), "held_out": {}}
    for name, source in held_out.items():
        inputs = {"corpus": corpus.fingerprint, "held_out": source, "version": source.version, "most": most}

        def against_corpus(name: str = name) -> tuple[pd.DataFrame, np.ndarray, int]:
            return *_alike(read(name), _of_corpus(corpus), rule), len(read(name))

        result["held_out"][name] = _counted(runs, {**inputs, "rule": rule}, against_corpus)
        result["held_out"][name]["exact_copies"] = _copies_in(source, "train")
    if {"val", "test"} <= set(held_out):
        val, test = held_out["val"], held_out["test"]
        inputs = {"val": val, "test": test, "versions": [val.version, test.version], "most": most, "rule": rule}

        def against_test() -> tuple[pd.DataFrame, np.ndarray, int]:
            return *_alike(read("val"), read("test"), rule), len(read("val"))

        result["val_test"] = {**_counted(runs, inputs, against_test), "exact_copies": _copies_in(val, "test")}
    return result


def _counted(
    runs: Path | str, inputs: Mapping[str, Any], compare: Callable[[], tuple[pd.DataFrame, np.ndarray, int]]
) -> dict[str, Any]:
    """Counts of one pair of splits, from a separate stage."""

    def build(directory: Path) -> None:
        pairs, worst, looked = compare()
        pairs.to_parquet(directory / PAIRS, index=False)
        np.save(directory / WORST, worst)
        apart = {kind: int((pairs["kind"] == kind).sum()) for kind in (OTHER_DATE, LOOK_ALIKE)}
        write_json(directory / COUNTS, {"looked_at": looked, "near_duplicates": int(pairs["counts"].sum()), **apart})

    directory = stage(runs, "leaks", inputs, build)
    return {**read_json(directory / COUNTS), "pairs": f"leaks/{directory.name}/{PAIRS}"}


def near_duplicates(
    corpus: Corpus, source: Source, most: int, rule: PairRule | None = None
) -> tuple[pd.DataFrame, int]:
    """Find pairs of a held-out image and an image of the corpus that look alike.

    Returns:
        a table with the columns `held_out` and `image` (ids), `correlation`, `kind` and `counts` (whether the pair
        counts as a duplicate), in which duplicates and high correlations come first; and the number of held-out images
        that were compared.
    """
    held = _held_out(source, most)
    return _alike(held, _of_corpus(corpus), PairRule() if rule is None else rule)[0], len(held)


def _alike(held: Looked, known: Looked, rule: PairRule) -> tuple[pd.DataFrame, np.ndarray]:
    """The table of `near_duplicates` and the images of its first `SHOWN` pairs, uint8 [n, 2, R, R, 3].

    The table has the best pair of every held-out image that has one; a pair that counts is better than one that does
    not.
    """
    result = []
    for at in range(len(held) if len(known) else 0):
        distances = np.bitwise_count(known.hashes ^ held.hashes[at])
        nearest = (
            np.argsort(distances, kind="stable")[:CANDIDATES] if len(known) > CANDIDATES else np.arange(len(known))
        )
        near = nearest[distances[nearest] <= NEAR_DUPLICATE_BITS]
        if not len(near):
            continue
        ours = np.repeat(held.images[held.rows[at]][None], len(near), axis=0)
        theirs = np.stack([known.images[row] for row in known.rows[near]])
        likeness = correlations(ours, theirs)
        kind = kinds(
            held.locations[np.full(len(near), at)], known.locations[near], same_pixels(ours, theirs), one_grid=True
        )
        counts = np.isin(kind, rule.counted)
        alike = likeness >= CORRELATION
        if alike.any():
            best = int(np.argmax(np.where(alike, likeness + 10 * counts, -1)))
            result.append((at, int(near[best]), float(likeness[best]), kind[best], bool(counts[best])))
    result.sort(key=lambda pair: (not pair[4], -pair[2], pair[0]))
    table = pd.DataFrame(result, columns=["held_out", "image", "correlation", "kind", "counts"])
    table["counts"] = table["counts"].astype(bool)
    shown = [(held.images[held.rows[pair[0]]], known.images[known.rows[pair[1]]]) for pair in result[:SHOWN]]
    worst = np.array(shown) if shown else np.empty((0, 2, *held.images.shape[1:]), np.uint8)
    for column, ids, at in (("held_out", held.ids, 0), ("image", known.ids, 1)):
        table[column] = ids[np.array([pair[at] for pair in result], dtype=np.int64)]
    return table, worst


def _of_corpus(corpus: Corpus) -> Looked:
    usable = np.flatnonzero(corpus.readable)
    rows = usable[thinned(len(usable), MOST_OF_CORPUS)]
    table = corpus.manifest.iloc[rows]
    locations = Locations.of(table, corpus.resolution)
    return Looked(table["id"].to_numpy(dtype=object), corpus.images, rows, _hashes(corpus, rows), locations)


def _held_out(source: Source, most: int) -> Looked:
    """The readable images among up to `most` evenly spread images of a source."""
    table = source.manifest()
    rows = thinned(len(table), most)
    read = [(row, image) for row, image in zip(rows, _images(source, rows), strict=True) if image is not None]
    empty = np.empty((0, source.resolution, source.resolution, 3), np.uint8)
    images = np.stack([image for _, image in read]) if read else empty
    table = table.iloc[[row for row, _ in read]].reset_index(drop=True)
    locations = Locations.of(table, source.resolution)
    return Looked(
        table["id"].to_numpy(dtype=object), images, np.arange(len(read)), perceptual_hashes(images), locations
    )


def _copies_in(source: Source, split: str) -> int:
    """Number of images of a source whose bytes also occur in the given split."""
    manifest = source.manifest()
    return names_in(manifest["copy_in"], split) if "copy_in" in manifest else 0


def _hashes(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """Perceptual hashes of rows of a corpus, uint64 [K]; cached for the next held-out split of the same corpus."""
    key = (str(corpus.directory), len(rows))
    if key not in _last_hashes:
        blocks = progress(range(0, len(rows), BLOCK), "search for leaks", unit="block")
        parts = [perceptual_hashes(corpus.images[rows[start : start + BLOCK]]) for start in blocks]
        _last_hashes.clear()
        _last_hashes[key] = np.concatenate([np.empty(0, np.uint64), *parts])
    return _last_hashes[key]


def pairs_of_splits(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The counts of every pair of splits in a result of `leaks`, by name."""
    named = {f"train and {name}": part for name, part in result["held_out"].items()}
    return {**named, **({"val and test": result["val_test"]} if result.get("val_test") else {})}


def leak_grids(result: Mapping[str, Any] | None, runs: Path) -> list[SampleGrid]:
    """Grids of the worst image pairs of every pair of splits, as far as their images still exist."""
    grids = []
    for name, part in pairs_of_splits(result).items() if result else ():
        table, images = runs / part["pairs"], (runs / part["pairs"]).with_name(WORST)
        if not table.is_file() or not images.is_file():
            continue
        worst, pairs = np.load(images), pd.read_parquet(table)
        if not len(worst):
            continue
        other, held = name.split(" and ") if name != "val and test" else ("test", "val")
        lines = [
            f"{row.held_out} and {row.image}: {row.correlation:.3f}{'' if row.counts else ', ' + _words(row.kind)}"
            for row in pairs.head(len(worst)).itertuples()
        ]
        caption = (
            f"{len(worst)} of {len(pairs):,} pairs: first those that count as duplicates, each group sorted by the "
            f"correlation of brightness. {part['near_duplicates']:,} of {part['looked_at']:,} {held} images count as "
            "duplicates."
        )
        grids.append(SampleGrid(name.capitalize(), caption, {held: worst[:, 0], other: worst[:, 1]}, lines, "pair"))
    return grids


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def announce_leaks(result: Mapping[str, Any], name: str) -> None:
    """Print one line on stderr about the images that the splits share; print nothing if they share none."""
    parts = [
        f"{part['near_duplicates']:,} of {part['looked_at']:,} {split} images are near-duplicates of training images "
        f"(table: {part['pairs']})"
        for split, part in result["held_out"].items()
        if part["near_duplicates"]
    ]
    between = result.get("val_test")
    if between and between["near_duplicates"]:
        parts.append(
            f"{between['near_duplicates']:,} of {between['looked_at']:,} val images are near-duplicates of test images "
            f"(table: {between['pairs']})"
        )
    if result["exact_copies"]:
        parts.insert(0, f"{result['exact_copies']:,} images have exact copies in another split")
    if parts:
        notice(f"{name}: leaks between the splits: {'; '.join(parts)}")


def _images(source: Source, rows: np.ndarray) -> Iterator[np.ndarray | None]:
    """Yield the images of some rows; None for an unreadable image."""
    for sample in source.reader(rows)():
        if isinstance(sample, str):
            yield None
        else:
            yield sample.image if isinstance(sample, Sample) else sample
