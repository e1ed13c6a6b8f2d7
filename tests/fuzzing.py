"""Run corpora of mutated files through index, prune and export, in one process with bounded memory.

`python tests/fuzzing.py FOLDER SEED SOURCE COUNT …` writes one JSON line for every corpus. For each kind of corpus the
test keeps an account of its input: every file, member and row must become a row of the manifest, be counted on stderr,
or belong to an image. The account uses only the names and is independent of the code of the sources.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import re
import resource
import shutil
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from mutations import (
    File,
    any_image,
    broken,
    metadata_bytes,
    metadata_of,
    odd_mask,
    odd_picture,
    odd_stem,
    odd_text,
    odd_vrt,
    picture,
    special_file,
    table,
    text_bytes,
)
from omegaconf import DictConfig, OmegaConf

from corpus.index import index_corpus
from corpus.sources.folder import ImageFolder
from corpus.sources.webdataset import WebDataset
from prune.selection import select
from runtime.application import CONFIGS, prepare_process
from runtime.errors import UserError
from runtime.notices import notice
from scripts.export import main as export

#: Address space of the process in bytes; the libraries alone take about four GiB of it.
MEMORY = 12 * 2**30
RATIO = 0.4
#: Seconds after which a corpus is reported as hanging, with a traceback.
HANGS = int(os.environ.get("FUZZ_HANGS", "300"))
#: Files without data of their own, which are ignored without a message.
QUIET = ("a.tfw", "a.tif.aux.xml", "a.prj", "Thumbs.db", "README.md", "LICENSE")
TEXTS = (".txt", ".caption", ".json")
Generator = np.random.Generator


@dataclass(frozen=True)
class MeanColour:
    """An encoder without a network: the mean colour."""

    name: str = "mean_colour"
    batch_size: int = 64
    dimensions: int = 3

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1, 3).mean(axis=1).astype(np.float16)


@dataclass(frozen=True)
class Put:
    """A generated corpus.

    Attributes:
        overrides: of the command line.
        check: (manifest, text on stderr) raises an AssertionError if the account does not balance.
    """

    overrides: list[str]
    check: Callable[[pd.DataFrame, str], None]


# ------------------------------------------------------------------------------------------------------------- folders


def folder(root: Path, rng: Generator, count: int) -> Put:
    """A folder of mutated files: images, texts, tables, masks, companion files, special files and unknown files."""
    masked = rng.random() < 0.3
    images: list[str] = []
    for number in range(count):
        place = ("", "scene/", "b/deep er/", "train/", "test/", "\u00e9/", ".hidden/")[rng.integers(7)]
        (root / place).mkdir(parents=True, exist_ok=True)
        stem = place + (odd_stem(rng, number) if rng.random() < 0.5 else f"tile{number}")
        kind = rng.choice(
            ["image", "text", "metadata", "other", "special", "quiet"], p=[0.6, 0.12, 0.1, 0.08, 0.06, 0.04]
        )
        if kind == "special":
            special_file(rng, str(root / f"{stem}.jpg"))
            continue
        if kind == "quiet":
            (root / place / QUIET[rng.integers(len(QUIET))]).write_bytes(b"x")
            continue
        if kind == "other":
            name = f"{stem}{rng.choice(['', '.csv', '.zip', '.npy', '.tar', '.mp4', '.cls', '.é'])}"
            (root / name).write_bytes(picture(rng).data if rng.random() < 0.3 else rng.bytes(300))
            continue
        file = any_image(rng)
        images.append(stem + file.suffix)
        (root / images[-1]).write_bytes(file.data)
        if kind == "text":
            (root / f"{stem}{rng.choice(['.txt', '.caption'])}").write_bytes(text_bytes(rng))
        if kind == "metadata":
            (root / f"{stem}.json").write_bytes(metadata_bytes(rng))
        if masked and rng.random() < 0.8:
            mask = odd_mask(rng)
            (root / "masks" / place).mkdir(parents=True, exist_ok=True)
            (root / "masks" / f"{stem}{mask.suffix}").write_bytes(mask.data)
    (root / "text without an image.txt").write_bytes(b"a lake")
    (root / os.fsdecode(b"no unicode \xff.png")).write_bytes(picture(rng).data)
    if images and rng.random() < 0.4:
        result = table(rng, images)
        (root / f"captions{result.suffix}").write_bytes(result.data)
    overrides = ["corpus=folder", f"corpus.root={root}", *shown(rng)]
    if masked and (root / "masks").is_dir():
        overrides += ["corpus.masks=masks", "corpus.classes=[a,b,c]"]
    return Put(overrides, lambda manifest, message: check_folder(root, masked, manifest, message))


def shown(rng: Generator) -> list[str]:
    """Options of rasters."""
    options = (
        [], [], [], ["corpus.bands=[1,1,1]"], ["corpus.bands=[red,green,blue]"], ["corpus.no_data=0"],
        ["corpus.stretch=none"], ["corpus.stretch=range", "corpus.low=10", "corpus.high=900"], ["corpus.bands=[2]"],
        ["corpus.content_hash=true"],
    )  # fmt: skip
    return options[rng.integers(len(options))]


def check_folder(root: Path, masked: bool, manifest: pd.DataFrame, message: str) -> None:
    """Every file is a row, belongs to a row, is a table, is known as irrelevant, or is counted."""
    files = set()
    for below, folders, names in os.walk(root):
        inside = Path(below).relative_to(root)
        folders[:] = [name for name in folders if not name.startswith(".") and not (masked and name == "masks")]
        files |= {(inside / name).as_posix() for name in names if not name.startswith(".")}
    rows = {bytes(row, "utf-8").decode("unicode_escape") if "\\xff" in row else row for row in manifest["id"]}
    rows = {row.replace("\xff", os.fsdecode(b"\xff")) for row in rows}
    assert rows <= files, f"rows of no file: {sorted(rows - files)[:3]}"
    stems = rows | {row.rpartition(".")[0] for row in rows}
    rest = {
        file for file in files - rows
        if Path(file).name not in QUIET
        and not Path(file).name.lower().startswith(("captions.", "metadata.", "classes.txt"))
        and not (file.endswith(TEXTS) and file.rpartition(".")[0] in stems)
    }  # fmt: skip
    result = re.search(r"folder: ([\d,]+) files ignored", message)
    given = int(result[1].replace(",", "")) if result else 0
    assert given == len(rest), f"{given} files ignored, but {len(rest)} are no rows: {sorted(rest)[:8]}"


# -------------------------------------------------------------------------------------------------------------- shards


def shards(root: Path, rng: Generator, count: int) -> Put:
    """Tar shards: complete ones with odd members, and broken ones with plain images."""
    urls, rows, passed, cut = [], 0, 0, {}
    number = 0
    while number < count:
        path = root / f"shard{len(urls)}.tar"
        size = int(rng.integers(3, 12))
        if rng.random() < 0.5:
            more, over = odd_shard(path, rng, len(urls), size)
            rows, passed = rows + more, passed + over
        else:
            cut[str(path)] = broken_shard(path, rng, len(urls), size)
        urls.append(str(path))
        number += size
    overrides = ["corpus=webdataset", f'corpus.urls="{"::".join(urls)}"', *shown(rng)]
    if rng.random() < 0.1:
        overrides += ["corpus.classes=[a,b,c]"]
    return Put(overrides, lambda manifest, message: check_shards(rows, passed, cut, manifest, message))


def odd_shard(path: Path, rng: Generator, shard: int, size: int) -> tuple[int, int]:
    """Write a complete shard; returns the number of its rows and the number of members that are skipped."""
    rows = passed = 0
    kind = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.PAX_FORMAT)[rng.integers(4)]
    with tarfile.open(path, "w", format=kind, errors="surrogateescape") as tar:

        def add(name: str, data: bytes, **fields: object) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            with contextlib.suppress(ValueError):  # a name too long for this format
                tar.addfile(member, io.BytesIO(data))

        for number in range(size):
            key = f"odd{shard}_{number}"
            match int(rng.integers(14)):
                case 0:  # two members of one name
                    file = any_image(rng)
                    add(key + file.suffix, file.data)
                    add(key + file.suffix, file.data)
                    rows += 2
                case 1:
                    add(f"/{key}.jpg", picture(rng).data)
                    add(f"../{key}.jpg", picture(rng).data)
                    rows += 2
                case 2:
                    add(f"{key}.jpg", b"", type=tarfile.SYMTYPE, linkname="gone")
                    add(f"{key}.png", b"", type=tarfile.LNKTYPE, linkname=f"{key}.jpg")
                    rows += 2
                case 3:
                    add(f"{key}", b"", type=tarfile.DIRTYPE)
                    add(f"{key}.jpg", b"", type=tarfile.FIFOTYPE)
                    add(f"{key}.png", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
                    passed += 2
                case 4:  # a tar in a tar in a tar
                    inner = io.BytesIO()
                    with tarfile.open(fileobj=inner, mode="w") as nested:
                        nested.addfile(tarfile.TarInfo("inner.jpg"))
                    add(f"{key}.tar", inner.getvalue())
                    rows += 1
                case 5:
                    file = any_image(rng)
                    add(key + file.suffix, file.data)
                    add(f"{key}.json", json.dumps({k: v for k, v in metadata_of(rng).items()}).encode())
                    add(f"{key}.cls", text_bytes(rng))
                    rows += 1
                case 6:
                    file = any_image(rng)
                    add(f"{key}.txt", text_bytes(rng))
                    add(key + file.suffix, file.data)
                    mask = odd_mask(rng)
                    add(f"{key}.mask{mask.suffix}", mask.data)
                    rows += 1
                case 7:
                    add(f"{key}.csv", b"1,2")
                    rows += 1
                case 8:
                    add(key, rng.bytes(100).replace(b"BM", b"ZZ"))
                    passed += 1
                case 9:
                    fields = {"comment": odd_text(rng)[:500], "mtime": str(rng.choice(["1e999", "x", "-1"]))}
                    fields |= {"size": "7"} if rng.random() < 0.1 else {}
                    clean = {name: value.encode("utf-8", "replace").decode() for name, value in fields.items()}
                    if kind == tarfile.PAX_FORMAT and "size" not in clean:
                        add(f"{key}.png", picture(rng).data, pax_headers=clean)
                        rows += 1
                case 10:
                    file = any_image(rng)
                    name = f"{key}/{odd_stem(rng, number).partition('.')[0]}".replace("\0", "")
                    before = tar.offset
                    add(name + file.suffix, file.data)
                    rows += tar.offset > before
                case 11:
                    add(f".{key}.jpg", b"hidden")
                case 12:
                    add(f"{key}.tfw", b"1\n0\n0\n")
                case _:
                    file = odd_picture(rng)
                    add(key + file.suffix, file.data)
                    rows += 1
    return rows, passed


def broken_shard(path: Path, rng: Generator, shard: int, size: int) -> int:
    """Write a shard of complete images and break its bytes; returns the number of its images."""
    buffer, offsets = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=(tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[shard % 2]) as tar:
        for number in range(size):
            file = File(".jpg", picture(rng).data)
            member = tarfile.TarInfo(("long" * 40 if rng.random() < 0.2 else "") + f"cut{shard}_{number}{file.suffix}")
            member.size = len(file.data)
            if rng.random() < 0.2 and shard % 2:
                member.pax_headers = {"GNU.sparse.major": str(rng.choice(["1", "x"])), "GNU.sparse.minor": "0"}
                member.pax_headers |= {"GNU.sparse.name": "s.jpg", "GNU.sparse.realsize": str(rng.choice(["9", "x"]))}
            offsets.append(tar.offset)
            tar.addfile(member, io.BytesIO(file.data))
    data = buffer.getvalue()
    match int(rng.integers(6)):
        case 0:
            data = broken(rng, data)
        case 1:
            data = data[: int(rng.integers(len(data)))]
        case 2:  # a valid header with a size beyond the end of the file
            at, claim = int(rng.integers(size)), int(rng.choice([2**20, 2**30, 2**33 - 1, 0]))
            data = claimed(data, offsets[at], claim)
        case 3:
            data = claimed(
                data,
                offsets[rng.integers(size)],
                2**33 - 1,
                bytes(rng.choice([b"L", b"K", b"x", b"g", b"S", b"V", b"D"])),
            )
        case 4:
            import bz2
            import gzip

            data = (gzip.compress, bz2.compress)[rng.integers(2)](data)
        case _:
            data = data + rng.bytes(600)
    path.write_bytes(data)
    return size


def claimed(data: bytes, start: int, size: int, kind: bytes | None = None) -> bytes:
    """The archive with another size, and another kind, in the header that starts here, with a valid checksum."""
    result = bytearray(data)
    result[start + 124 : start + 136] = b"%011o\0" % size
    if kind is not None:
        result[start + 156 : start + 157] = kind
    result[start + 148 : start + 156] = b" " * 8
    result[start + 148 : start + 156] = b"%06o\0 " % sum(result[start : start + 512])
    return bytes(result)


def check_shards(rows: int, passed: int, cut: dict[str, int], manifest: pd.DataFrame, message: str) -> None:
    """Check the rows of shards.

    Complete shards: as many rows as samples and problems, the rest counted. Broken shards: all images, or a row with
    the reason that the shard is broken.
    """
    broken_rows = manifest["id"].str.contains(r"cut\d+_\d+|shard\d+\.tar(?::end)?$", regex=True)
    for shard, size in cut.items():
        number = re.search(r"shard(\d+)\.tar$", shard)[1]
        of_shard = manifest["id"].str.contains(rf"(?:^|[^0-9])cut{number}_\d+", regex=True)
        end = manifest["id"].str.startswith(shard)
        assert of_shard.sum() >= size or end.any() or "shards are empty" in message, (
            f"{shard} had {size} images, has {of_shard.sum()} rows, and no reason"
        )
    whole = manifest[~broken_rows & ~manifest["id"].str.startswith(tuple(cut) or ("\0",))]
    strange = [row for row in whole["id"] if row in ("s.jpg", "s")]  # names from a broken header
    assert len(whole) - len(strange) == rows, f"{len(whole)} rows of {rows}: {sorted(whole['id'])[:40]}"
    result = re.search(r"webdataset: ([\d,]+) members ignored", message)
    given = int(result[1].replace(",", "")) if result else 0
    assert given >= passed and (cut or given == passed), f"{given} members ignored, not {passed}: {message}"


# -------------------------------------------------------------------------------------------------------------- scenes


def scenes(root: Path, rng: Generator, count: int) -> Put:
    """Rasters of all kinds, broken ones, and files that are not rasters."""
    for number in range(count):
        place = ("", "dry/", "b/c/", "\u00e9/")[rng.integers(4)]
        (root / place).mkdir(exist_ok=True, parents=True)
        stem = place + (odd_stem(rng, number) if rng.random() < 0.4 else f"scene{number}")
        choice = rng.random()
        if choice < 0.08:
            (root / f"{stem}.vrt").write_bytes(odd_vrt(rng, f"scene{number - 1}.tif"))
        elif choice < 0.12:
            special_file(rng, str(root / f"{stem}.tif"))
        elif choice < 0.2:
            (root / f"{stem}{rng.choice(['.png', '.txt', '', '.json', '.tfw'])}").write_bytes(picture(rng).data)
        else:
            file = any_image(rng) if rng.random() < 0.3 else odd_picture(rng)
            data = broken(rng, file.data) if rng.random() < 0.3 else file.data
            (root / f"{stem}{rng.choice(['.tif', '.tif', '.TIFF', '.jp2', '.img'])}").write_bytes(data)
    (root / "scene.tif").write_bytes(picture(rng).data)
    tiles = (["corpus.tile=16"], ["corpus.tile=16", "corpus.overlap=8", "corpus.edge=shift"], ["corpus.tile=64"])
    overrides = ["corpus=geotiff", f"corpus.root={root}", *shown(rng), *tiles[rng.choice(3, p=[0.5, 0.4, 0.1])]]
    return Put(overrides, lambda manifest, message: check_scenes(root, manifest, message))


def check_scenes(root: Path, manifest: pd.DataFrame, message: str) -> None:
    """Every file with a scene's suffix has a row of its own or tiles; every other file is counted."""
    names, others = set(), set()
    for below, _, files in os.walk(root):
        for name in files:
            file = (Path(below) / name).relative_to(root).as_posix()
            if not name.startswith("."):
                (names if name.lower().endswith((".tif", ".tiff", ".jp2", ".img", ".vrt")) else others).add(file)
    rows = {re.sub(r"/\d{6,}_\d{6,}$", "", row) for row in manifest["id"]}
    left = re.search(r"geotiff: (\d+) files are left out", message)
    missing = names - rows
    assert rows <= names, f"rows of no file: {sorted(rows - names)[:3]}"
    assert len(missing) == (int(left[1]) if left else 0), f"no rows of {sorted(missing)[:5]}: {message}"
    others = {file for file in others if not file.endswith(".tfw")}
    result = re.search(r"geotiff: ([\d,]+) files ignored", message)
    assert (int(result[1].replace(",", "")) if result else 0) == len(others), (
        f"{sorted(others)[:5]} are not counted: {message}"
    )


