"""Captions in users' formats: every usual place and spelling is read, and captions without an image are reported."""

from __future__ import annotations

import csv
import json
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_sources import encoded, shard, texture

from corpus.captions import (
    captions_in,
    class_list,
    decoded,
    label_list,
    own_captions,
    row_scene,
    scene_caption,
    scene_name,
)
from corpus.matching import Images
from corpus.sources.folder import ImageFolder
from corpus.sources.huggingface import HuggingFace
from corpus.sources.webdataset import WebDataset
from runtime.errors import UserError
from runtime.notices import notice
from train.text_encoder import caption_lengths, clip_tokenizer, tell_cut

NAMES = [f"Beach/{letter}.jpg" for letter in "abcdef"]


@pytest.fixture(autouse=True)
def notices_again() -> None:
    notice.cache_clear()


def images(root: Path, names: list[str] = NAMES) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        texture(number).save(root / name)
    return root


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def captions(root: Path, **options: object) -> dict[str, list[str]]:
    """All captions of every image by its name."""
    table = ImageFolder(str(root), **options).manifest()
    several = table["captions"] if "captions" in table else [None] * len(table)
    return {
        name: list(texts) if isinstance(texts, list) else [one]
        for name, one, texts in zip(table["id"], table["caption"], several, strict=True)
    }


# ------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("header", [("file_name", "text"), ("Filename", "Caption"), ("image", "sentence"), None])
def test_captions_are_read_from_csv_and_tsv_tables(
    tmp_path: Path, separator: str, header: tuple[str, str] | None
) -> None:
    images(tmp_path)
    with (tmp_path / ("captions.tsv" if separator == "\t" else "metadata.csv")).open("w", newline="") as file:
        table = csv.writer(file, delimiter=separator)
        table.writerows([header] if header else [])
        table.writerows([name, f"white sand {name}"] for name in NAMES)
    assert captions(tmp_path) == {name: [f"white sand {name}"] for name in NAMES}


