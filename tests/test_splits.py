"""train, val and test: by the names that a data set gives, else by a hash, and never the same image in two."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from corpus import splits
from corpus.splits import NAMES, assigned, check, hashed_split, part_names
from runtime.errors import UserError

IDS = [f"images/{number:05d}.png" for number in range(20_000)]
#: SHA-256 of the held-out ids of `IDS`, a line each, as they were before there was a val split.
HELD_OUT_BEFORE = {
    0.1: "0ec83a7e345d295136449ddbb6a6006c9b72979d9926e6c4c859faae4c37c785",
    0.3: "ea96e32e42e9abc20e753896f1e33fa4965a6cd9a7f8b611ff593cfa9d7c0781",
}
CORPORA = ("bluemarble", "folder", "geotiff", "huggingface", "torchgeo", "webdataset")


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    splits._tell.cache_clear()


def place(identifier: str) -> float:
    """Where in [0, 1) an id lies, by the hash's first eight bytes."""
    return int(hashlib.sha256(identifier.encode()).hexdigest()[:16], 16) / 2**64


@pytest.mark.parametrize("test_share", HELD_OUT_BEFORE)
@pytest.mark.parametrize("val_share", [0.0, 0.1, 0.5])
def test_the_test_ids_are_those_from_before_val(test_share: float, val_share: float) -> None:
    chosen = [hashed_split(identifier, val_share, test_share) for identifier in IDS]
    test = "\n".join(identifier for identifier, split in zip(IDS, chosen, strict=True) if split == "test")
    assert hashlib.sha256(test.encode()).hexdigest() == HELD_OUT_BEFORE[test_share]
    assert chosen.count("val") / len(IDS) == pytest.approx(val_share, abs=0.01)
    for identifier, split in zip(IDS, chosen, strict=True):
        expected = "test" if place(identifier) < test_share else "train"
        assert split == ("val" if test_share <= place(identifier) < test_share + val_share else expected)


def of(names: list[str], **shares: float) -> dict[str, set[str]]:
    """Ids of each split where id k is named names[k % len(names)]."""
    given = [names[number % len(names)] for number in range(len(IDS))]
    found = assigned("photos", IDS, given, **{"val_share": 0.1, "test_share": 0.2, **shares})
    of_split = {name: {i for i, split in zip(IDS, found, strict=True) if split == name} for name in splits.SPLITS[1:]}
    assert sum(map(len, of_split.values())) == len(IDS)
    return of_split


def named(names: list[str], *wanted: str) -> set[str]:
    return {identifier for number, identifier in enumerate(IDS) if names[number % len(names)] in wanted}


def test_three_named_splits_stay_as_they_are(capsys: pytest.CaptureFixture) -> None:
    names = ["train", "dev", "test", "train"]
    assert of(names) == {"train": named(names, "train"), "val": named(names, "dev"), "test": named(names, "test")}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [[""], ["train"], ["Training"]], ids=str)
def test_nothing_named_or_train_alone_goes_by_the_hash(names: list[str]) -> None:
    found = of(names)
    assert found["test"] == {identifier for identifier in IDS if place(identifier) < 0.2}
    assert found["val"] == {identifier for identifier in IDS if 0.2 <= place(identifier) < 0.1 + 0.2}


def test_val_comes_out_of_train_where_train_and_test_are_named(capsys: pytest.CaptureFixture) -> None:
    names = ["train", "train", "testing"]
    found = of(names)
    assert found["test"] == named(names, "testing")
    assert found["val"] == {identifier for identifier in named(names, "train") if place(identifier) < 0.1}
    assert found["train"] == named(names, "train") - found["val"]
    line = capsys.readouterr().err
    assert line == (
        f"photos: the data set names no val: of its train images a hash of the id takes {len(found['val'])} as val\n"
    )
    assert of(names, val_share=0.0)["train"] == named(names, "train") and capsys.readouterr().err == ""


def test_half_of_val_is_test_where_train_and_val_are_named(capsys: pytest.CaptureFixture) -> None:
    names = ["train", "validation", "train"]
    found = of(names)
    assert found["train"] == named(names, "train")
    assert found["val"] | found["test"] == named(names, "validation") and not found["val"] & found["test"]
    assert found["test"] == {identifier for identifier in named(names, "validation") if place(identifier) < 0.5}
    assert capsys.readouterr().err.count("names no test: of its val images") == 1


def test_an_image_without_a_name_goes_by_the_hash_beside_those_with_one() -> None:
    names = ["train", "val", "test", ""]
    found, nameless = of(names), named(names, "")
    assert {identifier for identifier in nameless if place(identifier) < 0.2} == found["test"] & nameless
    assert named(names, "val") < found["val"] and named(names, "test") < found["test"]


def test_what_has_an_unknown_name_is_not_trained_on(capsys: pytest.CaptureFixture) -> None:
    names = ["train", "val", "holdout"]
    assert of(names)["test"] == named(names, "holdout")
    assert capsys.readouterr().err == ("photos: no known split is called holdout: its images are held out as test\n")


@pytest.mark.parametrize("names", [["val"], ["test"], ["val", "test"]], ids=str)
def test_images_named_held_out_are_never_trained_on(names: list[str]) -> None:
    found = of(names)
    assert not found["train"] and found["val"] == named(names, "val") and found["test"] == named(names, "test")


def test_the_same_line_is_said_once(capsys: pytest.CaptureFixture) -> None:
    for _ in range(3):
        of(["train", "test"])
    assert capsys.readouterr().err.count("\n") == 1


def test_parts_of_a_data_set_name_splits_where_one_is_trained_on() -> None:
    assert part_names(["train", "extra", "test"]) == {"train": "train", "extra": "extra", "test": "test"}
    assert part_names(["test"]) == {"test": ""} and part_names(["a", "validation"]) == {"a": "", "validation": ""}


def test_every_usual_name_is_known() -> None:
    assert set(NAMES.values()) == {"train", "val", "test"} and all(name == name.lower() for name in NAMES)
    for name, split in (("training", "train"), ("validation", "val"), ("dev", "val"), ("eval", "test")):
        assert NAMES[name] == split


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("validation", 0.1, 0.1, None, 64), "all, train, val, test"),
        (("all", -0.1, 0.1, None, 64), "corpus.val_share=-0.1"),
        (("all", 0.1, 1.0, None, 64), "corpus.test_share=1.0"),
        (("all", 0.5, 0.5, None, 64), "leave nothing to train on"),
        (("all", 0.1, 0.1, 0, 64), "corpus.limit=0"),
        (("all", 0.1, 0.1, None, 0), "corpus.resolution=0"),
    ],
)
def test_what_cannot_be_split_is_one_line(options: tuple, message: str) -> None:
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
    own = {"split", "stride"}  # held-out tiles of Blue Marble lie closer
    parts = {part: {k: v for k, v in plain[part].items() if k not in own} for part in ("train", "val", "test")}
    assert parts["train"] == parts["val"] == parts["test"] and parts["train"]["limit"] is None
    assert [plain[part].split for part in parts] == list(parts)
    assert [changed[part].split for part in parts] == ["all", "val", "test"]
    assert [changed[part].resolution for part in parts] == [128, 128, 96]
    assert [changed[part].limit for part in parts] == [7, 5, None]
    assert [smoke[part].limit for part in parts] == [480, 400, 400]
