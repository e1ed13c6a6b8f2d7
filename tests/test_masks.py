"""Masks in users' formats: numbers, palettes, colours, ignored pixels, other shapes; each is right or has a reason."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import rasterio
import tifffile
from omegaconf import OmegaConf
from PIL import Image
from test_commands import call, forked  # noqa: F401

from corpus.index import Corpus, index_corpus
from corpus.masks import IGNORED, MaskRule, decode_mask, mask_rule, masks_in_same_folder, matching
from corpus.sources.folder import ImageFolder
from corpus.sources.huggingface import HuggingFace
from corpus.sources.webdataset import WebDataset
from downstream.tasks.semantic_synthesis import by_value, natural_palette
from eval.pairs import mean_intersection_over_union, pixel_accuracy
from runtime.errors import UserError

SIDE = 16
#: Colours of ISPRS Potsdam.
COLOURS = {
    "street": [255, 255, 255], "building": "#0000ff", "low": [0, 255, 255], "tree": "#00FF00", "car": [255, 255, 0],
    "clutter": [255, 0, 0],
}  # fmt: skip
PALETTE = np.array([(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)], np.uint8)
TWO, SIX = ["background", "building"], list(COLOURS)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(values: np.ndarray, mode: str | None = None) -> bytes:
    return encoded(Image.fromarray(values, mode))


def tiff(values: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def blocks(classes: int, seed: int = 0, side: int = SIDE) -> np.ndarray:
    """Class numbers uint8 [side, side], all of which occur."""
    small = np.random.default_rng(seed).permutation(np.arange(side * side // 4) % classes)
    return small.reshape(side // 2, side // 2).astype(np.uint8).repeat(2, 0).repeat(2, 1)


def texture(seed: int = 0, width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rule(count: int, **options: object) -> MaskRule:
    return mask_rule([f"class {number}" for number in range(count)], **options)


# ------------------------------------------------------------------------------------------------------ numbers (02)


def test_binary_masks_of_0_and_255_need_a_map_of_values() -> None:
    truth = blocks(2)
    data = png(truth * 255)
    assert decode_mask(data, rule(2), SIDE) == "class 255 of 2"
    mapped = decode_mask(data, mask_rule(TWO, values={0: "background", 255: "building"}), SIDE)
    assert mapped.dtype == np.uint8 and (mapped == truth).all()
    assert (decode_mask(data, mask_rule(TWO, values={"255": 0, "0": 1}), SIDE) == 1 - truth).all()
    assert decode_mask(png(truth * 7), mask_rule(TWO, values={0: 0, 255: 1}), SIDE) == (
        "value 7 is none of corpus.mask_values"
    )


def test_ignored_values_have_no_class() -> None:
    truth = blocks(3)
    truth[:2] = 255
    data = png(truth)
    assert decode_mask(data, rule(3), SIDE) == "class 255 of 3"
    assert (decode_mask(data, rule(3, ignore=255), SIDE) == truth).all() and IGNORED == 255
    several = decode_mask(data, rule(3, ignore=[255, 0]), SIDE)
    assert (several == np.where(truth == 0, IGNORED, truth)).all()
    nothing = decode_mask(data, mask_rule(values={0: "a", 1: "b", 2: None, 255: None}), SIDE)
    assert (nothing == np.where(truth == 2, IGNORED, truth)).all()
    assert decode_mask(png(np.full((8, 8), 255, np.uint8)), rule(3, ignore=255), SIDE) == "nothing but ignored pixels"


DEPTHS = [np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.float32, np.float64, np.float16, np.int64, np.uint64]


@pytest.mark.parametrize("dtype", DEPTHS)
def test_numbers_of_any_bit_depth_are_class_numbers(dtype: type) -> None:
    """The numbers are in TIFFs; Pillow cannot open 64-bit numbers and half floats."""
    truth = blocks(5)
    assert (decode_mask(tiff(truth.astype(dtype)), rule(5), SIDE) == truth).all()
    large = truth.astype(dtype)
    large[0, 0] = 100 if dtype == np.uint8 else 300
    assert decode_mask(tiff(large), rule(5), SIDE) == f"class {int(large[0, 0])} of 5"


def test_numbers_below_zero_can_be_ignored() -> None:
    values = blocks(3).astype(np.int16)
    values[3] = -1
    assert decode_mask(tiff(values), rule(3), SIDE) == "class -1 of 3"
    assert (decode_mask(tiff(values), rule(3, ignore=-1), SIDE) == np.where(values < 0, IGNORED, values)).all()


def test_only_whole_floats_are_class_numbers() -> None:
    values = blocks(3).astype(np.float32)
    assert (decode_mask(tiff(values), rule(3), SIDE) == values).all()
    values[0, 0] = 0.5
    assert decode_mask(tiff(values), rule(3), SIDE) == "values that are no whole numbers"
    values[0, 0] = np.nan
    assert decode_mask(tiff(values), rule(3), SIDE) == "values that are no whole numbers"
    assert decode_mask(tiff(values), rule(3, ignore=float("nan")), SIDE)[0, 0] == IGNORED
    assert decode_mask(tiff(values.astype(np.complex64)), rule(3), SIDE) == "values that are no whole numbers"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_bit_masks_are_read(kind: str) -> None:
    truth = blocks(2)
    data = encoded(Image.fromarray(truth.astype(bool)), kind)
    assert (decode_mask(data, rule(2), SIDE) == truth).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_values_of_2_and_4_bit_grey_masks_are_not_scaled(bits: int) -> None:
    """Pillow returns 4-bit values as 0, 17, …, 255, so class 1 would be read as class 17."""
    import struct
    import zlib

    truth = blocks(1 << bits)
    shifts = np.arange(8 - bits, -1, -bits)
    packed = (truth.reshape(SIDE, -1, 8 // bits) << shifts).sum(2).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert (decode_mask(data, rule(1 << bits), SIDE) == truth).all()
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", width=SIDE, height=SIDE, count=1, dtype="uint8", nbits=bits) as raster:
            raster.write(truth, 1)
        assert (decode_mask(memory.read(), rule(1 << bits), SIDE) == truth).all()


@pytest.mark.parametrize("options", [{"compress": "lzw"}, {"compress": "zstd"}, {"compress": "lerc"}, {"tiled": True}])
def test_masks_from_a_gis_are_read_with_any_compression(options: dict) -> None:
    truth = blocks(4)
    with rasterio.MemoryFile() as memory:
        tile = {"blockxsize": 16, "blockysize": 16} if "tiled" in options else {}
        with memory.open(
            driver="GTiff", width=SIDE, height=SIDE, count=1, dtype="uint8", nodata=0, **options, **tile
        ) as raster:
            raster.write(truth, 1)
        data = memory.read()
    assert (decode_mask(data, rule(4), SIDE) == truth).all(), "no data of 0 is often the first class"


def test_npy_masks_are_read_and_unsuitable_arrays_get_a_reason() -> None:
    def saved(values: np.ndarray) -> bytes:
        file = io.BytesIO()
        np.save(file, values)
        return file.getvalue()

    truth = blocks(4)
    for values in (truth, truth.astype(np.int64), truth[None], truth[..., None], np.asfortranarray(truth)):
        assert (decode_mask(saved(values), rule(4), SIDE) == truth).all()
    assert decode_mask(saved(truth)[:-9], rule(4), SIDE) == "damaged or truncated"
    assert decode_mask(saved(np.zeros((2, 2, 2, 2))), rule(4), SIDE) == "4 dimensions, not two"
    assert decode_mask(saved(truth.astype(object)), rule(4), SIDE) == "damaged or truncated", "no pickle is read"


BANDS = np.random.default_rng(0).integers(0, 2, (13, SIDE, SIDE), np.uint8)
FLOATS = np.random.default_rng(0).random((SIDE, SIDE, 3)).astype(np.float32)
NO_MASKS = {
    "empty": (b"", "empty file"),
    "html": (b"<html>", "not an image"),
    "cut png": (png(blocks(2))[:-30], "damaged or truncated"),
    "cut tiff": (tiff(blocks(2).astype(np.float64))[:-30], "damaged or truncated"),
    "cut codec": (tiff(blocks(2).astype(np.uint64), compression="zlib")[:-10], "damaged or truncated"),
    "bands": (tiff(BANDS, photometric="minisblack", planarconfig="separate"), "13 bands, not one"),
    "deep colours": (tiff(FLOATS, photometric="rgb"), "colours deeper than 8 bits"),
    "deep png": (cv2.imencode(".png", (FLOATS * 60000).astype(np.uint16))[1].tobytes(), "colours deeper than 8 bits"),
}


@pytest.mark.parametrize("name", NO_MASKS)
def test_invalid_masks_get_a_reason(name: str) -> None:
    data, reason = NO_MASKS[name]
    assert decode_mask(data, rule(2), SIDE) == reason


# ------------------------------------------------------------------------------------------------------ colours (08)


def test_colours_need_a_map_to_classes() -> None:
    truth = blocks(6)
    data = png(PALETTE[truth])
    assert decode_mask(data, rule(6), SIDE) == "colours, but no corpus.mask_colours"
    assert (decode_mask(data, mask_rule(SIX, colours=COLOURS), SIDE) == truth).all()
    assert (decode_mask(data, mask_rule(colours=COLOURS), SIDE) == truth).all(), "the classes are the map's"
    assert (decode_mask(data, mask_rule(SIX[::-1], colours=COLOURS), SIDE) == 5 - truth).all()
    other = PALETTE[truth].copy()
    other[5, 5] = (0x12, 0x34, 0x56)
    assert decode_mask(png(other), mask_rule(SIX, colours=COLOURS), SIDE) == "colour #123456 is none of the 6"


def test_a_colour_map_can_ignore_colours_and_merge_several_into_a_class() -> None:
    truth = blocks(6)
    left = {name: COLOURS[name] for name in SIX[:5]}
    result = decode_mask(png(PALETTE[truth]), mask_rule(SIX[:5], colours=left, ignore=["#ff0000"]), SIDE)
    assert (result == np.where(truth == 5, IGNORED, truth)).all()
    both = {"road": COLOURS["street"], "rest": [COLOURS[name] for name in SIX[1:]]}
    assert (decode_mask(png(PALETTE[truth]), mask_rule(colours=both), SIDE) == (truth > 0)).all()


def test_palette_masks_are_read_by_index_or_with_a_colour_map() -> None:
    truth = blocks(6)
    image = Image.fromarray(truth, "P")
    image.putpalette(PALETTE[::-1].ravel().tolist())
    for kind in ("PNG", "TIFF", "BMP"):
        data = encoded(image, kind)
        assert (decode_mask(data, rule(6), SIDE) == truth).all()
        assert (decode_mask(data, mask_rule(SIX, colours=COLOURS), SIDE) == 5 - truth).all()


def test_colours_of_tiffs_that_pillow_cannot_open_are_mapped_to_classes() -> None:
    truth = blocks(6)
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", width=SIDE, height=SIDE, count=3, dtype="uint8", compress="lerc") as raster:
            raster.write(PALETTE[truth].transpose(2, 0, 1))
        data = memory.read()
    assert (decode_mask(data, mask_rule(SIX, colours=COLOURS), SIDE) == truth).all()
    assert decode_mask(data, rule(6), SIDE) == "colours, but no corpus.mask_colours"


def test_transparency_does_not_change_the_class() -> None:
    truth = blocks(6)
    alpha = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 1), dtype=np.uint8)
    data = png(np.concatenate([PALETTE[truth], alpha], axis=2))
    assert (decode_mask(data, mask_rule(SIX, colours=COLOURS), SIDE) == truth).all()
    grey = png(np.concatenate([truth[..., None], alpha], axis=2), "LA")
    assert (decode_mask(grey, rule(6), SIDE) == truth).all()


def test_three_equal_channels_are_read_as_class_numbers() -> None:
    truth = blocks(6)
    assert (decode_mask(png(truth[..., None].repeat(3, axis=2)), rule(6), SIDE) == truth).all()
    black = mask_rule(TWO, colours={"background": "#000000", "building": "#ffffff"})
    for image in (Image.fromarray(blocks(2) * 255), Image.fromarray(blocks(2).astype(bool))):
        assert (decode_mask(encoded(image), black, SIDE) == blocks(2)).all()


# ------------------------------------------------------------------------------------------------- shape and direction


@pytest.mark.parametrize(
    ("mask", "image", "reason"),
    [
        ((64, 64), (128, 96), "64 x 64 for an image of 128 x 96"),
        ((96, 128), (128, 96), "96 x 128 for an image of 128 x 96"),
        ((128, 95), (128, 96), "128 x 95 for an image of 128 x 96"),
        ((128, 96), (128, 96), None),
        ((64, 48), (128, 96), None),
        ((256, 192), (128, 96), None),
        ((50, 33), (101, 67), None),
    ],
)
def test_masks_with_another_aspect_ratio_than_their_image_get_a_reason(
    mask: tuple[int, int], image: tuple[int, int], reason: str | None
) -> None:
    data = png(np.zeros(mask[::-1], np.uint8))
    pixels = texture(width=image[0], height=image[1])
    for stored in (encoded(pixels), encoded(pixels, "JPEG"), encoded(pixels, "TIFF"), encoded(pixels, "WEBP")):
        result = decode_mask(data, rule(2), SIDE, stored)
        assert result == reason if reason else result.shape == (SIDE, SIDE)
    deep = tiff(np.zeros((4, image[1], image[0]), np.uint16), photometric="minisblack", planarconfig="separate")
    result = decode_mask(data, rule(2), SIDE, deep)
    assert result == reason if reason else result.shape == (SIDE, SIDE)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(24, 16), (16, 16)])
def test_a_mask_gets_the_exif_orientation_of_its_image(width: int, height: int, turn: int, kind: str) -> None:
    """The image shows the mask's values in grey, so that both can be compared for every camera orientation."""
    from PIL import ImageOps

    from corpus.decoding import decode_image

    values = np.random.default_rng(turn).integers(0, 5, (height, width), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = turn
    photo = encoded(Image.fromarray((values * 50)[..., None].repeat(3, axis=2)), "PNG", exif=exif)
    bare, given = encoded(Image.fromarray(values), kind), encoded(Image.fromarray(values), kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(photo))))[..., 0] // 50
    seen = encoded(Image.fromarray(upright), kind)
    expected = decode_image(photo, 16)[..., 0] // 50
    for mask in (bare, given, *([seen] if turn > 4 and width != height else [])):
        assert (decode_mask(mask, rule(5), 16, photo) == expected).all()


