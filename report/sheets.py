"""Sample grids of a results directory: same prompts and noise, one column per method, one grid per training seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from corpus.index import open_corpus
from eval.measuring import IMAGES
from report.page import SampleGrid
from report.tables import method_order
from runtime.artefacts import read_json

#: Number of prompts of a grid; the first ones are of different scenes, because a balanced set alternates its scenes.
PROMPTS = 8
HELD_OUT = "held-out photograph"
CAPTION = (
    "Columns of one row share prompt and noise; the training seed is the same in all columns. The photograph is the "
    "held-out image that the prompt describes."
)


def sample_grids(measured: Mapping[str, Sequence[Path]], seeds: Sequence[int]) -> list[SampleGrid]:
    """One grid per training seed with the generated images that were measured; missing images are left out.

    Args:
        measured: directories of the stage `measured` by run, one per seed.
        seeds: the seeds, in the order of the directories.
    """
    grids = []
    for index, seed in enumerate(seeds):
        columns, prompts = {}, []
        for name in sorted(measured, key=method_order):
            if index >= len(measured[name]):
                continue
            metadata = read_json(measured[name][index] / "stage.json")["inputs"]
            drawn = measured[name][index].parent.parent / metadata["images"]
            if not (drawn / IMAGES).is_file():
                continue
            if not columns:
                prompts = read_json(drawn / "stage.json")["inputs"]["captions"][:PROMPTS]
                columns |= _photographs(drawn.parent.parent, metadata["held_out"])
            columns[name] = np.array(np.load(drawn / IMAGES, mmap_mode="r")[:PROMPTS])
        if columns:
            grids.append(SampleGrid(f"Side by side, training seed {seed}", CAPTION, columns, prompts))
    return grids


def _photographs(runs: Path, held_out: Mapping) -> dict[str, np.ndarray]:
    place = runs / "corpus" / held_out["corpus"]
    if not place.is_dir():
        return {}
    return {HELD_OUT: np.array(open_corpus(place).images[held_out["rows"][:PROMPTS]])}
