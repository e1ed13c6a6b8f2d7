"""The page for inspecting and changing a selection: one HTML file, with thumbnails inside it and in a folder."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from runtime.progress import progress

HERE = Path(__file__).parent
PAGE, THUMBNAILS = "index.html", "thumbs"
#: Number of thumbnails along each side of one image file of thumbnails, and its JPEG quality.
ATLAS_SIDE, QUALITY = 40, 80
#: Largest number of characters of an id and of a caption in the page.
LONGEST = 300


@dataclass(frozen=True)
class Shown:
    """Content of the page of a selection, one row per image in corpus order.

    Attributes:
        title: title of the page.
        metadata: further data for the page's script, as JSON values.
        table: the rows of selection.parquet.
        manifest: table with id and caption, and with lon and lat where they are known.
        columns: further arrays [N] or [N, k]: x, y, neighbours, cosines, group, nearest_kept, nearest_cosine.
        images: uint8 [N, R, R, 3], memory-mapped.
    """

    title: str
    metadata: Mapping[str, Any]
    table: pd.DataFrame
    manifest: pd.DataFrame
    columns: Mapping[str, np.ndarray]
    images: np.ndarray


@dataclass(frozen=True)
class Thumbnails:
    """Thumbnails of the page: `tile` is their side in px, `embedded` the number inside the page, `most` the total."""

    tile: int
    embedded: int
    most: int


def write_decision_page(directory: Path, shown: Shown, options: Thumbnails) -> Path:
    """Write the page and, next to it, the thumbnails that are not embedded; returns the path of the page."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / THUMBNAILS, ignore_errors=True)
    drawn = drawn_rows(shown.table, options.most)
    beside = len(drawn) > options.embedded
    if beside:
        _write_atlases(directory / THUMBNAILS, shown.images, drawn, options.tile)
    path = directory / PAGE
    partial = path.with_name(path.name + ".partial")
    partial.write_text(decision_page(shown, options, beside), encoding="utf-8")
    os.replace(partial, path)
    return path


def drawn_rows(table: pd.DataFrame, most: int) -> np.ndarray:
    """Rows of the images with thumbnails, int64, ascending: all readable images, or a random sample of them."""
    rows = np.flatnonzero((table["reason"] != "unreadable").to_numpy())
    return np.sort(np.random.default_rng(0).permutation(rows)[:most]) if len(rows) > most else rows


