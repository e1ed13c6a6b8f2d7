"""Export of the kept images in the format of another tool: `python scripts/export.py selection=DIR to=folder`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import rasterio
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from corpus.index import Corpus, Sample, open_corpus, subset_fingerprint
from corpus.remote import Target, access_of, copy_folder, is_remote, refuse_foreign
from corpus.sources.folder import ImageFolder
from corpus.sources.huggingface import HuggingFace
from corpus.sources.webdataset import WebDataset
from corpus.splits import NAMES
from report.data_card import DATA_CARD, Record, data_card
from report.results import write_text
from runtime.application import CONFIGS, run
from runtime.artefacts import COMPLETE, class_name, finite, plain, read_json, write_json
from runtime.errors import UserError
from runtime.notices import notice
from runtime.progress import progress
from runtime.redaction import public

#: File that is written last to an export behind a URL, marking it complete; and the options that identify an export.
MARK, IDENTITY = "export.json", ("reencode", "shard_size")
FORMS = ("folder", "symlinks", "webdataset", "huggingface", "list")
#: Sources that provide the original bytes of an image; for other sources the decoded image is exported.
WITH_ORIGINALS = {class_name(kind): kind for kind in (ImageFolder, WebDataset, HuggingFace)}
#: Columns about the reading of an image and copies of it, not about its content.
OWN_COLUMNS = ("readable", "reason", "stamp", "copy_in")
#: New name of a corpus's own column `weight` in an export, which uses `weight` for the selection's weights.
OWN_WEIGHT = "weight_in_corpus"
LONGEST_NAME = 100
#: First bytes of files, and the suffixes of their format, the usual one first.
SIGNATURES = (
    (b"\xff\xd8\xff", (".jpg", ".jpeg")),
    (b"\x89PNG\r\n\x1a\n", (".png",)),
    (b"RIFF....WEBP", (".webp",)),
    (b"GIF8", (".gif",)),
    (b"BM", (".bmp",)),
    (b"II[*+]\0|MM\0[*+]", (".tif", ".tiff")),
    (b"\0\0\0\x0cjP  |\xff\x4f\xff\x51", (".jp2", ".j2k")),
    (b"....ftypavi[fs]", (".avif",)),
    (b"P[1-6]\\s", (".ppm", ".pgm", ".pbm", ".pnm")),
)
#: Formats that open_clip's training and similar readers accept in shards; they skip samples in other formats.
SEEN = (".png", ".jpg", ".jpeg", ".webp")
#: Words in names that `datasets` reads as splits, unless a letter is next to them.
SPLIT_WORD = re.compile(
    r"(?<![A-Za-z])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?![A-Za-z])"
)
#: Types of numbers and lists in tables; they are converted to Python's types for JSON.
GENERIC = (np.generic, np.ndarray)


@dataclass(frozen=True)
class Item:
    """One kept image to export.

    Attributes:
        name: file name without suffix; unique also ignoring case, valid on every system.
        metadata: the manifest's row, JSON-ready.
        mask: the bytes of a mask file and its suffix, or None.
    """

    name: str
    image: bytes
    suffix: str
    metadata: dict[str, Any]
    mask: tuple[bytes, str] | None


@dataclass(frozen=True)
class Subset:
    """The kept rows of a corpus, int64, ascending, and the source of their bytes, or None.

    The manifest contains the selection's `weight`, so every export format includes it.

    Attributes:
        reencode: export images that are not in a format of `SEEN` as PNG: the central square, read like the corpus, at
            the image's own size.
    """

    corpus: Corpus
    rows: np.ndarray
    source: ImageFolder | WebDataset | HuggingFace | None
    reencode: bool = False

    def items(self) -> Iterator[Item]:
        """Every kept image, in corpus order."""
        table = self.corpus.manifest.drop(columns=list(OWN_COLUMNS), errors="ignore")
        names = safe_names(table["id"].iloc[self.rows])
        originals = self._decoded() if self.source is None else self._originals()
        for row, name, (image, suffix, mask) in zip(
            progress(self.rows, "export", unit="image"), names, originals, strict=True
        ):
            record = table.iloc[int(row)].dropna().to_dict()
            metadata = {key: value.tolist() if isinstance(value, GENERIC) else value for key, value in record.items()}
            yield Item(name, image, suffix, finite(metadata), mask)

    def _originals(self) -> Iterator[tuple[bytes, str, tuple[bytes, str] | None]]:
        """The original bytes, the suffix that matches them, and the mask."""
        readers: dict[int, Any] = {}
        for row, (image, suffix, mask) in zip(self.rows, self.source.originals(self.rows), strict=True):
            suffix = content_suffix(image, suffix)
            if not self.reencode or suffix in SEEN:
                yield image, suffix, mask
                continue
            side = own_side(image) or self.corpus.resolution
            reader = readers.setdefault(side, replace(self.source, resolution=side))
            [sample] = reader.reader(np.array([row]))()
            if isinstance(sample, str):
                identifier = self.corpus.manifest["id"].iloc[int(row)]
                raise UserError(f"{identifier} cannot be read at its own size ({sample}): export without reencode")
            pixels, classes = sample if isinstance(sample, Sample) else (sample, None)
            yield png(pixels), ".png", None if classes is None else (png(classes), ".png")

    def _decoded(self) -> Iterator[tuple[bytes, str, tuple[bytes, str] | None]]:
        for row in self.rows:
            mask = None if self.corpus.masks is None else (png(self.corpus.masks[row]), ".png")
            yield png(self.corpus.images[row]), ".png", mask


def open_subset(selection: Path, access: Mapping[str, Any] | None = None) -> Subset:
    """The kept images of a selection stage.

    Args:
        access: options for reaching shards behind URLs, which a stage does not store; from `access_fields`.
    Raises:
        UserError: the directory is not a selection, its corpus is gone, or its images have changed since.
    """
    metadata = selection / COMPLETE
    if not (selection / "selection.parquet").is_file() or not metadata.is_file():
        raise UserError(f"selection={selection} is not a selection: give the directory that prune/run.py prints")
    directory = selection.resolve().parent.parent / "corpus" / read_json(metadata)["inputs"]["corpus"]
    if not (directory / COMPLETE).is_file():
        raise UserError(f"the corpus of {selection} is not in {directory}: prune again")
    corpus = open_corpus(directory)
    kept = pd.read_parquet(selection / "selection.parquet")
    if "weight" not in kept:
        raise UserError(f"{selection} has no weights, because an earlier version made it: prune again")
    if kept["id"].tolist() != corpus.manifest["id"].tolist():
        raise UserError(f"{selection} does not belong to {directory}: prune again")
    inputs = read_json(directory / COMPLETE)["inputs"]
    fields = dict(inputs["source"])
    kind = WITH_ORIGINALS.get(fields.pop("_class_"))
    if kind is WebDataset:
        fields.update(_reached(str(fields["urls"]), access or {}))
    source = None if kind is None else kind(**fields)
    if source is not None and plain(source.version) != inputs["version"]:
        raise UserError(f"the images of {selection} changed since they were pruned: prune again, then export")
    manifest = corpus.manifest
    if "weight" in manifest:  # a column of the user, or of an export that was pruned again
        notice(f"the corpus has a column weight: it is exported as {OWN_WEIGHT}; weight is the selection's weight")
        manifest = manifest.rename(columns={"weight": OWN_WEIGHT})
    weighted = replace(corpus, manifest=manifest.assign(weight=kept["weight"]))
    return Subset(weighted, np.flatnonzero(kept["kept"].to_numpy()), source)


def access_fields(cfg: DictConfig) -> dict[str, Any]:
    """The options for reaching shards behind URLs, and the URLs with credentials if they are given."""
    access = access_of(cfg)
    urls = OmegaConf.select(cfg, "corpus.urls")
    return {
        "retries": access.retries,
        "timeout": access.timeout,
        "storage": access.storage,
        **({"urls": urls} if urls else {}),
    }


def _reached(kept: str, access: Mapping[str, Any]) -> dict[str, Any]:
    """`access`, if its URLs are those that the stage stores, which have no credentials.

    Raises:
        UserError: they are other URLs.
    """
    if "urls" in access and public(str(access["urls"])) != kept:
        raise UserError(
            f"corpus.urls={public(str(access['urls']))} is not the pruned corpus: give {kept}, or leave it out"
        )
    return dict(access)


def content_suffix(data: bytes, suffix: str) -> str:
    """The suffix of a file's format: the given one if it fits or the format is unknown, ".img" if there is none."""
    for start, suffixes in SIGNATURES:
        if re.match(start, data, re.DOTALL):
            return suffix if suffix in suffixes else suffixes[0]
    return suffix or ".img"