def test_larger_masks_are_reduced_by_nearest_neighbour() -> None:
    small = blocks(6)
    large = small.repeat(4, 0).repeat(4, 1)
    assert (decode_mask(png(large), rule(6), SIDE, encoded(texture())) == small).all()


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"values": {0: "a"}, "colours": {"a": "#000000"}}, "exclude each other"),
        ({"values": {0: "water"}}, "class water is not in"),
        ({"values": {0: 2}}, "class 2 is not in"),
        ({"values": {"a": 0}}, "key a, which is not a number"),
        ({"values": [0, 255]}, "is not a mapping"),
        ({"colours": {"a": "blue"}}, "is not a colour"),
        ({"colours": {"a": [0, 0, 256]}}, "is not a colour"),
        ({"colours": {"c": "#000000"}}, "class c is not in"),
        ({"colours": {"a": "#000000", "b": [0, 0, 0]}}, "#000000 to two classes"),
        ({"ignore": ["#000000"]}, "give corpus.mask_colours too"),
        ({"ignore": ["white"], "colours": {"a": "#000000"}}, "is not a colour"),
        ({"ignore": [[1]]}, "is not a number"),
    ],
)
def test_invalid_or_contradictory_mask_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        mask_rule(["a", "b"], **options)
    with pytest.raises(UserError, match="at most 255"):
        rule(256)
    with pytest.raises(UserError, match=r"corpus\.classes"):
        mask_rule(ignore=255)


