"""Users' corpora: faults of files, shards, hub data sets and GeoTIFF scenes, import and export."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.transform import from_origin

from corpus import decoding
from corpus.decoding import decode_image
from corpus.index import Corpus, Source, index_corpus
from corpus.masks import decode_mask, mask_rule
from corpus.names import kind_of
from corpus.names import samples as grouped
from corpus.reference import reference_set
from corpus.sources.folder import ImageFolder
from corpus.sources.geotiff import GeoTiff
from corpus.sources.huggingface import HuggingFace
from corpus.sources.webdataset import (
    COMPRESSED,
    CUT,
    DUPLICATE,
    LINK,
    NO_IMAGE,
    TOO_LARGE,
    UNSAFE,
    WebDataset,
)
from encoders.efficientnet import EfficientNetLite0
from prune.entropy import LocalEntropy
from prune.features import corpus_embeddings, corpus_entropy, scan_corpus
from runtime.artefacts import read_json, stage
from runtime.cost import COST, LOG
from runtime.errors import UserError

SIDE = 24
NOBODY = 65534  # the id of a user that owns nothing


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def texture(seed: int = 0, side: int = 32, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def tiff(values: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG header that claims 30,000 x 30,000 px, with almost no pixels."""
    small = bytearray(encoded(Image.new("1", (8, 8))))
    small[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)


def animation() -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


ODD = np.linspace(0, 4000, 32 * 32).reshape(32, 32)
WITH_HOLES = ODD.astype(np.float32).copy()
WITH_HOLES[:4] = np.nan
WITH_HOLES[4:8] = -9999

BANDS = np.random.default_rng(0).integers(0, 4000, (4, 32, 32), dtype=np.uint16)

# --------------------------------------------------------------------------------------------------- robust reading

READABLE = {
    "jpeg": encoded(texture(), "JPEG"),
    "wrong extension: a PNG": encoded(texture()),
    "CMYK jpeg": encoded(texture(mode="CMYK"), "JPEG"),
    "grey jpeg": encoded(texture(mode="L"), "JPEG"),
    "1 bit": encoded(texture(mode="1")),
    "palette with transparency": encoded(texture().quantize(16), "PNG", transparency=3),
    "16-bit grey": encoded(Image.fromarray(ODD.astype(np.uint16))),
    "16-bit tiff": tiff(ODD.astype(np.uint16)),
    "RGBA": encoded(texture(mode="RGBA")),
    "float tiff with NaN and no data": tiff(WITH_HOLES, extratags=[(42113, "s", 0, "-9999", False)]),
    "animated GIF": animation(),
    "multi-page tiff": encoded(texture(), "TIFF", save_all=True, append_images=[texture(1)]),
    "1 x 1": encoded(Image.new("RGB", (1, 1), "white")),
    "4 bands": tiff(BANDS, planarconfig="separate", photometric="minisblack"),
    "4 bands, interleaved": tiff(np.moveaxis(BANDS, 0, -1), planarconfig="contig", photometric="minisblack"),
    "float colours": tiff(np.moveaxis(BANDS[:3], 0, -1).astype(np.float32), photometric="rgb"),
    "webp": encoded(texture(), "WEBP"),
}
QUARANTINED = {
    "zero bytes": (b"", decoding.EMPTY),
    "truncated jpeg": (encoded(texture(), "JPEG")[:-300], decoding.DAMAGED),
    "truncated png": (encoded(texture())[:-800], decoding.DAMAGED),
    "truncated tiff": (encoded(texture(), "TIFF")[:600], decoding.DAMAGED),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", decoding.NOT_AN_IMAGE),
    "4 bands, cut": (tiff(BANDS, planarconfig="separate", photometric="minisblack")[:1000], decoding.DAMAGED),
    "30,000 x 30,000 px": (bomb(), decoding.TOO_MANY_PIXELS),
    "text": (b"not a picture", decoding.NOT_AN_IMAGE),
}


@pytest.mark.parametrize("name", READABLE)
def test_unusual_image_formats_are_read(name: str) -> None:
    image = decode_image(READABLE[name], SIDE)
    assert isinstance(image, np.ndarray), image
    assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
    assert image.max() > 100


@pytest.mark.parametrize("name", QUARANTINED)
def test_broken_images_get_a_reason(name: str) -> None:
    data, reason = QUARANTINED[name]
    result = decode_image(data, SIDE)
    assert isinstance(result, str) and result
    assert reason is None or result == reason


