"""train, val and test: by the names of a data set, else by a hash, and never the same image in two."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_sources import encoded, shard, texture

from corpus import splits
from corpus.sources.folder import ImageFolder
from corpus.sources.huggingface import HuggingFace
from corpus.sources.webdataset import WebDataset
from corpus.splits import (
    NAMES,
    assigned,
    check,
    copies_across_splits,
    elsewhere,
    folder_split,
    hashed_split,
    part_names,
    split_of,
)
from runtime.errors import UserError
from runtime.notices import notice

IDS = [f"images/{number:05d}.png" for number in range(20_000)]
#: SHA-256 of the held-out ids of `IDS`, one per line, from before the val split was introduced.
HELD_OUT_BEFORE = {
    0.1: "0ec83a7e345d295136449ddbb6a6006c9b72979d9926e6c4c859faae4c37c785",
    0.3: "ea96e32e42e9abc20e753896f1e33fa4965a6cd9a7f8b611ff593cfa9d7c0781",
}
CORPORA = ("bluemarble", "folder", "geotiff", "huggingface", "torchgeo", "webdataset")


@pytest.fixture(autouse=True)
def notices_again() -> None:
    notice.cache_clear()


def place(identifier: str) -> float:
    """Position of an id in [0, 1), by the first eight bytes of its hash."""
    return int(hashlib.sha256(identifier.encode()).hexdigest()[:16], 16) / 2**64


@pytest.mark.parametrize("test_fraction", HELD_OUT_BEFORE)
@pytest.mark.parametrize("val_fraction", [0.0, 0.1, 0.5])
def test_adding_val_does_not_change_the_test_ids(test_fraction: float, val_fraction: float) -> None:
    chosen = [hashed_split(identifier, val_fraction, test_fraction) for identifier in IDS]
    test = "\n".join(identifier for identifier, split in zip(IDS, chosen, strict=True) if split == "test")
    assert hashlib.sha256(test.encode()).hexdigest() == HELD_OUT_BEFORE[test_fraction]
    assert chosen.count("val") / len(IDS) == pytest.approx(val_fraction, abs=0.01)
    for identifier, split in zip(IDS, chosen, strict=True):
        expected = "test" if place(identifier) < test_fraction else "train"
        assert split == ("val" if test_fraction <= place(identifier) < test_fraction + val_fraction else expected)


def of(names: list[str], **fractions: float) -> dict[str, set[str]]:
    """Ids of each split if the split name of id k is names[k % len(names)]."""
    given = [names[number % len(names)] for number in range(len(IDS))]
    result = assigned("photos", IDS, given, **{"val_fraction": 0.1, "test_fraction": 0.2, **fractions})
    of_split = {name: {i for i, split in zip(IDS, result, strict=True) if split == name} for name in splits.SPLITS[1:]}
    assert sum(map(len, of_split.values())) == len(IDS)
    return of_split


def named(names: list[str], *requested: str) -> set[str]:
    return {identifier for number, identifier in enumerate(IDS) if names[number % len(names)] in requested}


def test_three_named_splits_are_unchanged(capsys: pytest.CaptureFixture) -> None:
    names = ["train", "dev", "test", "train"]
    assert of(names) == {"train": named(names, "train"), "val": named(names, "dev"), "test": named(names, "test")}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [[""], ["train"], ["Training"]], ids=str)
def test_images_without_split_names_or_of_train_alone_are_split_by_hash(names: list[str]) -> None:
    result = of(names)
    assert result["test"] == {identifier for identifier in IDS if place(identifier) < 0.2}
    assert result["val"] == {identifier for identifier in IDS if 0.2 <= place(identifier) < 0.1 + 0.2}


def test_val_is_taken_from_train_if_only_train_and_test_are_named(capsys: pytest.CaptureFixture) -> None:
    names = ["train", "train", "testing"]
    result = of(names)
    assert result["test"] == named(names, "testing")
    assert result["val"] == {identifier for identifier in named(names, "train") if place(identifier) < 0.1}
    assert result["train"] == named(names, "train") - result["val"]
    assert capsys.readouterr().err == (
        f"photos: the data set has no val split: a hash of the id takes {len(result['val'])} as val from its "
        "train images\n"
    )
    assert of(names, val_fraction=0.0)["train"] == named(names, "train") and capsys.readouterr().err == ""


def test_half_of_val_becomes_test_if_only_train_and_val_are_named(capsys: pytest.CaptureFixture) -> None:
    names = ["train", "validation", "train"]
    result = of(names)
    assert result["train"] == named(names, "train")
    assert result["val"] | result["test"] == named(names, "validation") and not result["val"] & result["test"]
    assert result["test"] == {identifier for identifier in named(names, "validation") if place(identifier) < 0.5}
    line = f"has no test split: a hash of the id takes {len(result['test'])} as test from its val images"
    assert capsys.readouterr().err.count(line) == 1


def test_images_without_a_split_name_are_split_by_hash_beside_named_ones() -> None:
    names = ["train", "val", "test", ""]
    result, nameless = of(names), named(names, "")
    assert {identifier for identifier in nameless if place(identifier) < 0.2} == result["test"] & nameless
    assert named(names, "val") < result["val"] and named(names, "test") < result["test"]


def test_images_with_an_unknown_split_name_are_held_out_as_test(capsys: pytest.CaptureFixture) -> None:
    names = ["train", "val", "mystery"]
    assert of(names)["test"] == named(names, "mystery")
    assert capsys.readouterr().err == ("photos: unknown split name mystery: its images are held out as test\n")


@pytest.mark.parametrize("names", [["val"], ["test"], ["val", "test"]], ids=str)
def test_images_named_held_out_are_never_trained_on(names: list[str]) -> None:
    result = of(names)
    assert not result["train"] and result["val"] == named(names, "val") and result["test"] == named(names, "test")


def test_the_same_line_is_reported_once(capsys: pytest.CaptureFixture) -> None:
    for _ in range(3):
        of(["train", "test"])
    assert capsys.readouterr().err.count("\n") == 1


def test_part_names_are_split_names_only_if_one_is_train() -> None:
    assert part_names(["train", "extra", "test"]) == {"train": "train", "extra": "extra", "test": "test"}
    assert part_names(["test"]) == {"test": ""} and part_names(["a", "validation"]) == {"a": "", "validation": ""}


def test_usual_split_names_are_known() -> None:
    assert set(NAMES.values()) == {"train", "val", "test"} and all(name == name.lower() for name in NAMES)
    for name, split in (("training", "train"), ("validation", "val"), ("dev", "val"), ("eval", "test")):
        assert NAMES[name] == split


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("validation", 0.1, 0.1, None, 64), "all, train, val, test"),
        (("all", -0.1, 0.1, None, 64), "corpus.val_fraction=-0.1"),
        (("all", 0.1, 1.0, None, 64), "corpus.test_fraction=1.0"),
        (("all", 0.5, 0.5, None, 64), "leave nothing to train on"),
        (("all", 0.1, 0.1, 0, 64), "corpus.limit=0"),
        (("all", 0.1, 0.1, None, 0), "corpus.resolution=0"),
    ],
)
def test_invalid_split_options_give_a_one_line_error(options: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(*options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CORPORA)
def test_every_corpus_has_three_parts_that_differ_in_their_split(name: str, repository: Path) -> None:
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        plain = compose("config", [f"corpus={name}"]).corpus
        changed = compose(
            "config",
            [f"corpus={name}", "corpus.train.resolution=128", "corpus.test.resolution=96", "corpus.train.limit=7",
             "corpus.val.limit=5", "corpus.train.split=all"],
        ).corpus  # fmt: skip
        smoke = compose("config", [f"corpus={name}", "profile=smoke"]).corpus
    OmegaConf.resolve(plain)
    own = {"split", "stride"}  # held-out tiles of Blue Marble are closer together
    parts = {part: {k: v for k, v in plain[part].items() if k not in own} for part in ("train", "val", "test")}
    assert parts["train"] == parts["val"] == parts["test"] and parts["train"]["limit"] is None
    assert [plain[part].split for part in parts] == list(parts)
    assert [changed[part].split for part in parts] == ["all", "val", "test"]
    assert [changed[part].resolution for part in parts] == [128, 128, 96]
    assert [changed[part].limit for part in parts] == [7, 5, None]
    assert [smoke[part].limit for part in parts] == [480, 400, 400]


# ------------------------------------------------------------------------------------- split names of users' data sets


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Training", "train"), ("train2017", "train"), ("trainA", "train"), ("train-00000-of-00005", "train"),
        ("images_train", "train"), ("TrainSet", "train"), ("train_val", "train"), ("restval", "train"),
        ("val2014", "val"), ("VALID", "val"), ("val_images", "val"), ("dev1", "val"), ("Validation ", "val"),
        ("test_a", "test"), ("testB", "test"), ("test-dev", "test"), ("hold-out", "test"), ("evaluation", "test"),
        ("train_station", ""), ("trainstation", ""), ("Beach", ""), ("2019", ""), ("images", ""), ("a", ""), ("", ""),
        ("contest", ""), ("valley", ""), ("Trained", ""), ("development_area", ""), ("test track", ""),
    ],
)  # fmt: skip
def test_split_of_maps_usual_names_to_splits(name: str, split: str) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("training/Beach", ("training", "Beach")), ("images/train/Beach", ("train", "Beach")), ("Beach", ("", "Beach")),
        ("train/images/Beach", ("train", "Beach")), ("Beach/test", ("test", "Beach")), ("train", ("train", "")),
        ("data/Beach/val2017", ("val2017", "data")), ("", ("", "")), ("images", ("", "")),
    ],
)  # fmt: skip
def test_split_and_scene_are_read_from_folder_names(path: str, expected: tuple[str, str]) -> None:
    assert folder_split(tuple(filter(None, path.split("/")))) == expected


@pytest.mark.parametrize("kind", ["folder", "rows", "shards", "table"])
def test_every_source_accepts_the_same_split_names(kind: str, tmp_path: Path) -> None:
    names = ["training"] * 12 + ["Testing"] * 4 + ["val2017"] * 4
    data = [encoded(texture(number)) for number in range(len(names))]
    sources = {"folder": ImageFolder, "rows": ImageFolder, "shards": WebDataset, "table": HuggingFace}
    place = tmp_path / "a.tar" if kind == "shards" else tmp_path
    table = pd.DataFrame({"image": [{"bytes": one, "path": None} for one in data], "split": names})
    if kind == "folder" or kind == "rows":
        for number, name in enumerate(names):
            folder = tmp_path / (f"{name}/Beach" if kind == "folder" else "Beach")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(data[number])
    if kind == "rows":
        lines = (f'{{"file_name": "Beach/{n}.png", "text": "no {n}", "split": "{s}"}}' for n, s in enumerate(names))
        (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    elif kind == "shards":
        metadata = [(f"{number}.json", f'{{"split": "{name}"}}'.encode()) for number, name in enumerate(names)]
        shard(place, [*((f"{number}.png", one) for number, one in enumerate(data)), *metadata])
    elif kind == "table":
        table.to_parquet(tmp_path / "all.parquet")
    counts = [len(sources[kind](str(place), split=split).manifest()) for split in ("train", "val", "test")]
    assert counts == [12, 4, 4]


def test_parts_of_a_data_set_accept_the_same_split_names() -> None:
    parts = {"Training": 5, "test_a": 3, "validation-1": 2}
    assert part_names(parts) == {name: name for name in parts}
    named = [name for name, count in parts.items() for _ in range(count)]
    result = assigned("photos", [str(number) for number in range(10)], named, 0.1, 0.1)
    assert result == ["train"] * 5 + ["test"] * 3 + ["val"] * 2


def test_images_without_a_split_name_are_counted(capsys: pytest.CaptureFixture) -> None:
    of(["train", "val", "test", ""])
    assert capsys.readouterr().err == ("photos: 5000 of 20000 images have no split name: a hash decides their split\n")


# -------------------------------------------------------------------------------------------------------------- copies


def test_copies_are_in_the_split_of_the_first_copy() -> None:
    firsts = np.arange(len(IDS)) // 2 * 2  # every image and the one after it
    result = assigned("photos", IDS, [""] * len(IDS), 0.1, 0.2, firsts)
    assert result[::2] == result[1::2] == [hashed_split(identifier, 0.1, 0.2) for identifier in IDS[::2]]
    assert result[::2] == assigned("photos", IDS, [""] * len(IDS), 0.1, 0.2)[::2]


def test_a_copy_without_a_split_name_gets_that_of_its_named_copy() -> None:
    ids, firsts = ["a", "b", "c", "d"], np.array([0, 0, 2, 2])
    assert assigned("photos", ids, ["", "test", "val", "train"], 0.1, 0.1, firsts) == ["test", "test", "val", "train"]
    assert assigned("photos", ids, ["val", "", "train", "test"], 0.0, 0.0, firsts)[1] == "val"


def test_copies_across_named_splits_are_counted(capsys: pytest.CaptureFixture) -> None:
    firsts = np.array([0, 0, 0, 3, 4, 4])
    assert elsewhere("photos", ["train", "train", "test", "val", "val", "test"], firsts) == [
        "test", "test", "train", "", "test", "val",
    ]  # fmt: skip
    assert capsys.readouterr().err.startswith(
        "photos: 2 images have exact copies in more than one split of the data set (train and test 1, val and test 1)"
    )
    assert elsewhere("photos", ["train"] * 6, firsts) == [""] * 6 and capsys.readouterr().err == ""


def equal_files(root: Path, count: int, large: bool = False) -> None:
    """`count` images with two names each, in folders of two scenes; as BMP all have the same size."""
    for number in range(count):
        image = texture(number, side=96 if large else 16)
        for folder in ("sea", "field"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            image.save(root / folder / f"{'copy_of_' * (folder == 'sea')}{number:02d}.{'bmp' if large else 'png'}")


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("content_hash", [False, True])
@pytest.mark.parametrize("kind", ["folder", "shards", "table"])
def test_no_copy_of_a_held_out_image_is_trained_on(kind: str, content_hash: bool, large: bool, tmp_path: Path) -> None:
    equal_files(tmp_path / "a", 20, large)
    files = sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file())
    options = {"test_fraction": 0.3} if kind == "table" else {"test_fraction": 0.3, "content_hash": content_hash}
    if kind == "folder":
        read = lambda split: ImageFolder(str(tmp_path / "a"), split=split, **options)  # noqa: E731
    elif kind == "shards":
        members = [(str(path.relative_to(tmp_path / "a")), path.read_bytes()) for path in files]
        shard(tmp_path / "a.tar", members[:25])
        shard(tmp_path / "b.tar", members[25:])
        read = lambda split: WebDataset(f"{tmp_path}/{{a,b}}.tar", split=split, **options)  # noqa: E731
    else:
        rows = [{"id": path.name, "image": {"bytes": path.read_bytes(), "path": None}} for path in files]
        pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
        read = lambda split: HuggingFace(str(tmp_path), split=split, **options)  # noqa: E731
    held: dict[str, str] = {}
    for split in ("train", "val", "test"):
        source = read(split)
        table = source.manifest()
        assert "copy_in" not in table and copies_across_splits(table) == 0
        for data, _, _ in source.originals(np.arange(len(table))):
            assert held.setdefault(hashlib.sha256(data).hexdigest(), split) == split
    assert len(held) == 20 and set(held.values()) == {"train", "val", "test"}


def test_images_without_copies_keep_their_hashed_split(tmp_path: Path) -> None:
    """All have the same size and equal ends: only the complete content distinguishes them."""
    for number in range(40):
        data = bytearray(b"\0" * 20_000)
        data[10_000] = number
        (tmp_path / f"{number:02d}.png").write_bytes(data)
    for split in ("train", "val", "test"):
        result = ImageFolder(str(tmp_path), split=split, test_fraction=0.3).manifest()["id"].tolist()
        names = [f"{number:02d}.png" for number in range(40)]
        assert result == [name for name in names if hashed_split(name, 0.1, 0.3) == split]


def test_copies_between_named_folders_are_listed_in_a_column(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split, numbers in (("train", range(6)), ("test", range(4, 8)), ("val", range(9, 11))):
        (tmp_path / split).mkdir()
        for number in numbers:
            texture(number).save(tmp_path / split / f"{number}.png")
    train, val, test = (ImageFolder(str(tmp_path), split=split).manifest() for split in ("train", "val", "test"))
    assert dict(zip(train["id"], train["copy_in"], strict=True)) == {
        f"train/{number}.png": "test" if number > 3 else "" for number in range(6)
    }
    assert [copies_across_splits(table) for table in (train, val, test)] == [2, 0, 2]
    line = "2 images have exact copies in more than one split of the data set (train and test 2)"
    assert capsys.readouterr().err.count(line) == 1