def own_side(data: bytes) -> int | None:
    """The shorter side of an encoded image in pixels; None if its header cannot be read."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        return min(image.size)
    with contextlib.suppress(Exception), rasterio.io.MemoryFile(data) as memory, memory.open() as raster:
        return min(raster.width, raster.height)
    return None


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def safe_names(identifiers: pd.Series) -> Iterator[str]:
    """A file name without suffix for every id: ASCII, no separators, dots or split names, unique also ignoring case."""
    taken: dict[str, int] = {}
    for identifier in identifiers:
        stem = str(PurePosixPath(identifier).with_suffix("")) if identifier.strip("/.") else identifier
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in stem)
        base = no_split(safe[-LONGEST_NAME:] or "image")
        name, number = base, taken.get(base.lower(), 0)
        while name.lower() in taken:
            number += 1
            name = f"{base}-{number}"
        taken[base.lower()] = number
        taken[name.lower()] = taken.get(name.lower(), 0)
        yield name


def no_split(name: str) -> str:
    """Rename `train_01` to `trainx_01`: `datasets` would read it as a split and drop all files with other names."""
    return SPLIT_WORD.sub(r"\1x", name)


def folder_name(scene: str) -> str:
    """The name of a scene's folder; "" without a scene."""
    name = no_split("".join(c if c.isalnum() or c in "-_ " else "_" for c in scene).strip()[:60])
    return f"{name}x" if name.lower() in NAMES else name


