"""Shared fixtures: the process settings of the commands, a small folder corpus, the measured data sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

torch.set_flush_denormal(True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets next to the repository; the test is skipped if it does not exist."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent: it holds data sets that are not part of the repository")
    return folder


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder of eight images of two scenes, one of them broken, with captions for two.

    The images of `BaseballField` are green, those of `dry_river` brown, sizes 48 x 32 px and formats various.
    """
    root = tmp_path / "tiny"
    colours = {"BaseballField": (20, 160, 40), "dry_river": (150, 110, 60)}
    for scene, colour in colours.items():
        (root / scene / "deeper").mkdir(parents=True)
        pixels = np.full((32, 48, 3), colour, dtype=np.uint8)
        for name in ("a.png", "b.bmp", "deeper/c.tif"):
            Image.fromarray(pixels).save(root / scene / name)
    Image.fromarray(pixels).save(root / "dry_river" / "D.JPEG", quality=95)
    (root / "dry_river" / "broken.jpg").write_bytes((root / "dry_river" / "D.JPEG").read_bytes()[:200])
    rows = [
        {"file_name": "BaseballField/a.png", "captions": ["a green field", "a lawn"], "split": "train"},
        {"file_name": "dry_river/a.png", "text": "a river without water", "split": "val"},
        {"file_name": "dry_river/gone.png", "text": "of no image"},
    ]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    (root / "notes.txt").write_text("no image", encoding="utf-8")
    return root