def jpegs_of_all_kinds() -> list[bytes]:
    random = np.random.default_rng(0)
    kinds = []
    for width, height in ((64, 64), (63, 65), (200, 131), (1, 1), (40, 300)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        turned = Image.Exif()
        turned[274] = 6
        kinds += [encoded(image, "JPEG", subsampling=part, progressive=part == 1) for part in (0, 1, 2)]
        kinds += [encoded(image, "JPEG", keep_rgb=True), encoded(image, "JPEG", exif=turned)]
        kinds += [encoded(image.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    whole = kinds[8]
    half = whole[: len(whole) // 2]
    kinds += [half, half + b"\xff\xd9", whole[:-2], whole + b"after", whole[:300]]
    for _ in range(60):
        damaged = bytearray(whole)
        for place in random.integers(2, len(whole), 4):
            damaged[place] = random.integers(256)
        kinds.append(bytes(damaged))
    return kinds


@pytest.mark.parametrize("resolution", [8, 32, 64])
def test_fast_jpeg_decoding_equals_pillow(resolution: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster decoder equals Pillow bit for bit for ordinary JPEGs, and leaves others and broken ones to Pillow."""
    files = jpegs_of_all_kinds()
    faster = sum(decoding.decode_jpeg(data, resolution) is not None for data in files)
    ours = [decode_image(data, resolution) for data in files]
    monkeypatch.setattr(decoding, "decode_jpeg", lambda *_: None)
    pillows = [decode_image(data, resolution) for data in files]
    assert 15 <= faster < len(files) - 10
    for mine, pillow in zip(ours, pillows, strict=True):
        assert isinstance(mine, str) == isinstance(pillow, str)
        assert np.array_equal(mine, pillow)


def test_a_cmyk_jpeg_is_decoded_with_the_right_colours() -> None:
    """Adobe's inverted four colours: white stays white and red red."""
    picture = Image.new("RGB", (32, 32), (250, 250, 250))
    picture.paste((220, 30, 30), (0, 0, 32, 16))
    image = decode_image(encoded(picture.convert("CMYK"), "JPEG", quality=95), 32).astype(int)
    assert np.abs(image[4, 16] - (220, 30, 30)).max() < 40 and np.abs(image[28, 16] - 250).max() < 12


def test_transparent_pixels_are_black() -> None:
    clear = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, SIDE, SIDE // 2))
    image = decode_image(encoded(clear), SIDE)
    assert (image[: SIDE // 2] == 255).all() and (image[SIDE // 2 :] == 0).all()


def test_deep_pixels_are_stretched_between_percentiles() -> None:
    image = decode_image(READABLE["16-bit tiff"], 32)[..., 0].astype(float).ravel()
    low, high = np.percentile(np.round(ODD), (2, 98))
    expected = np.clip((np.floor(ODD.ravel()) - low) / (high - low) * 255, 0, 255)
    assert np.abs(image - expected).max() <= 1
    bands = [decode_image(READABLE[name], 32) for name in ("4 bands", "4 bands, interleaved")]
    assert (bands[0] == bands[1]).all()
    expected = [
        np.clip((band - low) / (high - low) * 255, 0, 255)
        for band in BANDS[:3].astype(float)
        for low, high in [np.percentile(band, (2, 98))]
    ]
    assert np.abs(bands[0] - np.stack(expected, -1)).max() <= 1
    holes = decode_image(READABLE["float tiff with NaN and no data"], 32)
    assert (holes[:8] == 0).all() and holes[12:].min() > 0


def test_masks_keep_their_class_numbers() -> None:
    classes = np.repeat(np.arange(4, dtype=np.uint8), 8)[:, None].repeat(32, axis=1)
    palette = Image.fromarray(classes, mode="P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    for image in (palette, Image.fromarray(classes)):
        mask = decode_mask(encoded(image), mask_rule(list("abcd")), 16)
        assert (mask == np.repeat(np.arange(4), 4)[:, None]).all()


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """A folder with every fault of folders, and good images."""
    root = tmp_path / "messy"
    (root / "a b").mkdir(parents=True)
    (root / "dir.jpg").mkdir()
    for number, (name, data) in enumerate(READABLE.items()):
        (root / "a b" / f"{number:02d} good {name[:4]}\n.jpg").write_bytes(data)
    for number, (data, _) in enumerate(QUARANTINED.values()):
        (root / "dir.jpg" / f"{number:02d}.png").write_bytes(data)
    (root / "a b" / "same.png").write_bytes(READABLE["RGBA"])
    (root / "a b" / "SAME.png").write_bytes(READABLE["RGBA"])
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "self.png").symlink_to(root / "self.png")
    (root / "gone.png").symlink_to(root / "nothing.png")
    os.rename(root / "a b" / "same.png", os.fsencode(root) + b"/\xff\xfe.png")
    return root


def test_every_file_of_a_messy_folder_is_read_or_quarantined(messy: Path, tmp_path: Path) -> None:
    source = ImageFolder(str(messy), resolution=SIDE)
    corpus = index_corpus(source, tmp_path / "runs")
    on_disk = sum(len(files) for _, _, files in os.walk(messy))
    assert len(corpus) == on_disk == len(READABLE) + 2 + len(QUARANTINED) + 2
    assert corpus.readable.sum() == len(READABLE) + 2
    quarantine = pd.read_parquet(corpus.directory / "quarantine.parquet")
    assert set(quarantine["id"]) == set(corpus.manifest.loc[~corpus.readable, "id"])
    reasons = quarantine.set_index("id")["reason"]
    assert (reasons != "").all() and reasons["gone.png"] == decoding.VANISHED
    for number, (_, reason) in enumerate(QUARANTINED.values()):
        assert reason is None or reasons[f"dir.jpg/{number:02d}.png"] == reason
    assert (corpus.images[~corpus.readable] == 0).all()


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "deep").mkdir(parents=True)
    (root / "own").mkdir(parents=True)
    texture(0).save(root / "own" / "a.png")
    texture(1).save(outside / "deep" / "b.jfif", format="JPEG")
    for link, target in (("linked", outside), ("again", root / "own"), ("up", tmp_path), ("self", root)):
        (root / link).symlink_to(target, target_is_directory=True)
    (outside / "deep" / "back").symlink_to(outside, target_is_directory=True)
    assert ImageFolder(str(root)).manifest()["id"].tolist() == ["linked/deep/b.jfif", "own/a.png"]


@contextmanager
def unprivileged_user(home: Path) -> Iterator[None]:
    """Root can read everything, so run as another user for a while, to whom `home` belongs."""
    if os.geteuid():
        yield
        return
    try:
        os.chown(home, NOBODY, NOBODY)
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    except OSError as error:
        pytest.skip(f"root cannot be somebody else here: {error}")
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def test_files_and_folders_without_permission_are_quarantined() -> None:
    with tempfile.TemporaryDirectory() as home:  # other users cannot read pytest's directories
        folder = Path(home)
        (folder / "any").mkdir()
        texture().save(folder / "any" / "a.png")
        index_corpus(ImageFolder(str(folder / "any"), workers=1), folder / "warm")  # imports what it needs, as root
        with unprivileged_user(folder):
            for name in ("open", "shut"):
                (folder / "root" / name).mkdir(parents=True)
                texture().save(folder / "root" / name / "a.png")
            texture().save(folder / "root" / "b.png")
            (folder / "root" / "b.png").chmod(0)
            (folder / "root" / "shut").chmod(0)
            corpus = index_corpus(ImageFolder(str(folder / "root"), workers=1), folder / "runs")
            (folder / "root" / "shut").chmod(0o755)
    assert corpus.manifest.set_index("id")["reason"].to_dict() == {
        "b.png": decoding.NO_PERMISSION, "open/a.png": "", "shut": decoding.NO_PERMISSION,
    }  # fmt: skip


def test_files_that_vanish_during_the_run_are_quarantined(tmp_path: Path) -> None:
    for number in range(4):
        texture(number).save(tmp_path / f"{number}.png")
    source = ImageFolder(str(tmp_path), resolution=SIDE)
    source.manifest()
    (tmp_path / "2.png").unlink()
    read = list(source.reader(np.arange(4))())
    assert read[2] == decoding.VANISHED and all(isinstance(read[row], np.ndarray) for row in (0, 1, 3))


def test_masks_of_a_folder_are_matched_to_their_images(tmp_path: Path) -> None:
    for name in ("images/Beach", "masks/Beach"):
        (tmp_path / name).mkdir(parents=True)
    classes = np.zeros((32, 32), np.uint8)
    classes[:, 16:] = 1
    for number in range(3):
        texture(number).save(tmp_path / "images" / "Beach" / f"{number}.jpg")
    Image.fromarray(classes).save(tmp_path / "masks" / "Beach" / "0.png")
    (tmp_path / "masks" / "Beach" / "1.png").write_bytes(b"broken")
    corpus = index_corpus(
        ImageFolder(str(tmp_path), masks="masks", classes=("sand", "sea"), resolution=16), tmp_path / "runs"
    )
    assert corpus.mask_classes == ("sand", "sea")
    (tmp_path / "flat" / "masks").mkdir(parents=True)
    texture().save(tmp_path / "flat" / "a.png")
    texture().save(tmp_path / "flat" / "masks" / "a.png")
    flat = ImageFolder(str(tmp_path / "flat"), masks="masks", classes=("sand",))
    assert flat.manifest()["id"].tolist() == ["a.png"], "masks below the root are no images"
    assert (corpus.masks[0] == np.repeat([0, 1], 8)[None]).all()
    assert corpus.manifest["reason"].tolist() == ["", "mask: not an image", "mask: missing"]
    with pytest.raises(UserError, match=r"corpus\.classes"):
        ImageFolder(str(tmp_path), masks="masks")
    with pytest.raises(UserError, match="is not a folder"):
        ImageFolder(str(tmp_path), masks="labels", classes=("a",))


# ------------------------------------------------------------------------------------------------------- webdataset


def shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of twelve samples with captions, scenes, locations, splits and masks."""
    folder = tmp_path / "shards"
    folder.mkdir()
    mask = encoded(Image.fromarray(np.full((32, 32), 1, np.uint8)))
    for number in range(2):
        members: list[tuple[str, bytes]] = []
        for row in range(number * 6, number * 6 + 6):
            metadata = {"scene": f"scene{row % 3}", "lon": row * 10.0, "split": "test" if row == 11 else "train"}
            members += [
                (f"s{row:03d}.jpg", encoded(texture(row), "JPEG", quality=95)),
                (f"s{row:03d}.txt", f"caption {row}".encode()),
                (f"s{row:03d}.json", json.dumps(metadata).encode()),
                (f"s{row:03d}.mask.png", mask),
            ]
        shard(folder / f"part-{number}.tar", members)
    return folder


def test_the_webdataset_source_reads_the_same_as_the_library(shards: Path, tmp_path: Path) -> None:
    import webdataset

    urls = str(shards / "part-{0..1}.tar")
    source = WebDataset(urls, resolution=32, classes=("a", "b"), workers=1)
    corpus = index_corpus(source, tmp_path / "runs")
    expected = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert corpus.manifest["id"].tolist() == [sample["__key__"] for sample in expected]
    assert corpus.manifest["caption"].tolist() == [sample["txt"].decode() for sample in expected]
    assert corpus.manifest["scene"].tolist() == [json.loads(sample["json"])["scene"] for sample in expected]
    assert corpus.manifest["lon"].tolist() == [row * 10.0 for row in range(12)]
    for image, mask, sample in zip(corpus.images, corpus.masks, expected, strict=True):
        assert (image == np.asarray(Image.open(io.BytesIO(sample["jpg"])))).all() and (mask == 1).all()
    assert WebDataset(urls, split="test").manifest()["id"].tolist() == ["s011"]
    parts = [WebDataset(urls, split=split, val_fraction=0.5).manifest()["id"].tolist() for split in ("train", "val")]
    assert sorted([*parts[0], *parts[1]]) == [f"s{row:03d}" for row in range(11)] and all(parts)


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(["", "d/", "d.e/", "./", "d/\n"]),
        st.sampled_from(["a", "b", ""]),
        st.sampled_from(["", ".jpg", ".JPG", ".png", ".mask.png", ".txt"]),
    ).map("".join),
    max_size=8,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(MEMBERS)
def test_members_are_grouped_like_in_the_webdataset_library(names: list[str]) -> None:
    """For any order of the members; the library receives each key's members one after the other."""
    from webdataset.tariterators import base_plus_ext, group_by_keys

    dotted = [name for name in names if (base_plus_ext(name)[0] or "/")[-1] != "/"]  # hidden files are skipped
    keys = [base_plus_ext(name)[0] for name in dotted]
    order = sorted(range(len(dotted)), key=lambda at: keys.index(keys[at]))
    files = [{"fname": dotted[at], "data": at, "__url__": "a.tar"} for at in order]
    doubled: list[str] = []
    expected = []
    for sample in group_by_keys(files, handler=lambda error: doubled.append(str(error)) or True):
        images = [value for suffix, value in sample.items() if suffix in ("jpg", "png")]
        texts = [sample["txt"]] if "txt" in sample else []
        expected.append((sample["__key__"], min(images, default=None), sample.get("mask.png"), texts, bool(doubled)))
        doubled.clear()
    result = grouped(dotted, [kind_of(name, b"") for name in dotted])
    assert [(one.key, one.image, one.mask, one.texts, bool(one.doubled)) for one in result if result] == expected


@pytest.mark.parametrize("urls", ["a.tar", "d/{00..03}.tar", "a{b,c{1..2}}.tar::http://x/{9..10}.tar", "{a}.tar"])
def test_brace_lists_expand_like_in_the_webdataset_library(urls: str) -> None:
    from webdataset.shardlists import expand_urls

    assert WebDataset(urls)._shards == expand_urls(urls)


def test_shards_are_read_without_importing_torch(shards: Path, repository: Path) -> None:
    """Otherwise every decoding process would load it, half a gigabyte each."""
    code = (
        "import sys, numpy as np; from corpus.sources.webdataset import WebDataset\n"
        "source = WebDataset(sys.argv[1], resolution=16)\n"
        "assert len(list(source.reader(np.arange(12))())) == 12 and not {'torch', 'webdataset'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(shards / "part-{0..1}.tar")]
    assert subprocess.run(command, cwd=repository, check=False).returncode == 0


def test_faults_of_shards_get_a_reason(tmp_path: Path) -> None:
    good = encoded(texture(), "JPEG")
    shard(
        tmp_path / "odd.tar",
        [
            ("a.jpg", good), ("/etc/passwd.jpg", good), ("../up.jpg", good), ("b.jpg", good), ("b.jpg", good),
            ("c.txt", b"alone"), ("d.jpg", b"broken"), ("e.jpg", good), ("a.jpg", good), ("x/f.jpg", good),
        ],
    )  # fmt: skip
    shard(tmp_path / "cut.tar", [(f"g{number}.jpg", good) for number in range(4)])
    (tmp_path / "cut.tar").write_bytes(
        (tmp_path / "cut.tar").read_bytes()[: 2 * (512 + 512 * -(-len(good) // 512)) + 700]
    )
    (tmp_path / "no.tar").write_bytes(b"<html>" * 400)
    urls = "::".join(str(tmp_path / f"{name}.tar") for name in ("odd", "cut", "no"))
    corpus = index_corpus(WebDataset(urls, resolution=SIDE), tmp_path / "runs")
    reasons = dict(zip(corpus.manifest["id"], corpus.manifest["reason"], strict=True))
    assert reasons["a"] == reasons["e"] == reasons["x/f"] == reasons["g0"] == reasons["g1"] == ""
    assert reasons["b"] == "" and reasons["b#2"] == reasons["a#2"] == DUPLICATE
    assert reasons["c"] == f"{NO_IMAGE}: suffixes met .txt"
    assert reasons["d"] == decoding.NOT_AN_IMAGE
    assert [reason for name, reason in reasons.items() if "passwd" in name or "up.jpg" in name] == [UNSAFE, UNSAFE]
    assert reasons["g2"] == CUT and "g3" not in reasons
    assert [reasons[name] for name in reasons if name.endswith("cut.tar:end")] == [CUT]
    assert reasons[str(tmp_path / "no.tar")] == "not a tar shard"
    assert corpus.manifest.set_index("id").loc["x/f", "scene"] == "x"
    assert not (tmp_path.parent / "up.jpg").exists()


def test_shards_that_change_after_the_listing_are_detected(tmp_path: Path) -> None:
    """Another image of the same size at the same place, and a shard truncated in the middle of a mask."""
    one, other = (tiff(np.asarray(texture(seed))) for seed in (1, 2))
    assert len(one) == len(other)
    mask = encoded(Image.fromarray(np.zeros((32, 32), np.uint8)))
    shard(tmp_path / "a.tar", [("x.tif", one), ("y.tif", other), ("y.mask.png", mask)])
    source = WebDataset(str(tmp_path / "a.tar"), resolution=32, classes=("a",), workers=1)
    source.manifest()
    assert [data for data, _, _ in source.originals(np.array([1]))] == [other]
    shard(tmp_path / "a.tar", [("y.tif", other), ("x.tif", one), ("y.mask.png", mask)])
    assert list(source.reader(np.arange(2))()) == [CUT, CUT]
    with pytest.raises(UserError, match="can no longer be read"):
        list(source.originals(np.array([0])))
    shard(tmp_path / "a.tar", [("x.tif", one), ("y.tif", other), ("y.mask.png", mask)])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: 2 * (len(one) // 512 + 2) * 512 + 540])
    assert list(source.reader(np.array([1]))()) == [f"mask: {CUT}"]


def test_a_huge_sparse_member_gets_a_reason_and_a_small_one_is_read(tmp_path: Path) -> None:
    """Ten kilobytes that claim 20 GB are not extracted."""
    with (tmp_path / "bomb.png").open("wb") as file:
        file.truncate(20 * 2**30)
    texture().save(tmp_path / "fine.png")
    holes = np.zeros((256, 256, 3), np.uint8)
    holes[-1] = 200
    data, half = tiff(holes), 100_000
    with (tmp_path / "holes.tif").open("wb") as file:
        file.write(data[:4096])
        file.seek(half)
        file.write(data[half:])
    assert (tmp_path / "holes.tif").read_bytes() == data
    files = ["bomb.png", "fine.png", "holes.tif"]
    packed = subprocess.run(["tar", "--sparse", "-cf", "a.tar", *files], cwd=tmp_path, capture_output=True)
    if packed.returncode or (tmp_path / "a.tar").stat().st_size > 2**20:
        pytest.skip("no tar or file system here knows sparse files")
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getmember("holes.tif").sparse
    corpus = index_corpus(WebDataset(str(tmp_path / "a.tar"), resolution=256), tmp_path / "runs")
    assert corpus.manifest["reason"].tolist() == [TOO_LARGE, "", ""]
    assert (corpus.images[2] == holes).all()


def test_links_in_shards_and_compressed_shards_get_a_reason(tmp_path: Path) -> None:
    """GNU tar stores a file that occurs twice as a hard link."""
    (tmp_path / "a.jpg").write_bytes(encoded(texture(), "JPEG"))
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to("a.jpg")
    for name, mode in (("plain.tar", "w"), ("small.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            for file in ("a.jpg", "b.jpg", "c.jpg"):
                tar.add(tmp_path / file, file)
    urls = f"{tmp_path}/plain.tar::{tmp_path}/small.tar.gz"
    corpus = index_corpus(WebDataset(urls, resolution=SIDE), tmp_path / "runs")
    reasons = {Path(name).name: reason for name, reason in corpus.manifest[["id", "reason"]].to_numpy()}
    assert reasons == {"a": "", "plain.tar:b.jpg": LINK, "plain.tar:c.jpg": LINK, "small.tar.gz": COMPRESSED}


def test_truncated_and_damaged_shards_are_reported(tmp_path: Path) -> None:
    good = encoded(texture(), "JPEG")
    shard(tmp_path / "a.tar", [(f"g{number}.jpg", good) for number in range(6)])
    whole = (tmp_path / "a.tar").read_bytes()
    member = 512 + 512 * -(-len(good) // 512)
    damaged = bytearray(whole)
    damaged[2 * member : 2 * member + 512] = b"\xff" * 512
    cases = {
        "whole": (whole, 6, False), "without its end": (whole[: 6 * member], 6, False),
        "damaged header": (bytes(damaged), 2, True), "cut header": (whole[: 3 * member + 100], 3, True),
    }  # fmt: skip
    for name, (data, samples, cut) in cases.items():
        (tmp_path / "b.tar").write_bytes(data)
        source = WebDataset(str(tmp_path / "b.tar"), resolution=SIDE, workers=1)
        read = list(source.reader(np.arange(len(source.manifest())))())
        assert sum(isinstance(image, np.ndarray) for image in read) == samples, name
        assert (CUT in [image for image in read if isinstance(image, str)]) == cut, name


def test_unusual_metadata_do_not_make_images_unreadable(tmp_path: Path) -> None:
    good = encoded(texture(), "JPEG")
    metadata = [
        {"captions": 7},
        {"text": 5},
        {"caption": "\ud83d"},
        {"n": 2**80},
        {"n": 1},
        {"n": "x"},
        {"lon": "12.5", "lat": "1"},
    ]
    members = [
        pair
        for row, fact in enumerate(metadata)
        for pair in ((f"{row}.jpg", good), (f"{row}.json", json.dumps(fact).encode()))
    ]
    others = [(name, good) for name in ("a.jpg", "a#2.jpg", "b.jpg", "a.jpg")]
    shard(tmp_path / "a.tar", [*members, *others, ("c.json", b"[" * 99_999)])
    corpus = index_corpus(WebDataset(str(tmp_path / "a.tar"), resolution=SIDE), tmp_path / "runs")
    assert corpus.readable.sum() == len(metadata) + 3 and corpus.manifest["id"].is_unique


@pytest.mark.parametrize("urls", ["{000..", "foo://a.tar", "{folder}", "${NOWHERE}.tar"])
def test_invalid_urls_give_a_one_line_error(tmp_path: Path, urls: str) -> None:
    with pytest.raises(UserError, match="corpus") as caught:
        _ = WebDataset(urls.replace("{folder}", str(tmp_path))).version
    assert "\n" not in str(caught.value)


def test_shards_behind_a_url_are_read(shards: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    source = WebDataset("memory://bucket/part-{0..1}.tar", resolution=SIDE, workers=1)
    assert len(source.manifest()) == 12
    assert all(isinstance(image, np.ndarray) for image in source.reader(np.arange(12))())
    with pytest.raises(UserError, match=r"there is no shard memory://bucket/part-7\.tar"):
        _ = WebDataset("memory://bucket/part-7.tar").version


# ------------------------------------------------------------------------------------------------------ huggingface


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["Beach", "DenseForest"]),
            "lat": datasets.Value("float64"),
        }
    )
    rows = {
        "image": [{"bytes": encoded(texture(row)), "path": None} for row in range(6)]
        + [{"bytes": b"broken", "path": None}],
        "label": [row % 2 for row in range(7)],
        "lat": [float(row) for row in range(7)],
    }
    part = datasets.Dataset.from_dict(rows, features=features)
    part.save_to_disk(str(tmp_path / "disk"))
    (tmp_path / "parquet").mkdir()
    part.to_parquet(str(tmp_path / "parquet" / "train-0.parquet"))
    return tmp_path


@pytest.mark.parametrize(("place", "streaming"), [("disk", False), ("parquet", False), ("parquet", True)])
def test_huggingface_sets_are_read(saved: Path, tmp_path: Path, place: str, streaming: bool) -> None:
    source = HuggingFace(str(saved / place), resolution=32, streaming=streaming)
    corpus = index_corpus(source, tmp_path / "runs")
    assert corpus.manifest["scene"].tolist() == [["Beach", "DenseForest"][row % 2] for row in range(7)]
    assert corpus.manifest["caption"][1] == "a satellite image of dense forest"
    assert corpus.manifest["lat"].tolist() == [float(row) for row in range(7)]
    assert corpus.manifest["reason"].tolist() == [""] * 6 + [decoding.NOT_AN_IMAGE]
    for row in range(6):
        assert (corpus.images[row] == np.asarray(texture(row))).all()
    splits = [
        set(HuggingFace(str(saved / place), split=split, val_fraction=0.2, test_fraction=0.5).manifest()["id"])
        for split in ("train", "val", "test")
    ]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 7


@pytest.mark.parametrize("streaming", [False, True])
def test_masks_and_dates_of_a_hub_set_are_read(tmp_path: Path, streaming: bool) -> None:
    """The mask may also be the first image column."""
    import datasets

    masks = np.random.default_rng(0).integers(0, 3, (4, 32, 32), dtype=np.uint8)
    rows = {
        "mask": [{"bytes": encoded(Image.fromarray(mask)), "path": None} for mask in masks[:3]] + [None],
        "picture": [{"bytes": encoded(texture(row)), "path": None} for row in range(4)],
        "date": [datetime(2024, 5, day + 1) for day in range(4)],
    }
    kinds = {"mask": datasets.Image(), "picture": datasets.Image(), "date": datasets.Value("timestamp[s]")}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    table.to_parquet(str(tmp_path / "train.parquet"))

    def source(**options: Any) -> HuggingFace:
        return HuggingFace(str(tmp_path / "train.parquet"), resolution=32, streaming=streaming, **options)

    corpus = index_corpus(source(classes=("water", "land", "ice")), tmp_path / "runs")
    assert corpus.manifest["date"].tolist() == [f"2024-05-0{day + 1}T00:00:00" for day in range(4)]
    assert corpus.manifest["reason"].tolist() == ["", "", "", "mask: missing"]
    for row in range(3):
        assert (corpus.images[row] == np.asarray(texture(row))).all() and (corpus.masks[row] == masks[row]).all()
    [(data, suffix, mask)] = source(classes=("water", "land", "ice")).originals(np.array([1]))
    assert (data, suffix, mask) == (rows["picture"][1]["bytes"], ".png", (rows["mask"][1]["bytes"], ".png"))
    assert index_corpus(source(), tmp_path / "runs").masks is None
    with pytest.raises(UserError, match=r"no column of masks|is not in"):
        source(classes=("water",), mask_column="nothing").manifest()


def test_huggingface_errors_have_one_line(saved: Path) -> None:
    for options, message in (
        ({}, "corpus.path"),
        ({"path": str(saved / "nowhere")}, "cannot be loaded"),
        ({"path": str(saved / "disk"), "image_column": "picture"}, "corpus.image_column=picture"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            HuggingFace(**options).manifest()
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- geotiff


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A 4326 scene of 8 bits, a UTM scene of 16 bits with a no-data corner, and a file that is not a scene."""
    folder = tmp_path / "scenes"
    (folder / "alps").mkdir(parents=True)
    random = np.random.default_rng(0)
    values = random.integers(1, 256, (3, 96, 128), dtype=np.uint8)
    with rasterio.open(
        folder / "alps" / "a.tif", "w", driver="GTiff", height=96, width=128, count=3, dtype="uint8",
        crs="EPSG:4326", transform=from_origin(10.0, 48.0, 0.01, 0.01),
    ) as raster:  # fmt: skip
        raster.write(values)
    deep = random.integers(100, 3000, (4, 64, 64), dtype=np.uint16)
    deep[:, :32, :32] = 0
    with rasterio.open(
        folder / "b.tif", "w", driver="GTiff", height=64, width=64, count=4, dtype="uint16", nodata=0,
        crs="EPSG:32632", transform=from_origin(500_000, 5_300_000, 10, 10),
    ) as raster:  # fmt: skip
        raster.write(deep)
    (folder / "c.tif").write_bytes(b"no scene")
    return folder


def test_geotiff_tiles_have_the_location_and_pixels_of_their_place(scenes: Path, tmp_path: Path) -> None:
    corpus = index_corpus(GeoTiff(str(scenes), stretch="none", bands=(3, 2, 1), resolution=32), tmp_path / "runs")
    table = corpus.manifest.set_index("id")
    tile = table.loc["alps/a.tif/000032_000064"]
    assert tile["scene"] == "alps" and tile["lon"] == pytest.approx(10 + 0.01 * 80)
    assert tile["lat"] == pytest.approx(48 - 0.01 * 48)
    metres = 0.01 * 111_320 * np.sqrt(np.cos(np.radians(tile["lat"])))
    assert tile["ground_sampling_distance"] == pytest.approx(metres, rel=1e-3)
    assert json.loads(tile["transform"]) == pytest.approx([10.64, 0.01, 0, 47.68, 0, -0.01])
    row = table.index.get_loc("alps/a.tif/000032_000064")
    with rasterio.open(scenes / "alps" / "a.tif") as raster:
        assert (corpus.images[row] == raster.read([3, 2, 1])[:, 32:64, 64:96].transpose(1, 2, 0)).all()
    utm = table.loc["b.tif/000032_000032"]
    assert utm["lon"] == pytest.approx(9.0, abs=0.01) and utm["lat"] == pytest.approx(47.85, abs=0.01)
    assert utm["ground_sampling_distance"] == pytest.approx(10, rel=0.01)
    assert table.loc["b.tif/000000_000000", "reason"] == "no data"
    assert table.loc["c.tif", "reason"] == "cannot be opened as a scene"
    assert corpus.readable.sum() == 12 + 3


def test_geotiff_scenes_that_cannot_be_tiled_get_a_reason(scenes: Path, tmp_path: Path) -> None:
    reasons = index_corpus(GeoTiff(str(scenes), resolution=80), tmp_path / "runs").manifest.set_index("id")["reason"]
    assert reasons["b.tif"] == "smaller than a tile" and reasons["alps/a.tif/000000_000000"] == ""
    with pytest.raises(UserError, match="no images"):
        index_corpus(GeoTiff(str(scenes / "b.tif"), resolution=32, split="test", test_fraction=0), tmp_path / "runs")
    with pytest.raises(UserError, match="counted from 1"):
        GeoTiff(str(scenes), bands=(0, 1, 2))
    whole = (scenes / "alps" / "a.tif").read_bytes()
    (scenes / "alps" / "a.tif").write_bytes(whole[: len(whole) // 2])
    cut = index_corpus(GeoTiff(str(scenes / "alps"), resolution=16, stretch="none"), tmp_path / "cut")
    assert 0 < cut.readable.sum() < len(cut) and set(cut.manifest["reason"]) == {"", decoding.DAMAGED}


def test_geotiff_stretches_deep_values(scenes: Path) -> None:
    source = GeoTiff(str(scenes / "b.tif"), resolution=32, workers=1)
    images = [image for image in source.reader(np.arange(4))() if not isinstance(image, str)]
    assert len(images) == 3 and np.mean(images) == pytest.approx(127, abs=8)
    ranged = GeoTiff(str(scenes / "b.tif"), resolution=32, stretch="range", low=0, high=6000)
    assert np.mean([image for image in ranged.reader(np.arange(1, 4))()]) == pytest.approx(1550 / 6000 * 255, abs=8)


def test_geotiff_splits_have_no_common_pixel(scenes: Path) -> None:
    covered = np.zeros((96, 128), int)
    grounds = {}
    for split in ("train", "val", "test"):
        options = {"tile": 16, "resolution": 16, "overlap": 8, "block": 2, "val_fraction": 0.3, "test_fraction": 0.3}
        tiles = GeoTiff(str(scenes / "alps" / "a.tif"), split=split, **options).manifest()
        assert len(tiles) and (tiles["ground"] != "").any()
        canvas = np.zeros((96, 128), bool)
        for tile in tiles.itertuples():
            canvas[tile.row : tile.row + 16, tile.column : tile.column + 16] = True
            if tile.ground:
                assert grounds.setdefault(tile.ground, split) == split
        covered += canvas
    assert covered.max() == 1 and len(grounds) > 9


def test_geotiff_errors_have_one_line(scenes: Path) -> None:
    for options in (
        {}, {"root": str(scenes / "none")}, {"root": str(scenes), "overlap": 64},
        {"root": str(scenes), "bands": (1, 2)},
        {"root": str(scenes), "stretch": "log"}, {"root": str(scenes), "stretch": "range", "low": 9, "high": 3},
    ):  # fmt: skip
        with pytest.raises(UserError, match="corpus") as caught:
            GeoTiff(**options).manifest()
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- torchgeo


@pytest.fixture
def made_ucmerced(tmp_path: Path) -> Path:
    """Four images of two scenes in UC Merced's layout."""
    pytest.importorskip("torchgeo", reason="torchgeo is the extra `geo`, which is not installed")
    members: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for scene in ("agricultural", "forest"):
        (tmp_path / "UCMerced_LandUse" / "Images" / scene).mkdir(parents=True)
        for number, split in enumerate(("train", "train", "val", "test")):
            name = f"{scene}{number:02d}.tif"
            texture(number, side=256).save(tmp_path / "UCMerced_LandUse" / "Images" / scene / name)
            members[split].append(name)
    for split, names in members.items():
        (tmp_path / f"uc_merced-{split}.txt").write_text("\n".join(names) + "\n")
    return tmp_path


def test_torchgeo_sets_are_read(made_ucmerced: Path, tmp_path: Path) -> None:
    from corpus.sources.torchgeo import TorchGeo

    corpus = index_corpus(TorchGeo("UCMerced", str(tmp_path), resolution=256), tmp_path / "runs")
    assert sorted(corpus.manifest["scene"]) == ["agricultural"] * 4 + ["forest"] * 4
    assert (corpus.images[0] == np.asarray(texture(0, side=256))).all()
    assert len(TorchGeo("UCMerced", str(tmp_path), split="train").manifest()) == 4
    for options, message in (
        ({"dataset": "Nothing", "root": str(tmp_path)}, "is not a non-geo data set"),
        ({"dataset": "EuroSAT", "root": str(tmp_path)}, "does not find its files"),
    ):
        with pytest.raises(UserError, match=message):
            TorchGeo(**options).manifest()


def test_the_error_about_missing_torchgeo_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from corpus.sources.torchgeo import TorchGeo

    monkeypatch.setitem(sys.modules, "torchgeo", None)
    with pytest.raises(UserError, match=r"\.\[geo\]"):
        TorchGeo("UCMerced", str(tmp_path)).manifest()


# -------------------------------------------------------------------------------------------------------- reference


def test_the_error_about_a_missing_reference_names_the_option(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object) -> None:
        raise ConnectionError("offline,\n  try (later) again")

    monkeypatch.setattr("corpus.sources.huggingface._load", offline)
    for config, command in (
        (None, "`hf download blanchon/AID --repo-type dataset --local-dir DIR`"),
        ("RSSCN7", "--include 'RSSCN7/*'"),
    ):
        with pytest.raises(UserError, match=r"reference\.root=DIR") as caught:
            reference_set("aid", "blanchon/AID", 32, config=config)
        assert command in str(caught.value) and "\n" not in str(caught.value)
        assert "could not be loaded from the hub (offline, try (later) again)" in str(caught.value)
        causes = [caught.value.__cause__, caught.value.__cause__.__cause__]
        assert [type(cause) for cause in causes] == [UserError, ConnectionError]
    monkeypatch.undo()
    (tmp_path / "classes" / "Beach").mkdir(parents=True)
    texture().save(tmp_path / "classes" / "Beach" / "a.png")
    as_folders = reference_set("aid", "blanchon/AID", 32, root=str(tmp_path / "classes"))
    assert as_folders.manifest()["scene"].tolist() == ["Beach"]
    as_downloaded = reference_set("aid", "blanchon/AID", 32, root=str(saved / "parquet"))
    assert set(as_downloaded.manifest()["scene"]) == {"Beach", "DenseForest"}


# ---------------------------------------------------------------------------------------------- changes and interrupts


@pytest.fixture
def growing(tmp_path: Path) -> Path:
    root = tmp_path / "growing"
    root.mkdir()
    for number in range(9):
        texture(number).save(root / f"{number}.png")
    return root


def arrays_of(corpus: Corpus, runs: Path, encoder: EfficientNetLite0) -> list[np.ndarray]:
    entropy = corpus_entropy(corpus, LocalEntropy(), runs)
    return [np.asarray(corpus.images), entropy, np.asarray(corpus_embeddings(corpus, encoder, runs))]


@pytest.mark.parametrize("content_hash", [False, True])
def test_only_new_or_changed_files_are_read_again(
    growing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content_hash: bool
) -> None:
    encoder, seen, embedded = EfficientNetLite0(input_size=32, batch_size=4), [], []
    runs = tmp_path / "runs"

    def source() -> ImageFolder:
        return ImageFolder(str(growing), resolution=32, content_hash=content_hash)

    real_read, real_embed = ImageFolder.reader, EfficientNetLite0.__call__
    monkeypatch.setattr(ImageFolder, "reader", lambda self, rows: seen.extend(rows) or real_read(self, rows))
    monkeypatch.setattr(EfficientNetLite0, "__call__", lambda self, x: embedded.append(len(x)) or real_embed(self, x))
    arrays_of(scan_corpus(source(), runs, LocalEntropy(), encoder), runs, encoder)
    assert len(seen) == 9 and sum(embedded) == 9

    seen.clear(), embedded.clear()
    (growing / "3.png").unlink()
    texture(50).save(growing / "5.png")
    texture(51).save(growing / "55.png")
    if content_hash:
        os.utime(growing / "7.png", ns=(1, 1))  # touched, the same bytes
    corpus = scan_corpus(source(), runs, LocalEntropy(), encoder)
    result = arrays_of(corpus, runs, encoder)
    assert [corpus.manifest["id"][row] for row in seen] == ["5.png", "55.png"] and sum(embedded) == 2
    assert "3.png" not in set(corpus.manifest["id"]) and len(corpus) == 9

    whole = arrays_of(scan_corpus(source(), tmp_path / "anew", LocalEntropy(), encoder), tmp_path / "anew", encoder)
    np.testing.assert_array_equal(result[0], whole[0])
    np.testing.assert_array_equal(result[1], whole[1])
    np.testing.assert_allclose(result[2].astype(float), whole[2].astype(float), rtol=2e-3, atol=2e-3)


def test_a_new_scan_reuses_embeddings_of_earlier_indexes(
    growing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two encoders alternately on a growing folder: each embeds an image once, whichever of them indexed it."""
    embedded: list[int] = []
    real = EfficientNetLite0.__call__
    monkeypatch.setattr(EfficientNetLite0, "__call__", lambda self, x: embedded.append(len(x)) or real(self, x))
    first, second = (EfficientNetLite0(input_size=side, batch_size=4) for side in (32, 64))
    runs, result = tmp_path / "runs", []
    for number, encoder in enumerate((first, second, second, second, first, second)):
        if number >= 2:
            texture(50 + number).save(growing / f"more{number}.png")
        embedded.clear()
        corpus = scan_corpus(ImageFolder(str(growing), resolution=32), runs, LocalEntropy(), encoder)
        entropy, embeddings = corpus_entropy(corpus, LocalEntropy(), runs), corpus_embeddings(corpus, encoder, runs)
        result.append(sum(embedded))
    assert result == [9, 9, 1, 1, 3, 2]
    np.testing.assert_allclose(entropy, [LocalEntropy()(image) for image in corpus.images], rtol=1e-6)
    np.testing.assert_allclose(embeddings, second(np.asarray(corpus.images)), atol=2e-3)


def read_again(monkeypatch: pytest.MonkeyPatch, source: Callable[[], Source], runs: Path) -> list[str]:
    """Index a corpus and return the ids that were read."""
    seen, kind = [], type(source())
    with monkeypatch.context() as patch:
        real = kind.reader
        patch.setattr(kind, "reader", lambda self, rows: seen.extend(rows) or real(self, rows))
        corpus = index_corpus(source(), runs)
    return [corpus.manifest["id"][row] for row in seen]


def test_only_new_or_changed_rows_of_a_hub_set_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def save(seeds: list[int]) -> None:
        rows = {"image": [{"bytes": encoded(texture(seed)), "path": None} for seed in seeds], "n": seeds}
        features = datasets.Features({"image": datasets.Image(), "n": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))

    def source() -> HuggingFace:
        return HuggingFace(str(tmp_path / "train.parquet"), resolution=32)

    save([0, 1, 2, 3])
    assert len(read_again(monkeypatch, source, tmp_path / "runs")) == 4
    save([0, 1, 7, 3, 4])
    assert read_again(monkeypatch, source, tmp_path / "runs") == ["train/00000002", "train/00000004"]
    images = index_corpus(source(), tmp_path / "runs").images
    for row, seed in enumerate([0, 1, 7, 3, 4]):
        assert (images[row] == np.asarray(texture(seed))).all()


@pytest.mark.parametrize("content_hash", [False, True])
def test_only_new_or_changed_shards_are_read_again(
    content_hash: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without content hashes, changed shards are read again; with them, only images whose bytes are new."""

    def write(name: str, seeds: list[int]) -> None:
        shard(tmp_path / name, [(f"{seed:02d}.png", encoded(texture(seed % 50))) for seed in seeds])

    def source() -> WebDataset:
        return WebDataset(f"{tmp_path}/a.tar::{tmp_path}/b.tar", content_hash=content_hash, resolution=32, workers=1)

    write("a.tar", [0, 1])
    write("b.tar", [2, 3])
    assert len(read_again(monkeypatch, source, tmp_path / "runs")) == 4
    write("b.tar", [3, 2, 4])
    expected = ["04"] if content_hash else ["03", "02", "04"]
    assert read_again(monkeypatch, source, tmp_path / "runs") == expected
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    assert read_again(monkeypatch, source, tmp_path / "runs") == ([] if content_hash else ["00", "01"])


@pytest.mark.parametrize("content_hash", [False, True])
def test_only_new_or_changed_scenes_are_read_again(
    content_hash: bool, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def source() -> GeoTiff:
        return GeoTiff(str(scenes), content_hash=content_hash, tile=32, resolution=32, workers=1)

    read_again(monkeypatch, source, tmp_path / "runs")
    assert read_again(monkeypatch, source, tmp_path / "runs") == []
    os.utime(scenes / "alps" / "a.tif", ns=(1, 1))
    again = read_again(monkeypatch, source, tmp_path / "runs")
    assert (again == []) == content_hash and all("alps/a.tif" in identifier for identifier in again)


def test_only_new_or_changed_files_of_torchgeo_are_read_again(
    made_ucmerced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corpus.sources.torchgeo import TorchGeo

    def source() -> TorchGeo:
        return TorchGeo("UCMerced", str(made_ucmerced), resolution=256)

    assert len(read_again(monkeypatch, source, tmp_path / "runs")) == 8
    changed = made_ucmerced / "UCMerced_LandUse" / "Images" / "forest" / "forest01.tif"
    texture(77, side=256).save(changed)
    assert read_again(monkeypatch, source, tmp_path / "runs") == ["UCMerced_LandUse/Images/forest/forest01.tif"]


def test_unreadable_files_are_tried_again(growing: Path, tmp_path: Path) -> None:
    (growing / "gone.png").symlink_to(tmp_path / "later.png")
    first = index_corpus(ImageFolder(str(growing), resolution=SIDE), tmp_path / "runs")
    assert not first.readable[first.manifest["id"] == "gone.png"].any()
    texture(7).save(tmp_path / "later.png")
    second = index_corpus(ImageFolder(str(growing), resolution=SIDE), tmp_path / "runs")
    assert second.directory != first.directory and second.readable.all()


def test_progress_of_another_set_of_scans_is_not_reused(growing: Path, tmp_path: Path, monkeypatch) -> None:
    """Progress of another set of scans must not be taken for that of this one."""
    source = ImageFolder(str(growing), resolution=32)
    encoders = [EfficientNetLite0(input_size=32, batch_size=size) for size in (2, 4)]
    monkeypatch.setattr("corpus.index.CHUNK", 4)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        seen = []
        embed = EfficientNetLite0.__call__
        patch.setattr(
            EfficientNetLite0,
            "__call__",
            lambda self, x: stop() if len(seen) == 2 else seen.append(1) or embed(self, x),
        )
        scan_corpus(source, tmp_path / "runs", LocalEntropy(), encoders[0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("corpus.index.write_json", stop)
        scan_corpus(source, tmp_path / "runs", LocalEntropy(), encoders[1])
    corpus = scan_corpus(source, tmp_path / "runs", LocalEntropy(), encoders[0])
    assert corpus.readable.all() and (corpus.images.reshape(9, -1).max(axis=1) > 0).all()


def test_images_of_unchanged_shards_are_reused(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = WebDataset.reader
    monkeypatch.setattr(WebDataset, "reader", lambda self, rows: seen.extend(rows) or real(self, rows))
    urls = str(shards / "part-{0..1}.tar")
    first = index_corpus(WebDataset(urls, resolution=SIDE), tmp_path / "runs")
    seen.clear()
    shard(shards / "part-1.tar", [("new.jpg", encoded(texture(99), "JPEG"))])
    second = index_corpus(WebDataset(urls, resolution=SIDE), tmp_path / "runs")
    assert [second.manifest["id"][row] for row in seen] == ["new"]
    assert (second.images[:6] == first.images[:6]).all()


INTERRUPTED = """
import sys, os
sys.path.insert(0, {repository!r})
from corpus import index
index.CHUNK = 4
write = index.write_json
count = 0
def dying(path, value):
    global count
    write(path, value)
    count += path.name == "progress.json"
    if count == {deaths}:
        os.kill(os.getpid(), 9)
index.write_json = dying
from corpus.sources.folder import ImageFolder
from encoders.efficientnet import EfficientNetLite0
from prune.features import scan_corpus
from prune.entropy import LocalEntropy
encoder = EfficientNetLite0(input_size=32, batch_size=2)
print(scan_corpus(ImageFolder({root!r}, resolution=32), {runs!r}, LocalEntropy(), encoder).directory)
"""


def test_a_killed_index_resumes_from_its_last_chunk(growing: Path, tmp_path: Path, repository: Path) -> None:
    def go(runs: Path, deaths: int) -> subprocess.CompletedProcess:
        code = INTERRUPTED.format(repository=str(repository), root=str(growing), runs=str(runs), deaths=deaths)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    killed = go(tmp_path / "killed", 2)
    assert killed.returncode == -9
    partial = next((tmp_path / "killed" / "corpus").glob("*.partial"))
    assert read_json(partial / "progress.json")["done"] == 4
    resumed, undisturbed = go(tmp_path / "killed", 0), go(tmp_path / "whole", 0)
    assert resumed.returncode == undisturbed.returncode == 0, resumed.stderr + undisturbed.stderr
    one, other = (Path(run.stdout.split()[-1]) for run in (resumed, undisturbed))
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in names:
        if name.name in (LOG, COST):  # they contain times and workers
            continue
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_the_second_of_two_runs_waits_and_reports_it(tmp_path: Path, repository: Path) -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(repository)!r})\n"
        "from pathlib import Path\nfrom runtime.artefacts import stage\n"
        "def build(directory):\n"
        f"    open({str(tmp_path / 'builds')!r}, 'a').write('built\\n'); time.sleep(1.5)\n"
        f"print(stage({str(tmp_path / 'runs')!r}, 'bench', {{'a': 1}}, build))\n"
    )
    runs = []
    for _ in range(2):
        runs.append(
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        time.sleep(0.1)
    results = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert results[0][0] == results[1][0]
    assert (tmp_path / "builds").read_text() == "built\n"
    assert sum("another run is computing" in error for _, error in results) == 1


def test_a_full_disk_gives_a_one_line_error_and_keeps_existing_results(
    growing: Path, tmp_path: Path, repository: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    try:
        kept = stage(small / "runs", "bench", {}, lambda directory: (directory / "a").write_text("whole"))
        for number in range(300):
            texture(number, side=8).save(growing / f"more{number}.png")
        command = [
            sys.executable, str(repository / "prune" / "run.py"), "corpus=folder", f"corpus.root={growing}",
            "prune=random", "corpus.train.split=all", f"runs={small / 'runs'}", "tracker=none",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert result.returncode == 2, result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
        assert len(lines) == 1 and "no space left" in lines[0] and "Traceback" not in result.stderr
        assert (kept / "a").read_text() == "whole"
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


MANY = """
import sys, threading, time
sys.path.insert(0, {repository!r})
from pathlib import Path

peak = 0

def memory():
    \"\"\"Proportional resident bytes of this process and its workers.\"\"\"
    total = 0
    for path in Path("/proc").glob("[0-9]*/smaps_rollup"):
        try:
            parent = int((path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
            own = path.parent.name == str(Path("/proc/self").resolve().name)
            if own or str(parent) == str(Path("/proc/self").resolve().name):
                total += next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration, IndexError):
            pass
    return total / 2**20

def watch():
    global peak
    while True:
        peak = max(peak, memory())
        time.sleep(0.2)

threading.Thread(target=watch, daemon=True).start()
from corpus.sources.webdataset import WebDataset
from encoders.efficientnet import EfficientNetLite0
from prune.features import corpus_entropy, scan_corpus
from prune.entropy import LocalEntropy
source = WebDataset({urls!r}, resolution=16)
corpus = scan_corpus(source, {runs!r}, LocalEntropy(patch=8), EfficientNetLite0(input_size=32, batch_size=256))
entropy = corpus_entropy(corpus, LocalEntropy(patch=8), {runs!r})
print(len(corpus), int(corpus.readable.sum()), float(entropy.mean()) > 0, peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc to read the memory from")
def test_two_hundred_thousand_images_are_scanned_in_less_than_1_5_gb(tmp_path: Path, repository: Path) -> None:
    images = [encoded(texture(seed, side=16), "JPEG") for seed in range(100)]
    for number in range(200):
        shard(
            tmp_path / f"{number:03d}.tar",
            [(f"{number:03d}/{row:04d}.jpg", images[(number + row) % 100]) for row in range(1000)],
        )
    code = MANY.format(repository=str(repository), urls=str(tmp_path / "{000..199}.tar"), runs=str(tmp_path / "runs"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    count, readable, scored, peak = done.stdout.split()
    assert (count, readable, scored) == ("200000", "200000", "True")
    assert float(peak) < 1.5, f"{peak} GB resident"
