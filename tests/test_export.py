"""The subset is exported in every format, and read back with its pixels, labels, captions, masks and metadata."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
from omegaconf import OmegaConf
from PIL import Image
from test_sources import encoded, shard, texture

from corpus.index import Source, index_corpus
from corpus.sources.bluemarble import BlueMarble
from corpus.sources.folder import ImageFolder
from corpus.sources.geotiff import GeoTiff
from corpus.sources.huggingface import HuggingFace
from corpus.sources.webdataset import WebDataset
from report.data_card import DATA_CARD
from runtime.artefacts import stage
from runtime.errors import UserError
from scripts.export import FORMS, content_suffix, main, open_subset, safe_names

ROOT = Path(__file__).resolve().parent.parent
KEPT = [0, 2, 3, 7, 8]


def select(source: Source, runs: Path, kept: list[int] = KEPT) -> Path:
    """A selection stage that keeps these rows, in the format of prune/run.py."""
    corpus = index_corpus(source, runs)

    def build(directory: Path) -> None:
        rows = np.arange(len(corpus))
        weight = np.where(np.isin(rows, kept), rows + 1, 0).astype(np.float32)
        table = pd.DataFrame({"id": corpus.manifest["id"], "kept": np.isin(rows, kept), "weight": weight})
        table.to_parquet(directory / "selection.parquet", index=False)

    return stage(runs, "selection", {"corpus": corpus.fingerprint, "kept": kept}, build)


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Ten images of two scenes with captions, locations and masks; with some difficult names."""
    root = tmp_path / "corpus"
    names = ["a", "A", "a b\nc", "é", "x.y", "sub/a", "0", "1", "2", "3"]
    rows = []
    for number, name in enumerate(names):
        scene = ("Beach", "Forest")[number % 2]
        for kind in ("images", "masks"):
            (root / kind / scene / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / scene / f"{name}.png")
        Image.fromarray(np.full((16, 16), number % 2, np.uint8)).save(root / "masks" / scene / f"{name}.png")
        captions = [f"number {number}", f"the {number}th"] if number % 3 else f"number {number}"
        rows.append({"file_name": f"{scene}/{name}.png", "captions": captions, "lon": number * 1.5, "split": "train"})
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ImageFolder(str(root), masks="masks", classes=("sand", "leaf"), resolution=16)


def export(selection: Path, form: str, out: Path, *options: str, fails: bool = False) -> str:
    command = [
        sys.executable, str(ROOT / "scripts" / "export.py"), f"selection={selection}", f"to={form}",
        f"export.out={out}", "tracker=none", *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out.parent, timeout=300)
    assert (done.returncode == 2) if fails else (done.returncode == 0), done.stderr[-2000:]
    assert not list(out.parent.glob("*.partial")) and not list(out.parent.glob("*.scratch"))
    return done.stderr if fails else done.stdout


