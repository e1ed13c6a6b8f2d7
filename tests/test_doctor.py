"""The doctor's report on a corpus; it reads nothing twice and changes nothing."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hydra import compose, initialize_config_dir
from PIL import Image
from rasterio.transform import from_origin

import corpus.decoding
from corpus.inspection import describe, thumbnails
from runtime.application import CONFIGS
from runtime.errors import UserError
from runtime.notices import notice
from scripts import doctor

RANDOM = np.random.default_rng(8)


def colours(side: int = 32, bands: int = 3, high: int = 256, kind: str = "uint8") -> np.ndarray:
    return RANDOM.integers(0, high, (bands, side, side)).astype(kind)


def geotiff(path: Path, values: np.ndarray, x: float = 500_000, names: tuple[str, ...] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype.name}
    place = {"crs": "EPSG:32633", "transform": from_origin(x, 5_000_000, 10, 10)}
    with rasterio.open(path, "w", driver="GTiff", **shape, **place) as raster:
        raster.write(values)
        for number, name in enumerate(names, start=1):
            raster.set_band_description(number, name)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours().transpose(1, 2, 0)).save(path)


@pytest.fixture
def diagnose(tmp_path: Path, monkeypatch, capsys):
    """The lines that the doctor prints, by topic."""

    def run(*overrides: str) -> dict[str, list[str]]:
        notice.cache_clear()
        monkeypatch.chdir(tmp_path)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("config", [*overrides, f"runs={tmp_path / 'runs'}", "tracker=none"])
        doctor.main(cfg)
        result: dict[str, list[str]] = {}
        for line in capsys.readouterr().out.splitlines():
            result.setdefault(line[:11].strip(), []).append(line[11:])
        return result

    return run


def test_masks_captions_and_broken_files_of_a_folder_are_reported(tmp_path: Path, diagnose, capsys) -> None:
    root = tmp_path / "data"
    for number in range(30):
        picture(root / "images" / "Beach" / f"{number:02d}.jpg")
        mask = np.full((32, 32), number % 2, np.uint8)
        mask[:8] = 255
        (root / "masks" / "Beach").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / "Beach" / f"{number:02d}.png")
    (root / "images" / "Beach" / "00.jpg").write_bytes(b"<html>404</html>")
    (root / "masks" / "Beach" / "01.png").unlink()
    rows = [{"file_name": f"Beach/{number:02d}.jpg", "text": f"sand {number}"} for number in range(12)]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    message = diagnose(
        "corpus=folder", f"corpus.root={root}", "corpus.masks=masks", "corpus.classes=[water,sand]",
        "corpus.mask_ignore=255",
    )  # fmt: skip
    assert message["corpus"] == ["folder: 30 images"] and message["files"] == [".jpg 30"]
    assert message["scenes"] == ["1 on 30 images: Beach 30"]
    assert message["captions"] == ["12 of 30 images have their own caption, e.g. 'sand 0'"]
    assert message["formats"] == ["29 x JPEG RGB", "1 x no image that can be opened"]
    assert message["masks"] == ["28 of 29 images have a valid mask: water 38%, sand 38%, ignored 25%"]
    assert message["quarantine"] == ["2 of the 30 images in the sample: mask: missing 1, not an image 1"]
    counts = [int(part.split()[1]) for part in message["splits"][0].split(", ")]
    assert sum(counts) == 30 and "no exact copies" in message["overlap"][0]
    assert {path: path.stat().st_mtime_ns for path in before if path != tmp_path} == {
        path: time for path, time in before.items() if path != tmp_path
    }
    new = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path not in before}
    assert new == {"doctor.png"} and message["picture"] == ["doctor.png"]
    with Image.open(tmp_path / "doctor.png") as sheet:
        assert sheet.size == (4 * 164 - 4, 2 * 164 - 4)


def test_no_image_is_read_twice(tmp_path: Path, diagnose, monkeypatch) -> None:
    for number in range(20):
        geotiff(tmp_path / "data" / f"{number:02d}.tif", colours(high=3000, kind="uint16"), x=500_000 + 9_000 * number)
    opened, read = Counter(), corpus.decoding._read_bytes

    def counting(path: Path | str) -> bytes | str:
        opened[str(path)] += 1
        return read(path)

    monkeypatch.setattr(corpus.decoding, "_read_bytes", counting)
    diagnose("corpus=folder", f"corpus.root={tmp_path / 'data'}")
    assert len(opened) == 20 and set(opened.values()) == {1}
    assert corpus.decoding._remembered is None


def test_deep_bands_their_stretch_and_a_fourth_band_are_reported(tmp_path: Path, diagnose) -> None:
    root = tmp_path / "data"
    for number in range(10):
        geotiff(
            root / f"{number}.tif", colours(high=3000, kind="uint16"), 500_000 + 50_000 * number, ("B02", "B03", "B04")
        )
        geotiff(root / f"naip{number}.tif", colours(bands=4), x=500_000 + 50_000 * number)
    message = diagnose("corpus=folder", f"corpus.root={root}")
    assert message["formats"] == [
        "10 x GTiff uint16, 3 bands (B02, B03, B04; shown: 3, 2, 1), georeferenced",
        "10 x GTiff uint8, 4 bands (red, green, blue, alpha; shown: 1, 2, 3), georeferenced",
    ]
    assert message["values"][0].startswith("uint16 x 3: ") and message["alpha"] == ["uint8 x 3: not alpha: left out"]
    ends = message["stretch"][0].removeprefix("uint16 x 3: ").removesuffix(" becomes 0 to 255").split(", ")
    for end in ends:
        low, high = map(float, end.split(" to "))
        assert 0 < low < 120 and 2880 < high < 3000
    assert message["overlap"] == ["no ground cell in two splits"]


def test_scenes_and_their_coverage_by_tiles_are_reported(tmp_path: Path, diagnose) -> None:
    geotiff(tmp_path / "data" / "s.tif", colours(side=150))
    message = diagnose("corpus=geotiff", f"corpus.root={tmp_path / 'data'}", "corpus.tile=64", "corpus.train.split=all")
    assert message["corpus"] == ["geotiff: 4 images"] and message["files"] == [".tif 1"]
    assert message["formats"] == [
        "1 x GTiff uint8, 3 bands (red, green, blue; shown: 1, 2, 3), georeferenced, 150 x 150 px"
    ]
    assert message["captions"] == ["0 of 4 images have their own caption"], "tiles without captions have none"
    assert message["covered"] == [
        "tiles cover less than 95% of 1 of 1 scenes, and 73% of s.tif; corpus.edge=shift covers scenes completely"
    ]


def test_the_report_names_the_chosen_bands(tmp_path: Path, diagnose) -> None:
    geotiff(tmp_path / "data" / "s.tif", colours(bands=4, side=150))
    chosen = ("corpus=geotiff", f"corpus.root={tmp_path / 'data'}", "corpus.tile=64", "corpus.train.split=all")
    [line] = diagnose(*chosen, "corpus.bands=[4,1,2]")["formats"]
    assert "shown: 4, 1, 2" in line
    folder = ("corpus=folder", f"corpus.root={tmp_path / 'data'}", "corpus.train.split=all")
    assert "shown: 4, 1, 2" in diagnose(*folder, "corpus.bands=[4,1,2]")["formats"][0]


def test_shards_are_reported(tmp_path: Path, diagnose) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(8):
            buffer = io.BytesIO()
            Image.fromarray(colours().transpose(1, 2, 0)).save(buffer, "PNG")
            for suffix, data in (("png", buffer.getvalue()), ("txt", b"a field")):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    message = diagnose("corpus=webdataset", f"corpus.urls={tmp_path / 'a.tar'}")
    assert message["files"] == [".tar 1"] and message["formats"] == ["8 x PNG RGB"]
    assert message["captions"] == ["8 of 8 images have their own caption, e.g. 'a field'"]


def test_unreadable_corpora_and_invalid_options_are_refused(tmp_path: Path, diagnose) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UserError, match="none of the 1 images in the sample can be read"):
        diagnose("corpus=folder", f"corpus.root={tmp_path / 'bad'}")
    picture(tmp_path / "good" / "a.png")
    with pytest.raises(UserError, match=r"doctor\.picture=.*cannot be written"):
        diagnose("corpus=folder", f"corpus.root={tmp_path / 'good'}", "doctor.picture=nowhere/a.png")
    with pytest.raises(UserError, match=r"doctor\.images"):
        diagnose("corpus=folder", f"corpus.root={tmp_path / 'good'}", "doctor.images=0")


def test_thumbnails_show_the_images_in_order() -> None:
    images = [np.full((8, 8, 3), 10 * number, np.uint8) for number in range(20)]
    sheet = np.asarray(thumbnails(images))
    shown = [sheet[80 + 164 * row, 80 + 164 * column, 0] for row in range(2) for column in range(4)]
    assert shown[0] == 0 and shown[-1] == 190 and shown == sorted(shown) and len(set(shown)) == 8
    assert thumbnails(images[:1]).size == (160, 160)


def test_files_that_are_no_rasters_are_described() -> None:
    buffer = io.BytesIO()
    Image.new("P", (4, 4)).save(buffer, "GIF")
    assert describe(buffer.getvalue()) == "GIF P" and describe(b"nothing") == "no image that can be opened"
