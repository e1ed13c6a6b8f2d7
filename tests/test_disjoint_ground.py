"""Downstream tasks are measured on ground that is disjoint from all training pixels of the foundation and the tasks."""

from __future__ import annotations

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from runtime.application import CONFIGS


def covered(source, rows: np.ndarray) -> np.ndarray:
    """Bool map of the world: the pixels covered by some tiles."""
    world = np.zeros(source.world.shape[:2], dtype=bool)
    for row, column in source.corners()[rows]:
        world[row : row + source.resolution, column : column + source.resolution] = True
    return world


def test_training_and_measurement_have_no_common_pixel() -> None:
    """The foundation sees a subset of the split train, tasks see other rows of it; neither uses test and val."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", ["tracker=none"])
    sources = {split: instantiate(cfg.corpus[split]) for split in ("train", "val", "test")}
    maps = {split: covered(source, np.arange(len(source.corners()))) for split, source in sources.items()}
    assert all(ground.any() for ground in maps.values())
    for first, second in (("train", "test"), ("train", "val"), ("val", "test")):
        assert not (maps[first] & maps[second]).any()
    # the map detects overlapping tiles: two neighbours of the training split share pixels
    train = sources["train"]
    pixels = len(train.corners()) * train.resolution**2
    assert maps["train"].sum() < pixels
