"""The segmenter: images of any side, training until `val` stops improving, the best round is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_networks import pictures
from tiny_task import task_config
from torchmetrics.classification import MulticlassJaccardIndex

from corpus.index import Corpus
from downstream import segmenter as module
from downstream.segmenter import (
    SegmenterOptions,
    class_scores,
    new_network,
    segment,
    train_segmenter,
    trained_segmenter,
)
from runtime.artefacts import read_json
from runtime.errors import UserError

OPTIONS = SegmenterOptions(
    encoder="tu-test_resnet", channels=32, batch_size=8, learning_rate=5e-3, weight_decay=0.0,
    ema_decay=0.8, round_images=48, val_images=16, patience=2, most_rounds=4, seed=3,
)  # fmt: skip


def striped(tmp_path: Path, count: int, seed: int) -> Corpus:
    """Red on the left, blue on the right, a random edge position, and noise; the mask labels the sides."""
    random = np.random.default_rng(seed)
    masks = (np.arange(16)[None, None] >= random.integers(3, 14, count)[:, None, None]).astype(np.uint8)
    masks = np.broadcast_to(masks, (count, 16, 16)).copy()
    images = np.array([[170, 60, 60], [60, 60, 170]])[masks] + random.normal(scale=25, size=(count, 16, 16, 3))
    manifest = pd.DataFrame({"scene": ["a"] * count, "readable": True})
    return Corpus("striped", tmp_path, images.clip(0, 255).astype(np.uint8), manifest, masks, ("red", "blue"))


@pytest.mark.parametrize("side", [(16, 16), (20, 14), (33, 40)])
def test_every_pixel_of_any_side_gets_a_class(side: tuple[int, int]) -> None:
    network = new_network(OPTIONS, 5).eval()
    images = np.resize(pictures(3, size=48), (3, *side, 3))
    assert class_scores(network, torch.zeros(2, 3, *side)).shape == (2, 5, *side)
    classes = segment(network, images)
    assert classes.shape == (3, *side) and classes.dtype == np.uint8 and classes.max() < 5
    assert (segment(network, images[1:]) == classes[1:]).all()


def test_the_segmenter_learns_visible_classes_and_keeps_the_best_round(tmp_path: Path) -> None:
    training, val = striped(tmp_path, 64, 0), striped(tmp_path, 16, 1)
    state, rounds = train_segmenter(new_network(OPTIONS, 2), training, val, OPTIONS)
    short = replace(OPTIONS, most_rounds=1)
    assert train_segmenter(new_network(short, 2), training, val, short)[1] == rounds[:1]  # seeded
    network = new_network(replace(OPTIONS, seed=1), 2).eval()
    network.load_state_dict(state)
    classes = segment(network, val.images)
    best = max(round_["miou"] for round_ in rounds)
    assert best > 0.8  # the network's output has a quarter of the side
    assert best == pytest.approx(
        float(MulticlassJaccardIndex(2)(torch.from_numpy(classes), torch.from_numpy(val.masks)))
    )


@pytest.mark.parametrize(
    ("miou", "rounds"),
    [([0.1, 0.3, 0.2, 0.2, 0.9, 0.9], 4), ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6), ([0.5, 0.4, 0.6, 0.5, 0.6, 0.9], 5)],
)
def test_training_ends_when_val_stops_improving(
    miou: list[float], rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience is two rounds, the maximum six; an equal result does not count as better."""
    given = iter(miou)
    kept = []

    def scored(network, images, masks):
        kept.append({key: value.clone() for key, value in network.state_dict().items()})
        return {"miou": next(given), "pixel_accuracy": 0.0}

    monkeypatch.setattr(module, "_measured", scored)
    corpus = striped(tmp_path, 16, 0)
    options = replace(OPTIONS, round_images=8, batch_size=4, most_rounds=6)
    state, result = train_segmenter(new_network(options, 2), corpus, corpus, options)
    assert [entry["round"] for entry in result] == list(range(1, rounds + 1))
    best = int(np.argmax(miou[:rounds]))
    assert all(torch.equal(state[key], kept[best][key]) for key in state)
    assert not all(torch.equal(kept[best][key], kept[best - 1][key]) for key in state)


def test_the_segmenter_is_cached_and_independent_of_other_options(tmp_path: Path) -> None:
    cfg = task_config(tmp_path)
    result = trained_segmenter(cfg)
    assert result.directory.parent == tmp_path / "runs" / "segmenter"
    metadata = read_json(result.directory / "training.json")
    assert metadata["best_round"] in {entry["round"] for entry in metadata["rounds"]} and metadata["seconds"] > 0
    assert result(pictures(2)).shape == (2, 16, 16)
    assert trained_segmenter(cfg).key == result.key
    cfg.downstream.steps = 7
    cfg.eval.seed = 7
    cfg.seed = 7
    assert trained_segmenter(cfg).key == result.key
    with pytest.raises(UserError, match="patience=0: give at least 1"):
        replace(OPTIONS, patience=0)
    cfg.downstream.segmenter.encoder = "resnet18_of_nobody"
    with pytest.raises(UserError, match="encoder=resnet18_of_nobody"):
        trained_segmenter(cfg)
    bare = task_config(tmp_path, "corpus.masks=null", "corpus.classes=[]")
    with pytest.raises(UserError, match="has no masks"):
        trained_segmenter(bare)