def test_mask_rule_accepts_options_from_hydra_configurations() -> None:
    result = OmegaConf.create({"v": {0: "background", 255: "building"}, "i": [7, -1], "c": TWO})
    assert mask_rule(result.c, result.i, result.v) == MaskRule(tuple(TWO), (7.0, -1.0), {0.0: 0, 255.0: 1})
    result = OmegaConf.create({"c": {"a": [1, 2, 3], "b": "#0a0b0c"}})
    assert mask_rule((), None, None, result.c).colours == {0x010203: 0, 0x0A0B0C: 1}
    assert mask_rule("building").classes == ("building",)
    assert not mask_rule() and mask_rule() == MaskRule()


# --------------------------------------------------------------------------------------------------------------- files


def test_masks_are_found_by_their_usual_names() -> None:
    images = ["a/1.jpg", "a/2_sat.jpg", "a/3.png", "b/4.tif", "b/5_RGB.tif", "b/6.png", "b/7.png", "b/8.png"]
    masks = ["a/1.png", "a/1_mask.png", "a/2_mask.png", "a/3_Label.tif", "b/4.seg.png", "b/5_label.tif", "b/6.png.png",
             "a/7.png", "b/x_gt.png"]  # fmt: skip
    assert matching(images, masks) == {
        "a/1.jpg": "a/1.png", "a/2_sat.jpg": "a/2_mask.png", "a/3.png": "a/3_Label.tif", "b/4.tif": "b/4.seg.png",
        "b/5_RGB.tif": "b/5_label.tif", "b/6.png": "b/6.png.png",
    }  # fmt: skip
    assert masks_in_same_folder(["1.png", "1_mask.png", "2_sat.jpg", "2_mask.png", "land_mask.png"]) == {
        "1.png": "1_mask.png", "2_sat.jpg": "2_mask.png",
    }  # fmt: skip


