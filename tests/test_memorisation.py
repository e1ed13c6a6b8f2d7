"""Distances to the nearest training image: brute force, copies, and the record of a run's training images."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hydra.utils import instantiate
from scipy.spatial.distance import cdist
from tiny_networks import pictures
from tiny_run import tiny_config

from corpus.index import index_corpus
from encoders.efficientnet import EfficientNetLite0
from eval import memorisation
from eval.convergence import CONVERGENCE
from eval.measuring import evaluation_sets
from eval.measuring_any import TRAINING, find_training, measure_any
from eval.memorisation import nearest_distances, nearest_training
from eval.metrics import SETS
from prune.features import corpus_embeddings
from runtime.artefacts import COMPLETE, read_json, stage_fingerprint, write_json
from train.foundation import pretrain
from train.measured_run import MEASURED


def embedded(count: int, seed: int, dimensions: int = 16) -> np.ndarray:
    """Features with a common component, as after a ReLU."""
    return np.abs(np.random.default_rng(seed).standard_normal((count, dimensions))).astype(np.float32) + 3


@pytest.mark.parametrize("block", [7, 1000])
def test_distances_agree_with_scipy(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(memorisation, "BLOCK", block)
    features, corpus = embedded(30, 0), embedded(80, 1)
    rows = np.random.default_rng(2).permutation(80)[:50]
    centre = corpus[rows].mean(0)
    expected = cdist(features - centre, corpus[rows] - centre, "cosine").min(1)
    np.testing.assert_allclose(nearest_distances(features, corpus, rows), expected, atol=1e-5)


def test_nearest_training_is_near_zero_for_copies_and_near_one_for_new_images() -> None:
    corpus, held = embedded(2000, 1).astype(np.float16), embedded(300, 2)
    rows = np.arange(0, 2000, 2)
    copies = corpus[rows[:300]].astype(np.float32)
    assert nearest_training(copies, held, corpus, rows) == pytest.approx(0, abs=1e-4)
    assert nearest_training(embedded(300, 3), held, corpus, rows) == pytest.approx(1, abs=0.1)
    assert nearest_training(corpus[1:601:2], held, corpus, rows) == pytest.approx(1, abs=0.1), "not kept: not seen"
    half = np.concatenate([copies[:100], embedded(100, 3)])
    assert nearest_training(half, held, corpus, rows) < 0.9
    assert nearest_training(copies + 0.02 * embedded(300, 4), held, corpus, rows) < 0.2, "copies with a little noise"


def test_nearest_training_is_undefined_for_too_few_images_or_held_out_copies() -> None:
    corpus = embedded(50, 1)
    assert np.isnan(nearest_training(embedded(10, 0), embedded(10, 2), corpus, np.arange(3)))
    assert np.isnan(nearest_training(embedded(10, 0), corpus[:10], corpus.astype(np.float16), np.arange(50)))


# ---------------------------------------------------------------- training images of a run


@pytest.fixture
def trained(tmp_path: Path) -> SimpleNamespace:
    """A run with a snapshot, its selection and the features of its corpus, in the stages' format."""
    runs, corpus, encoder = tmp_path / "runs", SimpleNamespace(fingerprint="corpus"), EfficientNetLite0()
    selection = runs / "selection" / "chosen"
    selection.mkdir(parents=True)
    pd.DataFrame({"kept": [True, False, False, True]}).to_parquet(selection / "selection.parquet")
    write_json(selection / COMPLETE, {"inputs": {"corpus": "corpus"}})
    key = stage_fingerprint("embedding", {"corpus": "corpus", "encoder": encoder})
    embeddings = runs / "embedding" / key / "embeddings.npy"
    embeddings.parent.mkdir(parents=True)
    np.save(embeddings, embedded(4, 0).astype(np.float16))
    run = runs / "pretrain" / "run"
    (run / "snapshots" / "000000000320").mkdir(parents=True)
    (run / "pipeline").mkdir()
    write_json(run / TRAINING, {"selection": "chosen"})
    return SimpleNamespace(run=run, corpus=corpus, encoder=encoder, runs=runs, embeddings=embeddings)