def test_every_form_contains_the_complete_subset(folder: ImageFolder, tmp_path: Path) -> None:
    selection = select(folder, tmp_path / "runs")
    subset = open_subset(selection)
    images, masks = subset.corpus.images[KEPT], subset.corpus.masks[KEPT]
    table = subset.corpus.manifest.iloc[KEPT]
    for form in FORMS:
        assert export(selection, form, tmp_path / form).strip() == f"export: {tmp_path / form}"

    def same(corpus, by: str) -> None:
        """The exported corpus has the same images, masks, scenes and captions, whatever their order."""
        order = corpus.manifest[by].argsort() if by else np.arange(len(corpus))
        expected = table["caption"].argsort() if by else np.arange(len(table))
        assert (corpus.images[order] == images[expected]).all()
        if corpus.masks is not None:
            assert (corpus.masks[order] == masks[expected]).all()
        for column in ("scene", "caption", *(() if by else ("id",))):
            assert corpus.manifest[column].to_numpy()[order].tolist() == table[column].to_numpy()[expected].tolist()
        several = [None if value is None else list(value) for value in corpus.manifest["captions"].to_numpy()[order]]
        assert several == [None if value is None else list(value) for value in table["captions"].to_numpy()[expected]]
        assert several[1] is None or len(several[1]) == 2
        for column in ("lon", "weight"):
            result = corpus.manifest[column].to_numpy()[order].tolist()
            assert result == table[column].to_numpy()[expected].tolist()

    for form in ("folder", "symlinks"):
        back = ImageFolder(str(tmp_path / form), masks="masks", classes=("sand", "leaf"), resolution=16)
        same(index_corpus(back, tmp_path / "back"), "caption")
    assert all(path.is_symlink() for path in (tmp_path / "symlinks" / "images").rglob("*.png"))

    shards = WebDataset(str(tmp_path / "webdataset" / "subset-000000.tar"), classes=("sand", "leaf"), resolution=16)
    same(index_corpus(shards, tmp_path / "back"), "")

    import datasets

    loaded = datasets.load_from_disk(str(tmp_path / "huggingface"))
    assert loaded["caption"][:] == table["caption"].tolist() and loaded["id"][:] == table["id"].tolist()
    assert (np.asarray(loaded[1]["image"]) == images[1]).all() and (np.asarray(loaded[1]["mask"]) == masks[1]).all()
    same(index_corpus(HuggingFace(str(tmp_path / "huggingface"), resolution=16), tmp_path / "back"), "")

    lines = (tmp_path / "list" / "kept.txt").read_text(encoding="utf-8").splitlines()
    assert [line.replace("\\n", "\n") for line in lines] == table["id"].tolist()
    rows = [json.loads(line) for line in (tmp_path / "list" / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["caption"] for row in rows] == table["caption"].tolist()
    assert [row["weight"] for row in rows] == [row + 1 for row in KEPT]


def test_an_existing_weight_column_is_exported_under_another_name(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A user's own column, or that of an export that is pruned again."""
    root = tmp_path / "images"
    root.mkdir()
    rows = [{"file_name": f"{row}.png", "weight": 0.5 + row} for row in range(10)]
    for row in range(10):
        texture(row).save(root / f"{row}.png")
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    subset = open_subset(select(ImageFolder(str(root), resolution=16, split="all"), tmp_path / "runs"))
    kept = subset.corpus.manifest.iloc[KEPT]
    assert kept["weight_in_corpus"].tolist() == [0.5 + row for row in KEPT]
    assert kept["weight"].tolist() == [row + 1 for row in KEPT]
    assert capsys.readouterr().err.count("column weight: it is exported as weight_in_corpus") == 1


@dataclass(frozen=True)
class Case:
    """A source of ten images; original bytes and suffixes of images (None: the source keeps no files) and of masks."""

    source: Source
    files: list[tuple[bytes, str]] | None
    masks: list[bytes] | None = None


#: Each in another format, so that re-encoded bytes would be detected.
FILES = [
    (encoded(texture(row, side=20 + row), kind, **options), suffix)
    for row, (kind, suffix, options) in enumerate(
        [
            ("JPEG", ".jpg", {"quality": 90}), ("PNG", ".png", {}), ("WEBP", ".webp", {"quality": 80}),
            ("TIFF", ".tif", {"compression": "tiff_lzw"}), ("GIF", ".gif", {}),
        ]
        * 2
    )
]  # fmt: skip
SCENES = ("Beach", "DenseForest")


def case_of(kind: str, folder: Path) -> Case:
    """Ten images as shards with masks, as a Parquet file (read whole, or as a stream), or as a scene's tiles."""
    folder.mkdir()
    if kind == "webdataset":
        masks, members = [], []
        for row, (data, suffix) in enumerate(FILES):
            metadata = {"scene": SCENES[row % 2], "lon": row * 1.5, "captions": [f"number {row}", f"the {row}th"]}
            masks.append(encoded(Image.fromarray(np.full((16, 16), row % 2, np.uint8)), compress_level=row))
            key = f"{'ab'[row % 2]}/s{row:03d}"
            members += [
                (key + suffix, data), (f"{key}.json", json.dumps(metadata).encode()), (f"{key}.mask.png", masks[-1]),
            ]  # fmt: skip
        shard(folder / "0.tar", members[:12])
        shard(folder / "1.tar", members[12:])
        return Case(WebDataset(str(folder / "{0..1}.tar"), classes=("a", "b"), resolution=16), FILES, masks)
    if kind == "geotiff":
        values = np.random.default_rng(0).integers(1, 256, (3, 32, 80), dtype=np.uint8)
        with rasterio.open(
            folder / "a.tif", "w", driver="GTiff", count=3, height=32, width=80, dtype="uint8",
            crs="EPSG:32632", transform=rasterio.transform.from_origin(500_000, 5_300_000, 10, 10),
        ) as raster:  # fmt: skip
            raster.write(values)
        return Case(GeoTiff(str(folder), resolution=16, stretch="none"), None)
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(SCENES)),
            "caption": datasets.Value("string"),
            "lon": datasets.Value("float64"),
        }
    )
    rows = {
        "image": [{"bytes": data, "path": None} for data, _ in FILES],
        "label": [row % 2 for row in range(10)],
        "caption": [f"number {row}" for row in range(10)],
        "lon": [row * 1.5 for row in range(10)],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "rows.parquet"))
    return Case(HuggingFace(str(folder / "rows.parquet"), streaming=kind == "stream", resolution=16), FILES)


