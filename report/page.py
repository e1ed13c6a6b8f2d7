"""One self-contained HTML page: tables, figures, sample sheets and kept/dropped galleries, every picture inlined."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from eval.reference_rows import REFERENCE_ROWS
from report.tables import REFERENCE, TABLE_NOTES, seeds_line, show

#: The sentence under each section's heading.
LEADS = {
    "tables": "What was measured, one row a method. ↓ lower is better, ↑ higher is better; the best measured value of "
    "a column is marked. Brackets are 95\u00a0% intervals of the sampling of images alone. They do not say what "
    "another training seed would change, so a difference within one seed is no proof. Shaded rows are reference rows: "
    "what the metrics say of real or merely re-encoded images. No model trained on these latents can be expected to do "
    "better than reconstructed_train.",
    "figures": "How the numbers come about. Colours mean the same method in every figure.",
    "sheets": "Drawn or restored images as they are, enlarged without smoothing, not picked by hand. Look for "
    "structure that the metrics may miss: coasts, texture, repeated patterns.",
    "galleries": "A random sample of the kept and of the dropped images of every scene. Good pruning keeps variety and "
    "drops repetition, empty and broken images. Open a scene to see it.",
}


@dataclass(frozen=True)
class Gallery:
    """Sampled images of one scene.

    Attributes:
        title: the scene.
        kept, dropped: uint8 [n, H, W, 3] and [m, H, W, 3], the images to show.
        kept_total, dropped_total: how many there are in all.
    """

    title: str
    kept: np.ndarray
    dropped: np.ndarray
    kept_total: int
    dropped_total: int


def png_bytes(image: Image.Image | np.ndarray) -> bytes:
    """A PIL image or uint8 [H, W, 3] as PNG."""
    return _encode(image, "PNG", optimize=True)


def figure_bytes(figure: Figure, dpi: int = 150) -> bytes:
    """A Matplotlib figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def write_report(
    path: Path | str,
    *,
    title: str,
    intro: str,
    tables: Mapping[str, pd.DataFrame] | None = None,
    figures: Sequence[tuple[str, str, bytes | Path]] = (),
    galleries: Mapping[str, Sequence[Gallery]] | None = None,
    sheets: Sequence[tuple[str, str, bytes | Path]] = (),
    facts: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write the page; empty sections are left out.

    Args:
        intro: plain text, blank lines part paragraphs.
        tables: by name; frames of `report.tables.build_tables` get directions and best marks, others stay as they are.
        figures, sheets: title, caption, and the PNG as bytes or file.
        galleries: by method.
        facts: short values for the head of the page.
        notes: replaces the text under a table (by its name) or under a section's heading (a key of `LEADS`).
    """
    notes = notes or {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.j2").render(
        title=title,
        intro=[paragraph.strip() for paragraph in intro.split("\n\n") if paragraph.strip()],
        facts={name: str(value) for name, value in (facts or {}).items()},
        leads={section: notes.get(section, lead) for section, lead in LEADS.items()},
        references=_references((tables or {}).values()),
        tables=[_table(name, table, notes) for name, table in (tables or {}).items()],
        figures=[_picture(*figure) for figure in figures],
        sheets=[_picture(*sheet) for sheet in sheets],
        galleries={method: [_group(gallery) for gallery in groups] for method, groups in (galleries or {}).items()},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, path)


def _table(name: str, table: pd.DataFrame, notes: Mapping[str, str]) -> dict[str, Any]:
    shown = show(table)
    first = int(shown.headings[0] == "kind")  # told by shading here
    return {
        "name": name,
        "note": notes.get(name, TABLE_NOTES.get(name, "")),
        "seeds": seeds_line(table),
        "headings": [heading.replace(" ↓", "\u00a0↓").replace(" ↑", "\u00a0↑") for heading in shown.headings[first:]],
        "rows": [(kind, cells[first:]) for kind, cells in shown.rows],
        "numeric": shown.numeric[first:],
        "wide": "kind" in table or len(shown.headings) > 6,
    }


def _references(tables: Iterable[pd.DataFrame]) -> dict[str, str]:
    """What the reference rows in these tables are, by name."""
    names = {name for table in tables if "kind" in table for name in table.loc[table["kind"] == REFERENCE, "prune"]}
    return {name: text for name, text in REFERENCE_ROWS.items() if name in names}


def _picture(title: str, caption: str, png: bytes | Path) -> dict[str, Any]:
    data = png if isinstance(png, bytes) else Path(png).read_bytes()
    width, height = Image.open(io.BytesIO(data)).size
    return {"title": title, "caption": caption, "source": _inline(data, "png"), "wide": width > 2 * height}


def _group(gallery: Gallery) -> dict[str, Any]:
    totals = {"kept": gallery.kept_total, "dropped": gallery.dropped_total}
    tiles = {"kept": gallery.kept, "dropped": gallery.dropped}
    everything = max(sum(totals.values()), 1)
    return {
        "title": gallery.title,
        "counts": f"{totals['kept']:,} of {everything:,} kept, {totals['kept'] / everything:.1%}",
        "shown": {
            label: f"{total:,}" if len(tiles[label]) == total else f"{len(tiles[label]):,} of {total:,}"
            for label, total in totals.items()
        },
        **{label: [_tile(image) for image in images] for label, images in tiles.items()},
    }


def _tile(image: np.ndarray) -> str:
    """A gallery tile as a data address: WebP at high quality is a fifth of a PNG, and galleries hold a thousand."""
    return _inline(_encode(image, "WEBP", quality=92), "webp")


def _encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format=kind, **options)
    return buffer.getvalue()


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
