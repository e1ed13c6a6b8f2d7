"""Deliberately exchanged captions, their detection, and the commands that measure it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from synthetic_pairs import corpus_of, world
from test_commands import call

from captioning.detection import detection, fraction_error, worst_first
from captioning.probe import best_ratios
from captioning.swaps import Swaps, exchanged, swapped_corpus
from report.results import read_results
from runtime.artefacts import read_json
from runtime.errors import UserError

# ---------------------------------------------------------------- exchanges


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 200),
    st.integers(2, 6),
    st.floats(0, 0.6, allow_subnormal=False),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_captions_are_exchanged_and_none_is_lost(
    size: int, scenes: int, fraction: float, within: bool, uneven: bool, seed: int
) -> None:
    scene = np.random.default_rng(seed).integers(scenes, size=size).astype(str)
    rows = np.arange(10, 10 + size)
    names = np.concatenate([np.full(10, "none"), scene])
    givers = exchanged(rows, names, Swaps(fraction, within, uneven, seed), np.random.default_rng(seed))
    assert sorted(givers.tolist()) == rows.tolist()  # a permutation: every caption still belongs to one image
    moved = givers != rows
    if within:
        assert (names[givers[moved]] == names[rows[moved]]).all()
    if not uneven and not within:
        assert abs(moved.sum() - fraction * size) <= scenes  # rounded in every scene


def test_an_exchange_between_scenes_gives_captions_of_other_scenes() -> None:
    scene = np.repeat(["a", "b", "c"], 100)
    givers = exchanged(np.arange(300), scene, Swaps(0.4), np.random.default_rng(0))
    moved = givers != np.arange(300)
    assert moved.sum() == 120 and (scene[givers[moved]] != scene[moved]).all()


def test_uneven_exchanges_differ_between_scenes_by_their_seed() -> None:
    scene = np.repeat(np.arange(8).astype(str), 200)

    def fractions(seed: int) -> np.ndarray:
        swaps = Swaps(0.3, uneven=True)
        moved = exchanged(np.arange(1600), scene, swaps, np.random.default_rng(seed)) != np.arange(1600)
        return moved.reshape(8, 200).mean(1)

    assert fractions(0).max() <= 0.6 and np.ptp(fractions(0)) > 0.2
    np.testing.assert_array_equal(fractions(0), fractions(0))
    assert not np.array_equal(fractions(0), fractions(1))


def test_a_swapped_corpus_has_one_caption_per_image_and_marks_swapped_ones(tmp_path: Path) -> None:
    _, captions, scenes = world(120)
    several = [[text, "another one"] for text in captions]
    corpus = corpus_of(several, scenes, tmp_path)
    noisy, swapped = swapped_corpus(corpus, Swaps(0.25, seed=1))
    assert "captions" not in noisy.manifest and noisy.captions and not corpus.captions
    own = np.array(captions, dtype=object)
    np.testing.assert_array_equal(swapped, noisy.manifest["caption"].to_numpy(dtype=object) != own)
    assert sorted(noisy.manifest["caption"]) == sorted(captions) and 20 <= swapped.sum() <= 34
    assert swapped_corpus(corpus, Swaps(0.25, seed=2))[0].captions != noisy.captions
    assert not swapped_corpus(corpus, Swaps(0.0))[1].any()


@pytest.mark.parametrize("fraction", [-0.1, 1.5, "half"])
def test_an_invalid_swap_fraction_is_refused(fraction: object) -> None:
    with pytest.raises(UserError, match=r"captioning\.swapped\.fraction"):
        Swaps(fraction)


# ---------------------------------------------------------------- detection, probe


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 100), st.integers(0, 5))
def test_detection_agrees_with_scikit_learn(size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    swapped = random.random(size) < 0.4
    swapped[:2] = True, False
    score = random.standard_normal(size) + swapped
    order = np.argsort(-score)
    removed = int(random.integers(1, size))
    result = detection(swapped, order, removed)
    called = np.isin(np.arange(size), order[:removed])
    assert result["swap_precision"] == pytest.approx(precision_score(swapped, called))
    assert result["swap_recall"] == pytest.approx(recall_score(swapped, called))
    assert result["swap_auc"] == pytest.approx(roc_auc_score(swapped, score))
    called = np.isin(np.arange(size), order[: swapped.sum()])
    assert result["swap_precision_at_true"] == pytest.approx(precision_score(swapped, called))
    assert result["swap_removed"] == removed / size


def test_detection_metrics_without_swapped_captions_are_undefined() -> None:
    result = detection(np.zeros(5, bool), np.arange(5), 0)
    assert result["swap_removed"] == 0 and set(result.values()) == {0.0, None}


def test_worst_first_lists_mismatched_pairs_then_pairs_of_lowest_fit() -> None:
    mismatch, fit = np.array([0.7, 0.1, 0.9, 0.2]), np.array([5.0, 1.0, 9.0, -1.0])
    assert worst_first(mismatch, fit, 0.6).tolist() == [2, 0, 3, 1]


def test_fraction_error_is_the_mean_over_scenes_with_pairs() -> None:
    swapped, scene = np.array([True, False, False, False]), np.array([0, 0, 2, 2])
    assert fraction_error(swapped, scene, np.array([0.4, 0.9, 0.2])) == pytest.approx((0.1 + 0.2) / 2)


def test_each_scene_gets_the_ratio_with_the_least_distance_unless_it_has_few_images() -> None:
    ratios, everywhere = np.array([0.0, 0.2, 0.4]), np.array([30.0, 20.0, 25.0])
    distances = np.array([[10.0, 50.0, np.nan], [40.0, 40.0, np.nan], [50.0, 10.0, np.nan]])
    many = best_ratios(distances, np.array([1000, 1000, 0]), everywhere, ratios, prior_images=50)
    assert many.tolist() == [0.0, 0.4, 0.2]
    few = best_ratios(distances, np.array([1, 1, 0]), everywhere, ratios, prior_images=50)
    assert few.tolist() == [0.2, 0.2, 0.2]


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """900 images of three colours in three folders, each with a caption that names its colour."""
    root = tmp_path_factory.mktemp("photographs")
    colours = {"forest": (40, 110, 40), "water": (30, 60, 140), "sand": (210, 180, 130)}
    random, rows = np.random.default_rng(0), []
    for number in range(900):
        name = list(colours)[number % 3]
        folder = root / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.array(colours[name]) + random.normal(0, 20, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.png")
        text = f"{['much', 'some', 'wide'][number % 7 % 3]} {name} seen from above, {name} number {number % 5}"
        rows.append({"file_name": f"images/{name}/{number:03d}.png", "split": "train", "captions": [text]})
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_the_command_finds_exchanged_captions_and_compares_captioners(photographs: Path, tmp_path: Path) -> None:
    done = call(
        "scripts/pair_cleaning.py", "profile=smoke", "corpus=folder", f"corpus.root={photographs}",
        "corpus.train.limit=null", "corpus.train.resolution=32", "encoder.input_size=64",
        "evaluation_encoder.input_size=64",
        "pair_cleaning.fractions=[0.3]", "pair_cleaning.arms=[]", "tracker=none", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = tmp_path / "results" / "smoke" / "pair_cleaning"
    assert done.stdout.strip().splitlines()[-1].endswith("results/smoke/pair_cleaning")
    rows = read_results(results / "results.jsonl")
    result = {(row["prune"], row["swapped"]): row["metrics"] for row in rows if row["stage"] == "pair_detection"}
    assert len(result) == 3 * 4
    across = result["dldc", "0.3 of another scene"]
    assert across["swap_precision"] > 0.9 and across["swap_recall"] > 0.8
    assert result["random", "0.3 of another scene"]["swap_precision"] < 0.5
    assert result["dldc", "0 of another scene"]["swap_removed"] < 0.05
    sources = {row["captions"]: row["metrics"] for row in rows if row["stage"] == "caption_quality"}
    assert set(sources) == {"given", "offline"} and sources["given"]["caption_words"] == 8
    for name in ("pair_detection", "caption_quality"):
        assert (results / f"{name}.md").stat().st_size > 0


def test_an_unknown_arm_gives_a_one_line_error(tmp_path: Path) -> None:
    done = call("scripts/pair_cleaning.py", "profile=smoke", "pair_cleaning.arms=[spoilt]", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "spoilt" in done.stderr


@pytest.mark.slow
def test_every_arm_is_trained_and_evaluated(tmp_path: Path) -> None:
    done = call(
        "scripts/pair_cleaning.py", "profile=smoke", "pair_cleaning.detection=false", "pair_cleaning.captions=false",
        "train.loop.steps=4", "train.snapshots=1", "eval.images=16", "eval.convergence_images=12", "tracker=none",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_results(tmp_path / "results" / "smoke" / "pair_cleaning" / "results.jsonl")
    assert [row["pairs"] for row in rows] == ["raw", "clip_score", "cleaned", "repaired", "clean"]
    for row in rows:
        assert np.isfinite(row["metrics"]["balanced_clip_fitted_efficientnet_lite2"])
        assert 0 <= row["metrics"]["balanced_scene_accuracy_fitted_efficientnet_lite0"] <= 1


@pytest.mark.slow
def test_the_probe_writes_cleaning_ratios_that_pruning_accepts(tmp_path: Path) -> None:
    done = call(
        "scripts/cleaning_probe.py", "profile=smoke", "cleaning_probe.ratios=[0.3,0.0]", "cleaning_probe.steps=4",
        "eval.images=16", "eval.convergence_images=12", "tracker=none", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    path = tmp_path / "results" / "smoke" / "cleaning_probe" / "ratios.json"
    ratios = read_json(path)
    assert "" in ratios and set(ratios.values()) <= {0.0, 0.3} and len(ratios) > 2
    arguments = ("prune=dldc", "ratio=null", f"prune.cleaning_ratio={path}", "captioning.describe=none")
    pruned = call("prune/run.py", "profile=smoke", "tracker=none", *arguments, cwd=tmp_path)
    assert pruned.returncode == 0, pruned.stderr[-3000:]
    missing = call(
        "prune/run.py", "profile=smoke", "prune=dldc", "ratio=null", "prune.cleaning_ratio=none.json", cwd=tmp_path
    )
    assert missing.returncode == 2 and "none.json" in missing.stderr
