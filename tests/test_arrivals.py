"""New images against a kept set: verdicts by brute force, parts against the whole, an unchanged selection."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from corpus.index import Corpus
from corpus.locations import ELSEWHERE, SAME, UNKNOWN, Locations
from prune import neighbour_index
from prune.arrival_stages import (
    Thresholds,
    answered,
    arrive,
    budget_option,
    comparison_with_kept,
    nearest_others,
    union,
)
from prune.arrivals import Gathered, ImageData, Likeness, fill, first_of_scenes, swaps
from prune.clusters import Points
from prune.kept import Kept, KeptIndex, as_selected, open_selection
from prune.likeness import PairRule
from prune.neighbour_index import nearest, new_index, paired_cosines, read_index, write_index
from prune.scenes import Prototypes
from prune.selection import select
from runtime.application import CONFIGS
from runtime.errors import UserError
from runtime.notices import notice

ROOT = Path(__file__).resolve().parent.parent
SIDE, WIDTH = 12, 16
FLOOR, REDUNDANT, NEAR, BITS = 0.2, 0.97, 0.6, 1.0


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# ---------------------------------------------------------------- the index


def test_the_index_agrees_with_brute_force_and_can_be_saved_and_loaded(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    known, requested = (unit(generator.normal(size=(n, 24))).astype(np.float32) for n in (300, 40))
    index = new_index(known, len(known))
    index.add(known)
    result = nearest(index, requested, 5)
    half = known.astype(np.float16).astype(np.float32)
    expected = np.argsort(-(requested @ half.T), axis=1)[:, :5]
    assert (result == expected).mean() > 0.99  # except for ties in half precision
    assert write_index(index, tmp_path / "i.faiss") == (tmp_path / "i.faiss").stat().st_size < 300 * 24 * 2 + 500
    assert (nearest(read_index(tmp_path / "i.faiss"), requested, 5) == result).all()
    assert (
        nearest(index, requested[:1], 400).shape == (1, 400)
        and (nearest(index, requested[:1], 400)[0, 300:] == -1).all()
    )
    np.testing.assert_allclose(
        paired_cosines(requested, known[result]), np.take_along_axis(requested @ known.T, result, axis=1), atol=1e-6
    )


def test_a_large_index_is_approximate_and_still_finds_near_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbour_index, "EXACT", 500)
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(40, 96))
    known = unit(centres[generator.integers(40, size=3000)] + generator.normal(size=(3000, 96))).astype(np.float32)
    index = new_index(known, len(known))
    index.add(known)
    requested = unit(known[:400] + 0.02 * generator.normal(size=(400, 96))).astype(np.float32)
    result = nearest(index, requested, 8)
    assert (result == np.arange(400)[:, None]).any(axis=1).mean() > 0.98
    inverted = faiss.extract_index_ivf(index)
    assert inverted.nprobe == neighbour_index.PROBES < inverted.nlist  # only a part of the lists is searched


# ---------------------------------------------------------------- the budget


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.integers(0, 60))
def test_filling_scenes_equals_adding_one_image_at_a_time_to_the_smallest_scene(scenes: list, budget: int) -> None:
    kept, available = (np.array(values) for values in zip(*scenes, strict=True))
    added = np.zeros(len(kept), int)
    for _ in range(min(budget, int(available.sum()))):
        open_scenes = np.flatnonzero(added < available)
        added[open_scenes[np.argmin((kept + added)[open_scenes])]] += 1
    assert fill(kept, available, budget).tolist() == added.tolist()


def test_the_first_images_of_each_scene_are_chosen() -> None:
    chosen = first_of_scenes(np.array([1, 0, 1, 1, 2, 0]), np.array([1, 2, 0]))
    assert chosen.tolist() == [True, True, True, False, False, False]


def test_an_exchange_needs_enough_gain_and_keeps_one_of_two_similar_images() -> None:
    similarity, neighbour = np.array([0.99, 0.99, 0.5, 0.9]), np.array([1, 0, 3, 2])
    order = np.array([0, 1, 3, 2])
    assert swaps(np.array([0.4, 0.3, 0.2]), similarity, neighbour, order) == [(0, 0), (1, 3)]
    assert swaps(np.array([0.05, 0.04]), similarity, neighbour, order) == [(0, 0)]


# ---------------------------------------------------------------- arrivals as arrays


class Held(Kept):
    """A selection with embeddings in memory."""

    embeddings = np.empty((0, WIDTH), np.float16)


def corpus_of(name: str, ids: np.ndarray, images: np.ndarray, readable: np.ndarray, **columns: np.ndarray) -> Corpus:
    table = pd.DataFrame({"id": ids, "readable": readable, "reason": np.where(readable, "", "not an image"), **columns})
    return Corpus(name, Path(name), images, table, None, ())


class World:
    """60 of 80 images are kept; of 120 arrivals many repeat kept images or one another."""

    def __init__(self, seed: int, **columns: np.ndarray) -> None:
        random = np.random.default_rng(seed)
        centres = random.normal(size=(5, WIDTH)) * 2
        base = centres[random.integers(5, size=80)] + random.normal(size=(80, WIDTH))
        pixels = random.integers(0, 256, (200, SIDE, SIDE, 3), dtype=np.uint8)
        rows = np.sort(random.permutation(80)[:60])
        new = centres[random.integers(5, size=120)] + random.normal(size=(120, WIDTH))
        new[:10] = random.normal(size=(10, WIDTH)) * 3  # of no scene
        images = pixels[80:].copy()
        for at, source in enumerate(random.integers(80, size=20), 20):  # copies and near-duplicates of the corpus
            new[at] = base[source] + random.normal(size=WIDTH) * 0.05
            images[at] = pixels[source]
            if at % 2:
                images[at] = np.clip(images[at] * 0.9 + random.normal(0, 2, images[at].shape), 0, 255)
        for at, source in enumerate(random.integers(60, 100, size=20), 100):  # and of other arrivals
            new[at] = new[source] + random.normal(size=WIDTH) * (0.02 if at % 3 else 0.4)
            if at % 4 < 3:  # the others are similar only for the encoder
                images[at] = images[source] if at % 2 else np.clip(images[source] * 0.8, 0, 255)
        self.entropy = random.uniform(0.8, 6, 120).astype(np.float32)
        self.readable = random.random(120) > 0.05
        self.entropy[~self.readable] = 0
        self.embeddings, self.images = new.astype(np.float16), images
        self.ids = np.array([f"new/{number:03d}" for number in random.permutation(120)])
        self.columns = columns
        vectors = unit(centres).astype(np.float32)
        prototypes = Prototypes(np.zeros(WIDTH, np.float32), vectors, np.arange(5), tuple("abcde"), FLOOR)
        known = corpus_of("known", np.array([f"old/{n:02d}" for n in range(80)]), pixels[:80], np.ones(80, bool))
        table = pd.DataFrame({"id": known.manifest["id"][rows].to_numpy(), "row": rows})
        held = type("Held", (Held,), {"embeddings": base.astype(np.float16)})
        self.kept = held(Path("s"), Path("r"), {}, {"ratio": 0.75, "method": "m"}, known, table)
        points = Points(held.embeddings, prototypes.centre)
        index = new_index(points[rows], 60)
        index.add(points[rows])
        self.counts = np.bincount((points[rows] @ vectors.T).argmax(axis=1), minlength=6)
        self.index = KeptIndex("f", index, prototypes, self.counts, (REDUNDANT, None), 0)
        likeness = Likeness(self.index.similarities(0.99), NEAR, 8, PairRule())
        self.limits = Thresholds(BITS, likeness)

    def answer(self, parts: list[np.ndarray], budget: str | int = "growing") -> pd.DataFrame:
        tables, data = [], []
        for number, rows in enumerate(parts):
            columns = {name: values[rows] for name, values in self.columns.items()}
            corpus = corpus_of(str(number), self.ids[rows], self.images[rows], self.readable[rows], **columns)
            locations = Locations.together([Locations.of(corpus.manifest, SIDE)])
            data.append(ImageData(Points(self.embeddings[rows], np.zeros(WIDTH, np.float32)), corpus.images, locations))
            tables.append(
                comparison_with_kept(corpus, self.entropy[rows], data[-1], self.kept, self.index, self.limits)
            )
        table, together = union(tables, data)
        return answered(table, together, self.kept, self.index, self.limits.likeness, budget).set_index("id")


def brute_force(world: World) -> dict[str, tuple[str, str]]:
    """Verdicts before the budget and the repeated images, image by image, with NumPy only."""

    def correlation(first: np.ndarray, second: np.ndarray) -> float:
        return np.corrcoef(first.mean(-1).ravel(), second.mean(-1).ravel())[0, 1]

    def repeated(vector, image, need, others) -> tuple[str, str] | None:
        others = sorted(others, key=lambda other: -float(vector @ other[1]))
        close = [(name, pixels, float(vector @ other)) for name, other, pixels in others]
        for name, pixels, cosine in close:
            if cosine >= min(need, NEAR) and (pixels == image).all():
                return "copy", name
        for name, pixels, cosine in close:
            if cosine >= NEAR and correlation(pixels, image) >= 0.95:
                return "near_duplicate", name
        return next((("redundant", name) for name, _, cosine in close if cosine >= need), None)

    old, new = (unit(values.astype(np.float32)) for values in (world.kept.embeddings, world.embeddings))
    known = [
        (str(name), old[row], world.kept.corpus.images[row]) for name, row in world.kept.table.itertuples(index=False)
    ]
    result, free = {}, []
    for at, name in enumerate(world.ids):
        best = (world.index.prototypes.vectors @ new[at]).max()
        need = REDUNDANT if best >= FLOOR else 0.99
        if not world.readable[at]:
            result[name] = ("unreadable", "")
        elif world.entropy[at] < BITS:
            result[name] = ("low_entropy", "")
        elif (hit := repeated(new[at], world.images[at], need, known)) is not None:
            result[name] = hit
        else:
            gain = 1 - max(float(new[at] @ vector) for _, vector, _ in known)
            digest = hashlib.blake2b(world.images[at].tobytes(), digest_size=8).hexdigest()
            free.append((-round(gain * 100), digest, name, at, need))
    leaders: list = []
    for _, _, name, at, need in sorted(free):
        hit = repeated(new[at], world.images[at], need, leaders)
        result[name] = hit or ("free", "")
        if hit is None:
            leaders.append((name, new[at], world.images[at]))
    return result


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_verdict_agrees_with_brute_force(seed: int) -> None:
    world = World(seed)
    table = world.answer([np.arange(120)])
    expected = brute_force(world)
    free = table["verdict"].isin(["worth_adding", "not_needed"])
    verdict = table["verdict"].mask(free, "free")
    assert verdict.to_dict() == {name: hit[0] for name, hit in expected.items()}
    repeats = verdict.isin(["copy", "near_duplicate", "redundant"])
    assert table["duplicate_of"][repeats].to_dict() == {n: expected[n][1] for n in table.index[repeats]}
    assert set(table["duplicate_in"][repeats]) == {"kept", "arrived"}
    assert {"copy", "near_duplicate", "redundant", "low_entropy", "unreadable"} <= set(verdict)
    assert table["added"].sum() == min(30, free.sum()) == (table["verdict"] == "worth_adding").sum()
    assert table["unknown_scene"].sum() == (table["scene"] == "open").sum() > 0


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 3), st.lists(st.integers(0, 119), max_size=4), st.randoms(use_true_random=False))
def test_arrivals_in_parts_and_any_order_get_the_same_answer_as_all_at_once(seed: int, cuts: list[int], random) -> None:
    world, order = World(seed), list(range(120))
    budget = random.choice(["growing", "fixed", 7])
    whole = world.answer([np.arange(120)], budget)
    random.shuffle(order)
    parts = [np.array(part) for part in np.split(np.array(order), sorted(cuts)) if len(part)]
    again = np.array(order[:5])  # some arrive twice
    result = world.answer([*parts, again], budget)
    columns = ["verdict", "added", "duplicate_of", "replaces", "scene", "nearest_kept", "gain", "correlation"]
    pd.testing.assert_frame_equal(result[columns].sort_index(), whole[columns].sort_index(), rtol=1e-5)


def test_a_fixed_budget_replaces_each_redundant_kept_image_at_most_once() -> None:
    world = World(4)
    table = world.answer([np.arange(120)], "fixed")
    added = table[table["added"]]
    assert len(added) and added["replaces"].is_unique and set(added["replaces"]) <= set(world.kept.table["id"])
    assert (table.loc[~table["added"], "replaces"] == "").all()
    old = unit(world.kept.embeddings[world.kept.rows].astype(np.float32))
    cosines = old @ old.T
    np.fill_diagonal(cosines, -1)
    similarity, neighbour = nearest_others(world.kept, world.index)
    np.testing.assert_allclose(similarity, cosines.max(axis=1), atol=2e-3)
    assert (neighbour == cosines.argmax(axis=1)).mean() > 0.95
    lost = pd.Series(similarity, world.kept.table["id"])[added["replaces"]].to_numpy()
    assert (added["gain"].to_numpy() > 1 - lost).all()


def test_a_number_as_budget_limits_the_added_images_and_other_values_are_refused() -> None:
    world = World(5)
    assert [int(world.answer([np.arange(120)], most)["added"].sum()) for most in (0, 3)] == [0, 3]
    assert [budget_option(value) for value in ("growing", "fixed", 3)] == ["growing", "fixed", 3]
    for value in ("shrinking", -1, 0.5, True, None):
        with pytest.raises(UserError, match=r"^arrive\.budget=.* is unknown"):
            budget_option(value)


def test_options_decide_if_other_dates_and_locations_count_as_duplicates() -> None:
    """Arrivals with almost the same pixels: of one location and date, of another date, of another location."""
    verdicts = {}
    for name, place, date, rule in (
        ("same", 10.0, "2020-05-01", PairRule()),
        ("later", 10.0, "2021-05-01", PairRule()),
        ("later counts", 10.0, "2021-05-01", PairRule(other_date="duplicate")),
        ("elsewhere", 50.0, "2020-05-01", PairRule()),
        ("elsewhere counts", 50.0, "2020-05-01", PairRule(elsewhere="duplicate")),
    ):
        lon = np.linspace(-170, 170, 120)
        dates = np.full(120, "2020-05-01", dtype=object)
        lon[[60, 61]], dates[61] = (10.0, place), date
        world = World(6, lon=lon, lat=np.zeros(120), date=dates, ground_sampling_distance=np.full(120, 10.0))
        world.readable[[60, 61]], world.entropy[[60, 61]] = True, 5
        world.limits = Thresholds(BITS, Likeness(world.limits.likeness.similarity, NEAR, 8, rule))
        world.embeddings[60] = np.random.default_rng(9).normal(size=WIDTH) * 2
        world.embeddings[61] = world.embeddings[60] * np.float16(1.01)
        world.images[61] = np.clip(world.images[60] * 0.9, 0, 255)
        result = world.answer([np.arange(120)])["verdict"][world.ids[[60, 61]]]
        verdicts[name] = set(result) - {"worth_adding", "not_needed"}
    assert verdicts == {
        "same": {"near_duplicate"}, "later": set(), "later counts": {"near_duplicate"},
        "elsewhere": {"redundant"}, "elsewhere counts": {"near_duplicate"},
    }  # fmt: skip


def test_rows_gathered_from_several_arrays_equal_those_of_their_concatenation() -> None:
    parts = [np.arange(6).reshape(3, 2), np.arange(6, 14).reshape(4, 2)]
    gathered, whole = Gathered(parts), np.concatenate(parts)
    assert gathered.shape == whole.shape and len(gathered) == 7
    for rows in (slice(2, 5), np.array([6, 0, 3, 3]), np.array([], dtype=int)):
        assert (gathered[rows] == whole[rows]).all()


def test_locations_share_ground_if_their_squares_overlap() -> None:
    metres = 1 / 111_320
    table = pd.DataFrame(
        {
            "Lon": [0, 0, 0, 0, np.nan, 179.9999], "lat": [0, 0, 60, 0, 0, 0],
            "ground_sampling_distance": [1.0, 1.0, 1.0, np.nan, 1.0, 1.0],
            "date": ["2020", "2020-03-01", "2020-03-02T10:00:00Z", 2021, "", "no date"], "ground": [*list("aabba"), ""],
        }
    )  # fmt: skip
    first = Locations.of(table, 100)
    moved = table.assign(Lon=table["Lon"] + np.array([99, 101, 150, 50, 0, 0]) * metres)
    moved.loc[5, "Lon"] = -179.9999
    second = Locations.of(moved.assign(ground=["a", "b", "b", "a", "b", ""]), 100)
    assert first.ground_of(second, one_grid=False).tolist() == [SAME, ELSEWHERE, SAME, UNKNOWN, UNKNOWN, SAME]
    assert first.ground_of(second, one_grid=True).tolist() == [SAME, ELSEWHERE, SAME, ELSEWHERE, ELSEWHERE, SAME]
    dates = first[np.array([0, 0, 1, 1, 1])].on_other_date(first[np.array([1, 3, 2, 1, 4])])
    assert dates.tolist() == [False, True, True, False, False]


# ---------------------------------------------------------------- from files


def landscape(seed: int, side: int = 48) -> np.ndarray:
    random = np.random.default_rng(seed)
    smooth = gaussian_filter(random.normal(size=(side, side, 3)), (3, 3, 0))
    return np.clip(128 + 40 * smooth / smooth.std() + random.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def save(path: Path, image: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images to prune in `old`; new images, copies of both, plain images and a broken one in `new/a` and `new/b`."""
    root = tmp_path_factory.mktemp("arrivals")
    for number in range(60):
        save(root / "old" / f"{number:02d}.png", landscape(number))
    for number in range(20):
        part = root / "new" / "ab"[number % 2]
        save(part / f"new{number:02d}.png", landscape(100 + number))
        save(part / f"again{number:02d}.jpg", landscape(number), quality=92)
        save(part / f"same{number:02d}.png", landscape(20 + number))
        save(part / f"plain{number:02d}.png", np.full((48, 48, 3), 10 * number, np.uint8))
        twice = root / "new" / "ba"[number % 2]
        if number < 6:
            save(twice / f"twice{number:02d}.jpg", landscape(100 + number), quality=92)
    (root / "new" / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    return root


OPTIONS = ("tracker=none", "encoder.input_size=32", "leaks=0")


def config(root: Path, runs: Path, *overrides: str):
    notice.cache_clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", ["corpus=folder", f"corpus.root={root}", f"runs={runs}", *overrides])


@pytest.fixture(scope="module")
def selection(folders: Path) -> Path:
    options = ("corpus.train.split=all", "corpus.train.resolution=32", "ratio=0.5", "prune=rsprune")
    return select(config(folders / "old", folders / "runs", *options, *OPTIONS), "rsprune")[0]


def arrived(selection: Path, root: Path, *overrides: str) -> Path:
    kept = open_selection(selection)
    cfg = config(root, selection.parent.parent, "tracker=none", *overrides)
    return arrive(as_selected(cfg, kept, {}), kept)


def state(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}" for path in files}


def read(directory: Path) -> pd.DataFrame:
    table = pd.read_parquet(directory / "arrivals.parquet")
    for name in ("id", "duplicate_of"):
        table[name] = table[name].str.rpartition("/")[2]
    return table.set_index("id").sort_index()


def test_files_in_parts_get_the_same_verdicts_and_the_selection_is_unchanged(
    folders: Path, selection: Path, capsys
) -> None:
    before = state(selection)
    whole = arrived(selection, folders / "new")
    table, summary = read(whole), json.loads((whole / "summary.json").read_text())
    assert "87 images arrived" in capsys.readouterr().err
    kept = set(pd.read_parquet(selection / "selection.parquet").query("kept")["id"])
    for name, row in table.iterrows():
        kind, number = str(name).rstrip(".pngj")[:-2], str(name).rpartition(".")[0][-2:]
        if kind.startswith("plain"):
            assert row["verdict"] == "low_entropy"
        elif kind.startswith("same") and f"{int(number) + 20:02d}.png" in kept:
            assert (row["verdict"], row["duplicate_of"]) in (
                ("copy", f"{int(number) + 20:02d}.png"), ("low_entropy", f"{int(number) + 20:02d}.png"),
            )  # fmt: skip
        elif kind.startswith("again") and f"{number}.png" in kept and row["verdict"] != "low_entropy":
            assert (row["verdict"], row["duplicate_of"]) == ("near_duplicate", f"{number}.png")
    assert table["verdict"]["broken.jpg"] == "unreadable"
    pairs = [{f"new{n:02d}.png", f"twice{n:02d}.jpg"} for n in range(6)]
    assert all((table["verdict"][sorted(pair)] == "near_duplicate").sum() <= 1 for pair in pairs)
    assert sum((table["verdict"][sorted(pair)] == "near_duplicate").sum() for pair in pairs) >= 4
    assert summary["arrived"] == 87 == sum(summary["verdicts"].values())
    assert summary["added"] == table["added"].sum() <= 87 - round(0.5 * 87)
    assert (whole / "report.html").stat().st_size > 10_000

    ends = []
    for order in ("ab", "ba"):
        first = arrived(selection, folders / "new" / order[0])
        ends.append(arrived(selection, folders / "new" / order[1], f"arrive.after={first}"))
    assert ends[0] == ends[1]
    assert "images so far, " in capsys.readouterr().err
    columns = ["verdict", "added", "duplicate_of", "scene", "nearest_kept"]
    pd.testing.assert_frame_equal(read(ends[0])[columns], table[columns])
    assert state(selection) == before


def test_invalid_selections_and_options_that_contradict_them_are_refused(
    folders: Path, selection: Path, tmp_path: Path
) -> None:
    for place, message in ((None, "selection=null"), (tmp_path, "is not a selection: give the directory")):
        with pytest.raises(UserError, match=message):
            open_selection(place)
    kept = open_selection(selection)
    cfg = config(folders / "new", tmp_path, "encoder=efficientnet_lite2")
    with pytest.raises(UserError, match="encoder differs from that"):
        as_selected(cfg, kept, {"encoder": "efficientnet_lite2"})
    assert as_selected(cfg, kept, {}).encoder == kept.inputs["encoder"]
    with pytest.raises(UserError, match=r"corpus\.train\.resolution=64: the images of .* have 32 px"):
        as_selected(cfg, kept, {"corpus.train.resolution": "64"})
    result = as_selected(cfg, kept, {})
    assert result.corpus.train.resolution == 32 and result.corpus.train.split == "all"
    assert as_selected(cfg, kept, {"corpus.train.split": "train"}).corpus.train.split == "train"
    with pytest.raises(UserError, match=r"arrive\.after=.* is not a result of prune/arrive\.py"):
        arrived(selection, folders / "new", f"arrive.after={tmp_path}")
    with pytest.raises(UserError, match=r"arrive\.near=2"):
        arrived(selection, folders / "new", "arrive.near=2")
    with pytest.raises(UserError, match="other_date=never is unknown: give distinct or duplicate"):
        arrived(selection, folders / "new", "other_date=never")


def test_random_and_rsprune_selections_have_scenes_and_thresholds(folders: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "labelled"
    for number in range(14):
        save(labelled / "hill" / f"{number}.png", landscape(number))
        bright = np.clip(landscape(500 + number).astype(int) // 3 + 150, 0, 255).astype(np.uint8)
        save(labelled / "field" / f"{number}.png", bright)
    for method in ("random", "rsprune"):
        runs = tmp_path / method
        options = ("corpus.train.split=all", "corpus.train.resolution=32", "ratio=0.5", f"prune={method}")
        made = select(config(labelled, runs, *options, *OPTIONS), method)[0]
        summary = json.loads((arrived(made, folders / "new" / "a") / "summary.json").read_text())
        assert set(summary["scenes"]) == {"field", "hill", "open"}
        assert sum(part["kept"] for part in summary["scenes"].values()) == 14
        bits = json.loads((made / "summary.json").read_text())["entropy_threshold"]
        if method == "random":
            bits = float(pd.read_parquet(made / "selection.parquet").query("kept")["entropy"].quantile(0.05))
        assert summary["thresholds"]["entropy_bits"] == pytest.approx(bits)
        [path] = (runs / "arrival_index").glob("*/index.json")
        metadata = json.loads(path.read_text())
        if method == "random":
            assert metadata["scene_agreement"] is None and metadata["similarity"] == [None, None]
        else:
            assert metadata["scene_agreement"] == 1 and metadata["similarity"][0] <= metadata["similarity"][1] == 0.98
            noted = json.loads((made / "summary.json").read_text())["diagnostics"]["open_threshold"]
            assert metadata["threshold"] == pytest.approx(noted)


@pytest.mark.slow
def test_the_command_prints_its_result_folder_and_exits_with_2_on_bad_input(
    folders: Path, selection: Path, tmp_path: Path
) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "prune" / "arrive.py"), "tracker=none", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=600)

    new = f"corpus.root={folders / 'new'}"
    done = call(f"selection={selection}", "corpus=folder", new, f"runs={folders / 'runs'}", "arrive.budget=fixed")
    assert done.returncode == 0, done.stderr
    kind, _, directory = done.stdout.splitlines()[-1].partition(": ")
    assert kind == "arrivals" and len(pd.read_parquet(Path(directory) / "arrivals.parquet")) == 87
    done = call(f"selection={tmp_path}", "corpus=folder", new)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: selection=") and done.stdout == ""
