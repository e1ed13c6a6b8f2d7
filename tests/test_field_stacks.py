"""One file per band, and georeferenced patches: which files form one image, and which images must stay in one split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin

from corpus.footprints import footprint_of
from corpus.index import index_corpus
from corpus.sources.folder import ImageFolder
from corpus.sources.geotiff import GeoTiff
from corpus.splits import assigned, hashed_split
from corpus.stacks import place_of, scene_folders, single_bands, stacks
from runtime.errors import UserError

RGB = ("B04", "B03", "B02")
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes values [bands, H, W] as a GeoTIFF below the root `data`; returns the root."""

    def written(name: str, values: np.ndarray, x: float = 500_000, y: float = 5_000_000, **options: object) -> Path:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype.name}
        place = {"crs": "EPSG:32633", "transform": from_origin(x, y, options.pop("pixel", 10), 10)}
        with rasterio.open(path, "w", driver="GTiff", **{**shape, **place, **options}) as raster:
            raster.write(values)
        return tmp_path / "data"

    return written


def bigearthnet(write: Write, count: int = 4) -> tuple[Path, np.ndarray]:
    """Patches in BigEarthNet's layout, each with its labels; the true values are uint16 [count, 3, 24, 24]."""
    random = np.random.default_rng(11)
    truth = random.integers(0, 3000, (count, 3, 24, 24)).astype(np.uint16)
    for patch, bands in enumerate(truth):
        for name, values in zip(RGB, bands, strict=True):
            root = write(f"S2A_{patch}/S2A_{patch}_{name}.tif", values[None], x=600_000 + 9_000 * patch)
        for name, side in (("B01", 4), ("B05", 12), ("B08", 24)):
            write(f"S2A_{patch}/S2A_{patch}_{name}.tif", random.integers(0, 9, (1, side, side)).astype(np.uint16))
        labels = {"season": "summer", "labels": ["Pastures"]}
        (root / f"S2A_{patch}" / f"S2A_{patch}_labels_metadata.json").write_text(json.dumps(labels))
    return root, truth


def test_patches_with_one_file_per_band_are_stacked(write: Write, tmp_path: Path, capsys) -> None:
    root, truth = bigearthnet(write)
    with pytest.raises(UserError, match=r"one file per band \(S2A_0_B01\.tif, .*corpus\.bands=\[B04,B03,B02\]"):
        ImageFolder(str(root)).manifest()
    with pytest.raises(UserError, match="name the bands for red, green and blue"):
        ImageFolder(str(root), bands=(4, 3, 2)).manifest()
    source = ImageFolder(str(root), bands=RGB, stretch="range", low=0, high=3000, resolution=24)
    corpus = index_corpus(source, tmp_path / "runs")
    assert corpus.manifest["id"].tolist() == [f"S2A_{patch}/S2A_{patch}" for patch in range(4)]
    assert corpus.readable.all() and (corpus.manifest["season"] == "summer").all()
    assert (corpus.manifest["scene"] == "").all()  # a patch's own folder is not a class
    assert np.abs(corpus.images - truth.transpose(0, 2, 3, 1) / 3000 * 255).max() <= 0.51
    message = capsys.readouterr().err
    assert "4 images are stacked from single-band files; 12 other files of these scenes are left out" in message


def test_deep_stacks_have_one_stretch_and_are_exported_unchanged(write: Write) -> None:
    root, truth = bigearthnet(write)
    source = ImageFolder(str(root), bands=RGB, resolution=24)
    levels = source.survey.levels["uint16 x 3"]
    expected = np.percentile(truth.transpose(0, 2, 3, 1).reshape(-1, 3), (2, 98), axis=0).T
    assert np.allclose(levels, expected)
    [(data, suffix, mask)] = list(source.originals(np.array([2])))
    assert suffix == ".tif" and mask is None
    with rasterio.MemoryFile(data) as memory, memory.open() as raster:
        assert (raster.read() == truth[2]).all() and raster.crs.to_epsg() == 32633
        assert raster.transform.c == 618_000
    with pytest.raises(UserError, match="one file per band"):
        source.path(0)


def test_a_changed_band_changes_the_version_and_a_missing_band_gets_a_reason(write: Write, tmp_path: Path) -> None:
    root, _ = bigearthnet(write)
    source = ImageFolder(str(root), bands=RGB, resolution=24)
    before, (first,) = source.version, source.reader(np.array([1]))()
    write("S2A_1/S2A_1_B03.tif", np.full((1, 24, 24), 7, np.uint16))
    again = ImageFolder(str(root), bands=RGB, resolution=24)
    assert again.version != before
    read = again.reader(np.arange(4))
    (root / "S2A_2" / "S2A_2_B02.tif").unlink()
    (root / "S2A_3" / "S2A_3_B02.tif").write_bytes(b"II*\0 cut off")
    images = list(read())
    assert images[2] == "vanished" and images[3] == "damaged or truncated"
    assert np.ptp(first[..., 1]) > 0 and np.ptp(images[1][..., 1]) == 0  # the new values are read


