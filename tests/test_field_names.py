"""Keys, ids and suffixes of users' shards and folders: nothing is lost, nothing is read twice."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_sources import encoded, shard, texture

from corpus.index import index_corpus
from corpus.names import honest_suffix, image_suffix, kind_of, samples, unique_ids
from corpus.sources.folder import ImageFolder
from corpus.sources.huggingface import HuggingFace
from corpus.sources.webdataset import DUPLICATE, NO_IMAGE, WebDataset
from runtime.errors import UserError
from runtime.notices import notice

SIDE = 32


@pytest.fixture(autouse=True)
def notices_again() -> None:
    notice.cache_clear()


def jpeg(seed: int) -> bytes:
    return encoded(texture(seed), "JPEG", quality=95)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def read(source: WebDataset, tmp_path: Path) -> dict[str, tuple[str, str]]:
    """Reason and caption of every row, by id."""
    table = index_corpus(source, tmp_path / "runs").manifest
    return {row.id: (row.reason, row.caption) for row in table.itertuples()}


# ------------------------------------------------------------------------------------------------------------- shards


def test_keys_repeated_in_several_shards_get_different_ids(tmp_path: Path) -> None:
    for number in range(2):
        shard(tmp_path / f"s-{number}.tar", [(f"{row:06d}.jpg", jpeg(10 * number + row)) for row in range(3)])
    shard(tmp_path / "other.tar", [("only.jpg", jpeg(99)), ("000002.jpg", jpeg(98))])
    urls = f"{tmp_path}/s-{{0..1}}.tar::{tmp_path}/other.tar"
    corpus = index_corpus(WebDataset(urls, resolution=SIDE, workers=1), tmp_path / "runs")
    ids = [f"s-{number}/{row:06d}" for number in range(2) for row in range(3)]
    assert corpus.manifest["id"].tolist() == [*ids, "only", "other/000002"] and corpus.readable.all()
    assert (corpus.images[3] == pixels(jpeg(10))).all()


def test_shards_of_one_name_in_two_folders_get_different_ids(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shard(tmp_path / folder / "0.tar", [("x.jpg", jpeg(ord(folder)))])
    source = WebDataset(f"{tmp_path}/{{a,b}}/0.tar", resolution=SIDE)
    assert source.manifest()["id"].tolist() == ["a/0/x", "b/0/x"]


def test_ids_of_metadata_that_repeat_are_replaced_by_shard_and_key(tmp_path: Path) -> None:
    members = []
    for row in range(6):
        metadata = json.dumps({"id": f"n{row % 3}" if row != 5 else "own"}).encode()
        members += [(f"{row:03d}.png", encoded(texture(row))), (f"{row:03d}.json", metadata)]
    shard(tmp_path / "ids.tar", members)
    result = read(WebDataset(str(tmp_path / "ids.tar"), resolution=SIDE), tmp_path)
    assert list(result) == ["ids/000", "ids/001", "n2", "ids/003", "ids/004", "own"]
    assert {reason for reason, _ in result.values()} == {""}


def test_new_ids_never_equal_existing_ids() -> None:
    assert unique_ids(["a", "a", "s/a"], ["a", "a", "k"], ["s.tar", "t.tar", "t.tar"]) == ["s/a#2", "t/a", "s/a"]
    assert unique_ids(["a", "b"], ["a", "b"], ["s.tar", "s.tar"]) == ["a", "b"]


def test_the_second_member_of_one_name_is_refused_as_a_duplicate(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("a.jpg", jpeg(2)), ("a.txt", b"the first")])
    corpus = index_corpus(WebDataset(str(tmp_path / "a.tar"), resolution=SIDE, workers=1), tmp_path / "runs")
    assert corpus.manifest[["id", "reason"]].to_numpy().tolist() == [["a", ""], ["a#2", DUPLICATE], ["b", ""]]
    assert (corpus.images[0] == pixels(jpeg(0))).all() and corpus.manifest["caption"][0] == "the first"


@pytest.mark.parametrize(
    ("image", "caption"),
    [
        ("0.img_content", "0.caption"), ("0.input.jpg", "0.txt"), ("0.image.jpg", "0.text"), ("0.img", "0.cap"),
        ("0.IMAGE.JPEG", "0.TXT"), ("0.jfif", "0.txt"), ("d.e/0.rgb.png", "d.e/0.caption.txt"), ("0.bin", "0.txt"),
        ("0.output.png", "0.txt"),
    ],
)  # fmt: skip
def test_images_of_a_shard_are_found_by_last_suffix_or_content(tmp_path: Path, image: str, caption: str) -> None:
    data = encoded(texture(3)) if image.endswith("png") else jpeg(3)
    shard(tmp_path / "a.tar", [(image, data), (caption, b"a harbour"), (caption.rpartition("0")[0] + "0.url", b"http")])
    source = WebDataset(str(tmp_path / "a.tar"), resolution=SIDE, workers=1)
    corpus = index_corpus(source, tmp_path / "runs")
    assert corpus.manifest[["reason", "caption"]].to_numpy().tolist() == [["", "a harbour"]]
    assert (corpus.images[0] == pixels(data)).all()
    ((out, suffix, _),) = source.originals(np.array([0]))
    assert out == data and suffix in (".jpg", ".jpeg", ".png")


def test_image_and_mask_of_one_key_are_distinguished(tmp_path: Path) -> None:
    mask = encoded(Image.fromarray(np.full((32, 32), 1, np.uint8)))
    for number, name in enumerate(("mask.png", "seg.png", "label.tif", "gt.png")):
        members = [(f"a.{name}", mask), ("a.image.jpg", jpeg(0)), ("a.output.cls", b"4")]
        shard(tmp_path / f"{number}.tar", members)
        source = WebDataset(str(tmp_path / f"{number}.tar"), resolution=SIDE, classes=("a", "b"), workers=1)
        assert source.manifest()[["id", "scene", "caption"]].to_numpy().tolist() == [
            ["a", "class 4", "a satellite image"]
        ]
        (sample,) = source.reader(np.array([0]))()
        assert (sample.mask == 1).all() and (sample.image == pixels(jpeg(0))).all(), name


def test_members_of_a_sample_may_be_anywhere_in_the_shard(tmp_path: Path) -> None:
    images = [(f"{row:03d}.jpg", jpeg(row)) for row in range(4)]
    texts = [(f"{row:03d}.txt", b"a beach, no. %d" % row) for row in reversed(range(4))]
    shard(tmp_path / "x.tar", [*images, *texts])
    result = read(WebDataset(str(tmp_path / "x.tar"), resolution=SIDE), tmp_path)
    assert result == {f"{row:03d}": ("", f"a beach, no. {row}") for row in range(4)}


def test_samples_whose_keys_contain_dots_are_not_merged(tmp_path: Path) -> None:
    names = ["S2A.20190101.tile1", "S2A.20190101.tile2", "tile_12.5_43.25", "tile_12.5_43.50", "v1.0"]
    members = [(f"{name}.jpg", jpeg(row)) for row, name in enumerate(names)]
    members += [(f"{name}.txt", f"about {name}".encode()) for name in names]
    shard(tmp_path / "a.tar", members)
    result = read(WebDataset(str(tmp_path / "a.tar"), resolution=SIDE), tmp_path)
    assert result == {name: ("", f"about {name}") for name in names}


def test_several_images_of_one_key_share_its_metadata(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("s.left.jpg", jpeg(0)), ("s.right.jpg", jpeg(1)), ("s.json", b'{"scene": "port"}')])
    table = WebDataset(str(tmp_path / "a.tar"), resolution=SIDE).manifest()
    assert table[["id", "scene"]].to_numpy().tolist() == [["s.left", "port"], ["s.right", "port"]]


def test_the_image_takes_precedence_over_its_thumbnail(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shard(
        tmp_path / "a.tar", [("s.thumb.jpg", jpeg(0)), ("s.jpg", jpeg(1)), ("s.npy", b"numbers"), ("README.md", b"x")]
    )
    corpus = index_corpus(WebDataset(str(tmp_path / "a.tar"), resolution=SIDE, workers=1), tmp_path / "runs")
    assert corpus.manifest["id"].tolist() == ["s"] and (corpus.images[0] == pixels(jpeg(1))).all()
    assert "webdataset: 2 members ignored: .jpg 1, .npy 1\n" in capsys.readouterr().err


def test_the_reason_for_a_missing_image_lists_the_suffixes_of_the_sample(tmp_path: Path) -> None:
    shard(
        tmp_path / "a.tar", [("a.txt", b"alone"), ("a.npy", b"1"), ("b.jpg", jpeg(0)), ("plain", jpeg(1)), ("n", b"x")]
    )
    result = read(WebDataset(str(tmp_path / "a.tar"), resolution=SIDE), tmp_path)
    assert {name: reason for name, (reason, _) in result.items()} == {
        "a": f"{NO_IMAGE}: suffixes met .npy, .txt", "b": "", "plain": "",
    }  # fmt: skip


def test_an_option_adds_suffixes_of_images(tmp_path: Path) -> None:
    tga = encoded(texture(0), "TGA")
    shard(tmp_path / "a.tar", [("a.rgb", tga), ("a.txt", b"x y")])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.rgb").write_bytes(tga)
    (tmp_path / "folder" / "b.png").write_bytes(encoded(texture(1)))
    for options, count in (({}, 0), ({"image_suffixes": ("rgb",)}, 1), ({"image_suffixes": (".RGB",)}, 1)):
        source = WebDataset(str(tmp_path / "a.tar"), resolution=SIDE, **options)
        assert [item.problem == "" for item in source._chosen] == [bool(count)]
        assert len(ImageFolder(str(tmp_path / "folder"), **options).manifest()) == 1 + count


def test_samples_do_not_depend_on_the_order_of_members() -> None:
    names = ["a.jpg", "a.txt", "a.mask.png", "b.x.jpg", "b.y.jpg", "b.json", "c.txt"]
    kinds = [kind_of(name, b"") for name in names]
    random = np.random.default_rng(0)
    expected = {(one.key, one.image is not None and names[one.image]) for one in samples(names, kinds)}
    assert expected == {("a", "a.jpg"), ("b.x", "b.x.jpg"), ("b.y", "b.y.jpg"), ("c", False)}
    for _ in range(20):
        order = random.permutation(len(names))
        mixed = [names[at] for at in order]
        result = samples(mixed, [kinds[at] for at in order])
        assert {(one.key, one.image is not None and mixed[one.image]) for one in result} == expected


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_folder_s_images_are_found_by_suffix_or_content(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "a"
    root.mkdir()
    kinds = {
        "0.jpg": "JPEG", "1.jfif": "JPEG", "2.jpe": "JPEG", "3.jp2": "JPEG2000", "4.JP2": "JPEG2000", "5.ppm": "PPM",
        "6.tga": "TGA", "0a1b2c": "JPEG", "7.dat": "PNG", "8.pgm": "PPM", "x.y.z": "GIF",
    }  # fmt: skip
    for name, kind in kinds.items():
        texture(0, mode="L" if name == "8.pgm" else "RGB").save(root / name, kind)
    for name in (
        "notes.csv",
        "movie.mp4",
        "movie2.mp4",
        "0.tfw",
        "0.jpg.aux.xml",
        "Thumbs.db",
        "README",
        "LICENSE.txt",
    ):
        (root / name).write_text("of no picture at all")
    table = ImageFolder(str(root)).manifest()
    assert table["id"].tolist() == sorted(kinds)
    assert capsys.readouterr().err == "folder: 3 files ignored: .csv 1, .mp4 2\n"


def test_the_error_about_a_folder_without_images_lists_the_suffixes(tmp_path: Path) -> None:
    (tmp_path / "a.nc").write_bytes(b"CDF")
    with pytest.raises(UserError, match=r"1 files are something else: \.nc 1"):
        ImageFolder(str(tmp_path)).manifest()


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("JPEG", ".jpg"), ("PNG", ".png"), ("TIFF", ".tif"), ("GIF", ".gif"), ("BMP", ".bmp"), ("WEBP", ".webp"),
     ("PPM", ".ppm"), ("JPEG2000", ".jp2"), ("AVIF", ".avif")],
)  # fmt: skip
def test_the_first_bytes_name_the_format(kind: str, suffix: str) -> None:
    try:
        data = encoded(texture(0), kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    assert image_suffix(data[:64]) == suffix and kind_of("x.unknown", data[:64]) == "image"
    assert honest_suffix(data, ".dat") == suffix


@pytest.mark.parametrize("text", [b"BM25 ranks texts", b"P5 is a mask", b"P6", b"II*", b"RIFF....WAVE", b"", b"GIF"])
def test_first_bytes_of_other_files_name_no_format(text: bytes) -> None:
    assert image_suffix(text) == "" and kind_of("x", text) == "other"


def test_an_unusual_or_wrong_suffix_is_replaced_by_that_of_the_format() -> None:
    data = jpeg(0)
    assert [honest_suffix(data, suffix) for suffix in (".jpeg", ".jpg", ".jfif", ".png", "")] == [
        ".jpeg",
        *[".jpg"] * 4,
    ]


@pytest.mark.parametrize("layout", ["train/images/Beach", "images/train/Beach", "Beach/train", "train/Beach"])
def test_split_folders_are_found_at_every_level(tmp_path: Path, layout: str) -> None:
    for split in ("train", "val2017", "Testing"):
        folder = tmp_path / layout.replace("train", split)
        folder.mkdir(parents=True)
        texture(0).save(folder / f"{split}.png")
        labels = tmp_path / split / "labels" / "Beach"
        if layout.startswith("train/images"):
            labels.mkdir(parents=True)
            texture(0).save(labels / f"{split}.png")
    for split, name in (("train", "train"), ("val", "val2017"), ("test", "Testing")):
        table = ImageFolder(str(tmp_path), split=split).manifest()
        assert [(Path(one).stem, scene) for one, scene in table[["id", "scene"]].to_numpy()] == [(name, "Beach")]


# ------------------------------------------------------------------------------------------------------- class numbers


def test_class_numbers_of_shards_become_scene_names(tmp_path: Path) -> None:
    members = [
        pair for row in range(4) for pair in ((f"{row}.png", encoded(texture(row))), (f"{row}.cls", b"%d" % row))
    ]
    shard(tmp_path / "0.tar", [*members, ("9.png", encoded(texture(9))), ("9.cls", b"-1")])
    bare = WebDataset(str(tmp_path / "0.tar")).manifest()
    assert bare["scene"].tolist() == ["class 0", "class 1", "class 2", "class 3", ""]
    assert set(bare["caption"][:4]) == {"a satellite image"} and bare["caption"][4] == ""
    named = WebDataset(str(tmp_path / "0.tar"), class_names=["river", "dry forest", "airport"]).manifest()
    assert named["scene"].tolist() == ["river", "dry forest", "airport", "class 3", ""]
    assert named["caption"][1] == "a satellite image of dry forest"
    (tmp_path / "classnames.txt").write_text("river\nforest\nairport\nharbor\n")
    beside = WebDataset(str(tmp_path / "0.tar"))
    assert beside.manifest()["scene"].tolist() == ["river", "forest", "airport", "harbor", ""]
    assert beside.version != WebDataset(str(tmp_path / "0.tar"), class_names=[]).version


def test_numbered_folders_take_their_scene_names_from_a_list(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / "d" / str(number)).mkdir(parents=True)
        texture(number).save(tmp_path / "d" / str(number) / "a.png")
    assert ImageFolder(str(tmp_path / "d")).manifest()["scene"].tolist() == ["class 0", "class 1"]
    (tmp_path / "names.json").write_text('{"river": 0, "port": 1}')
    for given in ({0: "river", 1: "port"}, ["river", "port"], str(tmp_path / "names.json")):
        table = ImageFolder(str(tmp_path / "d"), class_names=given).manifest()
        assert table["scene"].tolist() == ["river", "port"]
    (tmp_path / "d" / "classes.txt").write_text("0: river\n1: port\n")
    assert ImageFolder(str(tmp_path / "d")).manifest()["scene"].tolist() == ["river", "port"]
    with pytest.raises(UserError, match=r"corpus\.class_names=.*cannot be read"):
        ImageFolder(str(tmp_path / "d"), class_names=str(tmp_path / "gone.txt")).manifest()


def test_class_numbers_of_a_table_become_scene_names(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": encoded(texture(row)), "path": None} for row in range(4)], "label": [0, 1, -1, 7]}
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    table = HuggingFace(str(tmp_path)).manifest()
    assert table["scene"].tolist() == ["class 0", "class 1", "", "class 7"]
    assert table["caption"].tolist() == ["a satellite image", "a satellite image", "", "a satellite image"]
    assert HuggingFace(str(tmp_path), class_names=["a", "b"]).manifest()["scene"].tolist() == ["a", "b", "", "class 7"]
    pd.DataFrame({**rows, "label_text": ["sea", "land", "", "ice"]}).to_parquet(tmp_path / "train.parquet")
    assert HuggingFace(str(tmp_path)).manifest()["scene"].tolist() == ["sea", "land", "", "ice"]


@pytest.mark.skipif(os.name != "posix", reason="names that are no Unicode exist on POSIX alone")
def test_suffixes_that_are_no_unicode_do_not_stop_indexing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    odd = os.fsdecode(b"a.\xff\n")
    shard(tmp_path / "a.tar", [(odd, b"x"), ("b.jpg", jpeg(0)), (os.fsdecode(b"b.\xfe"), b"y")])
    corpus = index_corpus(WebDataset(str(tmp_path / "a.tar"), resolution=SIDE), tmp_path / "runs")
    assert corpus.manifest["reason"].tolist() == [f"{NO_IMAGE}: suffixes met '.\\udcff\\n'", ""]
    (tmp_path / "d").mkdir()
    texture(0).save(tmp_path / "d" / "a.png")
    (tmp_path / "d" / odd).write_bytes(b"x")
    assert len(index_corpus(ImageFolder(str(tmp_path / "d"), resolution=SIDE), tmp_path / "runs")) == 1
    assert "folder: 1 files ignored: '.\\udcff\\n' 1\n" in capsys.readouterr().err


def test_shards_are_found_by_folder_or_pattern(tmp_path: Path) -> None:
    """img2dataset writes a folder with statistics next to the shards. Spaces and commas are not separators."""
    folder = tmp_path / "laion, part (1)"
    folder.mkdir()
    for part in range(2):
        with tarfile.open(folder / f"{part:05d}.tar", "w") as tar:
            for number in range(3):
                info, data = tarfile.TarInfo(f"{part:05d}{number:04d}.jpg"), jpeg(10 * part + number)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        (folder / f"{part:05d}_stats.json").write_text("{}")
    expected = [f"{part:05d}{number:04d}" for part in range(2) for number in range(3)]
    for urls in (str(folder), f"{folder}/*.tar", f"{folder}/0000?.tar", f"{folder}/{{00000..00001}}.tar"):
        assert WebDataset(urls=urls).manifest()["id"].tolist() == expected, urls
    for urls in (str(tmp_path), f"{folder}/*.tgz"):
        with pytest.raises(UserError, match="there is no shard"):
            WebDataset(urls=urls).manifest()


def test_the_error_about_a_split_without_images_names_the_option(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "data" / ("validation", "test")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(path)
    with pytest.raises(UserError, match=r"no images in its split train: .*corpus\.train\.split=all"):
        index_corpus(ImageFolder(str(tmp_path / "data"), split="train"), tmp_path / "runs")
