"""The raster reader: displayed bands, missing data, and the values that become black and white."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from corpus.decoding import DAMAGED, NO_DATA, decode_image, image_pixels
from corpus.index import index_corpus
from corpus.raster import ALPHA_FRACTION, Pixels, RasterOptions, Survey, has_data, spread, survey_of, to_rgb
from corpus.sources.folder import ImageFolder
from corpus.sources.geotiff import GeoTiff
from runtime.errors import UserError

SIDE = 32
NOISE = np.random.default_rng(5)


def geotiff(values: np.ndarray, names: tuple[str, ...] = (), **options: object) -> bytes:
    """Values [bands, H, W] as written by GDAL."""
    interpretation = options.pop("interpretation", None)
    mask = options.pop("mask", None)
    palette = options.pop("palette", None)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", count=len(values), height=values.shape[1], width=values.shape[2], dtype=values.dtype.name,
            transform=from_origin(500_000, 5_000_000, 10, 10), crs="EPSG:32633", **options,
        ) as raster:  # fmt: skip
            if interpretation:
                raster.colorinterp = interpretation
            if palette:
                raster.write_colormap(1, palette)
            raster.write(values)
            for band, name in enumerate(names, start=1):
                raster.set_band_description(band, name)
            if mask is not None:
                raster.write_mask(mask)
        return memory.read()


def colours(low: int = 0, high: int = 256, bands: int = 3, kind: str = "uint8") -> np.ndarray:
    return NOISE.integers(low, high, (bands, SIDE, SIDE)).astype(kind)


def shown(values: np.ndarray) -> np.ndarray:
    return values.transpose(1, 2, 0)


# -------------------------------------------------------------------------------------------------------------- bands


@pytest.mark.parametrize("infrared", ["noise", "low", "zero"])
def test_near_infrared_declared_as_alpha_does_not_change_the_colours(infrared: str) -> None:
    """GDAL declares a fourth band of 8 bits as alpha; the near infrared of a lake is dark, and may be 0 everywhere."""
    fourth = {"noise": colours(80, 255, 1), "low": np.full((1, SIDE, SIDE), 6), "zero": np.zeros((1, SIDE, SIDE))}
    values = np.concatenate([colours(60, 121), fourth[infrared].astype(np.uint8)])
    assert (decode_image(geotiff(values), SIDE) == shown(values[:3])).all()


def test_a_survey_of_the_corpus_prevents_reading_infrared_as_alpha() -> None:
    """A patch with infrared 0 on one half looks like alpha by itself; the sample of the corpus shows that it is not."""
    half = np.concatenate([colours(60, 121), np.full((1, SIDE, SIDE), 255, np.uint8)])
    half[3, :, : SIDE // 2] = 0
    others = [np.concatenate([colours(), colours(0, 255, 1)]) for _ in range(4)]
    options = RasterOptions()
    metadata = survey_of([image_pixels(geotiff(values), options) for values in (half, *others)], options)
    assert (decode_image(geotiff(half), SIDE, options, metadata) == shown(half[:3])).all()
    alone = decode_image(geotiff(half), SIDE)
    assert (alone[:, : SIDE // 2] == 0).all() and (alone[:, SIDE // 2 :] == shown(half[:3])[:, SIDE // 2 :]).all()


def test_transparent_pixels_of_pictures_are_black() -> None:
    picture = np.dstack([shown(colours(50, 200)), np.full((SIDE, SIDE), 255, np.uint8)])
    picture[:8, :, 3] = 0
    for kind in ("PNG", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(picture, "RGBA").save(buffer, kind, lossless=True)
        image = decode_image(buffer.getvalue(), SIDE)
        assert (image[:8] == 0).all() and (image[8:] == picture[8:, :, :3]).all(), kind


def test_named_bands_are_found_in_any_order() -> None:
    values = colours(0, 256, 13)
    names = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
    assert (decode_image(geotiff(values, names), SIDE) == shown(values[[3, 2, 1]])).all()
    chosen = RasterOptions(bands=("b8a", "B4", 12))
    assert (decode_image(geotiff(values, names), SIDE, chosen) == shown(values[[8, 3, 11]])).all()
    uses = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    assert (decode_image(geotiff(values[:4], interpretation=uses), SIDE) == shown(values[[2, 1, 0]])).all()
    described = geotiff(values[:5], ("nir", "Blue", "Green", "Red", "edge"))
    assert (decode_image(described, SIDE) == shown(values[[3, 2, 1]])).all()


def test_many_unnamed_bands_need_a_choice_of_bands() -> None:
    values = colours(0, 3000, 13, "uint16")
    assert decode_image(geotiff(values), SIDE) == "has 13 bands: choose three with corpus.bands"
    assert decode_image(geotiff(values), SIDE, RasterOptions(bands=(1, 2, 14))) == "has 13 bands, not 14"
    result = decode_image(geotiff(values), SIDE, RasterOptions(bands=("B04", "B03", "B02")))
    assert result == "has no band B04, but 13 without names"
    chosen = decode_image(geotiff(values), SIDE, RasterOptions(bands=(4, 3, 2), stretch="range", low=0, high=3000))
    assert np.abs(chosen - shown(values[[3, 2, 1]]) / 3000 * 255).max() <= 0.51


def test_the_guessed_colours_of_unnamed_bands_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Four bands may also be blue, green, red, infrared; two bands of a radar are two polarisations."""
    options = RasterOptions()
    named = geotiff(colours(bands=4, high=3000, kind="uint16"), ("blue", "green", "red", "nir"))
    assert survey_of([image_pixels(named, options)], options).notes == ()
    for count, words in ((4, "bands 1, 2, 3 of 4 are shown as red, green, blue"), (2, "band 1 of 2 is shown in grey")):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(3):
            data = geotiff(colours(bands=count, high=3000, kind="uint16"))
            (folder / f"{number}.tif").write_bytes(data)
        index_corpus(ImageFolder(str(folder), resolution=SIDE, split="all"), tmp_path / "runs")
        message = f"folder: {words}, because the files do not name their colours: choose others with corpus.bands=[…]\n"
        assert capsys.readouterr().err.count(message) == 1
        index_corpus(ImageFolder(str(folder), resolution=SIDE, split="all", bands=(1,)), tmp_path / "runs")
        assert words not in capsys.readouterr().err