def test_masks_and_captions_are_matched_to_the_patch(write: Write, tmp_path: Path) -> None:
    root, _ = bigearthnet(write)
    for patch in range(4):
        folder = tmp_path / "masks" / f"S2A_{patch}"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((24, 24), patch % 2, np.uint8)).save(folder / f"S2A_{patch}.png")
    rows = [{"file_name": f"S2A_{patch}", "text": f"patch {patch}"} for patch in range(4)]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"bands": RGB, "masks": str(tmp_path / "masks"), "classes": ("a", "b"), "resolution": 24}
    source = ImageFolder(str(root), **options)
    assert source.manifest()["caption"].tolist() == [f"patch {patch}" for patch in range(4)]
    assert [sample.mask.max() for sample in source.reader(np.arange(4))()] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("files", "bands", "place", "left"),
    [
        (["p/B02.tif", "p/B03.tif", "p/B04.tif", "p/SCL.tif"], RGB, "p", 1),
        (["B04/x.tif", "B03/x.tif", "B02/x.tif", "B08/x.tif"], RGB, "x", 1),
        (["L_02_T1_SR_B4.TIF", "L_02_T1_SR_B3.TIF", "L_02_T1_SR_B2.TIF", "L_02_T1_QA_PIXEL.TIF", "L_02_T1_ST_B10.TIF"],
         ("B4", "B3", "B2"), "L_02_T1_SR", 2),
        (["c_sr_band4.tif", "c_sr_band3.tif", "c_sr_band2.tif"], ("B4", "B3", "B2"), "c_sr", 0),
        (["x_red.tif", "x_green.tif", "x_blue.tif", "x_nir.tif"], ("red", "green", "blue"), "x", 1),
        (["HLS.L30.T1.v2.0.B04.tif", "HLS.L30.T1.v2.0.B03.tif", "HLS.L30.T1.v2.0.B02.tif", "HLS.L30.T1.v2.0.Fmask.tif"],
         RGB, "HLS.L30.T1.v2.0", 1),
        (["S1A_VV.tif", "S1A_VH.tif"], ("VV", "VH", "VV"), "S1A", 0),
    ],
)  # fmt: skip
def test_bands_of_other_products_are_stacked(files: list[str], bands: tuple[str, ...], place: str, left: int) -> None:
    result, others = stacks(files, bands)
    assert list(result) == [place] and len(result[place]) == 3 and len(others) == left


def test_quality_masks_of_a_safe_product_are_not_stacked() -> None:
    """Since baseline 04.00 a product has MSK_QUALIT_B02.jp2 and similar files next to the images."""
    granule = "S2A_MSIL2A_X.SAFE/GRANULE/L2A_T36KVU"
    images = [f"{granule}/IMG_DATA/R{size}m/T36KVU_{b}_{size}m.jp2" for size in (10, 20) for b in (*RGB, "SCL")]
    masks = [f"{granule}/QI_DATA/MSK_{kind}_{band}.jp2" for kind in ("QUALIT", "DETFOO") for band in RGB]
    result, others = stacks([*images, *masks, f"{granule}/QI_DATA/T36KVU_PVI.jp2"], RGB)
    assert list(result) == [f"{granule}/IMG_DATA/T36KVU"] and all("R10m" in file for file in result.popitem()[1])
    assert len(others) == len(images) - 3 + len(masks) + 1
    assert scene_folders(f"europe/{granule}/IMG_DATA/T36KVU") == ("europe",)


def test_files_that_are_no_bands_are_not_stacked() -> None:
    assert single_bands(["a_b1.png", "a_b2.png", "a_b3.png", "tb12.tif", "web1.tif", "B1.tif"]) == []
    assert stacks(["a.tif", "b.tif"], RGB) == ({}, set())
    assert place_of("p/S2A_10_labels.json", {"p/S2A_1"}) is None


def test_files_named_like_bands_but_with_three_bands_are_images(write: Write) -> None:
    for name in ("block_b1.tif", "block_b2.tif", "block_b3.tif"):
        root = write(name, np.zeros((3, 8, 8), np.uint8))
    assert len(ImageFolder(str(root), resolution=8).manifest()) == 3