def decision_page(shown: Shown, options: Thumbnails, beside: bool) -> str:
    """The page as HTML.

    Args:
        shown: the content.
        options: settings of the thumbnails.
        beside: whether the folder of thumbnails exists next to the page.
    """
    drawn = drawn_rows(shown.table, options.most)
    inside = _spread(shown.table["kept"].to_numpy()[drawn], drawn, options.embedded)
    columns = {**selection_columns(shown.table), **_known(shown), **shown.columns, "inside": inside.astype(np.int32)}
    if beside:
        columns["drawn"] = drawn.astype(np.int32)
    metadata = {
        **shown.metadata, **names_of(shown.table), "images": len(shown.table), "tile": options.tile, "side": ATLAS_SIDE,
        "beside": len(drawn) if beside else 0,
    }  # fmt: skip
    header, data = bundle(columns, _texts(shown.manifest))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("decision.html.j2").render(
        title=shown.title,
        metadata={**metadata, "columns": header},
        data=base64.b64encode(data).decode(),
        atlas=base64.b64encode(_atlas(shown.images, inside, options.tile)).decode(),
        style=Markup((HERE / "decision.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "decision.js").read_text(encoding="utf-8")),
    )


def names_of(table: pd.DataFrame) -> dict[str, list[str]]:
    """Names for the codes in `selection_columns`: `scenes` and `reasons`."""
    return {f"{name}s": sorted(set(table[name].astype(str))) for name in ("scene", "reason")}


def selection_columns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """The columns that differ between selections of one corpus; scenes and reasons are codes in sorted order."""
    codes = {name: np.unique(table[name].astype(str), return_inverse=True)[1] for name in ("scene", "reason")}
    return {
        "kept": table["kept"].to_numpy().astype(np.uint8),
        "scene": codes["scene"].astype(np.uint16),
        "reason": codes["reason"].astype(np.uint8),
        "cluster": table["cluster"].to_numpy(dtype=np.int32),
        "distance": table["centroid_distance"].to_numpy(dtype=np.float32),
        "similarity": table["scene_similarity"].to_numpy(dtype=np.float32),
    }


def bundle(columns: Mapping[str, np.ndarray], texts: Mapping[str, list[str]]) -> tuple[list[dict[str, Any]], bytes]:
    """Pack arrays and texts into one compressed block.

    Returns:
        the position of each column: `name`, `type` (a typed array of JavaScript, or "json"), `start`, `length` (number
        of values; for texts, bytes) and `width` (values per row); and the block, compressed with gzip, which is the
        same for the same data.
    """
    types = {"u1": "Uint8Array", "u2": "Uint16Array", "i4": "Int32Array", "f4": "Float32Array"}
    header: list[dict[str, Any]] = []
    block = io.BytesIO()
    for name, values in columns.items():
        values = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
        block.write(b"\0" * (-block.tell() % 4))
        kind, width = types[values.dtype.str[1:]], 1 if values.ndim == 1 else values.shape[1]
        header.append({"name": name, "type": kind, "start": block.tell(), "length": values.size, "width": width})
        block.write(values.tobytes())
    for name, lines in texts.items():
        data = json.dumps(lines, ensure_ascii=False).encode("utf-8", errors="replace")
        header.append({"name": name, "type": "json", "start": block.tell(), "length": len(data), "width": 1})
        block.write(data)
    return header, gzip.compress(block.getvalue(), compresslevel=6, mtime=0)


def _known(shown: Shown) -> dict[str, np.ndarray]:
    """Entropy, and locations if there are any."""
    columns = {"entropy": shown.table["entropy"].to_numpy(dtype=np.float32)}
    if {"lon", "lat"} <= set(shown.manifest):
        locations = shown.manifest[["lon", "lat"]].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float32)
        locations = np.where(np.isfinite(locations).all(axis=1, keepdims=True), locations, np.float32(np.nan))
        if np.isfinite(locations).any():
            columns |= {"lon": locations[:, 0].copy(), "lat": locations[:, 1].copy()}
    return columns


def _texts(manifest: pd.DataFrame) -> dict[str, list[str]]:
    ids = manifest["id"].astype(str).str.slice(0, LONGEST).tolist()
    captions = manifest["caption"].fillna("").astype(str).str.slice(0, LONGEST) if "caption" in manifest else None
    if captions is None or (captions == "").all():
        return {"ids": ids}
    codes, different = pd.factorize(captions)
    if len(different) > len(captions) // 2:
        return {"ids": ids, "captions": captions.tolist()}
    return {"ids": ids, "captions": different.tolist(), "captionCodes": codes.tolist()}


def _spread(kept: np.ndarray, rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` evenly spread rows, int64, ascending; half of them are kept images if there are enough."""
    if len(rows) <= most:
        return rows
    groups = [rows[kept], rows[~kept]]
    fewer = min(groups, key=len)
    counts = {id(fewer): min(len(fewer), most // 2)}
    chosen = []
    for group in groups:
        count = counts.get(id(group), most - min(len(fewer), most // 2))
        chosen.append(group[np.unique(np.linspace(0, len(group) - 1, count).astype(int))] if count else group[:0])
    return np.sort(np.concatenate(chosen))


def _atlas(images: np.ndarray, rows: np.ndarray, tile: int) -> bytes:
    """Thumbnails in a grid with `ATLAS_SIDE` per row, as JPEG; unused cells are black."""
    columns = min(ATLAS_SIDE, max(1, len(rows)))
    lines = max(1, -(-len(rows) // columns))
    sheet = np.zeros((lines * tile, columns * tile, 3), np.uint8)
    for place, row in enumerate(rows):
        top, left = place // columns * tile, place % columns * tile
        sheet[top : top + tile, left : left + tile] = thumbnail(images[row], tile)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def thumbnail(image: np.ndarray, tile: int) -> np.ndarray:
    """Resize an image, uint8 [R, R, 3], to `tile` px; smaller images are enlarged without smoothing."""
    if image.shape[0] == tile:
        return image
    method = Image.Resampling.BOX if image.shape[0] > tile else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.asarray(image)).resize((tile, tile), method))


def _write_atlases(folder: Path, images: np.ndarray, rows: np.ndarray, tile: int) -> None:
    folder.mkdir(exist_ok=True)
    size = ATLAS_SIDE**2
    for number, start in enumerate(progress(range(0, len(rows), size), "thumbnails", unit="file")):
        path = folder / f"{number:04d}.jpg"
        path.write_bytes(_atlas(images, rows[start : start + size], tile))