def test_constant_deep_images_are_reported() -> None:
    options = RasterOptions()
    constant = image_pixels(geotiff(np.full((1, SIDE, SIDE), 700, np.uint16)), options)
    assert "all sampled values are 700" in survey_of([constant], options).notes[0]
    assert survey_of([constant, image_pixels(geotiff(colours(0, 900, 1, "uint16")), options)], options).notes == ()


def test_bands_of_an_ordinary_picture_can_be_chosen() -> None:
    buffer = io.BytesIO()
    values = colours()
    Image.fromarray(shown(values)).save(buffer, "PNG")
    assert (decode_image(buffer.getvalue(), SIDE, RasterOptions(bands=(3, 2, 1))) == shown(values[::-1])).all()
    grey = decode_image(buffer.getvalue(), SIDE, RasterOptions(bands=("green",)))
    assert (grey == values[1][..., None]).all()
    assert "has 3 bands" in decode_image(buffer.getvalue(), SIDE, RasterOptions(bands=(4, 3, 2)))


def test_palette_images_are_shown_in_their_colours() -> None:
    indices = NOISE.integers(0, 6, (1, SIDE, SIDE)).astype(np.uint8)
    table = {index: (40 * index, 255 - 30 * index, index, 255) for index in range(6)}
    image = decode_image(geotiff(indices, palette=table, nodata=5), SIDE)
    expected = np.array([table[index][:3] for index in range(5)] + [(0, 0, 0)], np.uint8)[indices[0]]
    assert (image == expected).all()


