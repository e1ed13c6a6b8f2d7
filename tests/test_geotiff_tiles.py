"""Tiles of raster scenes: overlap, location on Earth, and pixels without data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from rasterio.transform import from_origin
from rasterio.warp import transform

from corpus.index import Corpus, index_corpus
from corpus.sources.geotiff import NO_DATA, GeoTiff
from runtime.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an array [bands, H, W] as a scene below `tmp_path/scenes`."""

    def written(name: str, values: np.ndarray, **options: object) -> Path:
        path = tmp_path / "scenes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        bands, height, width = values.shape
        place = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_300_000, 10, 10), **options}
        with rasterio.open(
            path, "w", driver="GTiff", count=bands, height=height, width=width, dtype=values.dtype, **place
        ) as raster:
            raster.write(values)
        return path

    return written


def noise(height: int, width: int, bands: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(1, 256, (bands, height, width), dtype=np.uint8)


def indexed(root: Path, tmp_path: Path, **options: object) -> Corpus:
    return index_corpus(GeoTiff(str(root), workers=1, **options), tmp_path / "runs")


def tiles(corpus: Corpus) -> list:
    return list(corpus.manifest.itertuples())


# ----------------------------------------------------------------------------------------------------------- overlap


@pytest.mark.parametrize("overlap", [0, 1, 5, 12])
def test_neighbouring_tiles_share_exactly_the_overlap(write: Write, tmp_path: Path, overlap: int) -> None:
    values = noise(60, 73)
    corpus = indexed(
        write("a.tif", values), tmp_path, tile=16, resolution=16, overlap=overlap, stretch="none", block=100
    )
    step = 16 - overlap
    places = [(y, x) for y in range(0, 60 - 15, step) for x in range(0, 73 - 15, step)]
    assert list(zip(corpus.manifest["row"], corpus.manifest["column"], strict=True)) == places
    images = dict(zip(places, corpus.images, strict=True))
    for y, x in places:
        assert (images[y, x] == values[:, y : y + 16, x : x + 16].transpose(1, 2, 0)).all()
    if overlap:
        assert (images[0, 0][:, -overlap:] == images[0, step][:, :overlap]).all()
        assert (images[0, 0][-overlap:] == images[step, 0][:overlap]).all()
        assert not (images[0, 0][:, -overlap - 1] == images[0, step][:, 0]).all(), "one column more is not shared"


def test_no_pixel_is_in_tiles_of_two_blocks(write: Write, tmp_path: Path) -> None:
    """Tiles overlap only inside their block, because splits consist of blocks."""
    table = GeoTiff(str(write("a.tif", noise(90, 90))), tile=16, resolution=16, overlap=10, block=3).manifest()
    extent = 2 * 6 + 16
    owners = np.full((90, 90), -1)
    for tile in table.itertuples():
        block = tile.row // extent * 100 + tile.column // extent
        part = owners[tile.row : tile.row + 16, tile.column : tile.column + 16]
        assert np.isin(part, (-1, block)).all()
        part[:] = block
    assert len(table) == 81 and len(set(owners[owners >= 0].tolist())) == 9


@pytest.mark.parametrize("overlap", [-1, 16, 20])
def test_an_invalid_overlap_is_refused(write: Write, overlap: int) -> None:
    path = write("a.tif", noise(32, 32))
    with pytest.raises(UserError, match=rf"corpus\.overlap={overlap} must lie in 0\.\.15"):
        GeoTiff(str(path), tile=16, resolution=16, overlap=overlap)


# ------------------------------------------------------------------------------------------------------------- place

PLACES = {
    "utm.tif": {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_300_000, 10, 10)},
    "south.tif": {"crs": "EPSG:32756", "transform": from_origin(334_000, 6_252_000, 30, 30)},
    "world.tif": {"crs": "EPSG:4326", "transform": from_origin(-71.5, -33.0, 0.002, 0.002)},
    "polar.tif": {"crs": "EPSG:3031", "transform": from_origin(1_200_000, 700_000, 250, 250)},
    "turned.tif": {
        "crs": "EPSG:32632",
        "transform": from_origin(600_000, 5_400_000, 20, 20) * rasterio.Affine.rotation(30),
    },
}


@pytest.mark.parametrize("tile", [16, 32])
def test_every_tile_has_its_coordinate_system_and_centre(write: Write, tile: int) -> None:
    """For every coordinate system of the scene, with and without reduction of the tiles."""
    for name, options in PLACES.items():
        root = write(name, noise(64, 96), **options).parent
    table = GeoTiff(str(root), tile=tile, resolution=16, overlap=4, stretch="none").manifest()
    assert table["id"].str.split("/").str[0].nunique() == len(PLACES)
    for row in table.itertuples():
        with rasterio.open(root / row.id.split("/")[0]) as raster:
            assert row.crs == raster.crs.to_string()
            corners = [raster.transform * (row.column + x * tile, row.row + y * tile) for x, y in ((0, 0), (0.5, 0.5))]
            lon, lat = (values[0] for values in transform(raster.crs, "EPSG:4326", *zip(corners[1], strict=True)))
            scale = np.sqrt(abs(raster.transform.determinant)) * tile / 16
        assert row.lon == pytest.approx(lon, abs=1e-9) and row.lat == pytest.approx(lat, abs=1e-9)
        own = rasterio.Affine.from_gdal(*json.loads(row.transform))
        assert own * (0, 0) == pytest.approx(corners[0]) and own * (8, 8) == pytest.approx(corners[1])
        metres = scale * (111_320 * np.sqrt(np.cos(np.radians(row.lat))) if row.crs == "EPSG:4326" else 1)
        # a projection's metre differs from the ground's by some per cent, most in the polar one
        assert row.ground_sampling_distance == pytest.approx(metres, rel=0.04)


