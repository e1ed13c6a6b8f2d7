"""Pruning by image-text pairs: exact budgets, fractions of scenes, RS-Prune among clean pairs, the real commands."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from PIL import Image
from test_commands import forked, ran  # noqa: F401

from captioning.loop import CAPTIONS
from captioning.scorers import FittedScorer, HubScorer, OpenClipScorer
from prune import captioned
from prune.methods.dldc import DLDC, LESS_FITTING, MISMATCHED, NO_CAPTION, ClipScore, goodness
from prune.methods.rsprune import RSPrune
from prune.methods.rsprune_dldc import RSPruneDLDC
from prune.pool import PairScores, Pool
from prune.selection import ratio_of, select
from runtime.artefacts import read_json
from runtime.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SCENES = ("airport", "forest", "harbour", "")


def pool_of(size: int, seed: int = 0, unreadable: int = 0, mismatched: float = 0.3, without: float = 0.1) -> Pool:
    random = np.random.default_rng(seed)
    readable = np.ones(size, bool)
    readable[random.permutation(size)[:unreadable]] = False
    wrong, none = random.random(size) < mismatched, random.random(size) < without
    values = np.where(wrong, random.uniform(0.61, 1, size), random.uniform(0, 0.59, size))
    columns = [np.where(none, np.nan, column).astype(np.float32) for column in (values, *random.normal(size=(2, size)))]
    scene = np.array(SCENES, dtype=object)[random.choice(4, size, p=[0.6, 0.25, 0.1, 0.05])]
    return Pool(
        ids=np.arange(size).astype(str), readable=readable, entropy=random.uniform(0, 8, size).astype(np.float32),
        embeddings=random.standard_normal((size, 6)).astype(np.float32),
        reference_embeddings=random.standard_normal((20, 6)).astype(np.float32),
        reference_labels=np.repeat(np.array(["airport", "forest"], dtype=object), 10),
        pair_scores=PairScores(*columns, scene),
    )  # fmt: skip


def kept_by(method: object, pool: Pool, budget: int) -> np.ndarray:
    kept = np.zeros(len(pool), bool)
    kept[method.select(pool, budget, np.random.default_rng(0)).kept] = True
    return kept


def clean_of(pool: Pool) -> np.ndarray:
    return pool.readable & (np.nan_to_num(pool.pair_scores.mismatch, nan=1) <= 0.6)


# ---------------------------------------------------------------- dldc


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(0, 30), st.floats(0, 0.999, allow_subnormal=False), st.integers(0, 5))
def test_budgets_are_exact_and_worse_kinds_of_pairs_are_removed_first(
    size: int, unreadable: int, ratio: float, seed: int
) -> None:
    """No pair of a worse kind is kept while one of a better kind is removed: clean, mismatched, without a caption."""
    pool = pool_of(size, seed, min(unreadable, size))
    budget = size - round(ratio * size)
    selection = DLDC().select(pool, budget, np.random.default_rng(seed))
    kept = np.isin(np.arange(size), selection.kept)
    assert kept.sum() == min(budget, pool.readable.sum()) and not kept[~pool.readable].any()
    without = pool.readable & np.isnan(pool.pair_scores.mismatch)
    kinds = [clean_of(pool), pool.readable & ~clean_of(pool) & ~without, without]
    for better, worse in itertools.pairwise(kinds):
        assert kept[better].all() or not kept[worse].any()
    back = kinds[1]
    if 0 < kept[back].sum() < back.sum():
        assert pool.pair_scores.mismatch[back & kept].max() <= pool.pair_scores.mismatch[back & ~kept].min()
    assert set(selection.reason[kinds[0] & ~kept]) <= {LESS_FITTING}
    assert set(selection.reason[kinds[1] & ~kept]) <= {MISMATCHED}
    assert set(selection.reason[kinds[2] & ~kept]) <= {NO_CAPTION}
    assert selection.diagnostics == {"mismatched": kinds[1].sum(), "without_caption": without.sum()}


def test_without_a_ratio_exactly_the_matched_pairs_are_kept() -> None:
    pool = pool_of(300, unreadable=9)
    assert DLDC().estimated_budget(pool) == clean_of(pool).sum()
    np.testing.assert_array_equal(kept_by(DLDC(), pool, DLDC().estimated_budget(pool)), clean_of(pool))
    strict = DLDC(most_mismatch=0.2)
    expected = pool.readable & (np.nan_to_num(pool.pair_scores.mismatch, nan=1) <= 0.2)
    np.testing.assert_array_equal(kept_by(strict, pool, strict.estimated_budget(pool)), expected)


def test_every_scene_keeps_the_same_fraction_and_its_best_fitting_pairs() -> None:
    pool = pool_of(600)
    scores, clean = pool.pair_scores, clean_of(pool)
    kept = kept_by(DLDC(), pool, 150)
    for name in SCENES:
        rows = np.flatnonzero(clean & (scores.scene == name))
        assert abs(kept[rows].sum() - len(rows) * 150 / clean.sum()) < 1
        order = rows[np.argsort(-scores.fit[rows])]
        np.testing.assert_array_equal(kept[order], np.arange(len(rows)) < kept[rows].sum())


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, {"airport": 0.4, "": 0.1}, {"harbour": 0.25}])
def test_a_cleaning_ratio_holds_for_every_scene(ratio: float | dict) -> None:
    pool = pool_of(500, unreadable=11)
    method, scores = DLDC(cleaning_ratio=ratio), pool.pair_scores
    usable = pool.readable & ~np.isnan(scores.mismatch)
    kept = kept_by(method, pool, method.estimated_budget(pool))
    assert not kept[~usable].any()
    for name in SCENES:
        rows = np.flatnonzero(usable & (scores.scene == name))
        part = ratio.get(name, ratio.get("", 0.0)) if isinstance(ratio, dict) else ratio
        assert (~kept[rows]).sum() == round(part * len(rows))
        badness = np.where(scores.mismatch[rows] > 0.6, 1e3 * scores.mismatch[rows], -scores.fit[rows])
        gone, stay = badness[~kept[rows]], badness[kept[rows]]
        assert not len(gone) or gone.min() >= stay.max()


def test_reasons_distinguish_mismatched_pairs_from_less_fitting_ones() -> None:
    """A cleaning ratio also removes well-matched pairs."""
    pool = pool_of(200, mismatched=0.1, without=0)
    method = DLDC(cleaning_ratio=0.5)
    selection = method.select(pool, method.estimated_budget(pool), np.random.default_rng(0))
    gone = np.setdiff1d(np.arange(200), selection.kept)
    wrong = pool.pair_scores.mismatch[gone] > 0.6
    assert (selection.reason[gone[wrong]] == MISMATCHED).all()
    assert (selection.reason[gone[~wrong]] == LESS_FITTING).all()
    assert selection.diagnostics["mismatched"] == (pool.pair_scores.mismatch > 0.6).sum()


def test_the_order_of_pairs_uses_the_threshold_of_the_method() -> None:
    scores = PairScores(
        np.float32([0.3, 0.1, 0.25]), np.float32([9, 1, 2]), np.zeros(3, np.float32), np.full(3, "a", object)
    )
    assert np.argsort(goodness(scores, np.arange(3), 0.5)).tolist() == [1, 2, 0]
    assert np.argsort(goodness(scores, np.arange(3), 0.2)).tolist() == [0, 2, 1]
    pool = replace(pool_of(3, without=0), pair_scores=scores)
    method = DLDC(most_mismatch=0.2, cleaning_ratio=0.3)
    assert kept_by(method, pool, method.estimated_budget(pool)).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"cleaning_ratio": 1.0}, "prune.cleaning_ratio=1.0"),
        ({"cleaning_ratio": -0.1}, "prune.cleaning_ratio=-0.1"),
        ({"cleaning_ratio": "half"}, "prune.cleaning_ratio=half"),
        ({"cleaning_ratio": {"forest": 2}}, "prune.cleaning_ratio=2"),
        ({"most_mismatch": 0.0}, "prune.most_mismatch=0.0"),
        ({"most_mismatch": 1.5}, "prune.most_mismatch=1.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        DLDC(**options)
    if "most_mismatch" in options:
        with pytest.raises(UserError, match=line):
            RSPruneDLDC(**options)


def test_a_cleaning_ratio_for_an_unknown_scene_is_refused() -> None:
    method = DLDC(cleaning_ratio={"forrest": 0.1})
    with pytest.raises(UserError, match=r"'forrest', which is not a scene: give some of airport, forest, harbour"):
        method.estimated_budget(pool_of(50))


# ---------------------------------------------------------------- clip_score, rsprune_dldc


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 80), st.integers(0, 80), st.integers(0, 3))
def test_clip_score_keeps_the_pairs_with_the_highest_cosine(size: int, budget: int, seed: int) -> None:
    pool = pool_of(size, seed, unreadable=size // 9)
    cosine = np.where(pool.readable, np.nan_to_num(pool.pair_scores.cosine, nan=-9), -99)
    expected = np.argsort(-cosine, kind="stable")[: min(budget, int(pool.readable.sum()))]
    assert sorted(expected.tolist()) == ClipScore().select(pool, budget, np.random.default_rng(0)).kept.tolist()


def test_rsprune_dldc_equals_rsprune_if_no_pair_is_mismatched() -> None:
    pool = pool_of(300, unreadable=7, mismatched=0, without=0)
    for budget in (0, 40, 250, 293, 300):
        ours, theirs = (method.select(pool, budget, np.random.default_rng(3)) for method in (RSPruneDLDC(), RSPrune()))
        for name in ("kept", "reason", "scene", "scene_similarity", "cluster", "centroid_distance"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert ours.diagnostics == {**theirs.diagnostics, "mismatched": 0}


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 150), st.floats(0, 1, allow_subnormal=False), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 3))
def test_rsprune_dldc_keeps_mismatched_images_only_if_clean_ones_are_used_up(
    size: int, fraction: float, mismatched: float, seed: int
) -> None:
    pool = pool_of(size, seed, size // 8, mismatched)
    budget, clean = int(fraction * size), clean_of(pool)
    selection = RSPruneDLDC().select(pool, budget, np.random.default_rng(seed))
    kept = np.isin(np.arange(size), selection.kept)
    assert kept.sum() == min(budget, pool.readable.sum()) and not kept[~pool.readable].any()
    assert kept[clean].sum() == min(budget, clean.sum())
    rest = pool.readable & ~clean
    order = np.nan_to_num(pool.pair_scores.mismatch, nan=9)
    if 0 < kept[rest].sum() < rest.sum():
        assert order[rest & kept].max() <= order[rest & ~kept].min()
    without = pool.readable & np.isnan(pool.pair_scores.mismatch)
    assert set(selection.reason[without & ~kept]) <= {NO_CAPTION}
    assert set(selection.reason[rest & ~without & ~kept]) <= {MISMATCHED}
    assert selection.diagnostics["mismatched"] == (rest & ~without).sum()


# ---------------------------------------------------------------- configuration


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_scorers_are_chosen_by_name(tmp_path: Path) -> None:
    cfg = config(
        "+scorer@captioning.scorers.remote=remoteclip", "+scorer@captioning.scorers.clip=openai_clip",
        "+scorer@captioning.scorers.geo=georsclip", "captioning.scorers.remote.architecture=ViT-B-32",
    )  # fmt: skip
    scorers = captioned.loops_of(cfg).scorers
    assert [type(scorer) for scorer in scorers] == [FittedScorer, OpenClipScorer, HubScorer, OpenClipScorer]
    assert [scorer.name for scorer in scorers] == ["fitted", "remoteclip_vit_l14", "clip_vit_l14", "georsclip_vit_b32"]
    assert scorers[1].architecture == "ViT-B-32"
    with pytest.raises(UserError, match=r"captioning\.scorers is empty"):
        captioned.loops_of(config("captioning.scorers.fitted=null"))
    assert config("prune=dldc", "captioning.most_mismatch=0.3").prune.most_mismatch == 0.3


@pytest.mark.parametrize(
    ("choice", "prune", "requested"),
    [
        ("auto", "dldc", (True, True)), ("auto", "random", (False, False)), ("best", "random", (True, True)),
        ("given", "dldc", (True, False)), ("given", "random", (False, False)), ("auto", "clip_score", (True, True)),
        ("auto", "rsprune_dldc", (True, True)),
    ],
)  # fmt: skip
def test_pairs_are_scored_if_the_method_or_the_captions_option_requires_it(
    choice: str, prune: str, requested: tuple[bool, bool]
) -> None:
    cfg = config(f"prune={prune}", f"captioning.captions={choice}")
    assert captioned.requested(cfg, instantiate(cfg.prune, _convert_="all")) == requested


@pytest.mark.parametrize("option", ["rounds=often", "most_mismatch=high", "seed=x"])
def test_a_word_in_place_of_a_number_is_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"captioning.{option}: give a number"):
        captioned.loops_of(config(f"captioning.{option}"))


def test_unknown_caption_choices_and_missing_ratios_are_refused() -> None:
    cfg = config("captioning.captions=mine")
    with pytest.raises(UserError, match=r"captioning\.captions=mine is unknown: give given, best, auto"):
        captioned.requested(cfg, instantiate(cfg.prune, _convert_="all"))
    cfg = config("ratio=null")
    with pytest.raises(UserError, match="ratio=null: prune=rsprune_dldc cannot tell how much to remove"):
        ratio_of(cfg, RSPruneDLDC(), "rsprune_dldc")
    assert ratio_of(cfg, DLDC(), "dldc") is None


# ---------------------------------------------------------------- a corpus of files


KINDS = {"meadow": (60, 150, 60), "desert": (200, 170, 110), "water": (30, 60, 120)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """150 images of 32 px in three folders; captions for all but five, every seventh of them of another kind."""
    root = tmp_path_factory.mktemp("pairs") / "images"
    random = np.random.default_rng(0)
    rows = []
    for number in range(150):
        kind = list(KINDS)[number % 3]
        (root / kind).mkdir(parents=True, exist_ok=True)
        pixels = np.array(KINDS[kind]) + random.normal(0, 25, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / kind / f"{number:03d}.png")
        message = list(KINDS)[(number + (number % 7 == 6) * (1 + number % 2)) % 3]
        text = f"an aerial view of {message}, {['open', 'wide', 'flat'][int(random.integers(3))]} {message} all over"
        if number % 30:
            rows.append({"file_name": f"{kind}/{number:03d}.png", "text": text})
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def is_wrong(ids: pd.Series) -> np.ndarray:
    return (ids.str.extract(r"(\d+)\.png")[0].astype(int) % 7 == 6).to_numpy()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def of_folder(folder: Path, runs: Path, *overrides: str) -> DictConfig:
    return config(
        "corpus=folder", f"corpus.root={folder}", "corpus.train.split=all", "corpus.train.resolution=32",
        "encoder.input_size=32", "leaks=0", "tracker=none", f"runs={runs}", f"results={runs}", *overrides,
    )  # fmt: skip


def test_dldc_cleans_a_corpus_of_files(folder: Path, runs: Path) -> None:
    directory, corpus = select(of_folder(folder, runs, "prune=dldc", "ratio=null"), "dldc")
    table, summary = pd.read_parquet(directory / "selection.parquet"), read_json(directory / "summary.json")
    [result] = (runs / "captions").iterdir()
    candidates = pd.read_parquet(result / CAPTIONS)
    given = candidates[candidates["round"] == 0].set_index("image")
    wrong, flagged = is_wrong(given["id"]), given["mismatch"].to_numpy() > 0.6
    assert flagged[wrong].mean() > 0.5 and flagged[~wrong].mean() < 0.05
    chosen = candidates[candidates["chosen"]].set_index("image")
    best = chosen["mismatch"].reindex(range(150))
    np.testing.assert_array_equal(table["kept"], best.le(0.6))  # all images with a good caption, given or new
    assert summary["ratio"] == pytest.approx(1 - table["kept"].mean()) and summary["kept"] == table["kept"].sum()
    assert summary["captions"]["pairs"] == len(candidates) and summary["method"] == "dldc"
    assert (candidates["source"] == "offline").any() and set(table["scene"]) == set(KINDS)
    assert corpus.manifest["caption"].tolist() == chosen["caption"].reindex(range(150)).tolist()
    assert (given["source"] == "scene name").sum() == 5  # images without a caption get the name of their folder


def test_choosing_the_best_captions_does_not_change_a_random_selection(folder: Path, runs: Path) -> None:
    arguments = (folder, runs, "prune=random", "ratio=0.5")
    given, plain = select(of_folder(*arguments), "random")
    best, corpus = select(of_folder(*arguments, "captioning.captions=best"), "random")
    assert best == given and plain.captions == "" and corpus.captions
    changed = (plain.manifest["caption"] != corpus.manifest["caption"]).to_numpy()
    wrong = is_wrong(plain.manifest["id"])
    assert changed[wrong].mean() > 0.4 and changed[~wrong].mean() < 0.1
    assert pd.read_parquet(best / "selection.parquet")["kept"].sum() == 75


def test_a_method_that_reads_scores_can_keep_the_given_captions(folder: Path, runs: Path) -> None:
    arguments = ("prune=rsprune_dldc", "ratio=0.5", "reference.per_scene=20", "captioning.captions=given")
    directory, corpus = select(of_folder(folder, runs, *arguments, "captioning.describe=none"), "rsprune_dldc")
    assert corpus.captions == "" and not corpus.manifest["caption"].str.contains("percent").any()
    table = pd.read_parquet(directory / "selection.parquet")
    mismatched = read_json(directory / "summary.json")["diagnostics"]["mismatched"]
    assert table["kept"].sum() == 75 and (table["reason"] == MISMATCHED).sum() == mismatched > 10
    assert is_wrong(table["id"][table["reason"] == MISMATCHED]).mean() > 0.9


def test_a_corpus_without_labels_uses_strata_as_scenes(folder: Path, tmp_path: Path) -> None:
    """Strata replace scenes, the same for every training seed; the default reference, the corpus, has no scenes."""
    flat = tmp_path / "flat"
    flat.mkdir()
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    for path in sorted(folder.glob("*/*.png")):
        (flat / path.name).symlink_to(path)
    lines = [json.dumps({**row, "file_name": row["file_name"].split("/")[1]}) + "\n" for row in rows]
    (flat / "captions.jsonl").write_text("".join(lines))
    for options in ("reference=corpus", "reference=none", "seed=1"):
        cfg = of_folder(flat, tmp_path / "runs", "prune=dldc", "ratio=0.5", "captioning.describe=none", options)
        directory, _ = select(cfg, "dldc")
        table = pd.read_parquet(directory / "selection.parquet")
        assert table["kept"].sum() == 75 and 1 < table["scene"].nunique() < 40 and (table["scene"] != "").all()
    assert len(list((tmp_path / "runs" / "captions").iterdir())) == 1


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("place")


SMOKE = ("profile=smoke", "corpus.train.limit=160", "encoder.input_size=64", "tracker=none", "leaks=0")


@pytest.mark.parametrize("prune", ["prune=dldc", "prune=rsprune_dldc"])
def test_the_command_writes_a_selection_and_finds_it_again(place: Path, forked, prune: str) -> None:  # noqa: F811
    name = prune.removeprefix("prune=")
    ratio = "ratio=null" if name == "dldc" else "ratio=0.85"
    arguments = ("prune/run.py", *SMOKE, prune, ratio)
    directory = ran(*arguments, cwd=place, by=forked)
    table, summary = pd.read_parquet(directory / "selection.parquet"), read_json(directory / "summary.json")
    assert summary["method"] == name and len(table) == 160 and (directory / "pairs.html").is_file()
    if name == "dldc":
        [result] = (place / "runs" / "captions").iterdir()
        candidates = pd.read_parquet(result / CAPTIONS)
        clean = candidates[candidates["chosen"] & (candidates["mismatch"] <= 0.6)]
        assert table["id"][table["kept"]].tolist() == clean["id"].tolist()
    else:
        assert table["kept"].sum() == 24
    assert ran(*arguments, cwd=place, by=forked) == directory


def test_ratio_null_gives_a_one_line_error_for_a_method_that_needs_a_ratio(place: Path, forked) -> None:  # noqa: F811
    done = forked("prune/run.py", *SMOKE, "prune=rsprune", "ratio=null", cwd=place)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert "ratio=null: prune=rsprune cannot tell how much to remove, give ratio=0.85 for example" in done.stderr
