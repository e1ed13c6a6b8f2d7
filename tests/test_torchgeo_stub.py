"""`corpus=torchgeo` without torchgeo: replacements of its kinds of data sets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_sources import texture

import corpus.sources.torchgeo
from corpus.decoding import DAMAGED
from corpus.index import index_corpus
from corpus.sources.torchgeo import TorchGeo
from runtime.artefacts import file_stamp
from runtime.errors import UserError

SIDE = 16
SCENES = ("BeachSand", "Forest")


class DatasetNotFoundError(FileNotFoundError):
    """torchgeo's error for missing files."""


class NonGeoDataset:
    """Six random images of alternating classes, one seed per split: integers as float32 [3, H, W]."""

    classes = SCENES
    first = 0

    def __init__(self, root: str) -> None:
        assert isinstance(root, str)
        if not any(Path(root).iterdir()):
            raise DatasetNotFoundError(root)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        image = torch.from_numpy(pixels(self.first + row).transpose(2, 0, 1).copy()).float()
        return {"image": image, "label": torch.tensor(row % 2)}


class Splits(NonGeoDataset):
    """Three splits, as in EuroSAT; others are refused by an assertion, as in torchgeo."""

    splits = ("train", "val", "test")

    def __init__(self, root: str, split: str = "train") -> None:
        assert split in self.splits
        super().__init__(root)
        self.first = {"train": 100, "val": 200, "test": 300}[split]


class TwoSplits(Splits):
    """Has no list of its splits, and no validation split."""

    splits = None  # type: ignore[assignment]

    def __init__(self, root: str, split: str = "train") -> None:
        assert split in ("train", "test")
        NonGeoDataset.__init__(self, root)
        self.first = {"train": 100, "test": 300}[split]


class Validation(Splits):
    """Has no list of its splits; one is called validation."""

    splits = None  # type: ignore[assignment]

    def __init__(self, root: str, split: str = "train") -> None:
        assert split in ("train", "validation", "test")
        super_split = {"validation": "val"}.get(split, split)
        self.splits = ("train", "val", "test")
        Splits.__init__(self, root, super_split)


class Dev(NonGeoDataset):
    """Has a list of its splits, one of them called dev."""

    valid_splits = ("train", "dev", "test")

    def __init__(self, root: str, split: str = "train") -> None:
        assert split in self.valid_splits
        super().__init__(root)


class Kinds(NonGeoDataset):
    """The argument `split` selects something other than train, val and test."""

    splits = ("positive", "negative")

    def __init__(self, root: str, split: str = "positive") -> None:
        assert split in self.splits
        super().__init__(root)


class NoSplits(NonGeoDataset):
    """A single set, whose constructor has no argument `split`."""


class Files(NonGeoDataset):
    """A folder of images that lists its files and labels, as torchvision's ImageFolder does."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.samples = [(str(path), "ab".index(path.name[0])) for path in sorted(Path(root).glob("*/*.png"))]
        self.targets = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        file, label = self.samples[row]
        return {"image": np.asarray(Image.open(file), np.float32).transpose(2, 0, 1), "label": label}


class Bands(NonGeoDataset):
    """Thirteen bands of reflectances, NaN in a corner of all; an unreadable row, and separate labels."""

    targets = (0, 1, 0, 1, 0, 1)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if row == 4:
            raise RuntimeError("truncated")
        return {"image": torch.from_numpy(reflectances(row)), "label": torch.tensor(row % 2)}


class BareBands(Bands):
    """The labels are only in the samples, as in a single HDF5 file."""

    targets = None  # type: ignore[assignment]


class Sentinel(BareBands):
    """Thirteen named bands in EuroSAT's order; the class defines red, green and blue."""

    all_band_names = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
    rgb_bands = ("B04", "B03", "B02")


