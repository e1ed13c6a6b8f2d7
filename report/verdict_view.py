"""The verdict in the form that the page shows: texts, table cells, and positions of intervals on a common scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from report.results import Row
from report.verdict import CLAIM, SEEDS, Comparison, compare, headline, seeds_note, sentences

#: Titles of the tables by stage; the table of subsets is folded, because the claim is about generated images.
TITLES = {
    "generation": "Generated images, KID×10³ of {} minus the other method's",
    "subset": "The kept images themselves, before any training, KID×10³ of {} minus the other method's",
}
_STATUS = {"The rows support the claim.": "better", "The rows do not support the claim.": "worse"}


def verdict_view(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Data for the page's template; None if no rows can be compared."""
    result = {stage: compare(rows, stage) for stage in TITLES}
    if not any(result.values()):
        return None
    generated = result["generation"]
    message = headline(generated)
    return {
        "claim": CLAIM,
        "headline": message,
        "status": next((status for text, status in _STATUS.items() if message.startswith(text)), "tie"),
        "sentences": sentences(generated),
        "note": " ".join(text for text in (_HOW, seeds_note(generated)) if text),
        "groups": [
            {
                "title": TITLES[stage].format(subject),
                "folded": stage != "generation",
                **_table([item for item in items if item.subject == subject]),
            }
            for stage, items in result.items()
            for subject in dict.fromkeys(item.subject for item in items)
        ],
    }


_HOW = (
    "Measured with the encoder that takes no part in selection or training. Below zero is better. A difference smaller "
    "than its interval is a tie."
)


def _table(items: Sequence[Comparison]) -> dict[str, Any]:
    """Headings and rows for one run; corpus, ratio and step are shown if they differ."""
    several = len({(item.corpus, item.ratio, item.step) for item in items}) > 1
    ends = [abs(end) for item in items for end in (item.low, item.high, item.mean) if math.isfinite(end)]
    scale = max(ends, default=0.0) or 1.0
    columns = [_cells(item, several) for item in items]
    headings = [{"text": text, "sort": "number" if cell["number"] else "text"} for text, cell in columns[0].items()]
    rows = [
        {"cells": list(cells.values()), "word": item.word, "range": _range(item, scale)}
        for item, cells in zip(items, columns, strict=True)
    ]
    return {"headings": headings, "rows": rows}


def _cells(item: Comparison, several: bool) -> dict[str, dict[str, Any]]:
    """Cells of a comparison by heading."""
    known = item.word != "unknown"
    where = {"corpus": _cell(item.corpus), "ratio": _number(item.ratio), "step": _number(item.step)}
    return {
        "compared with": _cell(item.other),
        "held-out set": _cell(item.held_out),
        **(where if several else {}),
        "verdict": _cell(item.word, word=True),
        "difference": _number(item.mean, f"{item.mean:+.1f}"),
        "95 % interval": _number(item.low if known else None, f"[{item.low:+.1f}, {item.high:+.1f}]"),
        "interval of": _cell(f"{item.seeds} seeds" if item.basis == SEEDS else f"1 seed, {item.basis}"),
    }


def _cell(text: str, *, word: bool = False) -> dict[str, Any]:
    return {"text": text, "value": text, "number": False, "word": word}


def _number(value: float | None, text: str | None = None) -> dict[str, Any]:
    """A number for sorting, and its text."""
    shown = "–" if value is None else (text or f"{value:g}")
    return {"text": shown, "value": "" if value is None else value, "number": True, "word": False}


def _range(item: Comparison, scale: float) -> dict[str, float] | None:
    """Left end, width and mean of an interval, in percent of a bar centred on zero; None without an interval."""
    if item.word == "unknown":
        return None
    low, mean, high = (round(50 + 50 * value / scale, 2) for value in (item.low, item.mean, item.high))
    return {"low": low, "width": round(max(high - low, 0.5), 2), "mean": mean}
