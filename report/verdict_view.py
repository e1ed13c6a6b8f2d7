"""The verdict as the page shows it: texts, table cells, and where each interval lies on a common scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from report.results import Row
from report.verdict import CLAIM, SEEDS, Comparison, compare, headline, seeds_note, sentences

#: Titles of the tables by stage; the subset's is folded: the claim is about generated images.
TITLES = {
    "generation": "Generated images: KID×10³ of RS-Prune minus the other method's",
    "subset": "The kept images themselves, before any training: the same differences",
}
_STATUS = {"The rows support the claim.": "better", "The rows do not support the claim.": "worse"}


def verdict_view(rows: Sequence[Row]) -> dict[str, Any] | None:
    """What the page's template asks for; None where no row can be compared."""
    found = {stage: compare(rows, stage) for stage in TITLES}
    if not any(found.values()):
        return None
    generated = found["generation"]
    said = headline(generated)
    return {
        "claim": CLAIM,
        "headline": said,
        "status": next((status for text, status in _STATUS.items() if said.startswith(text)), "tie"),
        "sentences": sentences(generated),
        "note": " ".join(text for text in (_HOW, seeds_note(generated)) if text),
        "groups": [
            {"title": TITLES[stage], "folded": stage != "generation", **_table(items)}
            for stage, items in found.items()
            if items
        ],
    }


_HOW = (
    "Below zero is better, by the encoder that takes no part in selection or training. A difference smaller than its "
    "interval is a tie."
)


def _table(items: Sequence[Comparison]) -> dict[str, Any]:
    """Headings and rows; corpus, ratio and step are shown where they differ."""
    several = len({(item.corpus, item.ratio, item.step) for item in items}) > 1
    ends = [abs(end) for item in items for end in (item.low, item.high, item.mean) if math.isfinite(end)]
    scale = max(ends, default=0.0) or 1.0
    texts = ["held-out set", "run", "compared with"]
    headings = [*(["corpus", "ratio", "step"] if several else []), *texts]
    headings = [{"text": text, "sort": "number" if text in ("ratio", "step") else "text"} for text in headings]
    headings += [{"text": "difference", "sort": "number"}, {"text": "95 % interval", "sort": "number"}]
    headings += [{"text": "verdict", "sort": "text"}, {"text": "interval of", "sort": "text"}]
    rows = [{"cells": _cells(item, several), "word": item.word, "range": _range(item, scale)} for item in items]
    return {"headings": headings, "rows": rows}


def _cells(item: Comparison, several: bool) -> list[dict[str, Any]]:
    known = item.word != "unknown"
    basis = f"{item.seeds} seeds" if item.basis == SEEDS else f"1 seed, {item.basis}"
    where = [_cell(item.corpus), _cell(item.ratio, number=True), _cell(item.step, number=True)] if several else []
    return [
        *where,
        _cell(item.held_out),
        _cell(item.subject),
        _cell(item.other),
        {"text": f"{item.mean:+.1f}", "value": item.mean, "number": True, "word": False},
        {
            "text": f"[{item.low:+.1f}, {item.high:+.1f}]" if known else "–",
            "value": item.low if known else "",
            "number": True,
            "word": False,
        },
        {"text": item.word, "value": item.word, "number": False, "word": True},
        _cell(basis),
    ]


def _cell(value: object, *, number: bool = False) -> dict[str, Any]:
    text = "–" if value is None else str(value)
    return {"text": text, "value": "" if value is None else value, "number": number, "word": False}


def _range(item: Comparison, scale: float) -> dict[str, float] | None:
    """Left end, width and mean of an interval in percent of a bar whose middle is zero; None without an interval."""
    if item.word == "unknown":
        return None
    low, mean, high = (round(50 + 50 * value / scale, 2) for value in (item.low, item.mean, item.high))
    return {"low": low, "width": round(max(high - low, 0.5), 2), "mean": mean}