def read_folder(out: Path) -> tuple[list[dict[str, Any]], list[tuple[bytes, str]], list[bytes]]:
    """Rows, images and masks of an export to a folder, in its own order."""
    rows = [json.loads(line) for line in (out / "images" / "metadata.jsonl").read_text("utf-8").splitlines()]
    paths = [out / "images" / row["file_name"] for row in rows]
    masks = [out / "masks" / Path(row["file_name"]).with_suffix(".png") for row in rows]
    files = {path for path in (out / "images").rglob("*") if path.is_file()}
    assert files == {*paths, out / "images" / "metadata.jsonl"}, "nothing lies beside"
    return rows, [(path.read_bytes(), path.suffix) for path in paths], [m.read_bytes() for m in masks if m.exists()]


def read_shards(out: Path) -> tuple[list[dict[str, Any]], list[tuple[bytes, str]], list[bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                name, _, suffix = member.name.partition(".")
                samples.setdefault(name, {})[f".{suffix}"] = tar.extractfile(member).read()
    rows = [json.loads(sample.pop(".json")) for sample in samples.values()]
    assert [sample.pop(".txt").decode() for sample in samples.values()] == [row["caption"] for row in rows]
    masks = [sample.pop(".mask.png") for sample in samples.values() if ".mask.png" in sample]
    return rows, [(data, suffix) for sample in samples.values() for suffix, data in sample.items()], masks


def read_saved(out: Path) -> tuple[list[dict[str, Any]], list[tuple[bytes, str]], list[bytes]]:
    import datasets

    loaded = datasets.load_from_disk(str(out))
    for name in {"image", "mask"} & set(loaded.column_names):
        loaded = loaded.cast_column(name, datasets.Image(decode=False))
    rows = list(loaded)
    images = [row.pop("image") for row in rows]
    masks = [row.pop("mask") for row in rows if "mask" in row]
    return rows, [(image["bytes"], Path(image["path"]).suffix) for image in images], [mask["bytes"] for mask in masks]


@pytest.mark.parametrize("kind", ["webdataset", "huggingface", "stream", "geotiff"])
def test_every_form_contains_the_original_bytes_and_metadata_of_a_source(kind: str, tmp_path: Path) -> None:
    """The original bytes, or the pixels if a source keeps no files, with scenes, captions and locations."""
    case = case_of(kind, tmp_path / "source")
    selection = select(case.source, tmp_path / "runs")
    corpus = open_subset(selection).corpus
    assert len(corpus) == 10 and corpus.readable.all()
    kept = corpus.manifest.iloc[KEPT]
    expected = kept.drop(columns=["readable", "reason", "stamp"], errors="ignore")

    def go(form: str) -> Path:
        out = tmp_path / form
        export_options = {"out": str(out), "shard_size": 2}
        main(OmegaConf.create({"selection": str(selection), "to": form, "export": export_options}))
        return out

    for form, read in (("folder", read_folder), ("webdataset", read_shards), ("huggingface", read_saved)):
        rows, images, masks = read(go(form))
        for column in expected:
            result = [row[column] for row in rows]
            assert result == [list(v) if isinstance(v, np.ndarray) else v for v in expected[column]], (form, column)
        if case.files is None:
            assert {suffix for _, suffix in images} == {".png"}
            decoded = [np.asarray(Image.open(io.BytesIO(data))) for data, _ in images]
            assert (np.stack(decoded) == corpus.images[KEPT]).all(), form
        else:
            assert images == [case.files[row] for row in KEPT], form
        assert masks == ([case.masks[row] for row in KEPT] if case.masks else []), form
    lines = (go("list") / "kept.txt").read_text(encoding="utf-8").splitlines()
    assert lines == kept["id"].tolist()
    with pytest.raises(UserError, match="corpus=folder"):
        go("symlinks")
    assert not (tmp_path / "symlinks").exists()

    if kind == "geotiff":  # the metadata above are the manifest's, here they are the scene's
        assert kept["id"].tolist() == [f"a.tif/{16 * (row // 5):06d}_{16 * (row % 5):06d}" for row in KEPT]
        assert set(kept["crs"]) == {"EPSG:32632"} and kept["lat"].notna().all()
    else:
        assert kept["scene"].tolist() == [SCENES[row % 2] for row in KEPT]
        assert kept["caption"].tolist() == [f"number {row}" for row in KEPT]
        assert kept["lon"].tolist() == [row * 1.5 for row in KEPT]


@pytest.mark.parametrize("kind", ["webdataset", "huggingface", "stream", "geotiff"])
def test_files_changed_since_pruning_are_refused_unless_stored_pixels_are_exported(kind: str, tmp_path: Path) -> None:
    case = case_of(kind, tmp_path / "source")
    selection = select(case.source, tmp_path / "runs")
    file = sorted((tmp_path / "source").iterdir())[0]
    if file.suffix == ".parquet":
        pd.read_parquet(file).iloc[::-1].to_parquet(file)
    else:
        file.write_bytes(file.read_bytes() + bytes(10_240))  # padding of a shard
    if kind == "geotiff":  # its images are the corpus's, which have not changed
        assert open_subset(selection).source is None
        return
    with pytest.raises(UserError, match="changed since they were pruned") as caught:
        open_subset(selection)
    assert "\n" not in str(caught.value)


def test_shards_are_deterministic_and_of_equal_size(folder: ImageFolder, tmp_path: Path) -> None:
    selection = select(folder, tmp_path / "runs")
    for name in ("one", "two"):
        export(selection, "webdataset", tmp_path / name, "export.shard_size=2")
    files = sorted((tmp_path / "one").iterdir())
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in sorted((tmp_path / "two").iterdir())]
    sizes = []
    assert files.pop(0).name == DATA_CARD
    for path in files:
        with tarfile.open(path) as tar:
            names = tar.getnames()
        assert not any(name.startswith("/") or ".." in name for name in names)
        sizes.append(len({name.split(".")[0] for name in names}))
    assert len(files) == 3 and sum(sizes) == 5 and max(sizes) - min(sizes) <= 1


def test_bluemarble_is_exported_with_its_locations(tmp_path: Path) -> None:
    selection = select(BlueMarble(limit=9), tmp_path / "runs")
    export(selection, "folder", tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "images" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all({"lon", "lat", "scene", "caption"} <= set(row) for row in rows)
    subset = open_subset(selection)
    for row, image in zip(rows, subset.corpus.images[KEPT], strict=True):
        assert (np.asarray(Image.open(tmp_path / "out" / "images" / row["file_name"])) == image).all()
    assert "corpus=folder" in export(selection, "symlinks", tmp_path / "links", fails=True)


def written(selection: Path, form: str, out: Path, **options: Any) -> Path:
    """Like `export`, in this process."""
    export_options = {"out": str(out), "shard_size": 100, "reencode": None, **options}
    main(OmegaConf.create({"selection": str(selection), "to": form, "export": export_options}))
    return out


def picture(seed: int = 0, side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def as_open_clip_sees(shard: Path) -> list[dict[str, Any]]:
    """The samples that open_clip trains on: webdataset's reader, then the rule of open_clip's filter."""
    webdataset = pytest.importorskip("webdataset", reason="webdataset, whose reader is used, is not installed")

    def keeps(sample: dict[str, Any]) -> bool:  # filter_no_caption_or_no_image of open_clip 3.3.0
        return "txt" in sample and any(suffix in sample for suffix in ("png", "jpg", "jpeg", "webp"))

    return [
        sample for sample in webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False) if keeps(sample)
    ]


def test_open_clip_sees_every_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "corpus"
    root.mkdir()
    kinds = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.JPG": "JPEG", "d.jpeg": "JPEG", "e.png": "PNG", "f.webp": "WEBP"}
    kinds |= {"g.png": "JPEG"}  # a wrong suffix
    for number, (name, kind) in enumerate(kinds.items()):
        picture(number).save(root / name, kind)
    rows = [{"file_name": "a.jfif", "captions": ["a wood", "trees"]}, {"file_name": "b.jpe", "text": "a lake"}]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = written(
        select(ImageFolder(str(root), resolution=24), tmp_path / "runs", list(range(7))), "webdataset", tmp_path / "out"
    )
    seen = as_open_clip_sees(out / "subset-000000.tar")
    assert [sample["txt"].decode() for sample in seen] == ["a wood", "a lake", "", "", "", "", ""]
    assert json.loads(seen[0]["json"])["captions"] == ["a wood", "trees"]
    assert [next(key for key in sample if key in ("jpg", "jpeg", "png", "webp")) for sample in seen] == [
        "jpg", "jpg", "jpg", "jpeg", "png", "webp", "jpg",
    ]  # fmt: skip
    assert "will not be seen" not in capsys.readouterr().err
    back = index_corpus(WebDataset(str(out / "subset-000000.tar"), resolution=24), tmp_path / "back")
    assert back.readable.all() and back.manifest["caption"].tolist() == ["a wood", "a lake", "", "", "", "", ""]
    assert back.manifest["id"].tolist() == list(kinds)


def test_formats_ignored_by_shard_readers_are_counted_or_reencoded_as_png(tmp_path: Path, capsys) -> None:
    root = tmp_path / "corpus"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number, name in enumerate(("a.tif", "b.bmp", "c.png", "d.gif")):
        Image.fromarray(np.asarray(picture(number, 32))[:, :24]).save(root / "images" / name)
        classes = np.random.default_rng(number).integers(0, 2, (32, 24), dtype=np.uint8)
        Image.fromarray(classes).save(root / "masks" / f"{name[0]}.png")
    source = ImageFolder(str(root), resolution=8, masks="masks", classes=("land", "sea"))
    selection = select(source, tmp_path / "runs", [0, 1, 2, 3])
    out = written(selection, "webdataset", tmp_path / "as-they-are")
    assert len(as_open_clip_sees(out / "subset-000000.tar")) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if "will not be seen" in line]
    assert line.startswith("3 of 4 images (.bmp 1, .gif 1, .tif 1)") and "export.reencode=png" in line

    out = written(selection, "webdataset", tmp_path / "png", reencode="png")
    seen = as_open_clip_sees(out / "subset-000000.tar")
    assert len(seen) == 4 and "will not be seen" not in capsys.readouterr().err
    for number, sample in enumerate(seen[:2]):  # the central square at its own size, not the corpus's 8 px
        result, mask = (np.asarray(Image.open(io.BytesIO(sample[key]))) for key in ("png", "mask.png"))
        assert (result == np.asarray(picture(number, 32))[4:28, :24]).all()
        assert (mask == np.random.default_rng(number).integers(0, 2, (32, 24), dtype=np.uint8)[4:28]).all()
    with pytest.raises(UserError, match="to=folder"):
        written(selection, "symlinks", tmp_path / "links", reencode="png")
    with pytest.raises(UserError, match=r"export\.reencode=tga is unknown"):
        written(selection, "folder", tmp_path / "tga", reencode="tga")


SPLIT_NAMES = ["train_01.png", "test-3.png", "val.png", "eval/1.png", "site_test_2/dev.png", "plain.png", "Test/x.png"]


@pytest.mark.parametrize("masks", [False, True])
def test_imagefolder_gives_every_row_in_one_split(masks: bool, tmp_path: Path) -> None:
    import datasets

    root, rows = tmp_path / "corpus", []
    for number, name in enumerate(SPLIT_NAMES):
        for kind in ("images", "masks"):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(root / "images" / name)
        Image.fromarray(np.full((24, 24), number % 2, np.uint8)).save(root / "masks" / name)
        rows.append({"file_name": name, "text": f"caption of {name}"})
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"masks": "masks", "classes": ("land", "sea")} if masks else {}
    selection = select(ImageFolder(str(root), resolution=24, **options), tmp_path / "runs", list(range(7)))
    out = written(selection, "folder", tmp_path / "train" / "out")
    for place in (out / "images", out):
        result = datasets.load_dataset("imagefolder", data_dir=str(place), cache_dir=str(tmp_path / "cache"))
        assert list(result) == ["train"]
        assert sorted(result["train"]["caption"]) == sorted(f"caption of {name}" for name in SPLIT_NAMES)
        assert sorted(result["train"]["id"]) == sorted(f"images/{name}" for name in SPLIT_NAMES)
        by_caption = {row["caption"]: np.asarray(row["image"]) for row in result["train"]}
        for number, name in enumerate(SPLIT_NAMES):
            assert (by_caption[f"caption of {name}"] == np.asarray(picture(number))).all()