def test_a_single_band_can_be_read_alone(write: Write) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    write("p/x_B08.tif", values)
    root = write("p/x_B04.tif", values // 2)
    for source in (
        GeoTiff(str(root), resolution=16, bands=("B08",)),
        ImageFolder(str(root), resolution=16, bands=("B08",)),
    ):
        [image] = source.reader(np.arange(1))()
        assert len(source.manifest()) == 1 and (image[..., 0] == values[0]).all()


# -------------------------------------------------------------------------------------------------------------- ground


@pytest.fixture
def patches(write: Write) -> Path:
    """240 patches of 160 m, at random over 8 km, in two projections; every fourth one again with another date."""
    random, pixels = np.random.default_rng(3), np.random.default_rng(4)
    for number in range(240):
        x, y = random.integers(0, 784, 2) * 10.0
        for date in (0, 1)[: 1 + (number % 4 == 0)]:
            values = pixels.integers(0, 256, (3, 16, 16), dtype=np.uint8)
            root = write(f"{number:03d}_{date}.tif", values, x=500_000 + x, y=5_000_000 + y)
    return root


def bounds(root: Path, names: list[str]) -> np.ndarray:
    result = []
    for name in names:
        with rasterio.open(root / name) as raster:
            result.append(tuple(raster.bounds))
    return np.array(result)


def test_no_ground_is_in_two_splits(patches: Path, capsys) -> None:
    tables = {split: ImageFolder(str(patches), split=split).manifest() for split in ("train", "val", "test")}
    boxes = {split: bounds(patches, table["id"].tolist()) for split, table in tables.items()}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        a, b = boxes[one][:, None], boxes[other][None]
        left, bottom, right, top = (a[..., side] for side in range(4))
        shared = (left < b[..., 2]) & (b[..., 0] < right) & (bottom < b[..., 3]) & (b[..., 1] < top)
        assert not shared.any(), (one, other)
    assert min(map(len, boxes.values())) > 10
    everything = ImageFolder(str(patches)).manifest()
    border = len(everything) - sum(map(len, tables.values()))
    assert border > 0 and f"{border} images lie across the border" in capsys.readouterr().err
    assert set(tables["train"]["ground"]) & set(tables["test"]["ground"]) <= {""}


def test_a_patch_has_the_same_footprint_in_two_utm_zones(tmp_path: Path, write: Write) -> None:
    """The same patch in the projection of the neighbouring zone falls into the same cell."""
    from rasterio.warp import transform

    values = np.zeros((3, 16, 16), np.uint8)
    (x,), (y,) = transform("EPSG:32633", "EPSG:32632", [320_000], [5_000_000])
    write("a.tif", values, x=320_000, y=5_000_000)
    root = write("b.tif", values, x=x, y=y, crs="EPSG:32632")
    first, second = (footprint_of(root / name) for name in ("a.tif", "b.tif"))
    assert abs(first.lon[1] - second.lon[1]) < 1e-6 and abs(first.lat[1] - second.lat[1]) < 1e-6
    assert 160 <= first.side < 165 and 160 <= second.side < 180  # the zones are rotated against each other


def test_images_without_a_location_are_split_by_the_hash_of_their_id(write: Write, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    (tmp_path / "plain").mkdir()
    for number in range(40):
        values = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "plain" / f"{number}.{'tif' if number % 2 else 'png'}")
    for split in ("train", "val", "test"):
        table = ImageFolder(str(tmp_path / "plain"), split=split).manifest()
        assert {hashed_split(name, 0.1, 0.1) for name in table["id"]} <= {split} and "ground" not in table


def test_images_of_a_single_location_are_split_by_id_and_reported(write: Write, capsys) -> None:
    """For example patches with an invented location, or many dates of one location."""
    random = np.random.default_rng(6)
    for number in range(60):
        root = write(f"{number}.tif", random.integers(0, 256, (3, 8, 8), dtype=np.uint8))
    for split in ("train", "val", "test"):
        table = ImageFolder(str(root), split=split).manifest()
        assert len(table) and {hashed_split(name, 0.1, 0.1) for name in table["id"]} == {split}
    assert "lie in only 1 ground cells, too few" in capsys.readouterr().err


def test_ground_decides_the_splits_that_the_data_set_does_not_name(capsys) -> None:
    ids = [f"{number}.tif" for number in range(200)]
    grounds = [(f"1,{number // 2}",) for number in range(200)]
    result = assigned("c", ids, [""] * 200, 0.1, 0.1, None, grounds)
    assert result == [hashed_split(cells[0], 0.1, 0.1) for cells in grounds]
    named = assigned("c", ids, ["test"] * 10 + ["train"] * 190, 0.1, 0.1, None, grounds)
    assert named[:10] == ["test"] * 10
    assert named[10:] == [hashed_split(cells[0], 0.1, 0.0) for cells in grounds[10:]]
    across = [(*cells, "1,999") if number < 50 else cells for number, cells in enumerate(grounds)]
    edge = assigned("c", ids, [""] * 200, 0.1, 0.1, None, across)
    expected = [{hashed_split(cell, 0.1, 0.1) for cell in cells} for cells in across]
    assert edge == [splits.pop() if len(splits) == 1 else "" for splits in expected] and "" in edge


def test_few_locations_fill_the_splits_and_are_not_divided(capsys) -> None:
    """Ten locations at three dates.

    A hash of ten cells may leave a split empty; a hash of the ids would separate the dates of a location.
    """
    for seed in range(40):
        places = [f"{seed},{number}" for number in range(10) for _ in range(3)]
        ids = [f"{place}_{date}" for place, date in zip(places, (0, 1, 2) * 10, strict=True)]
        splits = assigned("c", ids, [""] * 30, 0.1, 0.1, None, [(place,) for place in places])
        assert len(set(zip(places, splits, strict=True))) == 10
        by_id = {hashed_split(identifier, 0.1, 0.1) for identifier in ids}
        assert by_id <= set(splits)
