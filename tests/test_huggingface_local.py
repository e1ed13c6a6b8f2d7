"""Local data sets: plain Arrow files, folders of `save_to_disk`, and both read as a stream."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
from test_sources import BANDS, encoded, texture, tiff

from corpus import decoding
from corpus.index import index_corpus
from corpus.sources.huggingface import HuggingFace
from runtime.artefacts import plain
from runtime.errors import UserError

SIDE = 32
SCENES = ["Beach", "DenseForest", "River"]


def made(seeds: range, broken: tuple[int, ...] = ()) -> datasets.Dataset:
    """One row per seed: its texture as a PNG, a class, a caption, a location; the `broken` rows have invalid images."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=SCENES),
            "text": datasets.Value("string"),
            "lon": datasets.Value("float64"),
        }
    )
    rows = {
        "image": [
            {"bytes": b"broken" if row in broken else encoded(texture(seed)), "path": None}
            for row, seed in enumerate(seeds)
        ],
        "label": [seed % 3 for seed in seeds],
        "text": [f"picture {seed}" for seed in seeds],
        "lon": [seed / 4 for seed in seeds],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def save(place: str, folder: Path, seeds: range, broken: tuple[int, ...] = ()) -> str:
    """Write the rows in two parts, in one of the possible layouts on disk; returns `corpus.path`."""
    made(seeds, broken).save_to_disk(str(folder / "saved"), num_shards=2)
    if place == "saved":
        return str(folder / "saved")
    (folder / "bare").mkdir()
    for number, file in enumerate(sorted((folder / "saved").glob("*.arrow"))):
        file.rename(folder / "bare" / f"part-{number}.arrow")
    return {
        "bare": str(folder / "bare"),
        "pattern": str(folder / "bare" / "part-*.arrow"),
        "one file": str(folder / "bare" / "part-0.arrow"),
    }[place]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", ["bare", "pattern", "one file", "saved"])
def test_rows_are_read_from_every_layout_on_disk(tmp_path: Path, place: str, streaming: bool) -> None:
    path = save(place, tmp_path, range(10), broken=(3,))
    seeds = range(5 if place == "one file" else 10)
    corpus = index_corpus(HuggingFace(path, resolution=SIDE, streaming=streaming), tmp_path / "runs")
    table = corpus.manifest
    assert table["id"].tolist() == [f"train/{row:08d}" for row in seeds]
    assert table["scene"].tolist() == [SCENES[seed % 3] for seed in seeds]
    assert table["caption"].tolist() == [f"picture {seed}" for seed in seeds]
    assert table["lon"].tolist() == [seed / 4 for seed in seeds]
    assert table["reason"].tolist() == [decoding.NOT_AN_IMAGE if seed == 3 else "" for seed in seeds]
    for seed in seeds:
        assert (corpus.images[seed] == (0 if seed == 3 else np.asarray(texture(seed)))).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_data_set_keeps_its_splits(tmp_path: Path, streaming: bool) -> None:
    parts = {"train": made(range(6)), "validation": made(range(20, 22)), "test": made(range(30, 33))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    names = {"train": "train", "val": "validation", "test": "test"}
    for split, seeds in (("train", range(6)), ("val", range(20, 22)), ("test", range(30, 33))):
        source = HuggingFace(str(tmp_path / "saved"), split=split, resolution=SIDE, streaming=streaming)
        corpus = index_corpus(source, tmp_path / "runs")
        assert (corpus.images == np.stack([np.asarray(texture(seed)) for seed in seeds])).all()
        assert corpus.manifest["id"].tolist() == [f"{names[split]}/{row:08d}" for row in range(len(seeds))]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_split_is_taken_from_another(tmp_path: Path, streaming: bool) -> None:
    """val comes from train if there is a test split, test from val if there is none; without train a hash decides."""
    for names in (("train", "test"), ("train", "validation"), ("test",)):
        path = str(tmp_path / "-".join(names))
        datasets.DatasetDict({name: made(range(40)) for name in names}).save_to_disk(path)
        parts = {
            split: HuggingFace(path, split=split, resolution=SIDE, streaming=streaming).manifest()["id"].tolist()
            for split in ("train", "val", "test")
        }
        ids = {name: [f"{name}/{row:08d}" for row in range(40)] for name in names}
        assert sorted(chain(*parts.values())) == sorted(chain(*ids.values())) and all(parts.values())
        if names == ("train", "test"):
            assert parts["test"] == ids["test"] and len(parts["val"]) < 15
        elif names == ("train", "validation"):
            assert parts["train"] == ids["train"] and 8 < len(parts["val"]) < 32
        else:
            assert len(parts["train"]) > 20


@pytest.mark.parametrize("place", ["bare", "saved"])
def test_a_stream_gives_the_same_corpus_as_reading_all_rows_at_once(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows fill several chunks, are limited to 20, and are split by a hash."""
    monkeypatch.setattr("corpus.index.CHUNK", 8)
    path = save(place, tmp_path, range(40))
    options = {"split": "train", "test_fraction": 0.2, "limit": 20, "resolution": 8}
    whole, stream = (
        index_corpus(HuggingFace(path, streaming=streaming, **options), tmp_path / "runs")
        for streaming in (False, True)
    )
    assert whole.fingerprint != stream.fingerprint and len(stream) == 20
    assert (whole.images == stream.images).all() and stream.readable.all()
    assert whole.manifest.drop(columns="stamp").equals(stream.manifest)
    assert len(np.unique(stream.images.reshape(len(stream), -1), axis=0)) == len(stream)


@pytest.mark.parametrize("place", ["bare", "saved"])
def test_a_stream_restarts_for_earlier_rows(tmp_path: Path, place: str) -> None:
    source = HuggingFace(save(place, tmp_path, range(9)), resolution=SIDE, streaming=True)
    for rows in ([6, 7], [2, 8], [8], [0], [0, 1, 2]):
        images = list(source.reader(np.array(rows))())
        assert (np.stack(images) == np.stack([np.asarray(texture(row)) for row in rows])).all()
    originals = [data for data, suffix, mask in source.originals(np.array([1, 4]))]
    assert originals == [encoded(texture(row)) for row in (1, 4)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", ["bare", "saved"])
def test_other_rows_give_another_version(tmp_path: Path, place: str, streaming: bool) -> None:
    versions = []
    for name, seeds in (("one", range(6)), ("other", range(7))):
        (tmp_path / name).mkdir()
        path = Path(save(place, tmp_path / name, seeds))
        (tmp_path / "here").unlink(missing_ok=True)
        (tmp_path / "here").symlink_to(path, target_is_directory=True)
        first, again = (
            plain(HuggingFace(str(tmp_path / "here"), resolution=SIDE, streaming=streaming).version) for _ in range(2)
        )
        assert first == again
        versions.append(first)
    assert versions[0] != versions[1]


def test_a_stream_with_several_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"leave corpus\.workers=null"):
        HuggingFace(save("bare", tmp_path, range(2)), streaming=True, workers=2)


@pytest.mark.parametrize("streaming", [False, True])
def test_originals_have_the_suffix_of_their_format(tmp_path: Path, streaming: bool) -> None:
    """The suffix of their bytes, for any name; a format that Pillow does not know but that can be read is a TIFF."""
    files = {
        ".jpg": encoded(texture(), "JPEG"),
        ".tif": tiff(BANDS, planarconfig="separate", photometric="minisblack"),
        ".webp": encoded(texture(), "WEBP"),
        ".png": encoded(texture()),
        "": b"",
    }
    rows = {"image": [{"bytes": data, "path": "a.bmp"} for data in files.values()]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    source = HuggingFace(str(tmp_path / "a.parquet"), resolution=SIDE, streaming=streaming)
    assert sum(isinstance(image, np.ndarray) for image in source.reader(np.arange(5))()) == 4
    result = list(source.originals(np.arange(4)))
    assert result == [(data, suffix, None) for suffix, data in files.items() if suffix]
    with pytest.raises(UserError, match="can no longer be read") as caught:
        list(source.originals(np.arange(5)))
    assert "\n" not in str(caught.value)