def test_tiles_of_a_scene_without_georeference_have_no_location(write: Write, tmp_path: Path) -> None:
    here = write("here.tif", noise(16, 16))
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        write("nowhere.tif", noise(16, 16), crs=None, transform=rasterio.Affine.identity())
    table = indexed(here.parent, tmp_path, resolution=16).manifest.set_index("crs")
    assert table.loc["EPSG:32632", ["lon", "lat", "ground_sampling_distance"]].notna().all()
    assert table.loc["", ["lon", "lat", "ground_sampling_distance"]].isna().all() and table["readable"].all()


# ----------------------------------------------------------------------------------------------------------- no data

LOW, HIGH = -0.2, 1.2


@pytest.fixture
def holes(write: Write) -> tuple[Path, np.ndarray, np.ndarray]:
    """A float scene of two by three tiles of 16 px with NaN and -9999; its values, and the mask of missing ones."""
    values = np.random.default_rng(0).uniform(0.1, 1.0, (3, 32, 48)).astype(np.float32)
    values[:, 0:16, 16:32] = np.nan  # a tile without data
    values[:, 0:9, 32:48] = -9999  # 144 of 256 pixels: just too much
    values[:, 16:20, 0:16] = np.nan  # a quarter, half the side each way
    values[:, 20:24, 0:8] = -9999
    values[:, 16:24, 16:32] = -9999  # exactly half, which is still accepted
    values[1, 30, 40] = np.nan  # only one band
    values[2, 31, 41] = -9999
    missing = np.isnan(values).any(axis=0) | (values == -9999).all(axis=0)
    return write("holes.tif", values, nodata=-9999.0), values, missing


def test_tiles_with_too_little_data_are_quarantined(holes, tmp_path: Path) -> None:
    path, _, missing = holes
    for most in (0.5, 0.2, 0.6):
        corpus = indexed(path, tmp_path, resolution=16, most_no_data=most)
        fractions = [missing[tile.row : tile.row + 16, tile.column : tile.column + 16].mean() for tile in tiles(corpus)]
        assert corpus.manifest["reason"].tolist() == [NO_DATA if fraction > most else "" for fraction in fractions]
        assert (corpus.images[~corpus.readable] == 0).all()
        assert 0 < (~corpus.readable).sum() < len(corpus) == 6


def test_pixels_without_data_are_black_and_others_are_stretched_as_usual(holes, tmp_path: Path) -> None:
    path, values, missing = holes
    corpus = indexed(path, tmp_path, resolution=16, stretch="range", low=LOW, high=HIGH)
    expected = np.where(missing, 0, (values - LOW) * (255 / (HIGH - LOW))).transpose(1, 2, 0)
    assert corpus.readable.sum() == 4
    for tile, image in zip(tiles(corpus), corpus.images, strict=True):
        window = np.s_[tile.row : tile.row + 16, tile.column : tile.column + 16]
        if tile.readable:
            assert ((image == 0).all(axis=-1) == missing[window]).all()
            assert np.abs(image - np.clip(expected[window], 0, 255)).max() <= 0.51


def test_pixels_without_data_do_not_affect_the_stretch(holes, tmp_path: Path) -> None:
    """The percentiles use only valid pixels: neither NaN nor -9999 in all bands changes them."""
    path, values, missing = holes
    corpus = indexed(path, tmp_path, resolution=16)
    ends = [np.percentile(band[~missing], (2, 98)) for band in values]
    for tile, image in zip(tiles(corpus), corpus.images, strict=True):
        if tile.readable:
            window = np.s_[tile.row : tile.row + 16, tile.column : tile.column + 16]
            for band, (low, high) in enumerate(ends):
                grey = np.clip((values[band][window] - low) / (high - low) * 255, 0, 255)
                assert np.abs(image[..., band] - np.where(missing[window], 0, grey)).max() <= 0.51


def test_all_tiles_of_a_scene_without_data_are_quarantined(write: Write, tmp_path: Path) -> None:
    for number, (value, nodata) in enumerate(((np.nan, None), (-1.0, -1.0), (np.nan, np.nan))):
        path = write(f"{number}.tif", np.full((1, 32, 32), value, np.float32), nodata=nodata)
        with pytest.raises(UserError, match=rf"none of 4 images can be read: {NO_DATA} 4 \(table: ") as refused:
            indexed(path, tmp_path, resolution=16)
        table = pd.read_parquet(str(refused.value).split("(table: ")[1].split(")")[0])
        assert table["reason"].tolist() == [NO_DATA] * 4