class Loaded(Sentinel):
    """Has loaded only some of its bands, in its own order."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.bands = ["B03", "B8A", "B02", "B04"]

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        rows = [self.all_band_names.index(name) for name in self.bands]
        return {**super().__getitem__(row), "image": torch.from_numpy(reflectances(row)[rows])}


class Named(BareBands):
    """Thirteen named bands without information on their colours."""

    band_names = Sentinel.all_band_names


class Radar(NonGeoDataset):
    """One band."""

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"image": torch.from_numpy(pixels(row)[None, ..., 0]).float(), "label": torch.tensor(row % 2)}


class RasterDataset:
    """A geo data set, which has locations but no rows."""


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def reflectances(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(0, 0.4, (13, SIDE, SIDE)).astype(np.float32)
    values[:, :3, :3] = np.nan
    return values


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module `torchgeo`, version 9.9."""
    package, datasets = ModuleType("torchgeo"), ModuleType("torchgeo.datasets")
    for kind in (
        DatasetNotFoundError,
        NonGeoDataset,
        Splits,
        TwoSplits,
        NoSplits,
        Files,
        Bands,
        BareBands,
        Validation,
        Dev,
        Kinds,
        Sentinel,
        Loaded,
        Named,
        Radar,
        RasterDataset,
    ):
        setattr(datasets, kind.__name__, kind)
    package.datasets = datasets
    monkeypatch.setitem(sys.modules, "torchgeo", package)
    monkeypatch.setitem(sys.modules, "torchgeo.datasets", datasets)
    version = {"torchgeo": "9.9"}.__getitem__
    monkeypatch.setattr(corpus.sources.torchgeo, "metadata", SimpleNamespace(version=version))
    yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder in which a data set finds its files."""
    (tmp_path / "root" / "a").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(pixels(number)).save(tmp_path / "root" / "a" / f"a{number}.png")
    (tmp_path / "root" / "b").mkdir()
    Image.fromarray(pixels(3)).save(tmp_path / "root" / "b" / "b3.png")
    return tmp_path / "root"


def ids_of(name: str, count: int) -> list[str]:
    return [f"{name}/{row:08d}" for row in range(count)]


def source(dataset: str, root: Path, **options: Any) -> TorchGeo:
    return TorchGeo(dataset, str(root), resolution=SIDE, **options)


def test_the_splits_of_a_class_become_the_splits_of_the_corpus(root: Path, tmp_path: Path) -> None:
    for split, first in (("train", 100), ("val", 200), ("test", 300)):
        indexed = index_corpus(source("Splits", root, split=split), tmp_path / "runs")
        assert (indexed.images == np.stack([pixels(first + row) for row in range(6)])).all()
        assert indexed.manifest["scene"].tolist() == [SCENES[row % 2] for row in range(len(indexed))]
        assert set(indexed.manifest["caption"]) == {"a satellite image of beach sand", "a satellite image of forest"}
        assert indexed.manifest["id"].tolist() == [f"{split}/{row:08d}" for row in range(6)]
    assert len(source("Splits", root).manifest()) == 18
    assert source("Splits", root).version == {
        **source("Splits", root).version, "torchgeo": "9.9", "train": 6, "val": 6, "test": 6,
    }  # fmt: skip


def test_a_missing_val_split_is_taken_from_train(root: Path) -> None:
    ids = source("TwoSplits", root).manifest()["id"].str.split("/").str[0]
    assert ids.tolist() == ["train"] * 6 + ["test"] * 6
    parts = {split: source("TwoSplits", root, split=split).manifest()["id"] for split in ("train", "val", "test")}
    assert parts["test"].tolist() == ids_of("test", 6)
    parts = {split: source("TwoSplits", root, split=split, val_fraction=0.5).manifest()["id"] for split in parts}
    assert sorted([*parts["train"], *parts["val"]]) == ids_of("train", 6) and 0 < len(parts["val"]) < 6
    assert parts["test"].tolist() == ids_of("test", 6)


def test_other_names_of_the_val_split_are_recognised(root: Path) -> None:
    """So2Sat uses the name validation and keeps no list; SustainBench uses dev."""
    for dataset, name in (("Validation", "validation"), ("Dev", "dev")):
        for split, expected in (("train", "train"), ("val", name), ("test", "test")):
            assert source(dataset, root, split=split).manifest()["id"].tolist() == ids_of(expected, 6)


def test_unknown_split_names_are_replaced_by_a_hashed_split(root: Path) -> None:
    """VHR-10 has the splits positive and negative."""
    parts = [
        source("Kinds", root, split=split, val_fraction=0.3, test_fraction=0.3) for split in ("train", "val", "test")
    ]
    ids = [identifier for part in parts for identifier in part.manifest()["id"]]
    assert sorted(ids) == [*ids_of("negative", 6), *ids_of("positive", 6)]
    assert all(0 < len(part.manifest()) < 12 for part in parts)


def test_a_class_without_splits_is_split_by_a_hash(root: Path) -> None:
    ids = source("NoSplits", root).manifest()["id"].tolist()
    assert ids == [f"all/{row:08d}" for row in range(6)]
    fractions = {"val_fraction": 0.2, "test_fraction": 0.5}
    parts = [source("NoSplits", root, split=split, **fractions).manifest()["id"] for split in ("train", "val", "test")]
    assert sorted(identifier for part in parts for identifier in part) == ids and 0 < len(parts[2]) < 6
    assert len(source("NoSplits", root, split="test", test_fraction=0).manifest()) == 0


def test_a_limit_takes_images_evenly_from_all_splits(root: Path) -> None:
    thin = source("Splits", root, limit=6)
    assert thin.manifest()["id"].str.split("/").str[0].value_counts().to_dict() == {"train": 2, "val": 2, "test": 2}
    rows = np.array([0, 5])
    images = list(thin.reader(rows)())
    for image, (name, row) in zip(images, thin.manifest()["id"].iloc[rows].str.split("/"), strict=True):
        assert (image == pixels({"train": 100, "val": 200, "test": 300}[name] + int(row))).all()


def test_files_give_ids_scenes_and_stamps(root: Path, tmp_path: Path) -> None:
    """Ids are paths below the root, scenes come from the labels, and a changed file changes the version."""
    indexed = index_corpus(source("Files", root), tmp_path / "runs")
    table = indexed.manifest
    assert table["id"].tolist() == ["a/a0.png", "a/a1.png", "a/a2.png", "b/b3.png"]
    assert table["scene"].tolist() == ["BeachSand"] * 3 + ["Forest"]
    assert table["stamp"].tolist() == [file_stamp(root / name) for name in table["id"]]
    assert (indexed.images == np.stack([pixels(seed) for seed in range(4)])).all()
    before = source("Files", root).version
    assert source("Files", root).version == before
    Image.fromarray(pixels(50)).save(root / "a" / "a1.png")
    os.utime(root / "a" / "a1.png", ns=(1, 1))
    assert source("Files", root).version != before
    changed = index_corpus(source("Files", root), tmp_path / "runs")
    assert (changed.images[1] == pixels(50)).all() and (changed.images[3] == pixels(3)).all()


def test_a_damaged_file_is_quarantined(root: Path, tmp_path: Path) -> None:
    (root / "a" / "a2.png").write_bytes((root / "a" / "a2.png").read_bytes()[:200])
    (root / "b" / "b3.png").write_bytes(b"")
    indexed = index_corpus(source("Files", root), tmp_path / "runs")
    assert indexed.manifest["reason"].tolist() == ["", "", DAMAGED, DAMAGED]


def test_deep_bands_are_chosen_and_stretched(root: Path, tmp_path: Path) -> None:
    indexed = index_corpus(source("Bands", root, bands=(3, 2, 1)), tmp_path / "runs")
    assert indexed.manifest["reason"].tolist() == ["", "", "", "", DAMAGED, ""]
    for row in (0, 5):
        assert np.abs(indexed.images[row] - shown(row, [3, 2, 1])).max() <= 0.51


def shown(row: int, bands: list[int]) -> np.ndarray:
    """Bands of a generated image, stretched between percentiles of all readable images."""
    values = reflectances(row)[bands]
    pooled = np.stack([reflectances(number)[bands] for number in (0, 1, 2, 3, 5)])
    low, high = (np.nanpercentile(pooled, part, axis=(0, 2, 3))[:, None, None] for part in (2, 98))
    expected = np.clip((values - low) / (high - low) * 255, 0, 255)
    expected[:, :3, :3] = 0
    return expected.transpose(1, 2, 0)


@pytest.mark.parametrize(
    ("dataset", "bands", "rows"),
    [
        ("Sentinel", None, [3, 2, 1]),  # red, green, blue: B04, B03, B02
        ("Loaded", None, [3, 2, 1]),
        ("Sentinel", ("B8A", "B11", "B04"), [12, 10, 3]),
        ("Sentinel", (7, "B03", 0), [7, 2, 0]),
        ("Sentinel", ("B8A",), [12, 12, 12]),
        ("Named", ("B12", "B08", "B04"), [11, 7, 3]),
        ("BareBands", (2, 1, 0), [2, 1, 0]),
    ],
)
def test_bands_are_chosen_by_the_names_of_the_class_or_by_row(
    root: Path, dataset: str, bands: tuple | None, rows: list[int]
) -> None:
    read = list(source(dataset, root, bands=bands).reader(np.array([0, 4, 5]))())
    assert read[1] == DAMAGED
    for image, row in ((read[0], 0), (read[2], 5)):
        assert np.abs(image - shown(row, rows)).max() <= 0.51


def test_a_single_band_is_shown_in_grey(root: Path) -> None:
    [image] = source("Radar", root).reader(np.array([2]))()
    assert (image == pixels(2)[..., :1]).all()


@pytest.mark.parametrize(
    ("dataset", "bands", "message"),
    [
        ("BareBands", None, r"has 13 bands and does not say .*corpus\.bands=.* by row from 0 to 12"),
        ("Named", None, r"has 13 bands and does not say .*corpus\.bands=.*B01, B02, .*B8A"),
        ("Sentinel", ("B04", "B03", "B2"), r"no band B2; it has the rows 0 to 12, called B01, "),
        ("BareBands", ("B04", "B03", "B02"), r"no band B04; it has the rows 0 to 12, which have no names"),
        ("Sentinel", (3, 2, 13), r"no band 13"),
        ("Sentinel", (3, 2, -1), r"no band -1"),
        ("Sentinel", (3, 2), r"corpus\.bands=\[3, 2\]: name three"),
    ],
)
def test_unknown_bands_give_a_one_line_error(root: Path, dataset: str, bands: tuple | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        source(dataset, root, bands=bands).manifest()
    assert "\n" not in str(caught.value)


def test_an_image_with_fewer_bands_than_the_others_gets_a_reason(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"image": torch.from_numpy(reflectances(1)[:2]), "label": torch.tensor(0)}
    whole = Sentinel.__getitem__
    monkeypatch.setattr(Sentinel, "__getitem__", lambda self, row: few if row == 1 else whole(self, row))
    images = list(source("Sentinel", root).reader(np.arange(3))())
    assert images[1] == "has 2 bands, not 4" and isinstance(images[2], np.ndarray)


def test_an_unreadable_row_has_no_scene_and_does_not_stop_the_index(root: Path, tmp_path: Path) -> None:
    indexed = index_corpus(source("BareBands", root, bands=(2, 1, 0)), tmp_path / "runs")
    assert indexed.manifest["reason"].tolist() == ["", "", "", "", DAMAGED, ""]
    assert indexed.manifest["scene"].tolist() == ["BeachSand", "Forest", "BeachSand", "Forest", "", "Forest"]


def test_images_are_cropped_to_a_square_and_reduced(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.asarray(texture(0, side=40))[:32]
    image = torch.from_numpy(wide.transpose(2, 0, 1).copy()).float()
    monkeypatch.setattr(NoSplits, "__getitem__", lambda self, row: {"image": image, "label": 0}, raising=False)
    result = next(iter(source("NoSplits", root).reader(np.array([0]))()))
    assert np.abs(result - wide[:, 4:36].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))).max() <= 0.51


@pytest.mark.parametrize("name", ["Nothing", "RasterDataset", "DatasetNotFoundError", "__name__"])
def test_a_class_that_is_not_a_non_geo_data_set_gives_a_one_line_error(root: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"corpus\.dataset={name} is not a non-geo data set of torchgeo") as caught:
        source(name, root).manifest()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Splits", "TwoSplits", "NoSplits"])
def test_missing_files_give_a_one_line_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"torchgeo's {name} does not find its files in .*empty") as caught:
        source(name, tmp_path / "empty").manifest()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": None}, "needs a class and its folder"),
        ({"root": None}, "needs a class and its folder"),
        ({"root": "nowhere"}, "corpus.root=nowhere is not a folder"),
        ({"split": "holdout"}, "split='holdout' is unknown"),
        ({"limit": 0}, "limit"),
    ],
)
def test_invalid_torchgeo_options_give_a_one_line_error(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        TorchGeo(**{"dataset": "Splits", "root": str(root), **options})
    assert "\n" not in str(caught.value)
