"""Special files, unsupported claims, and names that other libraries cannot handle: each gets a reason.

One case for each finding of the fuzz test.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from PIL import Image
from rasterio.transform import Affine

from corpus.captions import LONGEST_SCENE, own_captions, scalars, scene_name
from corpus.decoding import LARGEST_FILE, NOT_A_FILE, TOO_LARGE, VANISHED, read_bytes, survey_files
from corpus.index import Corpus, Source, index_corpus
from corpus.masks import NO_PIXELS, decode_mask, mask_rule
from corpus.raster import Pixels, RasterOptions, Survey, to_rgb
from corpus.sources.folder import ImageFolder
from corpus.sources.geotiff import HOLLOW, TOO_MANY_TILES, GeoTiff
from corpus.sources.webdataset import BROKEN, CUT, WebDataset
from report.figures import LONGEST_LABEL, scene_bars
from report.page import figure_bytes
from runtime.notices import notice
from runtime.quiet import silence_libraries


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def indexed(source: Source, tmp_path: Path) -> Corpus:
    notice.cache_clear()
    return index_corpus(source, tmp_path / "runs")


def reasons(corpus: Corpus) -> dict[str, str]:
    return dict(zip(corpus.manifest["id"], corpus.manifest["reason"], strict=True))


# ---------------------------------------------------------------------------------------------------- special files


def test_pipes_devices_and_too_large_sparse_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would block forever
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")  # reading it would never end
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    assert read_bytes(tmp_path / "pipe.jpg") == read_bytes(tmp_path / "zero.jpg") == NOT_A_FILE
    assert read_bytes(tmp_path / "hole.jpg") == TOO_LARGE
    assert read_bytes("a\0b.jpg") == VANISHED


def test_a_folder_with_pipes_and_too_large_sparse_files_is_indexed(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.png").write_bytes(png())
    os.mkfifo(root / "pipe.jpg")
    for name in ("hole.jpg", "other.jpg"):  # equal in size, so they would be compared as copies
        with open(root / name, "wb") as file:
            file.truncate(LARGEST_FILE + 1)
    corpus = indexed(
        ImageFolder(root=str(root), resolution=8, val_fraction=0, test_fraction=0, split="train"), tmp_path
    )
    assert reasons(corpus) == {"a.png": "", "hole.jpg": TOO_LARGE, "other.jpg": TOO_LARGE, "pipe.jpg": NOT_A_FILE}


@pytest.mark.parametrize("content_hash", [False, True])
def test_a_scene_folder_with_pipes_and_a_circular_link_is_indexed(
    tmp_path: Path, content_hash: bool, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "scenes"
    root.mkdir()
    (root / "a.tif").write_bytes(png())
    os.mkfifo(root / "pipe.tif")
    os.mkfifo(root / "pipe.vrt")
    (root / "loop.tif").symlink_to("loop.tif")
    (root / "self.vrt").write_bytes(b"<VRTDataset")
    (root / "notes.csv").write_text("a,b")
    (root / "a.tfw").write_text("1")
    corpus = indexed(GeoTiff(str(root), resolution=16, content_hash=content_hash), tmp_path)
    result = reasons(corpus)
    assert result["pipe.tif"] == result["pipe.vrt"] == NOT_A_FILE and result["loop.tif"] and result["self.vrt"]
    assert result["a.tif/000000_000000"] == ""
    assert "geotiff: 1 files ignored: .csv 1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ rasters


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300, 0.0])
def test_a_scene_with_an_invalid_transform_keeps_its_tiles(tmp_path: Path, number: float) -> None:
    root = tmp_path / "scenes"
    root.mkdir()
    for name, transform in (("a.tif", Affine(number, 0, 1, 0, number, 2)), ("b.tif", Affine(10, 0, 5e5, 0, -10, 5e6))):
        profile = {"driver": "GTiff", "count": 3, "height": 32, "width": 32, "dtype": "uint8", "crs": "EPSG:32632"}
        with rasterio.open(root / name, "w", transform=transform, **profile) as raster:
            raster.write(np.random.default_rng(0).integers(1, 256, (3, 32, 32), dtype=np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        corpus = indexed(GeoTiff(str(root), resolution=16), tmp_path)
    assert corpus.readable.all() and len(corpus) == 8
    assert np.isfinite(corpus.manifest.loc[corpus.manifest["id"].str.startswith("b"), ["lon", "lat"]]).all(axis=None)


def test_a_small_vrt_that_declares_millions_of_tiles_is_quarantined_as_one_row(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "a.tif").write_bytes(png())
    band = '<VRTRasterBand dataType="Byte" band="1"/>'
    vrt = f'<VRTDataset rasterXSize="{2**31 - 1}" rasterYSize="{2**31 - 1}">{band}</VRTDataset>'
    (tmp_path / "scenes" / "b.vrt").write_text(vrt)
    corpus = indexed(GeoTiff(str(tmp_path / "scenes"), resolution=16), tmp_path)
    assert reasons(corpus) == {"a.tif/000000_000000": "", "b.vrt": TOO_MANY_TILES}


@pytest.mark.parametrize("size", [2_000, 19_000])
def test_a_picture_that_declares_more_pixels_than_its_bytes_is_quarantined(tmp_path: Path, size: int) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "a.tif").write_bytes(png())
    (tmp_path / "scenes" / "b.tif").write_bytes(f"P6 {size} {size} 255\n".encode())
    corpus = indexed(GeoTiff(str(tmp_path / "scenes"), tile=20, resolution=16), tmp_path)
    assert reasons(corpus)["b.tif"] == HOLLOW


def test_values_near_the_float64_limit_are_stretched_without_a_warning() -> None:
    values = np.array([[[-1.7e308], [1.7e308]]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = to_rgb(Pixels(values), RasterOptions(), Survey({"float64 x 1": ((-1.0, 1.0),)}))
    assert image[0, :, 0].tolist() == [0, 255]


def test_a_survey_of_a_damaged_tiff_prints_nothing(capfd: pytest.CaptureFixture) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (40, 40)).astype(bool)).save(
        buffer, "TIFF", compression="group4"
    )
    data = bytearray(buffer.getvalue())
    data[20:120] = np.random.default_rng(1).bytes(100)
    survey_files([bytes(data)], RasterOptions())
    assert capfd.readouterr().err == ""


# -------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_a_mask_without_pixels_gets_a_reason(shape: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, np.uint8))
    assert decode_mask(buffer.getvalue(), mask_rule(["a", "b"]), 8, None) == NO_PIXELS


def test_an_npy_mask_beside_an_image_in_a_shard_is_read(tmp_path: Path) -> None:
    buffer, mask = io.BytesIO(), np.arange(400).reshape(20, 20) % 2
    np.save(buffer, mask)
    write(tmp_path / "a.tar", {"a.png": png(), "a.mask.npy": buffer.getvalue()})
    corpus = indexed(WebDataset(urls=str(tmp_path / "a.tar"), resolution=20, classes=("x", "y")), tmp_path)
    assert corpus.readable.all() and (corpus.masks[0] == mask).all()


# ------------------------------------------------------------------------------------------------------------- shards


def write(path: Path, members: dict[str, bytes], **headers: str) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), headers if name.startswith("bad") else {}
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("headers", [{"GNU.sparse.realsize": "x"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}])
def test_an_unreadable_tar_header_affects_only_its_own_shard(tmp_path: Path, headers: dict[str, str]) -> None:
    write(tmp_path / "a.tar", {"first.png": png(), "bad.png": png(1), "last.png": png(2)}, **headers)
    write(tmp_path / "b.tar", {"bad0.png": png(3)}, **{"GNU.sparse.realsize": "x"})
    write(tmp_path / "c.tar", {"whole.png": png(4)})
    urls = "::".join(str(tmp_path / f"{name}.tar") for name in "abc")
    result = reasons(indexed(WebDataset(urls=urls, resolution=8), tmp_path))
    assert result.pop("whole") == result.pop("first") == ""
    assert set(result.values()) == {CUT, BROKEN}


def test_a_sparse_member_that_declares_8_gib_does_not_affect_other_shards(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"a.png": png(), "b.png": png(1)})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[124:136] = b"%011o\0" % (2**33 - 1)
    data[156:157] = b"S"  # the size is taken from the sparse map, which is missing
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    write(tmp_path / "c.tar", {"whole.png": png(4)})
    urls = f"{tmp_path / 'a.tar'}::{tmp_path / 'c.tar'}"
    corpus = indexed(WebDataset(urls=urls, resolution=8), tmp_path)
    assert corpus.manifest.loc[corpus.readable, "id"].tolist() == ["whole"]


def test_pipes_and_links_in_a_shard_are_counted_as_ignored(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "a.tar", {"a.png": png()})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, kind in (("pipe.png", tarfile.FIFOTYPE), ("link", tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            tar.addfile(member)
    indexed(WebDataset(urls=str(tmp_path / "a.tar"), resolution=8), tmp_path)
    assert "webdataset: 2 members ignored: none 1, .png 1" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- texts


def test_deeply_nested_captions_are_ignored() -> None:
    deep: object = "a lake"
    for _ in range(900):
        deep = [deep]
    assert own_captions({"captions": deep}) == []
    assert own_captions({"captions": [["a lake"]]}) == ["a lake"]


def test_a_caption_in_brackets_is_kept_as_text() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own_captions({"caption": "[1is a lake]"}) == ["[1is a lake]"]


def test_a_long_text_is_not_a_scene_name() -> None:
    assert scene_name("x" * LONGEST_SCENE) and scene_name("x" * (LONGEST_SCENE + 1)) == ""


def test_metadata_keys_become_valid_column_names(tmp_path: Path) -> None:
    metadata = scalars({"\ud800": 1, "a\0b": 2, "": 3, "lon": 4.5})
    pd.DataFrame([metadata]).to_parquet(tmp_path / "a.parquet")
    assert list(metadata.values()) == [1, 2, 3, 4.5] and not any("\0" in key for key in metadata)
    assert json.dumps(metadata)


@pytest.mark.parametrize("name", [r"$\frac$", "$", "_hidden", "x" * 5000, "a\nb\tc", "漢字"])
def test_scene_names_with_special_characters_can_be_plotted(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silence_libraries()
        figure = scene_bars({name: 3, "other": 2}, {name: 1, "other": 1})
        assert figure_bytes(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert all(len(label) <= LONGEST_LABEL + 4 and "\n" not in label for label in labels)


def test_warnings_about_missing_glyphs_are_silenced() -> None:
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(Exception):
        silence_libraries()
        warnings.warn("Glyph 28450 (\\N{CJK}) missing from font(s) DejaVu Sans.", UserWarning, stacklevel=1)
    assert not caught


def test_a_shard_of_zeros_is_reported_as_empty(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "a.tar", {"a.png": png()})
    (tmp_path / "b.tar").write_bytes(bytes(10_240))
    indexed(WebDataset(urls=f"{tmp_path / 'a.tar'}::{tmp_path / 'b.tar'}", resolution=8), tmp_path)
    assert f"webdataset: 1 of 2 shards are empty, e.g. {tmp_path / 'b.tar'}" in capsys.readouterr().err
