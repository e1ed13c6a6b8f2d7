"""Held-out sets: balanced and natural draws, halves on disjoint ground, refusals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from eval.held_out import balanced_rows, halves, held_out_sets, second_sets
from runtime.errors import UserError


@dataclass(frozen=True)
class Mean:
    """An encoder: the mean colour."""

    name: str = "mean"
    batch_size: int = 16
    dimensions: int = 3

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.mean(axis=(1, 2)).astype(np.float32)


class Made(SimpleNamespace):
    """The attributes of a corpus that the held-out sets read."""

    def __len__(self) -> int:
        return len(self.manifest)


def made(scenes: list[str], ground: list[str] | None = None, unreadable: tuple[int, ...] = ()) -> Made:
    readable = np.ones(len(scenes), dtype=bool)
    readable[list(unreadable)] = False
    manifest = pd.DataFrame({"scene": scenes, "caption": [f"of {scene}" for scene in scenes]})
    if ground is not None:
        manifest["ground"] = ground
    images = np.arange(len(scenes), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    return Made(name="made", manifest=manifest, images=images, readable=readable, fingerprint="f")


def test_every_leading_part_of_a_balanced_set_is_balanced():
    corpus = made(["sea"] * 80 + ["ice"] * 12 + ["land"] * 8)
    rows = balanced_rows(corpus, corpus.readable, 30, np.random.default_rng(0))
    scenes = corpus.manifest["scene"].to_numpy()[rows]
    assert len(set(rows)) == 30
    assert [sorted(scenes[start : start + 3]) for start in (0, 3, 21)] == [["ice", "land", "sea"]] * 3
    assert (scenes == "land").sum() == 8  # it has no more, so its turns go to the others


def test_halves_are_disjoint_and_have_no_common_ground():
    ground = [f"{index // 10:02d}" if index % 10 < 8 else "" for index in range(100)]
    corpus = made(["sea", "ice"] * 50, ground, unreadable=(3,))
    first, second = halves(corpus, seed=0)
    assert not (first & second).any() and not (first | second)[[3, 8, 9]].any()
    grounds = [set(corpus.manifest["ground"].to_numpy()[part]) for part in (first, second)]
    assert grounds == [{"00", "02", "04", "06", "08"}, {"01", "03", "05", "07", "09"}]
    plain = halves(made(["sea"] * 60 + ["ice"] * 40), seed=0)
    assert not (plain[0] & plain[1]).any() and (plain[0] | plain[1]).all()
    assert [int(part[:60].sum()) for part in plain] == [30, 30]


def test_first_and_second_held_out_sets_have_no_common_image(tmp_path: Path):
    corpus = made(["sea"] * 60 + ["ice"] * 40)
    first = held_out_sets(corpus, [Mean()], 20, 0, tmp_path)
    second = second_sets(corpus, [Mean()], 20, 0, tmp_path)
    for name, held in first.items():
        np.testing.assert_array_equal(held.features["mean"], Mean()(corpus.images[held.rows]))
        assert held.captions == [f"of {scene}" for scene in corpus.manifest["scene"].to_numpy()[held.rows]]
        assert len(held.first(5)) == len(held.first(5).features["mean"]) == 5
        assert not {*held.rows.tolist()} & {*second[name].rows.tolist()}
    assert first["balanced"].rows.tolist() == held_out_sets(corpus, [Mean()], 20, 0, tmp_path)["balanced"].rows.tolist()


def test_a_small_split_gives_only_one_set_and_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus = made(["sea"] * 18 + ["ice"] * 12)
    assert len(held_out_sets(corpus, [Mean()], 25, 0, tmp_path)["natural"]) == 25
    assert second_sets(corpus, [Mean()], 25, 0, tmp_path) == {}
    assert "no row real_held_out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"30 usable images, eval\.images=31"):
        held_out_sets(corpus, [Mean()], 31, 0, tmp_path)