def write_pairs(root: Path, count: int, mask: Callable[[int], bytes], name: str = "masks/{}.png") -> Path:
    for number in range(count):
        image, file = root / "images" / f"{number:02d}.png", root / name.format(f"{number:02d}")
        for path in (image, file):
            path.parent.mkdir(parents=True, exist_ok=True)
        texture(number).save(image)
        file.write_bytes(mask(number))
    return root


def folder(root: Path, **options: object) -> ImageFolder:
    return ImageFolder(str(root), resolution=SIDE, workers=1, **options)


def test_masks_beside_their_images_are_not_indexed_as_images(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "a", 4, lambda number: png(blocks(3, number)), "images/{}_mask.png")
    for where in (".", "images", str(root)):
        source = folder(root, masks=where, classes=("a", "b", "c"))
        assert source.manifest()["id"].tolist() == [f"images/{number:02d}.png" for number in range(4)]
        corpus = index_corpus(source, tmp_path / "runs")
        assert all((corpus.masks[number] == blocks(3, number)).all() for number in range(4))


def test_the_number_of_matched_masks_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_pairs(tmp_path / "a", 10, lambda number: png(blocks(3 if number else 4, number)))
    (root / "masks" / "03.png").unlink()
    (root / "masks" / "05.png").rename(root / "masks" / "five.png")
    (root / "images" / "09.png").write_bytes(b"no")
    corpus = index_corpus(folder(root, masks="masks", classes=("a", "b", "c")), tmp_path / "runs")
    lines = capsys.readouterr().err.splitlines()
    assert "folder: masks: 7 of 9 images have one; 2 missing (e.g. images/03.png)" in lines
    assert "folder: masks: 1 of 9 files match no image (e.g. five.png)" in lines
    assert lines[-1] == (
        "folder: 4 of 10 images quarantined: mask: missing 2, mask: class 3 of 3 1, not an image 1 "
        f"(table: {corpus.directory}/quarantine.parquet)"
    )


