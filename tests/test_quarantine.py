"""Unreadable files are reported in one line on stderr per corpus, and a corpus with no readable image is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_commands import call, forked  # noqa: F401

from corpus.index import Source, index_corpus
from corpus.quarantine import announce, counted, reason_counts
from corpus.sources.folder import ImageFolder
from corpus.sources.huggingface import HuggingFace
from corpus.sources.webdataset import WebDataset
from runtime.errors import UserError

SIDE = 16


def texture(seed: int, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    texture(seed).save(file, "PNG")
    return file.getvalue()


def folder(root: Path, whole: int = 3, html: int = 2, empty: int = 1) -> Path:
    """A folder of valid images, web pages and empty files, in two scenes."""
    for scene in ("a", "b"):
        (root / scene).mkdir(parents=True)
    for number in range(whole):
        (root / "ab"[number % 2] / f"whole{number:02d}.png").write_bytes(png(number))
    for number in range(html):
        (root / "ab"[number % 2] / f"page{number:02d}.jpg").write_text("<html>404</html>")
    for number in range(empty):
        (root / "a" / f"empty{number:02d}.png").touch()
    return root


# ------------------------------------------------------------------------------------------------------------- grouping


def test_reasons_that_differ_only_in_values_are_grouped() -> None:
    reasons = ["mask: class 7 of 2", "empty file", "mask: class 255 of 2", "mask: class 9 of 2", "empty file"]
    assert list(reason_counts(reasons).items()) == [("mask: class … of 2", 3), ("empty file", 2)]


@pytest.mark.parametrize(
    ("reasons", "name"),
    [
        (["mask: 64 x 64 for an image of 128 x 96"] * 2, "mask: 64 x 64 for an image of 128 x 96"),
        (["mask: 64 x 64 for an image of 128 x 96", "mask: 32 x 64 for an image of 128 x 90"],
         "mask: … x 64 for an image of 128 x …"),
        (["colour #123456 is none of the 6", "colour #abcdef is none of the 6"], "colour … is none of the 6"),
        (["no image (txt, xyz)", "no image (json)"], "no image …"),
        (["value 0.25", "value -3"], "value …"),
        (["no decoder for JPEG2000"] * 2, "no decoder for JPEG2000"),
    ],
)  # fmt: skip
def test_values_that_differ_are_left_out_of_a_groups_name(reasons: list[str], name: str) -> None:
    assert reason_counts(reasons) == {name: 2}


def test_reasons_with_different_words_are_not_grouped() -> None:
    assert reason_counts(["no decoder for LERC", "no decoder for ZSTD"]) == {
        "no decoder for LERC": 1, "no decoder for ZSTD": 1,
    }  # fmt: skip
    assert reason_counts(["a\0b 1", "a b 2"]) == {"a b …": 2}


def test_five_reasons_are_named_and_the_others_counted() -> None:
    counts = {f"reason {letter}": 1200 - number for number, letter in enumerate("abcdefg")}
    assert counted(counts) == (
        "reason a 1,200, reason b 1,199, reason c 1,198, reason d 1,197, reason e 1,196 and 2 more reasons"
    )
    assert counted({name: 1 for name in "abcdef"}).endswith("e 1 and 1 more reason")
    assert counted({"no\nend " + "x" * 500: 3}) == "no end " + "x" * 112 + "… 3"


def test_the_line_counts_images_and_names_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reasons = ["duplicate key"] * 20 + [""] * 20
    table = pd.DataFrame({"id": map(str, range(40)), "readable": [not reason for reason in reasons], "reason": reasons})
    announce(table, "shards (train)", tmp_path)
    assert capsys.readouterr().err == (
        f"shards (train): 20 of 40 images quarantined: duplicate key 20 (table: {tmp_path}/quarantine.parquet)\n"
    )
    announce(table.loc[table["readable"]], "shards (train)", tmp_path)
    assert capsys.readouterr().err == "", "nothing where nothing is quarantined"
    with pytest.raises(UserError, match=r"none of 20 images can be read: duplicate key 20 \(table: .*parquet\)"):
        announce(table.loc[~table["readable"]], "shards (train)", tmp_path)


# -------------------------------------------------------------------------------------------------------- every source


def broken_folder(root: Path) -> Source:
    return ImageFolder(str(folder(root)), resolution=SIDE)


def broken_shard(root: Path) -> Source:
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as tar:
        for number, data in enumerate((*map(png, range(3)), b"no", b"no", b"")):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return WebDataset(str(root / "a.tar"), resolution=SIDE)


def broken_parquet(root: Path) -> Source:
    root.mkdir()
    images = [{"bytes": data, "path": None} for data in (*map(png, range(3)), b"no", b"no", b"")]
    pd.DataFrame({"image": images, "label": ["x"] * 6}).to_parquet(root / "train.parquet")
    return HuggingFace(str(root), resolution=SIDE)


@pytest.mark.parametrize("broken", [broken_folder, broken_shard, broken_parquet])
def test_every_source_reports_quarantined_images_and_a_cached_index_repeats_it(
    broken: Callable[[Path], Source], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from runtime.notices import notice

    source = broken(tmp_path / "corpus")
    corpus = index_corpus(source, tmp_path / "runs")
    line = (
        f"{source.name}: 3 of 6 images quarantined: not an image 2, empty file 1 "
        f"(table: {corpus.directory}/quarantine.parquet)"
    )
    assert capsys.readouterr().err.splitlines().count(line) == 1
    table = pd.read_parquet(corpus.directory / "quarantine.parquet")
    assert sorted(table["reason"]) == ["empty file", "not an image", "not an image"]
    index_corpus(source, tmp_path / "runs")
    assert line not in capsys.readouterr().err, "a command says it once"
    notice.cache_clear()  # as in the next command
    index_corpus(source, tmp_path / "runs")
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_corpus_without_readable_images_is_refused(tmp_path: Path) -> None:
    source = ImageFolder(str(folder(tmp_path / "corpus", whole=0, html=3, empty=2)), resolution=SIDE)
    for _ in range(2):  # built, and opened
        with pytest.raises(UserError) as refused:
            index_corpus(source, tmp_path / "runs")
        text = str(refused.value)
        assert text.startswith("folder: none of 5 images can be read: not an image 3, empty file 2 (table: ")
        assert "\n" not in text and Path(text.split("(table: ")[1].split(")")[0]).is_file()


# ------------------------------------------------------------------------------------------------------------ commands


def prune(by: Callable, cwd: Path, *overrides: str):
    arguments = ("corpus=folder", "prune=random", "ratio=0.5", "tracker=none", "corpus.train.resolution=16")
    return by("prune/run.py", *arguments, f"runs={cwd}/runs", *overrides, cwd=cwd)


def test_a_command_reports_quarantined_images_at_every_run(tmp_path: Path, forked) -> None:  # noqa: F811
    root = folder(tmp_path / "corpus", whole=12, html=5, empty=1)
    for _ in range(2):
        done = prune(forked, tmp_path, f"corpus.root={root}", "corpus.train.split=all")
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if "quarantined" in line]
        assert len(lines) == 1, "the reference is the corpus: it is not said twice"
        assert "6 of 18 images quarantined: not an image 5, empty file 1 (table: " in lines[0]
        assert len(done.stdout.splitlines()) == 3 and "6 unreadable" in done.stdout
    selection = Path(done.stdout.splitlines()[-1].removeprefix("selection: "))
    summary = json.loads((selection / "summary.json").read_text())
    assert summary["quarantined"] == {"not an image": 5, "empty file": 1}


def test_the_line_names_the_split(tmp_path: Path, forked) -> None:  # noqa: F811
    for split in ("train", "test"):
        folder(tmp_path / "corpus" / split, whole=6, html=3 if split == "train" else 0, empty=0)
    done = prune(forked, tmp_path, f"corpus.root={tmp_path}/corpus", "corpus.val_fraction=0")
    assert done.returncode == 0, done.stderr
    assert "folder (train): 3 of 9 images quarantined: not an image 3 " in done.stderr


def test_a_command_without_readable_images_ends_with_a_one_line_error(tmp_path: Path, forked) -> None:  # noqa: F811
    """This holds for the corpus and for the reference set of a readable corpus."""
    bad = folder(tmp_path / "bad", whole=0, html=4, empty=0)
    good = folder(tmp_path / "good", whole=8, html=0, empty=0)
    cases = {
        "folder: none of 4": (f"corpus.root={bad}", "corpus.train.split=all"),
        "folder (train): none of": (f"corpus.root={bad}", "corpus.val_fraction=0", "corpus.test_fraction=0"),
        "reference: none of 4": (
            f"corpus.root={good}", "corpus.train.split=all", "prune=rsprune", "reference=folder",
            f"reference.root={bad}", "+reference.source.name=reference",
        ),
    }  # fmt: skip
    for start, overrides in cases.items():
        done = prune(forked, tmp_path, *overrides)
        assert done.returncode == 2 and done.stdout == "", done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in done.stderr
        assert errors[0].startswith(f"error: {start}") and "not an image 4 (table: " in errors[0]
    assert not list((tmp_path / "runs").glob("selection/*/stage.json"))


def broken_in(root: Path, split: str) -> Path:
    for name in ("train", "val", "test"):
        folder(root / name, whole=0 if name == split else 12, html=2 if name == split else 0)
    return root


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_without_readable_images_is_refused(split: str, tmp_path: Path) -> None:
    source = ImageFolder(str(broken_in(tmp_path / "corpus", split)), split=split, resolution=SIDE)
    with pytest.raises(UserError, match=rf"folder \({split}\): none of 3 images can be read: not an image 2, empty"):
        index_corpus(source, tmp_path / "runs")


@pytest.mark.slow
def test_unreadable_held_out_images_end_a_pretraining(tmp_path: Path) -> None:
    root = broken_in(tmp_path / "corpus", "val")
    done = call(
        "train/pretrain.py", "profile=smoke", "corpus=folder", f"corpus.root={root}", "prune=random", "ratio=0.5",
        "tracker=none", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "error: folder (val): none of 3 images can be read: not an image 2, empty file 1" in done.stderr
