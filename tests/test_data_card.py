"""The data card of an export: recomputed counts and factors, its command, and reproducible bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from test_export import KEPT, select, texture

from corpus.sources.folder import ImageFolder
from report.data_card import DATA_CARD, FORMS, Record, data_card, repeat_command, scene_balance
from scripts.export import FORMS as EXPORT_FORMS
from scripts.export import main

CORPUS = {
    "name": "folder", "licence": "CC-BY-4.0", "root": "/home/me/tiles", "bands": [4, 1, 2], "val_fraction": 0.1,
    "train": {"_target_": "corpus.sources.folder.ImageFolder", "root": "/home/me/tiles", "split": "all", "limit": None},
}  # fmt: skip
DEFAULTS = {
    "corpus": {
        "name": "folder", "licence": None, "root": None, "bands": None, "val_fraction": 0.1,
        "train": {
            "_target_": "corpus.sources.folder.ImageFolder", "root": "${..root}", "split": "train", "limit": None,
        },
    },
    "prune": {"_target_": "prune.methods.rsprune.RSPrune", "uniformity": 1.0, "scenes": True},
}  # fmt: skip


def record(**changes: object) -> Record:
    """Ten images of three scenes; the first four are kept."""
    kept = np.arange(10) < 4
    table = pd.DataFrame(
        {
            "id": [f"{row}.png" for row in range(10)],
            "kept": kept,
            "reason": np.where(kept, "kept", "redundant"),
            "scene": ["stratum 00"] * 10,
            "weight": np.where(kept, [7, 1, 1, 1, 0, 0, 0, 0, 0, 0], 0),
        }
    )
    config = {"corpus": CORPUS, "prune": {**DEFAULTS["prune"], "uniformity": 0.5}, "reference": {"source": None}}
    summary = {
        "method": "rsprune", "ratio": 0.6, "seed": 3, "quarantined": {"empty file": 2}, "versions": {"torch": "2"},
        "leaks": {"exact_copies": 1, "held_out": {"val": {"looked_at": 50, "near_duplicates": 4}}},
        "strata": {"source": "corpus", "count": 5},
    }  # fmt: skip
    stage = {
        "commit": "abc",
        "version": 5,
        "inputs": {"ratio": 0.6, "encoder": {"_target_": "e.Net"}},
        "config": config,
    }
    scenes = np.array(["sea"] * 6 + ["land"] * 3 + ["ice"], dtype=object)
    fields = {"name": "tiles", "scenes": scenes, "selection": table, "summary": summary, "stage": stage}
    return Record(**{**fields, "defaults": DEFAULTS, **changes})


def test_factors_are_fractions_of_the_subset_over_those_of_the_corpus() -> None:
    scenes, kept = ["sea"] * 6 + ["land"] * 3 + ["ice"], np.array([1, 0, 0, 0, 0, 0, 1, 1, 0, 0], bool)
    weight = np.array([6, 0, 0, 0, 0, 0, 2, 2, 0, 0], float)
    table = scene_balance(scenes, kept, weight).set_index("scene")
    assert list(table.index) == ["sea", "land", "ice"]
    for scene in table.index:
        inside = np.array(scenes) == scene
        assert table.loc[scene, "factor"] == pytest.approx((kept & inside).sum() / kept.sum() / inside.mean())
        assert table.loc[scene, "weighted"] == pytest.approx(weight[inside].sum() / 10 / inside.mean())
    assert table.loc["ice", "after"] == 0 and table["before"].sum() == 10
    random = np.random.default_rng(0)  # all kept: nothing is over- or under-represented
    same = scene_balance(random.choice(["a", "b"], 50), np.ones(50, bool), np.ones(50))
    assert np.allclose(same[["factor", "weighted"]], 1)


def test_the_card_lists_removed_images_reasons_and_biases() -> None:
    text = data_card(record(), "folder")
    assert text.startswith("# Data card: 4 of 10 images of tiles\n") and FORMS["folder"] in text
    for line in (
        "| sea     | 6               | 4               | 1.67     | 1.67       |",
        "Over-represented: sea (× 1.67). Not in the subset at all: land, ice.",
        "as precisely as 2 images of equal weight",  # 10² / 52
        "2 images could not be used", "- empty file: 2", "exact copies across splits: 1",
        "`val`: 4 near-duplicates of other splits among 50 compared images", "## Licence\n\nCC-BY-4.0",
        "5 strata by k-means on the corpus", "| RS-Prune, commit  | abc       |",
    ):  # fmt: skip
        assert line in text, text
    assert "/home/me" not in text and data_card(record(), "folder") == text


def test_unreadable_images_do_not_count_in_the_bias() -> None:
    whole = record()
    broken = whole.selection.assign(reason=np.where(np.arange(10) == 9, "unreadable", whole.selection["reason"]))
    text = data_card(record(selection=broken), "folder")
    assert "| sea     | 6               | 4               | 1.50 " in text and "| ice " not in text


def test_unlabelled_images_are_counted_by_the_scenes_of_the_method() -> None:
    text = data_card(record(scenes=np.full(10, "", dtype=object)), "list")
    assert "| stratum 00 | 10" in text and "No scene is more or less frequent" in text


def test_an_earlier_selection_without_records_has_a_card_too() -> None:
    bare = record().selection[["id", "kept", "weight"]]
    text = data_card(Record("tiles", np.full(10, "", dtype=object), bare), "webdataset")
    assert "Not given. Find out the licence" in text and "Not searched" in text


def test_the_licence_of_the_export_replaces_that_of_the_corpus() -> None:
    assert "## Licence\n\nCC0\n" in data_card(record(given_licence="CC0"), "folder")


def test_the_repeat_command_contains_the_options_that_differ_from_the_defaults() -> None:
    command = repeat_command(record())
    assert command == (
        "python prune/run.py corpus=folder corpus.licence=CC-BY-4.0 corpus.root=DIR 'corpus.bands=[4,1,2]' "
        "corpus.train.split=all reference=none prune=rsprune prune.uniformity=0.5 ratio=0.6 seed=3"
    )


@pytest.mark.parametrize("form", EXPORT_FORMS)
def test_exporting_a_form_twice_gives_the_same_data_card(form: str, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    for row in range(10):
        (root / ("sea", "land")[row % 2]).mkdir(parents=True, exist_ok=True)
        texture(row).save(root / ("sea", "land")[row % 2] / f"{row}.png")
    selection = select(ImageFolder(str(root), resolution=16, split="all"), tmp_path / "runs")
    cards = []
    for name in ("one", "two"):
        options = {"out": str(tmp_path / name), "shard_size": 100, "reencode": None}
        main(OmegaConf.create({"selection": str(selection), "to": form, "export": options}))
        cards.append((tmp_path / name / DATA_CARD).read_bytes())
    text = cards[0].decode()
    assert cards[0] == cards[1] and FORMS[form] in text and str(tmp_path) not in text
    assert f"# Data card: {len(KEPT)} of 10 images" in text and "| land " in text