def test_mask_options_without_a_folder_or_class_names_are_refused(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "a", 1, lambda number: png(blocks(2)))
    with pytest.raises(UserError, match=r"corpus\.masks=DIR"):
        folder(root, classes=("a", "b"), mask_ignore=255)
    with pytest.raises(UserError, match=r"corpus\.classes"):
        folder(root, masks="masks")
    assert folder(root, masks="masks", mask_values={0: "a", 1: "b"}).mask_classes == ("a", "b")


SOURCES = ["folder", "webdataset", "huggingface", "stream"]


def source_of(kind: str, root: Path, images: list[bytes], masks: list[bytes], **options: object):
    root.mkdir(parents=True)
    options |= {"resolution": SIDE, "workers": 1}
    if kind == "folder":
        for name, files in (("images", images), ("masks", masks)):
            (root / name).mkdir()
            for number, data in enumerate(files):
                (root / name / f"{number}.png").write_bytes(data)
        return ImageFolder(str(root), masks="masks", **options)
    if kind == "webdataset":
        with tarfile.open(root / "a.tar", "w") as tar:
            for number, pair in enumerate(zip(images, masks, strict=True)):
                for suffix, data in zip(("png", "mask.png"), pair, strict=True):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return WebDataset(str(root / "a.tar"), **options)
    table = {
        name: [{"bytes": data, "path": None} for data in files] for name, files in (("image", images), ("mask", masks))
    }
    pd.DataFrame(table).to_parquet(root / "train.parquet")
    return HuggingFace(str(root), streaming=kind == "stream", **options)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_checks_and_maps_its_masks(kind: str, tmp_path: Path) -> None:
    images = [encoded(texture(number)) for number in range(4)]
    truth = [blocks(2, number) for number in range(4)]
    masks = [png(result * 255) for result in truth]
    masks[3] = png(np.zeros((SIDE, 2 * SIDE), np.uint8))
    options = {"classes": tuple(TWO), "mask_values": {0: "background", 255: "building"}}
    corpus = index_corpus(source_of(kind, tmp_path / "mapped", images, masks, **options), tmp_path / "runs")
    assert corpus.manifest["reason"].tolist() == ["", "", "", "mask: 32 x 16 for an image of 16 x 16"]
    assert all((corpus.masks[number] == truth[number]).all() for number in range(3))
    with pytest.raises(UserError, match="none of 4 images can be read: mask: class 255 of 2 3"):
        index_corpus(source_of(kind, tmp_path / "bare", images, masks, classes=tuple(TWO)), tmp_path / "runs")