@pytest.mark.parametrize("form", FORMS)
def test_an_export_of_an_empty_subset_is_refused_and_writes_no_files(form: str, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    root.mkdir()
    picture().save(root / "a.png")
    (root / "b.png").write_bytes(b"no image")
    selection = select(ImageFolder(str(root), resolution=24), tmp_path / "runs", [])
    with pytest.raises(UserError, match=r"keeps none of its 2 images \(1 unreadable\)") as caught:
        written(selection, form, tmp_path / "out" / "here")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_suffixes_follow_the_content() -> None:
    assert content_suffix(encoded(picture(), "JPEG"), ".jfif") == ".jpg"
    assert content_suffix(encoded(picture(), "JPEG"), ".jpeg") == ".jpeg"
    assert content_suffix(encoded(picture(), "PNG"), ".jpg") == ".png"
    for kind, suffix in (("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp"), ("TIFF", ".tif"), ("PPM", ".ppm")):
        assert content_suffix(encoded(picture(), kind), "") == suffix
    assert content_suffix(encoded(picture(), "TIFF"), ".tiff") == ".tiff"
    assert content_suffix(b"nothing known", ".tga") == ".tga" and content_suffix(b"nothing known", "") == ".img"


def test_invalid_exports_are_refused_in_one_line(folder: ImageFolder, tmp_path: Path) -> None:
    selection = select(folder, tmp_path / "runs")
    full = tmp_path / "full"
    full.mkdir()
    (full / "theirs.txt").write_text("keep")
    cases = [
        (selection, "tape", tmp_path / "a", "to=tape is unknown"),
        (tmp_path / "none", "folder", tmp_path / "a", "is not a selection"),
        (selection, "folder", full, "is not empty"),
    ]
    changed = (selection, "folder", tmp_path / "a", "changed since they were pruned")
    for chosen, form, out, message in (*cases, changed):
        if message == changed[-1]:
            os.utime(Path(folder.root) / "images" / "Beach" / "a b\nc.png", ns=(1, 1))
        error = export(chosen, form, out, fails=True)
        assert message in error and len(error.strip().splitlines()) == 1, error
    assert (full / "theirs.txt").read_text() == "keep" and not (tmp_path / "a").exists()


def test_exported_names_are_safe_and_unique_regardless_of_case() -> None:
    identifiers = [
        "a/b.png",
        "a_b.png",
        "A/B.jpg",
        "../../etc/passwd",
        "/abs.png",
        "é\n.png",
        "",
        "x" * 300,
        "a-1",
        "a",
        "A",
    ]
    names = list(safe_names(pd.Series(identifiers)))
    assert len({name.lower() for name in names}) == len(names)
    assert all(name and name.isascii() and "/" not in name and "." not in name and len(name) < 120 for name in names)