def test_complex_values_are_shown_by_their_magnitude() -> None:
    values = (NOISE.normal(size=(1, SIDE, SIDE)) + 1j * NOISE.normal(size=(1, SIDE, SIDE))).astype(np.complex64)
    image = decode_image(geotiff(values), SIDE)
    magnitude = np.abs(values[0])
    low, high = np.percentile(magnitude, (2, 98))
    assert np.abs(image[..., 0] - np.clip((magnitude - low) / (high - low) * 255, 0, 255)).max() <= 0.51


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_values_of_less_than_8_bits_are_scaled_to_the_full_range(bits: int) -> None:
    values = NOISE.integers(0, 2**bits, (1, SIDE, SIDE)).astype(np.uint8)
    image = decode_image(geotiff(values, nbits=bits, nodata=2**bits - 1), SIDE)
    grey = values[0] * (255 // (2**bits - 1))
    assert (image[..., 0] == np.where(values[0] == 2**bits - 1, 0, grey)).all()


# ------------------------------------------------------------------------------------------------------------ no data


def test_a_pixel_has_no_data_only_if_all_bands_have_none() -> None:
    lake = colours(20, 80)
    lake[0] = 0  # water without red
    lake[:, :8] = 0
    for image in (
        decode_image(geotiff(lake, nodata=0), SIDE),
        decode_image(geotiff(lake), SIDE, RasterOptions(no_data=0)),
    ):
        assert (image == shown(lake)).all()
    data = image_pixels(geotiff(lake, nodata=0), RasterOptions())
    assert (data.valid == (np.arange(SIDE) >= 8)[:, None]).all()


def test_nan_in_any_band_is_no_data() -> None:
    values = NOISE.uniform(0, 1, (3, SIDE, SIDE)).astype(np.float32)
    values[1, :4] = np.nan
    image = decode_image(geotiff(values), SIDE)
    assert (image[:4] == 0).all() and image[4:].std() > 50


def test_the_mask_of_a_file_marks_no_data() -> None:
    values, mask = colours(30, 255), np.full((SIDE, SIDE), 255, np.uint8)
    mask[:, :10] = 0
    image = decode_image(geotiff(values, mask=mask), SIDE)
    assert (image[:, :10] == 0).all() and (image[:, 10:] == shown(values)[:, 10:]).all()


@pytest.mark.parametrize(
    ("kind", "no_data"), [("uint8", 255), ("int16", -9999), ("float32", -3.4028234663852886e38), ("uint8", -9999)]
)
def test_no_data_values_are_compared_in_the_type_of_the_pixels(kind: str, no_data: float) -> None:
    values = colours(1, 100, kind=kind)
    held = np.iinfo(kind).min <= no_data <= np.iinfo(kind).max if kind != "float32" else True
    if held:
        values[:, :5] = np.array(no_data).astype(kind)
    if kind == "uint8" and not held:
        with rasterio.MemoryFile(geotiff(values)) as memory, memory.open() as raster:
            assert raster.nodata is None  # GDAL writes no such tag, so the option must give it
        image = decode_image(geotiff(values), SIDE, RasterOptions(no_data=no_data))
        assert (image == shown(values)).all()
        return
    image = decode_image(geotiff(values, nodata=no_data), SIDE)
    assert (image[:5] == 0).all() and image[5:].std() > 10


def test_an_image_without_data_gets_a_reason() -> None:
    assert decode_image(geotiff(np.zeros((3, SIDE, SIDE), np.uint8), nodata=0), SIDE) == NO_DATA
    assert decode_image(geotiff(np.full((1, SIDE, SIDE), np.nan, np.float32)), SIDE) == NO_DATA


def test_has_data_equals_hand_computed_values() -> None:
    values = np.array([[[0.0, 0.0], [0.0, 1.0], [np.nan, 1.0], [0.0, 7.0]]])
    assert has_data(values, [0, 7]).tolist() == [[True, True, False, False]]
    assert has_data(values, [None, 7]).tolist() == [[True, True, False, True]]


# ------------------------------------------------------------------------------------------------------------ stretch


def test_deep_images_are_stretched_by_the_levels_of_the_whole_corpus() -> None:
    options = RasterOptions()
    sea = [geotiff(NOISE.normal(1000, 4, (3, SIDE, SIDE)).astype(np.uint16)) for _ in range(6)]
    town = [geotiff(NOISE.uniform(400, 4000, (3, SIDE, SIDE)).astype(np.uint16)) for _ in range(6)]
    metadata = survey_of([image_pixels(data, options) for data in sea + town], options)
    (low, high), *_ = metadata.levels["uint16 x 3"]
    assert 400 < low < 700 and 3700 < high < 4000
    calm, built = decode_image(sea[0], SIDE, options, metadata), decode_image(town[0], SIDE, options, metadata)
    assert calm.std() < 2 and built.std() > 60 and built.mean() > calm.mean() + 50


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32", "float64", "uint32"])
def test_only_types_deeper_than_8_bits_are_stretched(kind: str) -> None:
    """The same dark values: 8-bit values are unchanged, for any deeper type the corpus determines the scale."""
    values = colours(10, 60, kind=kind)
    image = decode_image(geotiff(values), SIDE)
    if kind == "uint8":
        assert (image == shown(values)).all()
        return
    low, high = np.percentile(values.reshape(3, -1), (2, 98), axis=1)
    expected = np.clip((shown(values) - low) / (high - low) * 255, 0, 255)
    assert np.abs(image - expected).max() <= 0.51
    assert (decode_image(geotiff(values), SIDE, RasterOptions(stretch="none")) == shown(values)).all()


def test_the_survey_sample_is_spread_and_weighs_images_equally() -> None:
    assert spread(0) == [] and spread(3) == [0, 1, 2] and spread(1000)[-1] == 999 and len(spread(1000)) == 128
    small = Pixels(np.full((8, 8, 1), 0, np.uint16))
    large = Pixels(np.full((2000, 2000, 1), 1000, np.uint16))
    metadata = survey_of([small] * 128 + [large], RasterOptions())
    assert metadata.levels["uint16 x 1"][0][0] == 0.0
    assert survey_of([Pixels(np.zeros((4, 4, 3), np.uint8))], RasterOptions()) == Survey()
    assert Survey().stamp == "" and metadata.stamp != survey_of([small], RasterOptions()).stamp


def test_soft_alpha_is_composited_over_black_like_in_pillow() -> None:
    values, alpha = shown(colours()), colours()[0]
    alpha[alpha < 240] = 255
    alpha[0, 0] = 128
    assert float(np.isin(alpha, (0, 255)).mean()) > ALPHA_FRACTION
    expected = Image.alpha_composite(
        Image.new("RGBA", (SIDE, SIDE), "black"), Image.fromarray(np.dstack([values, alpha]), "RGBA")
    )
    assert (to_rgb(Pixels(values, None, alpha), RasterOptions(), Survey()) == np.asarray(expected)[..., :3]).all()


@pytest.mark.parametrize(
    "options", [{"bands": (1, 2)}, {"bands": (0, 1, 2)}, {"stretch": "log"}, {"stretch": "range", "low": 9, "high": 3}]
)
def test_invalid_raster_options_give_a_one_line_error(options: dict) -> None:
    with pytest.raises(UserError, match=r"corpus\.") as caught:
        RasterOptions(**options)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- compressions

PACKED = {
    "none": {}, "lzw": {"compress": "lzw"}, "lzw with differences": {"compress": "lzw", "predictor": 2},
    "deflate": {"compress": "deflate"}, "zstd": {"compress": "zstd"}, "lerc": {"compress": "lerc"},
    "lzma": {"compress": "lzma"}, "tiled": {"compress": "lzw", "tiled": True, "blockxsize": 16, "blockysize": 16},
    "planes": {"interleave": "band"}, "big": {"bigtiff": True}, "big end first": {"endianness": "big"},
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_lossless_compression_does_not_change_pixels(name: str, kind: str) -> None:
    values = np.random.default_rng(1).integers(0, 256 if kind == "uint8" else 4000, (3, SIDE, SIDE)).astype(kind)
    try:
        packed = geotiff(values, **PACKED[name])
    except rasterio.errors.RasterioError:
        pytest.skip(f"GDAL writes no {name} here")
    assert (decode_image(packed, SIDE) == decode_image(geotiff(values), SIDE)).all()


def test_a_missing_codec_is_named() -> None:
    data = bytearray(geotiff(colours(kind="uint16")))
    place = data.index((259).to_bytes(2, "little") + (3).to_bytes(2, "little"))  # the tag of the compression
    data[place + 8 : place + 10] = (34661).to_bytes(2, "little")  # JBIG, which is rarely supported
    reason = decode_image(bytes(data), SIDE)
    assert reason == "no decoder: Cannot open TIFF file due to missing codec JBIG", reason


def test_a_truncated_raster_is_reported_as_damaged() -> None:
    data = geotiff(colours(kind="uint16"))
    assert decode_image(data[: len(data) // 2], SIDE) == DAMAGED


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_jpeg_2000_images_equal_geotiffs_of_the_same_values(kind: str) -> None:
    values = colours(0, 256 if kind == "uint8" else 4000, kind=kind)
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="JP2OpenJPEG", count=3, height=SIDE, width=SIDE, dtype=kind, QUALITY=100, REVERSIBLE="YES",
            transform=from_origin(0, 0, 1, 1), crs="EPSG:32633",
        ) as raster:  # fmt: skip
            raster.write(values)
        data = memory.read()
    assert (decode_image(data, SIDE) == decode_image(geotiff(values), SIDE)).all()


def test_rasters_with_an_orientation_tag_are_made_upright() -> None:
    import tifffile

    values = NOISE.integers(0, 4000, (SIDE, SIDE, 3)).astype(np.uint16)
    plain = io.BytesIO()
    tifffile.imwrite(plain, values, photometric="rgb")
    for turned in range(1, 9):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values, photometric="rgb", extratags=[(274, "H", 1, turned, True)])
        small = Image.fromarray((values[..., 0] >> 4).astype(np.uint8))
        small.getexif()[274] = turned
        exif = Image.Exif()
        exif[274] = turned
        holder = io.BytesIO()
        small.save(holder, "PNG", exif=exif)
        from PIL import ImageOps

        upright = np.asarray(ImageOps.exif_transpose(Image.open(holder))).astype(int)
        result = image_pixels(buffer.getvalue(), RasterOptions())
        assert (result.values[..., 0].astype(int) >> 4 == upright).all(), turned


# ------------------------------------------------------------------------------------------------------------- scenes

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(name: str, values: np.ndarray, left: float = 0, pixel: float = 10, crs: str = "EPSG:32633") -> Path:
        path = tmp_path / "scenes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            path, "w", driver="GTiff", count=len(values), height=values.shape[1], width=values.shape[2],
            dtype=values.dtype.name, crs=crs, transform=from_origin(500_000 + left, 5_000_000, pixel, pixel),
        ) as raster:  # fmt: skip
            raster.write(values)
        return path

    return written


def splits(root: Path, **options: object) -> dict[str, set]:
    """The tiles of every split."""
    result = {}
    for split in ("train", "val", "test"):
        table = GeoTiff(
            str(root), split=split, val_fraction=0.2, test_fraction=0.2, resolution=16, **options
        ).manifest()
        result[split] = set(table["id"]) if len(table) else set()
    return result


def ground(root: Path, ids: set, pixel: float = 10) -> np.ndarray:
    """Pixels of the ground that some tiles show, by their own transforms."""
    canvas = np.zeros((512, 1024), bool)
    table = GeoTiff(str(root), resolution=16).manifest().set_index("id")
    import json

    for transform in table.loc[sorted(ids), "transform"]:
        left, width, _, top, _, height = json.loads(transform)
        x, y = round((left - 500_000) / pixel), round((5_000_000 - top) / pixel)
        canvas[y : y + round(16 * -height / pixel), x : x + round(16 * width / pixel)] = True
    return canvas


def test_overlapping_scenes_have_no_common_ground_across_splits(write: Write) -> None:
    values = colours()  # the content does not matter
    values = np.tile(values, (1, 16, 20))
    root = write("west.tif", values).parent
    write("east.tif", values, left=3200)
    write("west_later.tif", values, left=30)  # another date, shifted by some pixels
    result = splits(root)
    assert all(result.values())
    seen = [ground(root, ids) for ids in result.values()]
    assert np.sum(seen, axis=0).max() == 1
    assert sum(seen[0].ravel()) > 100_000


def test_the_sources_of_a_vrt_are_not_indexed_separately(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    root = write("a.tif", np.tile(colours(), (1, 4, 4))).parent
    (root / "mosaic.vrt").write_text(
        '<VRTDataset rasterXSize="128" rasterYSize="128"><SRS>EPSG:32633</SRS>'
        "<GeoTransform>500000, 10, 0, 5000000, 0, -10</GeoTransform>"
        + "".join(
            f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><SourceFilename relativeToVRT="1">a.tif'
            f"</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
            for band in (1, 2, 3)
        )
        + "</VRTDataset>"
    )
    table = GeoTiff(str(root), resolution=16).manifest()
    assert set(table["id"].str.split("/").str[0]) == {"mosaic.vrt"} and len(table) == 64


def test_bands_in_separate_files_are_stacked(write: Write, tmp_path: Path) -> None:
    truth = np.random.default_rng(2).integers(0, 3000, (3, 96, 96)).astype(np.uint16)
    product = "T36KVU_20200101/T36KVU"
    for band, name in zip(truth, ("B04", "B03", "B02"), strict=True):
        root = write(f"{product}_{name}_10m.tif", band[None]).parents[1]
    write(f"{product}_B08_10m.tif", truth[:1])
    write(f"{product}_B04_20m.tif", truth[:1, ::2, ::2], pixel=20)
    write(f"{product}_SCL_20m.tif", NOISE.integers(0, 12, (1, 48, 48)).astype(np.uint8), pixel=20)
    write(f"{product}_TCI_10m.tif", (truth / 12).astype(np.uint8))
    with pytest.raises(UserError, match=r"one file per band .*corpus\.bands=\[B04,B03,B02\]"):
        GeoTiff(str(root), resolution=32).manifest()
    source = GeoTiff(str(root), resolution=32, bands=("B04", "B03", "B02"), stretch="range", low=0, high=3000)
    table = source.manifest()
    assert len(table) == 9 and table["id"].iloc[0] == f"{product}/000000_000000"
    for row, image in zip(table.itertuples(), source.reader(np.arange(9))(), strict=True):
        part = truth[:, row.row : row.row + 32, row.column : row.column + 32]
        assert np.abs(image - shown(part) / 3000 * 255).max() <= 0.51
    mixed = GeoTiff(str(root), resolution=32, bands=("B04", "B03", "SCL"), stretch="none")
    image = next(iter(mixed.reader(np.arange(1))()))
    with rasterio.open(root / f"{product}_SCL_20m.tif") as raster:
        coarse = raster.read(1)[:16, :16]
    assert (image[..., 2] == coarse.repeat(2, 0).repeat(2, 1)).all()


def test_the_covered_fraction_of_a_scene_is_stored_and_shifted_tiles_cover_it(write: Write) -> None:
    root = write("s.tif", np.tile(colours(), (1, 19, 19))[:, :600, :600])
    left = GeoTiff(str(root), tile=256, resolution=16)
    assert left.metadata["covered"]["s.tif"] == pytest.approx((512 / 600) ** 2, abs=1e-3) and len(left.manifest()) == 4
    whole = GeoTiff(str(root), tile=256, resolution=16, edge="shift")
    assert whole.metadata["covered"]["s.tif"] == 1 and len(whole.manifest()) == 9
    assert {(344, 344), (0, 344), (256, 344)} <= set(
        zip(whole.manifest()["row"], whole.manifest()["column"], strict=True)
    )