# ---------------------------------------------------------------------------------------------------------- downstream


def ignoring(tmp_path: Path) -> Corpus:
    """Red on the left, blue on the right, and a green border without a class."""
    images = np.zeros((12, 16, 16, 3), np.uint8)
    images[:, :, :8], images[:, :, 8:] = (200, 0, 0), (0, 0, 200)
    masks = np.zeros((12, 16, 16), np.uint8)
    masks[:, :, 8:] = 1
    images[:, :2], masks[:, :2] = (0, 200, 0), IGNORED
    manifest = pd.DataFrame({"id": map(str, range(12)), "scene": "a", "readable": True})
    return Corpus("rimmed", tmp_path, images, manifest, masks, ("left", "right"))


def test_pixels_without_a_class_get_their_own_palette_colour(tmp_path: Path) -> None:
    corpus = ignoring(tmp_path)
    palette = natural_palette(corpus, seed=0, distance=40)
    assert palette.tolist() == [[200, 0, 0], [0, 0, 200], [0, 200, 0]]
    colours = by_value(palette, 2)
    assert (colours[corpus.masks] == corpus.images).all()
    bare = Corpus("bare", tmp_path, corpus.images, corpus.manifest, np.minimum(corpus.masks, 1), ("left", "right"))
    assert natural_palette(bare, seed=0, distance=40)[2].tolist() == [128, 128, 128], "masks of users may have some"
    assert by_value(palette[:2], 2)[IGNORED].tolist() == [128, 128, 128]


def test_segmentation_metrics_exclude_ignored_pixels() -> None:
    random = np.random.default_rng(0)
    masks, result = (random.integers(0, 3, (4, 8, 8), dtype=np.uint8) for _ in range(2))
    masks[:, :3] = IGNORED
    known = masks != IGNORED
    overlap = [((result == k) & (masks == k)).sum() / (((result == k) & known) | (masks == k)).sum() for k in range(3)]
    assert mean_intersection_over_union(result, masks, 3) == pytest.approx(np.mean(overlap))
    assert pixel_accuracy(result, masks, 3) == pytest.approx((result == masks)[known].mean())
    result[:, :3] = 2
    assert mean_intersection_over_union(result, masks, 3) == pytest.approx(np.mean(overlap)), "whatever is found there"


