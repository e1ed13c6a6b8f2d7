"""A self-contained HTML page with tables, figures, sample sheets and galleries; all pictures are embedded."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from eval.reference_names import REFERENCE_ROWS
from report.tables import REFERENCE, TABLE_NOTES, seeds_line, show

HERE = Path(__file__).parent
#: Style sheet and scripts that are embedded in the page.
ASSETS = ("page.css", "sort.js", "chart.js")
#: Default headings of sections for which a page may set another heading.
HEADINGS = {"sheets": "Samples"}
#: The sentence under each section's heading.
LEADS = {
    "tables": "The measurements, one row per method. ↓ lower is better, ↑ higher is better; the best measured value of "
    "a column is marked. Brackets are 95\u00a0% intervals for the sampling of images only. They do not include the "
    "variation between training seeds, so a difference within one seed is no proof. Shaded rows are reference rows: "
    "the metrics of real or re-encoded images. No model trained on these latents can be expected to do better than "
    "reconstructed_train. Click on a heading to sort; reference rows stay below.",
    "figures": "The data behind the numbers. A method has the same colour in every figure.",
    "sheets": "Generated or restored images, enlarged without smoothing and not selected by hand. Look for structure "
    "that the metrics may miss: coasts, texture, repeated patterns.",
    "pairs": "The best pairs have the best fit among the images of their scene. The worst pairs, one per image, have "
    "given captions that most likely describe another scene. A caption that is struck through was thrown out; the "
    "caption that replaced it is shown below it. Open a scene to see its pairs.",
    "galleries": "A random sample of the kept and of the dropped images of every scene. Good pruning keeps variety and "
    "drops repeated, empty and damaged images. Open a scene to see its images.",
}


class Picture(NamedTuple):
    """A figure or a sheet.

    Attributes:
        png: bytes or file of the picture, which is shown without JavaScript.
        chart: data from `report.curves.chart`; the chart is drawn in place of the picture.
        folded: whether the picture is shown only on demand.
    """

    title: str
    caption: str
    png: bytes | Path
    chart: Mapping[str, Any] | None = None
    folded: bool = False


@dataclass(frozen=True)
class SampleGrid:
    """Images side by side, with one row per prompt and one column per method.

    Attributes:
        columns: images uint8 [N, H, W, 3], by heading.
        prompts: str [N].
        row: name for one row, for example "prompt".
    """

    title: str
    caption: str
    columns: Mapping[str, np.ndarray]
    prompts: Sequence[str]
    row: str = "prompt"


@dataclass(frozen=True)
class Gallery:
    """Sampled images of one scene.

    Attributes:
        title: the scene.
        kept, dropped: uint8 [n, H, W, 3] and [m, H, W, 3], the images to show.
        kept_total, dropped_total: total numbers of such images.
        note: the reason why the images were dropped; a gallery with a note has no kept images.
    """

    title: str
    kept: np.ndarray
    dropped: np.ndarray
    kept_total: int
    dropped_total: int
    note: str = ""


@dataclass(frozen=True)
class Caption:
    """A caption under an image.

    Attributes:
        note: source and scores of the caption.
        struck: whether the caption was rejected.
    """

    text: str
    note: str
    struck: bool = False


@dataclass(frozen=True)
class PairCard:
    """An image uint8 [H, W, 3] with its captions, and whether it is kept."""

    image: np.ndarray
    captions: Sequence[Caption]
    kept: bool


@dataclass(frozen=True)
class ScenePairs:
    """Image-text pairs of one scene.

    Attributes:
        title: the scene.
        counts: a line of counts next to the title.
        groups: for each kind ("best", "worst"), a line of text and the pairs.
    """

    title: str
    counts: str
    groups: Mapping[str, tuple[str, Sequence[PairCard]]]


def png_bytes(image: Image.Image | np.ndarray) -> bytes:
    """A PIL image or an array uint8 [H, W, 3] as PNG."""
    return _encode(image, "PNG", optimize=True)


def figure_bytes(figure: Figure, dpi: int = 150) -> bytes:
    """A Matplotlib figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def figure_svg(figure: Figure) -> bytes:
    """A Matplotlib figure as SVG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "figure"}):  # otherwise the ids of its elements are random
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def write_report(
    path: Path | str,
    *,
    title: str,
    intro: str,
    tables: Mapping[str, pd.DataFrame] | None = None,
    verdict: Mapping[str, Any] | None = None,
    figures: Sequence[Picture | tuple[str, str, bytes | Path]] = (),
    galleries: Mapping[str, Sequence[Gallery]] | None = None,
    panels: Sequence[Picture | tuple[str, str, bytes | Path]] = (),
    pairs: Sequence[ScenePairs] = (),
    grids: Sequence[SampleGrid] = (),
    sheets: Sequence[Picture | tuple[str, str, bytes | Path]] = (),
    key_figures: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
    headings: Mapping[str, str] | None = None,
) -> None:
    """Write the page; empty sections are left out.

    Args:
        path: path of the page.
        title: title of the page.
        intro: plain text; blank lines separate paragraphs.
        tables: tables by name. Tables of `report.tables.build_tables` get direction arrows and marks for the best
            values; other tables are shown unchanged.
        verdict: result of `report.verdict_view.verdict_view`, shown first.
        figures, sheets: pictures, or tuples of at least the first fields of `Picture`.
        galleries: galleries by method.
        panels: small figures side by side, below the others.
        pairs: image-text pairs by scene.
        grids: grids of samples.
        key_figures: short values for the head of the page.
        notes: replacements for the text under a table (by its name) or under a section's heading (a key of `LEADS`).
        links: files next to this one, by title.
        headings: replacements for `HEADINGS`.
    """
    notes = notes or {}
    html = _template().render(
        title=title,
        verdict=verdict,
        assets={name: Markup((HERE / name).read_text(encoding="utf-8")) for name in ASSETS},
        intro=[paragraph.strip() for paragraph in intro.split("\n\n") if paragraph.strip()],
        key_figures={name: str(value) for name, value in (key_figures or {}).items()},
        leads={section: notes.get(section, lead) for section, lead in LEADS.items()},
        headings={**HEADINGS, **(headings or {})},
        references=_references((tables or {}).values()),
        tables=[_table(name, table, notes) for name, table in (tables or {}).items()],
        figures=[_picture(Picture(*figure)) for figure in figures],
        panels=[_picture(Picture(*panel)) for panel in panels],
        pairs=[_scene_pairs(scene) for scene in pairs],
        links=dict(links or {}),
        grids=[_grid(grid) for grid in grids],
        sheets=[_picture(Picture(*sheet)) for sheet in sheets],
        galleries={method: [_group(gallery) for gallery in groups] for method, groups in (galleries or {}).items()},
    )
    _write(Path(path), html)


def _write(path: Path, html: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, path)


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def _table(name: str, table: pd.DataFrame, notes: Mapping[str, str]) -> dict[str, Any]:
    shown = show(table)
    first = int(shown.headings[0] == "kind")  # the page shows the column `kind` by shading
    return {
        "name": name,
        "note": notes.get(name, TABLE_NOTES.get(name, "")),
        "seeds": seeds_line(table),
        "headings": [heading.replace(" ↓", "\u00a0↓").replace(" ↑", "\u00a0↑") for heading in shown.headings[first:]],
        "rows": [(kind, cells[first:]) for kind, cells in shown.rows],
        "numeric": shown.numeric[first:],
        "sortable": sum(kind != REFERENCE for kind, _ in shown.rows) > 1,
        "wide": "kind" in table or len(shown.headings) > 6,
    }


def _references(tables: Iterable[pd.DataFrame]) -> dict[str, str]:
    """Descriptions of the reference rows in these tables, by name."""
    names = {name for table in tables if "kind" in table for name in table.loc[table["kind"] == REFERENCE, "prune"]}
    return {name: text for name, text in REFERENCE_ROWS.items() if name in names}


def _picture(picture: Picture) -> dict[str, Any]:
    data = picture.png if isinstance(picture.png, bytes) else Path(picture.png).read_bytes()
    width, height = Image.open(io.BytesIO(data)).size
    wide = width > 2 * height or picture.chart is not None
    return {**picture._asdict(), "source": _inline(data, "png"), "wide": wide}


def _grid(grid: SampleGrid) -> dict[str, Any]:
    tiles = [[_tile(image) for image in images] for images in grid.columns.values()]
    rows = [(prompt, [column[index] for column in tiles]) for index, prompt in enumerate(grid.prompts)]
    return {"title": grid.title, "caption": grid.caption, "columns": list(grid.columns), "rows": rows, "row": grid.row}


def _group(gallery: Gallery) -> dict[str, Any]:
    totals = {"kept": gallery.kept_total, "dropped": gallery.dropped_total}
    tiles = {"kept": gallery.kept, "dropped": gallery.dropped}
    everything = max(sum(totals.values()), 1)
    kept = f"{totals['kept']:,} of {everything:,} kept, {totals['kept'] / everything:.1%}"
    return {
        "title": gallery.title,
        "counts": f"{totals['dropped']:,} images: {gallery.note}" if gallery.note else kept,
        "labels": ("dropped",) if gallery.note else ("kept", "dropped"),
        "shown": {
            label: f"{total:,}" if len(tiles[label]) == total else f"{len(tiles[label]):,} of {total:,}"
            for label, total in totals.items()
        },
        **{label: [_tile(image) for image in images] for label, images in tiles.items()},
    }


def _scene_pairs(scene: ScenePairs) -> dict[str, Any]:
    groups = [
        {
            "kind": kind,
            "title": title,
            "cards": [{"source": _tile(card.image), "captions": card.captions, "kept": card.kept} for card in cards],
        }
        for kind, (title, cards) in scene.groups.items()
    ]
    return {"title": scene.title, "counts": scene.counts, "groups": groups}


def _tile(image: np.ndarray) -> str:
    """A gallery tile as a data URL in high-quality WebP, which is a fifth of a PNG; galleries have a thousand tiles."""
    return _inline(_encode(image, "WEBP", quality=92), "webp")


def _encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format=kind, **options)
    return buffer.getvalue()


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
