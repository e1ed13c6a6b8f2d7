"""Overlap between splits: copies in other formats are found; different images of one kind are not reported."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter

from corpus.index import index_corpus
from corpus.sources.folder import ImageFolder
from prune.leaks import announce_leaks, leak_grids, leaks, near_duplicates
from prune.likeness import PairRule, correlation, correlations
from prune.selection import select
from runtime.application import CONFIGS
from runtime.errors import UserError
from runtime.notices import notice

SIDE = 48


def landscape(seed: int) -> np.ndarray:
    """Smooth colours with some grain, uint8 [SIDE, SIDE, 3]."""
    random = np.random.default_rng(seed)
    smooth = gaussian_filter(random.normal(size=(SIDE, SIDE, 3)), (4, 4, 0))
    return np.clip(128 + 40 * smooth / smooth.std() + random.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def sea(seed: int) -> np.ndarray:
    """Plain blue with a grain of a few levels, different for every location."""
    grain = np.random.default_rng(seed).normal(0, 2, (SIDE, SIDE, 1))
    return np.clip(np.array([20, 40, 90]) + grain, 0, 255).astype(np.uint8)


def save(root: Path, name: str, image: np.ndarray | Image.Image, **options: object) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(root / name, **options)


@pytest.fixture
def leaking(tmp_path: Path) -> Path:
    """Three of 12 test images are training images: as JPEG, brighter, and enlarged; the others are new, or sea."""
    root = tmp_path / "data"
    for number in range(40):
        save(root, f"train/a/{number:02d}.png", landscape(number))
        save(root, f"train/sea/{number:02d}.png", sea(number))
        if number < 6:
            save(root, f"val/a/{number}.png", landscape(200 + number))
            save(root, f"test/sea/{number}.png", sea(300 + number))
    save(root, "test/a/0.jpg", landscape(3), quality=80)
    save(root, "test/a/1.png", ImageEnhance.Brightness(Image.fromarray(landscape(7))).enhance(1.15))
    save(root, "test/a/2.png", Image.fromarray(landscape(11)).resize((96, 96), Image.Resampling.BICUBIC))
    for number in range(3, 6):
        save(root, f"test/a/{number}.png", landscape(100 + number))
    return root


def test_copies_in_another_format_are_the_only_near_duplicates_found(leaking: Path, tmp_path: Path, capsys) -> None:
    corpus = index_corpus(ImageFolder(str(leaking), split="train", resolution=32), tmp_path / "runs")
    held_out = {name: ImageFolder(str(leaking), split=name, resolution=32) for name in ("val", "test")}
    pairs, looked = near_duplicates(corpus, held_out["test"], 2000)
    assert looked == 12 and dict(zip(pairs["held_out"], pairs["image"], strict=True)) == {
        "test/a/0.jpg": "train/a/03.png", "test/a/1.png": "train/a/07.png", "test/a/2.png": "train/a/11.png",
    }  # fmt: skip
    result = leaks(corpus, held_out, 2000, tmp_path / "runs")
    assert result["exact_copies"] == 0
    assert {name: part["near_duplicates"] for name, part in result["held_out"].items()} == {"val": 0, "test": 3}
    assert len(pd.read_parquet(tmp_path / "runs" / result["held_out"]["test"]["pairs"])) == 3
    announce_leaks(result, "folder")
    assert "3 of 12 test images are near-duplicates of training images" in capsys.readouterr().err


def test_at_most_the_requested_number_of_readable_images_is_searched(leaking: Path, tmp_path: Path) -> None:
    corpus = index_corpus(ImageFolder(str(leaking), split="train", resolution=32), tmp_path / "runs")
    source = ImageFolder(str(leaking), split="test", resolution=32)
    assert near_duplicates(corpus, source, 4)[1] == 4
    (leaking / "test" / "a" / "0.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert near_duplicates(corpus, ImageFolder(str(leaking), split="test", resolution=32), 50)[1] == 11


def test_correlation_equals_numpy_and_is_zero_for_constant_images() -> None:
    first, second = landscape(1), landscape(2)
    expected = np.corrcoef(first.mean(-1).ravel(), second.mean(-1).ravel())[0, 1]
    assert correlation(first, second) == pytest.approx(expected) and abs(expected) < 0.5
    assert correlation(np.full((8, 8, 3), 9, np.uint8), np.full((8, 8, 3), 9, np.uint8)) == 0


def test_correlations_of_many_pairs_equal_those_of_single_pairs() -> None:
    images = np.stack([landscape(number) for number in range(6)])
    together = correlations(images, images[::-1])
    assert together.tolist() == [correlation(*pair) for pair in zip(images, images[::-1], strict=True)]


@pytest.fixture
def placed(tmp_path: Path) -> Path:
    """Recompressed training images in val: with the same location and date, another date, another location, and none.

    One of them is in test as well, and one is the training image itself with another location.
    """
    root, rows = tmp_path / "placed", []

    def add(name: str, number: int, lon: float | None, date: str, **options: object) -> None:
        save(root, name, landscape(number), **options)
        place = {} if lon is None else {"lon": lon, "lat": 0.0, "ground_sampling_distance": 10.0}
        rows.append({"file_name": name, "date": date, **place})

    for number in range(20):
        add(f"train/a/{number:02d}.png", number, number, "2020-01-01")
        add(f"test/a/{number:02d}.png", 100 + number, number + 0.5, "2020-01-01")
    add("val/a/same.jpg", 1, 1.001, "2020-01-01", quality=85)
    add("val/a/later.jpg", 2, 2.0, "2021-06-01", quality=85)
    add("val/a/elsewhere.jpg", 3, 77.0, "2020-01-01", quality=85)
    add("val/a/nowhere.jpg", 4, None, "2022-01-01", quality=85)
    add("val/a/twin.png", 5, 80.0, "2020-01-01")
    add("val/a/new.png", 300, 90.0, "2020-01-01")
    add("test/a/too.jpg", 4, None, "2022-01-01", quality=75)
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root


def test_near_duplicates_of_other_dates_or_locations_are_counted_separately(
    placed: Path, tmp_path: Path, capsys
) -> None:
    corpus = index_corpus(ImageFolder(str(placed), split="train", resolution=32), tmp_path / "runs")
    val = ImageFolder(str(placed), split="val", resolution=32)
    pairs, looked = near_duplicates(corpus, val, 100)
    kinds = dict(zip(pairs["held_out"], pairs["kind"], strict=True))
    assert looked == 6 and kinds == {
        "val/a/same.jpg": "near_duplicate", "val/a/later.jpg": "same_location_other_date",
        "val/a/elsewhere.jpg": "look_alike_elsewhere", "val/a/nowhere.jpg": "near_duplicate",
        "val/a/twin.png": "near_duplicate",
    }  # fmt: skip
    assert pairs["counts"].tolist() == sorted(pairs["counts"], reverse=True) and pairs["counts"].sum() == 3
    for rule, count in ((PairRule("duplicate"), 4), (PairRule(elsewhere="duplicate"), 4)):
        assert near_duplicates(corpus, val, 100, rule)[0]["counts"].sum() == count

    held_out = {"val": val, "test": ImageFolder(str(placed), split="test", resolution=32)}
    result = leaks(corpus, held_out, 100, tmp_path / "runs")
    counts = {"looked_at": 6, "near_duplicates": 3, "same_location_other_date": 1, "look_alike_elsewhere": 1}
    assert counts.items() <= result["held_out"]["val"].items() and result["held_out"]["val"]["exact_copies"] == 1
    assert (result["val_test"]["looked_at"], result["val_test"]["near_duplicates"]) == (6, 1)
    [pair] = pd.read_parquet(tmp_path / "runs" / result["val_test"]["pairs"]).itertuples()
    assert (pair.held_out, pair.image, pair.kind) == ("val/a/nowhere.jpg", "test/a/too.jpg", "near_duplicate")
    announce_leaks(result, "placed")
    assert "1 of 6 val images are near-duplicates of test images" in capsys.readouterr().err

    first, second, third = leak_grids(result, tmp_path / "runs")
    assert [grid.title for grid in (first, second, third)] == ["Train and val", "Train and test", "Val and test"]
    assert list(first.columns) == ["val", "train"] and len(first.prompts) == 5 and len(third.prompts) == 1
    rows = {name: row for row, name in enumerate(corpus.manifest["id"])}
    for at, pair in enumerate(pairs.itertuples()):
        assert first.prompts[at].startswith(f"{pair.held_out} and {pair.image}: {pair.correlation:.3f}")
        assert (first.columns["train"][at] == corpus.images[rows[pair.image]]).all()
    [image] = val.reader(np.flatnonzero(val.manifest()["id"] == pairs["held_out"][2]))()
    assert (first.columns["val"][2] == image).all()


def test_the_report_shows_the_worst_pairs_and_the_pair_rule_changes_the_fingerprint(
    placed: Path, tmp_path: Path
) -> None:
    summary = prune(placed, tmp_path / "runs")
    [selection] = (tmp_path / "runs" / "selection").iterdir()
    page = (selection / "report.html").read_text()
    assert "<h2>Leaks between the splits</h2>" in page and "val/a/later.jpg and train/a/02.png" in page
    assert "same location other date" in page and page.count('alt="train: ') == 6
    assert summary["leaks"]["val_test"]["near_duplicates"] == 1
    again = prune(placed, tmp_path / "runs", "other_date=duplicate")
    assert again["leaks"]["held_out"]["val"]["near_duplicates"] == 4
    assert len(list((tmp_path / "runs" / "selection").iterdir())) == 2
    with pytest.raises(UserError, match="elsewhere=no is unknown: give distinct or duplicate"):
        prune(placed, tmp_path / "runs", "elsewhere=no")


def prune(root: Path, runs: Path, *overrides: str) -> dict:
    notice.cache_clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        chosen = [f"corpus.root={root}", f"runs={runs}", "corpus.train.resolution=32", *overrides]
        cfg = compose("config", ["corpus=folder", "prune=random", "ratio=0.5", "tracker=none", *chosen])
    return json.loads((select(cfg, "random")[0] / "summary.json").read_text())


def test_the_summary_counts_leaks_and_one_line_on_stderr_reports_them(leaking: Path, tmp_path: Path, capsys) -> None:
    buffer = io.BytesIO()
    Image.fromarray(landscape(400)).save(buffer, "PNG")
    for name in ("train/a/z.png", "val/a/z.png"):
        (leaking / name).write_bytes(buffer.getvalue())
    summary = prune(leaking, tmp_path / "runs")
    assert summary["source"] == {} and summary["leaks"]["exact_copies"] == 1
    assert {name: part["near_duplicates"] for name, part in summary["leaks"]["held_out"].items()} == {
        "val": 1,
        "test": 3,
    }
    message = [line for line in capsys.readouterr().err.splitlines() if "leaks between the splits" in line]
    assert len(message) == 1 and "1 images have exact copies in another split" in message[0]
    assert prune(leaking, tmp_path / "off", "leaks=0")["leaks"] is None
    assert prune(leaking, tmp_path / "all", "corpus.train.split=all")["leaks"] is None