# -------------------------------------------------------------------------------------------------------------- tables


def parquet(root: Path, rng: Generator, count: int) -> Put:
    """Parquet files with columns of all kinds, some of them broken."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("caption", "label", "scene", "split", "id", "lon", "mask", "text", "captions", "é", "reason", "readable")
    extra = [str(name) for name in rng.choice(names, int(rng.integers(0, 5)), replace=False)]
    bare = rng.random() < 0.2
    rows = count if rng.random() < 0.95 else 0

    def image(number: int) -> object:
        if rng.random() < 0.1:
            return None
        file = any_image(rng)
        if bare:
            return file.data
        odd = ({"bytes": None, "path": None}, {"bytes": b"", "path": "x.png"}, {"bytes": None, "path": "/dev/zero"})
        odd += ({"bytes": None, "path": "gone.png"}, {"bytes": None, "path": "a\0b"}, {"bytes": None, "path": "/"})
        return odd[rng.integers(6)] if rng.random() < 0.15 else {"bytes": file.data, "path": odd_stem(rng, number)}

    columns: dict[str, object] = {"image": pa.array([image(number) for number in range(rows)])}
    for name in extra:
        columns[name] = column(rng, rows)
    if rng.random() < 0.05:
        columns["image"] = column(rng, rows)
    if rng.random() < 0.05:
        columns = {f"no_{name}": values for name, values in columns.items()}
    made = pa.table(columns)
    file = root / "part-0.parquet"
    if rng.random() < 0.2:
        from datasets import Dataset

        try:
            Dataset(made).save_to_disk(str(root / "saved"))
            path = root / "saved"
        except Exception:
            pq.write_table(made, file)
            path = root
    else:
        pq.write_table(made, file)
        path = root
    if rng.random() < 0.12:
        target = file if file.exists() else next(path.rglob("*.arrow"), file)
        target.write_bytes(broken(rng, target.read_bytes() if target.exists() else b""))
    if rng.random() < 0.06 and path == root:
        pq.write_table(pa.table({"other": [1, 2]}), root / "part-1.parquet")
    overrides = ["corpus=huggingface", f"corpus.path={path}", *[o for o in shown(rng) if "content" not in o]]
    if "mask" in extra and rng.random() < 0.5:
        overrides += ["corpus.classes=[a,b,c]"]
    return Put(overrides, lambda manifest, message: check_rows(rows, manifest))


def column(rng: Generator, rows: int) -> object:
    """A column of any type that Arrow has, with gaps."""
    import datetime

    import pyarrow as pa

    makers = (
        lambda: odd_text(rng).encode("utf-8", "replace").decode(), lambda: int(rng.integers(-5, 2**40)),
        lambda: float(rng.choice([0.5, np.nan, np.inf])), lambda: bool(rng.integers(2)), lambda: rng.bytes(9),
        lambda: ["a", "b"], lambda: {"a": 1}, lambda: datetime.date(2020, 1, 1), lambda: datetime.datetime(2020, 1, 1),
        lambda: picture(rng).data, lambda: {"bytes": odd_mask(rng).data, "path": None}, lambda: [],
        lambda: datetime.timedelta(1), lambda: "train",
    )  # fmt: skip
    make = makers[rng.integers(len(makers))]
    return pa.array([None if rng.random() < 0.2 else make() for _ in range(rows)])


def check_rows(rows: int, manifest: pd.DataFrame) -> None:
    assert len(manifest) == rows, f"{len(manifest)} rows of {rows}"


# ----------------------------------------------------------------------------------------------------------------- run

SOURCES = {"folder": folder, "webdataset": shards, "geotiff": scenes, "huggingface": parquet}


def config(root: Path, overrides: list[str]) -> DictConfig:
    options = [
        "tracker=none",
        "prune=random",
        "reference=none",
        f"ratio={RATIO}",
        f"runs={root}/runs",
        f"results={root}/results",
    ]
    options += ["corpus.train.split=all", "corpus.train.resolution=16", "corpus.val.resolution=16"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        result = compose("config", [*overrides, *options])
    OmegaConf.set_struct(result, False)
    result.encoder = {"_target_": "fuzzing.MeanColour"}
    return result


def run(root: Path, source: str, seed: int, count: int) -> dict[str, object]:
    """Run one corpus through all steps; `problem` describes an error, if there was one."""
    rng = np.random.default_rng([seed, sorted(SOURCES).index(source)])
    (root / "corpus").mkdir(parents=True)
    put = SOURCES[source](root / "corpus", rng, count)
    metadata: dict[str, object] = {"source": source, "seed": seed, "overrides": put.overrides, "problem": ""}
    message, started = io.StringIO(), time.monotonic()
    notice.cache_clear()
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(io.StringIO()):
            metadata |= through(root, put, message, rng)
    except UserError as error:
        metadata |= {"refused": str(error)}
        metadata["problem"] = "a message of several lines" if "\n" in str(error) or not str(error).strip() else ""
        metadata["problem"] = metadata["problem"] or account_of_refused(root, put, message.getvalue())
    except AssertionError as error:
        metadata["problem"] = f"account: {error}"
    except Exception:
        metadata["problem"] = traceback.format_exc()
    noise = [line for line in message.getvalue().splitlines() if re.search("Warning|Traceback|warn\\(", line)]
    if noise and not metadata.get("problem"):
        metadata["problem"] = f"noise on stderr: {noise[:3]}"
    metadata["seconds"] = round(time.monotonic() - started, 2)
    metadata["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return metadata


def account_of_refused(root: Path, put: Put, message: str) -> str:
    """The account of an index without a readable image; the command ends after the index."""
    for manifest in root.glob("runs/corpus/*/manifest.parquet"):
        try:
            put.check(pd.read_parquet(manifest), message)
        except AssertionError as error:
            return f"account: {error}"
    return ""


def through(root: Path, put: Put, message: io.StringIO, rng: Generator) -> dict[str, object]:
    """Index, prune, export in two forms and read both back."""
    cfg = config(root, put.overrides)
    directory, corpus = select(cfg, "random")
    put.check(corpus.manifest, message.getvalue())
    total, readable = len(corpus), int(corpus.readable.sum())
    assert ((corpus.manifest["reason"] == "") == corpus.manifest["readable"]).all(), "a row without a reason"
    kept = int(pd.read_parquet(directory / "selection.parquet")["kept"].sum())
    assert kept == min(total - round(RATIO * total), readable), f"{kept} kept of {readable} readable of {total}"
    source = instantiate(cfg.corpus.train, _convert_="all")
    options = {name: getattr(source, name) for name in ("bands", "no_data", "stretch", "low", "high", "resolution")}
    masked = corpus.masks is not None
    for form in ("folder", "webdataset", str(rng.choice(["huggingface", "list"]))):
        cfg.selection, cfg.to, cfg.export.out = str(directory), form, str(root / form)
        export(cfg)
        if source.name == "geotiff":
            options = {"resolution": 16}
        if form in ("folder", "webdataset"):
            back = read_back(root / form, form, options, corpus.mask_classes if masked else (), source)
            again = index_corpus(back, root / f"runs-{form}")
            assert len(again) == int(again.readable.sum()) == kept, (
                f"{kept} exported to {form}, {again.readable.sum()} of {len(again)} read back: "
                f"{again.manifest.loc[~again.readable, ['id', 'reason']].to_dict('records')[:4]}"
            )
    return {
        "rows": total,
        "readable": readable,
        "kept": kept,
        "reasons": corpus.manifest["reason"].value_counts().to_dict(),
    }


def read_back(
    target: Path, form: str, options: dict, classes: tuple[str, ...], source: object
) -> ImageFolder | WebDataset:
    if form == "folder":
        back = ImageFolder(root=str(target), **options)
        return replace(back, masks="masks", classes=classes) if classes else back
    return WebDataset(urls="::".join(map(str, sorted(target.glob("*.tar")))), classes=classes, **options)


def main(folder: Path, seed: int, plan: list[tuple[str, int]]) -> None:
    """Run several corpora; writes one JSON line per corpus to stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    prepare_process()
    for number, (source, count) in enumerate(plan):
        root = folder / f"{source}-{seed + number}"
        print(json.dumps({"starts": str(root)}), flush=True)
        faulthandler.dump_traceback_later(HANGS, exit=True)
        print(json.dumps(run(root, source, seed + number, count)), flush=True)
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(root) if os.environ.get("FUZZ_KEEP") is None else None


if __name__ == "__main__":
    pairs = sys.argv[3:]
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        [(source, int(count)) for source, count in zip(pairs[::2], pairs[1::2], strict=True)],
    )