def test_cells_keep_numbers_quotes_and_commas(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images(tmp_path)
    text = 'file_name,lon,split,text\nBeach/a.jpg,12.5,train,"sand, ""white"""\nBeach/b.jpg,3,test,a beach, and a sea\n'
    (tmp_path / "metadata.csv").write_text("\ufeff" + text, encoding="utf-8")
    table = ImageFolder(str(tmp_path)).manifest().set_index("id")
    assert table.loc["Beach/a.jpg", ["lon", "caption"]].tolist() == [12.5, 'sand, "white"']
    assert table.loc["Beach/b.jpg", ["lon", "caption"]].tolist() == [3, "a beach, and a sea"]
    assert "Beach/b.jpg" in ImageFolder(str(tmp_path), split="test", test_fraction=0.0).manifest()["id"].tolist()
    (tmp_path / "metadata.csv").write_text("height;width\n3;4\n")
    assert captions(tmp_path)["Beach/a.jpg"] == ["a satellite image of beach"]
    assert "metadata.csv does not name its images: add a column or field file_name" in capsys.readouterr().err


def test_captions_are_read_from_text_files_beside_the_images(tmp_path: Path) -> None:
    images(tmp_path)
    written = {
        "a.txt": "written beside", "b.caption": "in another suffix", "c.jpg.txt": "after the whole name",
        "d.txt": "A beach.\nWhite sand.\n", "e.txt": "0 0.51 0.32 0.10 0.20\n1 0.2 0.3 0.1 0.1\n",
        "f.json": '{"caption": "of its metadata", "lon": 7.5}',
    }  # fmt: skip
    for name, text in written.items():
        (tmp_path / "Beach" / name).write_text(text)
    assert captions(tmp_path) == {
        "Beach/a.jpg": ["written beside"], "Beach/b.jpg": ["in another suffix"],
        "Beach/c.jpg": ["after the whole name"], "Beach/d.jpg": ["A beach.", "White sand."],
        "Beach/e.jpg": ["a satellite image of beach"], "Beach/f.jpg": ["of its metadata"],
    }  # fmt: skip
    source = ImageFolder(str(tmp_path))
    assert source.manifest().set_index("id").loc["Beach/f.jpg", "lon"] == 7.5
    (tmp_path / "Beach" / "a.txt").write_text("another text")
    assert ImageFolder(str(tmp_path)).version != source.version


DOCUMENTS = {
    "karpathy": {
        "images": [
            {"filename": Path(n).name, "split": "test", "sentences": [{"raw": "x " + n}, {"raw": "y"}]} for n in NAMES
        ]
    },
    "coco": {
        "images": [{"id": at, "file_name": name} for at, name in enumerate(NAMES)],
        "annotations": [
            {"image_id": at, "caption": text} for at, name in enumerate(NAMES) for text in ("x " + name, "y")
        ],
    },
    "rows": [{"image": name, "captions": ["x " + name, "y"]} for name in NAMES],
    "table": {name: ["x " + name, "y"] for name in NAMES},
    "metadata": {name: {"caption": ["x " + name, "y"]} for name in NAMES},
}


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("place", ["dataset_rsicd.json", "captions.json", "annotations/captions_train2017.json"])
@pytest.mark.parametrize("below", ["", "images/"])
def test_captions_are_read_from_json_documents(tmp_path: Path, kind: str, place: str, below: str) -> None:
    images(tmp_path, [below + name for name in NAMES])
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(json.dumps(DOCUMENTS[kind]))
    assert captions(tmp_path) == {below + name: ["x " + name, "y"] for name in NAMES}
    if kind == "karpathy":
        assert len(ImageFolder(str(tmp_path), split="test").manifest()) == 6


def test_five_rows_of_an_image_give_five_captions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images(tmp_path)
    lines(tmp_path / "metadata.jsonl", [{"file_name": n, "text": f"{k} of {n}"} for n in NAMES for k in range(5)])
    (tmp_path / "metadata.csv").write_text("file_name,lon,text\nBeach/a.jpg,4.5,0 of Beach/a.jpg\n")
    table = ImageFolder(str(tmp_path)).manifest()
    assert [list(texts) for texts in table["captions"]] == [[f"{k} of {n}" for k in range(5)] for n in NAMES]
    assert table["caption"].tolist() == [f"0 of {name}" for name in NAMES] and table["lon"][0] == 4.5
    assert capsys.readouterr().err == "folder: 6 of 6 images have captions (30 captions)\n"


# ---------------------------------------------------------------------------------------------------------- spellings


def test_other_spellings_of_an_image_path_are_matched(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = images(tmp_path / "tiles", [*NAMES, "Beach/g.jpg", "Beach/h.jpg", "Beach/i.png"])
    spelled = {
        "a": "Beach\\a.jpg", "b": "./Beach/b.jpg", "c": "./../tiles/Beach/c.jpg", "d": "beach/D.JPG",
        "e": str(root / "Beach" / "e.jpg"), "f": "f.jpg", "g": "tiles/images/Beach/g.jpg",
        "h": "D:\\data\\tiles\\Beach\\h.jpg", "i": "Beach/i.tif",
    }  # fmt: skip
    rows = [{"file_name": name, "text": f"about {letter}"} for letter, name in spelled.items()]
    lines(root / "captions.jsonl", [*rows, {"file_name": "Beach/gone.jpg", "text": "lost"}])
    assert captions(root) == {f"Beach/{one}.{'png' if one == 'i' else 'jpg'}": [f"about {one}"] for one in spelled}
    given = capsys.readouterr().err
    assert "folder: 1 of 10 caption rows match no image, e.g. 'Beach/gone.jpg'\n" in given
    assert "folder: 9 of 9 images have captions (9 captions)\n" in given


@pytest.mark.parametrize(("on_disk", "in_row"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_file_names_match_in_either_unicode_normal_form(tmp_path: Path, on_disk: str, in_row: str) -> None:
    name = f"Straße/{unicodedata.normalize(on_disk, 'Köln')}.jpg"
    images(tmp_path, [name, "Straße/b.jpg"])
    row = f"Straße/{unicodedata.normalize(in_row, 'Köln')}.jpg"
    lines(tmp_path / "metadata.jsonl", [{"file_name": row, "text": "a town on the Rhine"}])
    assert captions(tmp_path)[name] == ["a town on the Rhine"]


def test_an_ambiguous_image_name_matches_no_image(tmp_path: Path) -> None:
    result = Images(tmp_path, ["a/x.jpg", "b/x.jpg", "A.png", "a.png", "c/y.jpg", "train/z.jpg"])
    assert result.find("a/x.jpg", ".") == ("a/x.jpg", True)
    assert result.find("x.jpg", ".") is None and result.find("x.jpg", "b") == ("b/x.jpg", True)
    assert result.find("A.PNG", ".") is None and result.find("A.png", ".") == ("A.png", True)
    assert result.find("y.jpg", ".") == ("c/y.jpg", False) and result.find("y.jpg", "a") is None
    assert result.find("val/z.jpg", ".") is None and result.find("/far/away/z.jpg", ".") is None
    assert result.find("/far/away/train/z.jpg", ".") == ("train/z.jpg", False)


def test_a_row_with_the_exact_image_name_takes_precedence(tmp_path: Path) -> None:
    images(tmp_path, ["train/a.jpg"])
    rows = [{"file_name": "a.jpg", "text": "perhaps"}, {"file_name": "train/a.jpg", "text": "surely"}]
    lines(tmp_path / "captions.jsonl", rows)
    assert captions(tmp_path) == {"train/a.jpg": ["surely"]}


# ---------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "utf-32"])
def test_captions_are_decoded_from_every_common_encoding(tmp_path: Path, encoding: str) -> None:
    text = "Häuser an der Küste – “white”"
    assert decoded(text.encode(encoding)) == text
    images(tmp_path)
    (tmp_path / "Beach" / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "captions.csv").write_bytes(f"file_name,text\nBeach/b.jpg,{text}\n".encode(encoding))
    assert captions(tmp_path)["Beach/a.jpg"] == captions(tmp_path)["Beach/b.jpg"] == [text]
    shard(tmp_path / "a.tar", [("a.jpg", encoded(texture(0), "JPEG")), ("a.txt", text.encode(encoding))])
    assert WebDataset(str(tmp_path / "a.tar")).manifest()["caption"].tolist() == [text]


def test_a_text_with_a_broken_byte_keeps_its_other_letters() -> None:
    assert decoded("Küste und Häuser".encode() + b"\xc3") == "Küste und Häuser\ufffd"
    assert decoded(b"K\xfcste") == "Küste" and decoded(b"") == ""


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("one", ["one"]), (["one", "two"], ["one", "two"]), ("['one', 'two']", ["one", "two"]),
        ('["one", "it\'s"]', ["one", "it's"]), ("[sic] one", ["[sic] one"]), (b"one", ["one"]),
        ([{"raw": "one"}, {"text": "two"}], ["one", "two"]),
        (7, []), (np.array(["one", "two"], object), ["one", "two"]), (None, []), ("  ", []), ([None, "one"], ["one"]),
    ],
)  # fmt: skip
def test_captions_are_read_from_strings_lists_and_dictionaries(value: object, expected: list[str]) -> None:
    assert own_captions({"captions": value}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 ships\n", ["3 ships"]), ("12", []), ("0 0.5 0.5 0.1 0.1", []), ("", []),
        ("10 20 30 20 30 40 10 40 plane 0", []), ("a town\na river", ["a town", "a river"]),
        ("a long text that goes\non and ends here.", ["a long text that goes\non and ends here."]),
        ("海边的房子", ["海边的房子"]),
    ],
)  # fmt: skip
def test_numbers_are_no_captions(text: str, expected: list[str]) -> None:
    assert captions_in(text) == expected


def test_scene_names_and_captions_are_derived_from_labels() -> None:
    assert [scene_name(value) for value in ("3", 3, 3.0, "BaseballField", None, -1, float("nan"), "7b")] == [
        "class 3", "class 3", "class 3", "BaseballField", "", "", "", "7b",
    ]  # fmt: skip
    assert scene_caption("class 3") == "a satellite image" and scene_caption("") == ""
    assert scene_caption("DryRiver") == "a satellite image of dry river"
    assert row_scene({"label": 2, "label_text": "port"}) == "port" and row_scene({"label": "sea"}) == "sea"
    assert class_list(b"0 river\n1 dry forest\n") == class_list(b"river\ndry forest") == ("river", "dry forest")
    assert class_list(b'{"1": "b", "0": "a"}') == class_list(b'["a", "b"]') == ("a", "b")


def test_captions_are_read_from_the_rows_of_a_hub_data_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = {
        "image": [{"bytes": encoded(texture(row)), "path": None} for row in range(3)],
        "sentences": [[{"raw": "one"}, {"raw": "two"}], [{"raw": "three"}], []],
    }
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    table = HuggingFace(str(tmp_path)).manifest()
    assert table["caption"].tolist() == ["one", "three", ""] and list(table["captions"][0]) == ["one", "two"]
    assert "huggingface: 2 of 3 rows have captions (3 captions)\n" in capsys.readouterr().err


def test_captions_in_the_metadata_take_precedence_over_the_text_file(tmp_path: Path) -> None:
    data = encoded(texture(0), "JPEG")
    metadata = {
        "a": {"caption": "of the metadata"}, "b": {"captions": ["one", "two"]}, "c": {},
        "d": {"sentence": "a sentence"},
    }  # fmt: skip
    members = [(f"{key}.jpg", data) for key in metadata]
    members += [(f"{key}.json", json.dumps(row).encode()) for key, row in metadata.items()]
    shard(tmp_path / "a.tar", [*members, ("a.txt", b"of the text"), ("b.txt", b"one"), ("c.caption", b"in caption")])
    table = WebDataset(str(tmp_path / "a.tar")).manifest()
    assert table["caption"].tolist() == ["of the text", "one", "in caption", "a sentence"]
    assert list(table["captions"][1]) == ["one", "two"]


def test_a_broken_table_gives_a_one_line_error(tmp_path: Path) -> None:
    images(tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"file_name": "a.jpg"}\n{"text": "of nothing"}\n')
    with pytest.raises(UserError, match=r"captions\.jsonl, line 2") as caught:
        ImageFolder(str(tmp_path)).manifest()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- length


def test_truncated_captions_are_counted(capsys: pytest.CaptureFixture) -> None:
    begin = "a wide flat plain beside a slow brown river with several small farms and narrow roads between them"
    texts = ["", f"{begin} near an airport", f"{begin} near a harbour", "a river"]
    tokenizer = clip_tokenizer(16)
    assert tell_cut(tokenizer, texts, caption_lengths(tokenizer, texts)) == 2
    assert capsys.readouterr().err.startswith("2 of 3 different captions are longer than the 16 tokens")
    exact = tokenizer(texts[1], truncation=False).input_ids
    fitting = clip_tokenizer(len(exact))
    assert tell_cut(fitting, texts, caption_lengths(fitting, texts)) == 0


# ------------------------------------------------------------------------------------------------------ several labels


def test_several_labels_of_an_image_become_its_caption(tmp_path: Path) -> None:
    """BigEarthNet has up to a dozen: they give words but no scene; the image's own caption comes first."""
    labels = ["Pastures", "Mixed forest"]
    images(tmp_path / "folder", ["a.jpg", "b.jpg"])
    rows = [{"file_name": "a.jpg", "labels": labels}, {"file_name": "b.jpg", "labels": labels, "text": "A pasture."}]
    lines(tmp_path / "folder" / "metadata.jsonl", rows)
    expected = {"a": ["a satellite image of pastures, mixed forest"], "b": ["A pasture."]}
    assert captions(tmp_path / "folder") == {f"{name}.jpg": texts for name, texts in expected.items()}

    data = {letter: encoded(texture(number)) for number, letter in enumerate("ab")}
    metadata = {row["file_name"][0]: json.dumps(row).encode() for row in rows}
    members = [[(f"{key}.png", data[key]), (f"{key}.json", metadata[key])] for key in "ab"]
    shard(tmp_path / "s.tar", [member for pair in members for member in pair])
    shards = WebDataset(str(tmp_path / "s.tar"), split="all").manifest()
    assert shards["caption"].tolist() == [texts[0] for texts in expected.values()]
    assert set(shards["scene"]) == {""}

    datasets = pytest.importorskip("datasets")
    names = datasets.Sequence(datasets.ClassLabel(names=["Sea", *labels]))
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": data["a"], "path": None}], "labels": [[1, 2]]},
        features=datasets.Features({"image": datasets.Image(), "labels": names}),
    )
    table.save_to_disk(str(tmp_path / "hub"))
    loaded = HuggingFace(path=str(tmp_path / "hub"), split="all").manifest()
    assert loaded["caption"].tolist() == expected["a"]
    assert label_list({"labels": [3, 4]}) == [] and label_list({"label": 3}) == []
