"""What splits share: copies in other formats are found, images of one kind are none."""

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
from prune.leaks import WORST, announce_leaks, leak_grids, leaks, near_duplicates
from prune.likeness import PairRule, correlation
from prune.selection import select
from runtime.application import CONFIGS
from runtime.notices import notice

SIDE = 48


def landscape(seed: int) -> np.ndarray:
    """Smooth colours with some grain, uint8 [SIDE, SIDE, 3]."""
    random = np.random.default_rng(seed)
    smooth = gaussian_filter(random.normal(size=(SIDE, SIDE, 3)), (4, 4, 0))
    return np.clip(128 + 40 * smooth / smooth.std() + random.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def sea(seed: int) -> np.ndarray:
    """Plain blue with a grain of a few levels, as no two places share it."""
    grain = np.random.default_rng(seed).normal(0, 2, (SIDE, SIDE, 1))
    return np.clip(np.array([20, 40, 90]) + grain, 0, 255).astype(np.uint8)


def save(root: Path, name: str, image: np.ndarray | Image.Image, **options: object) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(root / name, **options)


@pytest.fixture
def leaking(tmp_path: Path) -> Path:
    """Of 12 test images three are training images again: as JPEG, brighter, and enlarged; others are new, or sea."""
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


def test_copies_in_another_format_are_found_and_no_others(leaking: Path, tmp_path: Path, capsys) -> None:
    corpus = index_corpus(ImageFolder(str(leaking), split="train", resolution=32), tmp_path / "runs")
    held_out = {name: ImageFolder(str(leaking), split=name, resolution=32) for name in ("val", "test")}
    pairs, looked = near_duplicates(corpus, held_out["test"], 2000)
    assert looked == 12 and dict(zip(pairs["held_out"], pairs["image"], strict=True)) == {
        "test/a/0.jpg": "train/a/03.png", "test/a/1.png": "train/a/07.png", "test/a/2.png": "train/a/11.png",
    }  # fmt: skip
    found = leaks(corpus, held_out, 2000, tmp_path / "runs")
    assert found["exact_copies"] == 0
    assert {name: part["near_duplicates"] for name, part in found["held_out"].items()} == {"val": 0, "test": 3}
    assert len(pd.read_parquet(tmp_path / "runs" / found["held_out"]["test"]["pairs"])) == 3
    announce_leaks(found, "folder")
    assert "3 of 12 test images look like one that is trained on" in capsys.readouterr().err


def test_no_more_images_are_looked_at_than_asked_for(leaking: Path, tmp_path: Path) -> None:
    corpus = index_corpus(ImageFolder(str(leaking), split="train", resolution=32), tmp_path / "runs")
    source = ImageFolder(str(leaking), split="test", resolution=32)
    assert near_duplicates(corpus, source, 4)[1] == 4
    (leaking / "test" / "a" / "0.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert near_duplicates(corpus, ImageFolder(str(leaking), split="test", resolution=32), 50)[1] == 11


def test_correlation_is_that_of_numpy_and_of_plain_images_nothing() -> None:
    first, second = landscape(1), landscape(2)
    expected = np.corrcoef(first.mean(-1).ravel(), second.mean(-1).ravel())[0, 1]
    assert correlation(first, second) == pytest.approx(expected) and abs(expected) < 0.5
    assert correlation(np.full((8, 8, 3), 9, np.uint8), np.full((8, 8, 3), 9, np.uint8)) == 0


def prune(root: Path, runs: Path, *overrides: str) -> dict:
    notice.cache_clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        chosen = [f"corpus.root={root}", f"runs={runs}", "corpus.train.resolution=32", *overrides]
        cfg = compose("config", ["corpus=folder", "prune=random", "ratio=0.5", "tracker=none", *chosen])
    return json.loads((select(cfg, "random")[0] / "summary.json").read_text())


def test_the_summary_of_a_selection_tells_leaks_and_says_so(leaking: Path, tmp_path: Path, capsys) -> None:
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
    said = [line for line in capsys.readouterr().err.splitlines() if "leaks between the splits" in line]
    assert len(said) == 1 and "1 images have exact copies in another split" in said[0]
    assert prune(leaking, tmp_path / "off", "leaks=0")["leaks"] is None
    assert prune(leaking, tmp_path / "all", "corpus.train.split=all")["leaks"] is None
