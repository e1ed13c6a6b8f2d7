"""Exported shards are pruned in the same way as their source; broken files in a folder are counted consistently."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_commands import forked, ran  # noqa: F401
from test_sources import encoded, texture

from corpus import decoding
from corpus.index import Corpus, index_corpus, open_corpus
from corpus.sources.folder import ImageFolder
from runtime.artefacts import COMPLETE, read_json

SCENES = ("Beach", "DenseForest", "river")
FAST = ("tracker=none", "runs=runs", "results=results", "encoder.input_size=32", "corpus.workers=1")


def corpus_of(selection: Path) -> Corpus:
    """The corpus of a selection."""
    return open_corpus(selection.parents[1] / "corpus" / read_json(selection / COMPLETE)["inputs"]["corpus"])


def kept_of(selection: Path) -> dict[str, np.ndarray]:
    """Kept images by id."""
    table = pd.read_parquet(selection / "selection.parquet")
    rows = np.flatnonzero(table["kept"])
    return dict(zip(table["id"].iloc[rows], corpus_of(selection).images[rows], strict=True))


def there_and_back(folder: tuple[str, ...], reference: tuple[str, ...], home: Path, by) -> tuple[Path, Path]:
    """Selections of a folder and of the shards to which all of its images were exported, with the same options."""
    whole = ran("prune/run.py", "corpus=folder", *folder, "prune=full", *reference, *FAST, cwd=home, by=by)
    done = by(
        "scripts/export.py", f"selection={whole}", "to=webdataset", "export.out=shards", "export.shard_size=17",
        "tracker=none", cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    last = len(list((home / "shards").glob("*.tar"))) - 1
    assert last > 0
    shards = ("corpus=webdataset", f"corpus.urls='shards/subset-{{000000..{last:06d}}}.tar'", "corpus.train.split=all")
    one, other = (
        ran("prune/run.py", *corpus, "prune=rsprune", "ratio=0.5", *reference, *FAST, cwd=home, by=by)
        for corpus in (("corpus=folder", *folder), shards)
    )
    assert one != other and corpus_of(other).name == "webdataset"
    return one, other


def assert_the_same(one: Path, other: Path, count: int) -> None:
    """Both selections keep the same half of the images, for the same reasons."""
    first, second = kept_of(one), kept_of(other)
    assert set(first) == set(second) and len(first) == count - round(0.5 * count)
    assert all((first[identifier] == second[identifier]).all() for identifier in first)
    tables = [pd.read_parquet(path / "selection.parquet").set_index("id").sort_index() for path in (one, other)]
    pd.testing.assert_frame_equal(*tables)
    assert len(tables[0]) == count and tables[0]["scene"].nunique() > 1
    summaries = [read_json(path / "summary.json") for path in (one, other)]
    for key in (
        "images",
        "kept",
        "scenes",
        "true_scenes",
        "reasons",
        "quarantined",
        "entropy_threshold",
        "diagnostics",
    ):
        assert summaries[0][key] == summaries[1][key], key


def picture(scene: int, seed: int) -> Image.Image:
    """A texture with the colour and grain of its scene."""
    random = np.random.default_rng([scene, seed])
    grain = random.integers(0, 256, (6 * (scene + 1), 6 * (scene + 1), 3), dtype=np.uint8)
    colour = np.array([(210, 190, 120), (20, 90, 30), (40, 80, 160)][scene])
    rough = np.asarray(Image.fromarray(grain).resize((72, 72), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray((colour * 0.6 + rough * random.uniform(0.1, 0.4)).astype(np.uint8))


@pytest.mark.slow
def test_a_folder_and_its_shards_are_pruned_alike(tmp_path: Path, forked) -> None:  # noqa: F811
    rows = []
    for number in range(41):
        scene, (kind, suffix) = number % 3, [("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif")][number % 4 % 3]
        (tmp_path / "corpus" / SCENES[scene]).mkdir(parents=True, exist_ok=True)
        name = f"{SCENES[scene]}/{number:02d} é.{suffix}"
        (tmp_path / "corpus" / name).write_bytes(encoded(picture(scene, number), kind))
        rows.append({"file_name": name, "captions": [f"number {number}"], "split": "train" if number % 5 else "test"})
    (tmp_path / "corpus" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    folder = ("corpus.root=corpus", "corpus.train.split=all")
    one, other = there_and_back(folder, ("reference=folder", "reference.root=corpus"), tmp_path, forked)
    assert_the_same(one, other, 41)
    captions = corpus_of(other).manifest.set_index("id")["caption"]
    assert {row["file_name"]: row["captions"][0] for row in rows} == captions.to_dict()


@pytest.mark.slow
def test_aid_and_its_shards_are_pruned_alike(shared_data: Path, tmp_path: Path, forked) -> None:  # noqa: F811
    root = shared_data / "aid"
    if not root.is_dir():
        pytest.skip("../shared/data/aid is absent")
    folder = (f"corpus.root={root}", "corpus.train.split=all", "corpus.train.limit=120")
    reference = ("reference=folder", f"reference.root={root}", "+reference.source.limit=300")
    one, other = there_and_back(folder, reference, tmp_path, forked)
    assert_the_same(one, other, 120)
    assert corpus_of(one).manifest["scene"].nunique() == 30


# ------------------------------------------------------------------------------------------------------- quarantined

GOOD = 12
BROKEN = {
    "empty.jpg": (b"", decoding.EMPTY),
    "cut.jpg": (encoded(texture(side=64), "JPEG")[:-900], decoding.DAMAGED),
    "page.jpg": (b"<!DOCTYPE html><html><body>404 not found</body></html>", decoding.NOT_AN_IMAGE),
    "page again.png": (b"<html></html>", decoding.NOT_AN_IMAGE),
}


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Good images and broken ones, difficult names, and a dangling link."""
    root = tmp_path / "messy"
    for number in range(GOOD):
        (root / SCENES[number % 3]).mkdir(parents=True, exist_ok=True)
        (root / SCENES[number % 3] / f"{number}.png").write_bytes(encoded(picture(number % 3, number)))
    for name, (data, _) in BROKEN.items():
        (root / "river" / name).write_bytes(data)
    for seed, name in enumerate((b"a b\nc.png", b"\xff\xfe, \xe9.png")):
        with open(os.fsencode(root / "Beach") + b"/" + name, "wb") as file:
            file.write(encoded(picture(0, 100 + seed)))
    with open(os.fsencode(root / "Beach") + b"/broken \n\xff.jpg", "wb") as file:
        file.write(BROKEN["cut.jpg"][0])
    (root / "gone.png").symlink_to(root / "nothing.png")
    return root


