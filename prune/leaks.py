"""What a pruned split shares with the held-out ones: copies of files, and images that look alike to the pixel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from corpus.index import Corpus, Sample, Source
from corpus.splits import copies_across_splits, thinned
from eval.waste import BLOCK, NEAR_DUPLICATE_BITS, perceptual_hashes
from runtime.artefacts import read_json, stage, write_json
from runtime.notices import notice
from runtime.progress import progress

#: The table of pairs in a stage's directory.
PAIRS = "pairs.parquet"
#: Nearest images by hash of which one must also resemble in its pixels: plain images of any place have like hashes.
CANDIDATES = 8
#: Two images are near-duplicates where their brightness correlates at least so. Two dates of a place stay below, and
#: so do two patches of one sea; a copy in another format, size or stretch does not.
CORRELATION = 0.95
#: Images of the corpus that are compared, evenly spread: hashing all of millions would take hours.
MOST_OF_CORPUS = 50_000
_last_hashes: dict[tuple[str, int], np.ndarray] = {}
#: Levels of 255 by which brightness must vary for it to say anything.
LEAST_CONTRAST = 1.0


def leaks(corpus: Corpus, held_out: Mapping[str, Source], most: int, runs: Path | str) -> dict[str, Any]:
    """How many held-out images the pruned split has as well.

    Args:
        corpus: the split that is pruned.
        held_out: val and test, by name.
        most: images of each that are looked at, evenly spread; of the corpus `MOST_OF_CORPUS`.
    Returns:
        `exact_copies`: images of the split whose bytes lie in another split, too; by split `looked_at` and
        `near_duplicates`: held-out images that were compared, and those of them that look like one of the corpus, and
        `pairs`: the table of these, below `runs`.
    """
    found: dict[str, Any] = {"exact_copies": copies_across_splits(corpus.manifest), "held_out": {}}
    for name, source in held_out.items():
        inputs = {"corpus": corpus.fingerprint, "held_out": source, "version": source.version, "most": most}

        def build(directory: Path, source: Source = source) -> None:
            pairs, looked = near_duplicates(corpus, source, most)
            pairs.to_parquet(directory / PAIRS, index=False)
            write_json(directory / "leaks.json", {"looked_at": looked, "near_duplicates": len(pairs)})

        directory = stage(runs, "leaks", inputs, build, code="selection")
        found["held_out"][name] = {**read_json(directory / "leaks.json"), "pairs": f"leaks/{directory.name}/{PAIRS}"}
    return found


def near_duplicates(corpus: Corpus, source: Source, most: int) -> tuple[pd.DataFrame, int]:
    """Pairs of a held-out image and the image of the corpus that looks like it, and how many were compared.

    Returns:
        a table with `held_out` and `image` (their ids) and `correlation`.
    """
    table = source.manifest()
    rows = thinned(len(table), most)
    images = [(row, image) for row, image in zip(rows, _images(source, rows), strict=True) if image is not None]
    usable = np.flatnonzero(corpus.readable)
    usable = usable[thinned(len(usable), MOST_OF_CORPUS)]
    if not images or not len(usable):
        return pd.DataFrame({"held_out": [], "image": [], "correlation": []}), len(images)
    held = np.stack([image for _, image in images])
    known = _hashes(corpus, usable)
    found = []
    for (row, image), hashed in zip(images, perceptual_hashes(held), strict=True):
        distances = np.bitwise_count(known ^ hashed)
        nearest = (
            np.argsort(distances, kind="stable")[:CANDIDATES] if len(known) > CANDIDATES else np.arange(len(known))
        )
        near = usable[nearest[distances[nearest] <= NEAR_DUPLICATE_BITS]]
        likeness = [correlation(image, corpus.images[at]) for at in near]
        if likeness and max(likeness) >= CORRELATION:
            best = near[int(np.argmax(likeness))]
            found.append((table["id"].iloc[int(row)], corpus.manifest["id"].iloc[int(best)], max(likeness)))
    return pd.DataFrame(found, columns=["held_out", "image", "correlation"]), len(images)


def _hashes(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """Perceptual hashes of rows of a corpus, uint64 [K]; kept for the next held-out split of the same corpus."""
    key = (str(corpus.directory), len(rows))
    if key not in _last_hashes:
        blocks = progress(range(0, len(rows), BLOCK), "look for leaks", unit="block")
        parts = [perceptual_hashes(corpus.images[rows[start : start + BLOCK]]) for start in blocks]
        _last_hashes.clear()
        _last_hashes[key] = np.concatenate(parts)
    return _last_hashes[key]


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of the brightness of two images, uint8 [R, R, 3]; 0 where one is plain."""
    luma = [image.mean(axis=-1, dtype=np.float64).ravel() for image in (first, second)]
    if min(values.std() for values in luma) < LEAST_CONTRAST:
        return 0.0
    return float(np.corrcoef(luma)[0, 1])


def announce_leaks(found: Mapping[str, Any], name: str) -> None:
    """Say on stderr, in one line, what the pruned split shares with the held-out ones; nothing where it shares none."""
    near = {split: part for split, part in found["held_out"].items() if part["near_duplicates"]}
    parts = [
        f"{part['near_duplicates']:,} of {part['looked_at']:,} {split} images look like one that is trained on "
        f"(table: {part['pairs']})"
        for split, part in near.items()
    ]
    if found["exact_copies"]:
        parts.insert(0, f"{found['exact_copies']:,} images have exact copies in another split")
    if parts:
        notice(f"{name}: leaks between the splits: {'; '.join(parts)}")


def _images(source: Source, rows: np.ndarray) -> Iterator[np.ndarray | None]:
    """The images of some rows, None for one that cannot be read."""
    for sample in source.reader(rows)():
        if isinstance(sample, str):
            yield None
        else:
            yield sample.image if isinstance(sample, Sample) else sample