def test_ignored_pixels_do_not_contribute_to_the_segmentation_loss() -> None:
    import torch

    from downstream.segmenter import _update

    def taught(images: torch.Tensor, masks: torch.Tensor) -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        network = torch.nn.Conv2d(3, 2, 1)
        network.encoder = torch.nn.Module()
        network.encoder.output_stride = 1
        loss = _update(network, torch.optim.SGD(network.parameters(), 0.1), images, masks)
        return loss, network.weight.detach()

    images, masks = torch.rand(2, 3, 8, 8), torch.randint(0, 2, (2, 8, 8))
    masks[:, 4:] = IGNORED
    loss, weight = taught(images, masks)
    half, halved = taught(images[:, :, :4], masks[:, :4])
    assert loss == pytest.approx(half) and torch.allclose(weight, halved, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ commands


def write_field(root: Path, count: int, coloured: bool) -> Path:
    """Pairs of two scenes: masks of 0 and 255, or in six colours."""
    for scene in ("a", "b"):
        for part in ("images", "masks"):
            (root / part / scene).mkdir(parents=True)
        for number in range(count):
            texture(number, 64, 64).save(root / "images" / scene / f"{number}.png")
            mask = PALETTE[blocks(6, number, 64)] if coloured else blocks(2, number, 64) * 255
            (root / "masks" / scene / f"{number}.png").write_bytes(png(mask))
    return root


def prune(by: Callable, cwd: Path, root: Path, *overrides: str):
    return by(
        "prune/run.py", "corpus=folder", f"corpus.root={root}", "corpus.masks=masks", "prune=random", "ratio=0.5",
        "tracker=none", "corpus.train.split=all", *overrides, cwd=cwd,
    )  # fmt: skip


def test_unmapped_mask_values_end_a_command_with_a_one_line_error(tmp_path: Path, forked) -> None:  # noqa: F811
    binary = write_field(tmp_path / "binary", 4, coloured=False)
    colours = write_field(tmp_path / "colours", 4, coloured=True)
    for root, classes, reason in (
        (binary, TWO, "mask: class 255 of 2 8"),
        (colours, SIX, "mask: colours, but no corpus.mask_colours 8"),
    ):
        done = prune(forked, tmp_path, root, f"corpus.classes=[{','.join(classes)}]")
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
        assert f"error: folder: none of 8 images can be read: {reason} (table: " in done.stderr


def test_mask_options_work_on_the_command_line(tmp_path: Path, forked) -> None:  # noqa: F811
    binary = write_field(tmp_path / "binary", 4, coloured=False)
    colours = write_field(tmp_path / "colours", 4, coloured=True)
    given = ",".join(
        f'{name}:"{c}"' if isinstance(c, str) else f"{name}:{c}".replace(" ", "") for name, c in COLOURS.items()
    )
    for root, option, count in (
        (binary, "corpus.mask_values={0:background,255:building}", 2),
        (binary, "corpus.mask_values={0:null,255:building}", 1),
        (colours, f"corpus.mask_colours={{{given}}}", 6),
    ):
        done = prune(forked, tmp_path, root, option)
        assert done.returncode == 0, done.stderr
        assert "folder: masks: 8 of 8 images have one" in done.stderr and "quarantined" not in done.stderr
        selection = Path(tmp_path / done.stdout.splitlines()[-1].removeprefix("selection: "))
        key = json.loads((selection / "stage.json").read_text())["inputs"]["corpus"]
        masks = np.load(selection.parents[1] / "corpus" / key / "masks.npy")
        assert sorted(set(np.unique(masks)) - {IGNORED}) == list(range(count))


@pytest.mark.slow
def test_semantic_synthesis_works_with_ignored_pixels(tmp_path: Path) -> None:
    """The second set of field row 02: three classes and a border of 255."""
    random = np.random.default_rng(2)
    for scene in ("a", "b"):
        for part in ("images", "masks"):
            (tmp_path / part / scene).mkdir(parents=True)
        for number in range(60):
            mask = random.integers(0, 3, (8, 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            mask[:2] = mask[-2:] = mask[:, :2] = mask[:, -2:] = 255
            texture(number, 64, 64).save(tmp_path / "images" / scene / f"{number:03d}.png")
            (tmp_path / "masks" / scene / f"{number:03d}.png").write_bytes(png(mask))
    words = (
        "downstream/semantic_synthesis.py", "profile=smoke", "corpus=folder", f"corpus.root={tmp_path}",
        "corpus.masks=masks", "corpus.classes=[a,b,c]", "corpus.test_fraction=0.3", "foundation=scratch",
        "eval.images=20", "downstream.images=20", "tracker=none",
    )  # fmt: skip
    refused = call(*words, cwd=tmp_path)
    assert refused.returncode == 2 and "mask: class 255 of 3" in refused.stderr
    done = call(*words, "corpus.mask_ignore=255", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / done.stdout.strip().splitlines()[-1].removeprefix("run: ")
    summary = json.loads((run / "summary.json").read_text())
    assert "NaN" not in (run / "summary.json").read_text() and summary
    palette = json.loads(next(run.rglob("palette.json")).read_text())
    assert list(palette) == ["a", "b", "c", "no class"]