@pytest.mark.parametrize("below", ["", "pipeline", "snapshots/000000000320"])
def test_find_training_returns_the_training_images_of_a_run(trained: SimpleNamespace, below: str) -> None:
    result = find_training(trained.run / below, trained.corpus, [trained.encoder], trained.runs)
    assert result.rows.tolist() == [0, 3]
    assert result.key == {"corpus": "corpus", "selection": "chosen"}
    np.testing.assert_array_equal(result.embeddings(trained.encoder.name), np.load(trained.embeddings))


@pytest.mark.parametrize("lacks", ["run", "selection", "embeddings", "corpus", "encoder"])
def test_find_training_returns_none_if_a_part_is_missing(trained: SimpleNamespace, tmp_path: Path, lacks: str) -> None:
    source, corpus, encoders = trained.run, trained.corpus, [trained.encoder]
    if lacks == "run":
        source = tmp_path / "elsewhere"
        source.mkdir()
    elif lacks == "selection":
        (trained.runs / "selection" / "chosen").rename(tmp_path / "gone")
    elif lacks == "embeddings":
        trained.embeddings.unlink()
    elif lacks == "corpus":
        write_json(trained.runs / "selection" / "chosen" / COMPLETE, {"inputs": {"corpus": "another"}})
    else:
        encoders.append(EfficientNetLite0(name="other"))
    assert find_training(source, corpus, encoders, trained.runs) is None


def test_copies_of_photographs_are_found_through_an_encoder() -> None:
    encoder = EfficientNetLite0(input_size=32)
    corpus = encoder(pictures(40, seed=1)).astype(np.float16)
    held, copies = encoder(pictures(12, seed=2)), encoder(pictures(40, seed=1)[:12])
    assert nearest_training(copies, held, corpus, np.arange(40)) < 0.01
    assert nearest_training(encoder(pictures(12, seed=3)), held, corpus, np.arange(40)) > 0.7


@pytest.mark.slow
def test_pretraining_measures_the_distance_to_its_training_images(tmp_path: Path) -> None:
    """The complete `train/pretrain.py`, and the same numbers by `eval/measure.py of=RUN`, from the same stages."""
    cfg = tiny_config(tmp_path, "encoder@evaluation_encoder=efficientnet_lite0", "evaluation_encoder.input_size=32")
    run = pretrain(cfg, "random")
    metrics = read_json(run / "summary.json")["metrics"]
    name = "nearest_training_efficientnet_lite0"
    assert {f"{held}_{name}" for held in SETS} <= set(metrics)
    table = pd.read_parquet(tmp_path / "runs/selection" / read_json(run / TRAINING)["selection"] / "selection.parquet")
    corpus = index_corpus(instantiate(cfg.corpus.train), cfg.runs)
    features = corpus_embeddings(corpus, instantiate(cfg.evaluation_encoder), cfg.runs)
    held = evaluation_sets(cfg)["natural"].features["efficientnet_lite0"]
    made = np.load(Path(read_json(run / MEASURED)["natural"]) / "efficientnet_lite0.npy")
    seen = features[table["kept"].to_numpy()].astype(np.float32)
    medians = [np.median(cdist(x - seen.mean(0), seen - seen.mean(0), "cosine").min(1)) for x in (made, held)]
    assert metrics[f"natural_{name}"] == pytest.approx(medians[0] / medians[1], rel=1e-3)
    lines = [json.loads(line) for line in (run / CONVERGENCE).read_text().splitlines()]
    assert all(line[f"balanced_{name}"] > 0 for line in lines)
    stages = sorted((tmp_path / "runs" / "measured").iterdir())
    cfg.of = str(run)
    assert read_json(measure_any(cfg) / "metrics.json") == metrics
    assert sorted((tmp_path / "runs" / "measured").iterdir()) == stages