@pytest.mark.slow
def test_every_file_is_kept_dropped_or_quarantined_once(messy: Path, tmp_path: Path, forked) -> None:  # noqa: F811
    """The selection's counts and table of broken files equal those of the corpus."""
    selection = ran(
        "prune/run.py", "corpus=folder", f"corpus.root={messy}", "corpus.train.split=all", "prune=rsprune",
        "ratio=0.5", *FAST, cwd=tmp_path, by=forked,
    )  # fmt: skip
    table = pd.read_parquet(selection / "selection.parquet")
    summary, corpus = read_json(selection / "summary.json"), corpus_of(selection)
    on_disk = sum(len(files) for _, _, files in os.walk(os.fsencode(messy)))
    assert len(table) == on_disk == GOOD + len(BROKEN) + 4 == summary["images"]
    assert table["id"].is_unique and table["id"].tolist() == corpus.manifest["id"].tolist()
    assert {"Beach/a b\nc.png", r"Beach/\xff\xfe, \xe9.png"} <= set(table.loc[table["reason"] != "unreadable", "id"])

    expected = {f"river/{name}": reason for name, (_, reason) in BROKEN.items()}
    expected |= {"Beach/broken \n\\xff.jpg": decoding.DAMAGED, "gone.png": decoding.VANISHED}
    for directory in (selection, corpus.directory):
        quarantine = pd.read_parquet(directory / "quarantine.parquet")
        assert quarantine["id"].is_unique
        assert dict(zip(quarantine["id"], quarantine["reason"], strict=True)) == expected
    reasons = corpus.manifest.loc[~corpus.readable].set_index("id")["reason"]
    assert reasons.to_dict() == expected
    assert summary["quarantined"] == {reason: list(expected.values()).count(reason) for reason in expected.values()}

    kept, quarantined = set(table.loc[table["kept"], "id"]), set(expected)
    dropped = set(table.loc[~table["kept"] & (table["reason"] != "unreadable"), "id"])
    assert len(kept) + len(dropped) + len(quarantined) == len(table), "none is counted twice"
    assert kept | dropped | quarantined == set(table["id"])
    assert set(table.loc[table["reason"] == "unreadable", "id"]) == quarantined
    assert set(table.loc[table["reason"] == "kept", "id"]) == kept and len(kept) == len(table) - round(len(table) / 2)
    assert summary["unreadable"] == len(quarantined) and summary["kept"] == len(kept)
    assert summary["reasons"] == table["reason"].value_counts().to_dict() and (table["reason"] != "").all()
    report = (selection / "report.html").read_text(encoding="utf-8")
    assert f"{len(kept)} of {len(table)} images kept" in report and "</html>" in report


# --------------------------------------------------------------------------------------------------------- row groups


def test_a_manifest_is_written_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of millions of rows can be read in pieces: each row group contains exactly its rows."""
    (tmp_path / "corpus").mkdir()
    for number in range(11):
        data = encoded(texture(number)) if number != 6 else b"broken"
        (tmp_path / "corpus" / f"{number:02d}.png").write_bytes(data)
    monkeypatch.setattr("corpus.index.ROW_GROUP", 4)
    corpus = index_corpus(ImageFolder(str(tmp_path / "corpus"), resolution=16), tmp_path / "runs")
    file = pq.ParquetFile(corpus.directory / "manifest.parquet")
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [4, 4, 3]
    for number in range(3):
        part = file.read_row_group(number).to_pandas()
        assert part["id"].tolist() == [f"{row:02d}.png" for row in range(4 * number, min(11, 4 * number + 4))]
        assert part["readable"].tolist() == [row != "06.png" for row in part["id"]]
    assert corpus.manifest["id"].tolist() == [f"{number:02d}.png" for number in range(11)]