def to_folder(subset: Subset, target: Path, links: bool = False) -> None:
    """Write `images/<scene>/<name>.<suffix>`, `masks/<scene>/<name>.png` and `images/metadata.jsonl`, one row per
    image.

    This is the layout of Hugging Face's ImageFolder, which reads all rows as one split (names are changed by
    `no_split`). `corpus=folder` reads it back with labels, captions and masks.
    """
    if links and not isinstance(subset.source, ImageFolder):
        raise UserError("to=symlinks needs corpus=folder, because only its files can be linked: take to=folder")
    (target / "images").mkdir()
    with (target / "images" / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for item, row in zip(subset.items(), subset.rows, strict=True):
            place = Path(folder_name(str(item.metadata.get("scene", "")))) / item.name
            path = target / "images" / place.with_name(item.name + item.suffix)
            path.parent.mkdir(exist_ok=True)
            if links:
                path.symlink_to(subset.source.path(int(row)).resolve())
            else:
                path.write_bytes(item.image)
            if item.mask is not None:
                mask = target / "masks" / place.with_name(item.name + item.mask[1])
                mask.parent.mkdir(parents=True, exist_ok=True)
                mask.write_bytes(item.mask[0])
            metadata = {"file_name": path.relative_to(target / "images").as_posix(), **item.metadata}
            lines.write(json.dumps(metadata, ensure_ascii=False) + "\n")


def to_webdataset(subset: Subset, target: Path, shard_size: int) -> None:
    """Write `subset-000000.tar`, ... with `<name>.<suffix>`, `.txt`, `.json`, `.mask.<suffix>`; the bytes are
    reproducible.

    The numbers of images of the shards differ by at most one. The text is the first caption, empty if there is none;
    all captions are in the JSON. The number of images in formats that common readers skip is reported on stderr.
    """
    if shard_size < 1:
        raise UserError(f"export.shard_size={shard_size}: give at least 1")
    count = len(subset.rows)
    shards = max(1, -(-count // shard_size))
    items, unseen = subset.items(), Counter()
    for shard in range(shards):
        with tarfile.open(target / f"subset-{shard:06d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for _ in range(count * shard // shards, count * (shard + 1) // shards):
                item = next(items)
                members = {
                    item.suffix: item.image,
                    ".txt": str(item.metadata.get("caption", "")).encode(),
                    ".json": json.dumps(item.metadata, ensure_ascii=False).encode(),
                }
                unseen[item.suffix] += item.suffix not in SEEN
                if item.mask is not None:
                    members[f".mask{item.mask[1]}"] = item.mask[0]
                for suffix, data in members.items():
                    header = tarfile.TarInfo(item.name + suffix)  # default time, owner and mode: reproducible
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
    if unseen.total():
        formats = ", ".join(f"{suffix} {number}" for suffix, number in sorted(unseen.items()) if number)
        print(
            f"{unseen.total()} of {count} images ({formats}) will not be seen by open_clip and other readers that read "
            f"only {', '.join(SEEN)}: export.reencode=png converts them to PNG",
            file=sys.stderr,
        )


def to_huggingface(subset: Subset, target: Path, scratch: Path) -> None:
    """Write a data set for `datasets.load_from_disk`: image, mask if there are any, and the manifest's columns."""
    import datasets

    datasets.disable_progress_bars()
    table = subset.corpus.manifest.drop(columns=list(OWN_COLUMNS), errors="ignore").iloc[subset.rows]
    columns = {name: _feature(table[name]) for name in table if name not in ("image", "mask")}
    features = {"image": datasets.Image(), **columns}
    if subset.corpus.masks is not None:
        features["mask"] = datasets.Image()

    def rows() -> Iterator[dict[str, Any]]:
        for item in subset.items():
            row = {name: item.metadata.get(name) for name in columns}
            row["image"] = {"bytes": item.image, "path": item.name + item.suffix}
            if "mask" in features:
                row["mask"] = item.mask and {"bytes": item.mask[0], "path": item.name + item.mask[1]}
            yield row

    # with a name, otherwise `datasets` would hash all images to make one
    made = datasets.Dataset.from_generator(
        rows,
        features=datasets.Features(features),
        cache_dir=str(scratch),
        fingerprint=subset_fingerprint(subset.corpus, subset.rows),
    )
    made.save_to_disk(str(target))


def _feature(column: pd.Series) -> Any:
    import datasets

    if any(isinstance(value, np.ndarray) for value in column):
        return datasets.List(datasets.Value("string"))
    kind = "float64" if column.dtype.kind == "f" else {"i": "int64", "u": "int64", "b": "bool"}.get(column.dtype.kind)
    return datasets.Value(kind or "string")


def to_list(subset: Subset, target: Path) -> None:
    """Write `kept.txt`, one id per line (with \\n and \\ escaped), and `kept.jsonl`, one row per image."""
    table = subset.corpus.manifest.drop(columns=list(OWN_COLUMNS), errors="ignore").iloc[subset.rows]
    lines = [identifier.replace("\\", "\\\\").replace("\n", "\\n") for identifier in table["id"]]
    (target / "kept.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    table.to_json(target / "kept.jsonl", orient="records", lines=True, force_ascii=False)


def chosen_subset(cfg: DictConfig) -> Subset:
    """The subset that the options name.

    Raises:
        UserError: an option is unknown or missing, or nothing is kept; see also `open_subset`.
    """
    if cfg.selection is None:
        raise UserError("no selection given: selection=DIR, the directory that prune/run.py prints")
    if cfg.to not in FORMS:
        raise UserError(f"to={cfg.to} is unknown: choose from {', '.join(FORMS)}")
    reencode = cfg.export.get("reencode")
    if reencode not in (None, "png"):
        raise UserError(f"export.reencode={reencode} is unknown: give png, or null to keep all files as they are")
    if reencode and cfg.to == "symlinks":
        raise UserError("export.reencode=png makes new files, but to=symlinks cannot: take to=folder")
    subset = replace(open_subset(Path(cfg.selection).expanduser(), access_fields(cfg)), reencode=reencode is not None)
    if len(subset.rows) == 0:
        unreadable = int((~subset.corpus.readable).sum())
        raise UserError(
            f"{cfg.selection} keeps none of its {len(subset.corpus)} images ({unreadable} unreadable): prune again "
            "with a lower ratio or readable images"
        )
    return subset


def card_record(selection: Path, corpus: Corpus, licence: str | None = None) -> Record:
    """The data for the data card of a selection; selections of earlier versions may lack parts."""
    result = {name: selection / f"{name}.json" for name in ("summary", "stage")}
    result = {name: read_json(path) if path.is_file() else {} for name, path in result.items()}
    source = ((result["stage"].get("config") or {}).get("corpus") or {}).get("train") or {}
    files = {
        "corpus": str(source.get("_target_", "")).split(".")[-2:-1],
        "prune": [result["summary"].get("method")],
        "entropy": ["local"],
        "encoder": ["efficientnet_lite0"],
    }
    paths = {group: CONFIGS / group / f"{names[0]}.yaml" for group, names in files.items() if names}
    defaults = {
        group: OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        for group, path in paths.items()
        if path.is_file()
    }
    table, scenes = pd.read_parquet(selection / "selection.parquet"), corpus.manifest["scene"].to_numpy(dtype=object)
    name = ((result["stage"].get("config") or {}).get("corpus") or {}).get("name") or corpus.name
    return Record(str(name), scenes, table, result["summary"], result["stage"], defaults, licence)


def main(cfg: DictConfig) -> None:
    subset = chosen_subset(cfg)
    selection = Path(cfg.selection).expanduser().resolve().name
    local = Path(cfg.get("results", "results")) / "export" / f"{selection}-{cfg.to}"
    if is_remote(str(cfg.export.out or "")):
        target = Target(str(cfg.export.out), access_of(cfg), "export.out")
        identity = {"selection": selection, "to": str(cfg.to), **{key: cfg.export[key] for key in IDENTITY}}
        upload(cfg, subset, local.with_name(local.name + ".upload"), target, identity)
        return
    target = Path(cfg.export.out or local).expanduser()
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise UserError(f"export.out={target} is not empty: name another, or remove it")
    write(cfg, subset, target)
    _tell_of_network(subset)
    print(f"export: {target}")


def upload(cfg: DictConfig, subset: Subset, local: Path, target: Target, identity: dict[str, Any]) -> None:
    """Export into a local folder, copy it behind a URL, with `export.json` as the last file, and remove the local
    folder.

    Raises:
        UserError: the target has other files, or cannot be written; then the local folder is kept.
    """
    if cfg.to == "symlinks":
        raise UserError(f"to=symlinks can link files only on this machine, not in export.out={target}: take to=folder")
    refuse_foreign(target, identity, (MARK,))
    shutil.rmtree(local, ignore_errors=True)
    write(cfg, subset, local)
    write_json(local / MARK, {**identity, "images": len(subset.rows)})
    try:
        copy_folder(local, target, identity, (MARK,))
    except UserError as error:
        raise UserError(f"{error}; the export is in {local}: run the same command to copy it") from None
    shutil.rmtree(local)
    _tell_of_network(subset)
    print(f"export: {target}")


def _tell_of_network(subset: Subset) -> None:
    for note in getattr(subset.source, "network_notes", ()):
        notice(f"{subset.source.name}: {note}")


def write(cfg: DictConfig, subset: Subset, target: Path) -> None:
    """Export into a folder, which appears only when complete."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    scratch = partial.with_name(target.name + ".scratch")
    try:
        if cfg.to in ("folder", "symlinks"):
            to_folder(subset, partial, links=cfg.to == "symlinks")
        elif cfg.to == "webdataset":
            to_webdataset(subset, partial, int(cfg.export.shard_size))
        elif cfg.to == "huggingface":
            to_huggingface(subset, partial, scratch)
        else:
            to_list(subset, partial)
        record = card_record(Path(cfg.selection).expanduser(), subset.corpus, cfg.export.get("licence"))
        write_text(partial / DATA_CARD, data_card(record, str(cfg.to)))
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    run(main)
