"""The report on new images: how they compare with a kept set, and which are worth adding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from corpus.index import Corpus
from report.figures import contact_sheet
from report.page import Picture, SampleGrid, png_bytes, write_report
from report.prune_report import percentage

#: Number of images of a sheet, of images per row, and of pairs.
SHOWN, COLUMNS, PAIRS = 48, 12, 12
#: Smallest side of a shown image in screen pixels.
SIDE = 96
#: Meanings of the verdicts, the most interesting first.
MEANINGS = {
    "worth_adding": "new compared with the kept images, and within the budget",
    "not_needed": "new compared with the kept images, but other images fill the budget",
    "redundant": "its embedding is so similar to that of a kept or new image that it adds nothing",
    "copy": "equal in every pixel to a kept or new image",
    "near_duplicate": "the same picture as a kept or new image: their pixels correlate",
    "low_entropy": "local information entropy below the threshold, for example water, cloud or no data",
    "unreadable": "damaged, or in a format that no decoder reads",
}


class Images(Protocol):
    """Images uint8 [N, R, R, 3] that are read when they are accessed."""

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


def write_arrivals_report(
    path: Path | str,
    table: pd.DataFrame,
    summary: Mapping[str, Any],
    images: Images,
    kept: Corpus,
    generator: np.random.Generator,
) -> None:
    """Write the report of an answer.

    Args:
        path: path of the page.
        table: the rows of arrivals.parquet, with the column `row`, their row in `images`.
        summary: the content of summary.json.
        images: the new images.
        kept: the corpus of the kept images.
        generator: draws the images shown.
    """
    counts = summary["verdicts"]
    write_report(
        path,
        title=f"{summary['added']:,} of {summary['arrived']:,} new images are worth adding",
        intro=f"New images, compared with the {summary['kept']:,} images that {summary['method']} kept. The kept set "
        "is unchanged: this is a proposal.",
        key_figures=_key_figures(summary),
        tables={name: part for name, part in {"verdicts": _verdicts(counts), "scenes": _scenes(summary)}.items()},
        sheets=_sheets(table, images, generator),
        grids=[grid for grid in (_repeated(table, images, kept), _swaps(table, images, kept)) if grid is not None],
        headings={"sheets": "New images"},
        notes={
            "tables": "Exact counts of all images that have arrived so far.",
            "sheets": "A random sample of every verdict, and the most similar pairs.",
            "verdicts": "Each image has one verdict: the first one that applies, read from the bottom of this table.",
            "scenes": "Kept, arrived and added images by scene. Open: similar to no known scene.",
        },
    )


def _key_figures(summary: Mapping[str, Any]) -> dict[str, str]:
    limits = summary["thresholds"]
    similar = limits["redundant_similarity"]
    return {
        "arrived": f"{summary['arrived']:,}",
        "added": f"{summary['added']:,}",
        "budget": str(summary["budget"]),
        "images of unknown scenes": f"{summary['unknown_scene']:,}",
        "entropy threshold": f"{limits['entropy_bits']:.2f} bits",
        "redundant from a cosine of": f"{similar['known scene']:.3f}, in unknown scenes {similar['unknown scene']:.3f}",
        "index of kept images": f"{summary['index_bytes'] / 1e6:,.1f} MB",
        "seconds": f"{sum(summary['seconds'].values()):,.1f}",
    }


def _verdicts(counts: Mapping[str, int]) -> pd.DataFrame:
    total = max(sum(counts.values()), 1)
    return pd.DataFrame(
        [
            {
                "verdict": name,
                "images": f"{counts[name]:,}",
                "fraction": percentage(counts[name] / total),
                "meaning": text,
            }
            for name, text in MEANINGS.items()
        ]
    )


def _scenes(summary: Mapping[str, Any]) -> pd.DataFrame:
    rows = sorted(summary["scenes"].items(), key=lambda item: (-item[1]["arrived"], item[0]))
    return pd.DataFrame([{"scene": name, **{key: f"{value:,}" for key, value in part.items()}} for name, part in rows])


def _sheets(table: pd.DataFrame, images: Images, generator: np.random.Generator) -> list[Picture]:
    """One sheet for every verdict and one for unknown scenes; unreadable images cannot be shown."""
    groups = {name: (table["verdict"] == name, text) for name, text in MEANINGS.items() if name != "unreadable"}
    groups["unknown_scene"] = (table["unknown_scene"], "similar to no known scene, whatever the verdict")
    sheets = []
    for name, (chosen, text) in groups.items():
        locations = np.flatnonzero(chosen.to_numpy(dtype=bool))
        if not len(locations):
            continue
        shown = table["row"].to_numpy()[np.sort(generator.permutation(locations)[:SHOWN])]
        pixels = np.asarray(images[shown])
        sheet = contact_sheet(pixels, COLUMNS, scale=max(1, round(SIDE / pixels.shape[1])))
        title = f"{name.replace('_', ' ').capitalize()}: {len(locations):,}"
        sheets.append(Picture(title, f"{len(shown):,} of them: {text}.", png_bytes(sheet), folded=len(sheets) > 2))
    return sheets


def _repeated(table: pd.DataFrame, images: Images, kept: Corpus) -> SampleGrid | None:
    """Near-duplicates next to the images that they repeat, the most similar first."""
    chosen = table[table["verdict"] == "near_duplicate"].sort_values(["correlation", "id"], ascending=[False, True])
    chosen = chosen.head(PAIRS)
    if chosen.empty:
        return None
    arrived = pd.Series(table["row"].to_numpy(), index=table["id"])
    arrived = arrived[~arrived.index.duplicated()]
    others = np.stack(
        [
            _kept_image(kept, row.duplicate_of)
            if row.duplicate_in == "kept"
            else images[np.array([arrived[row.duplicate_of]])][0]
            for row in chosen.itertuples()
        ]
    )
    lines = [
        f"{row.id} and {row.duplicate_of} ({row.duplicate_in}): {row.correlation:.3f}" for row in chosen.itertuples()
    ]
    columns = {"arrived": np.asarray(images[chosen["row"].to_numpy()]), "repeats": others}
    return SampleGrid(
        "Near-duplicates", "The most similar pairs, by the correlation of their brightness.", columns, lines, "pair"
    )


def _swaps(table: pd.DataFrame, images: Images, kept: Corpus) -> SampleGrid | None:
    """Arrivals next to the kept images that they would replace."""
    chosen = table[table["replaces"] != ""].sort_values(["gain", "id"], ascending=[False, True]).head(PAIRS)
    if chosen.empty:
        return None
    columns = {
        "arrived": np.asarray(images[chosen["row"].to_numpy()]),
        "kept": np.stack([_kept_image(kept, identifier) for identifier in chosen["replaces"]]),
    }
    lines = [f"{row.id} for {row.replaces}: gain {row.gain:.3f}" for row in chosen.itertuples()]
    caption = "New images that could replace a kept image with a similar kept image. A proposal: nothing was changed."
    return SampleGrid("Exchanges", caption, columns, lines, "exchange")


def _kept_image(kept: Corpus, identifier: str) -> np.ndarray:
    [row] = np.flatnonzero((kept.manifest["id"] == identifier).to_numpy())
    return np.array(kept.images[row])
