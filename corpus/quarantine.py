"""Unreadable images of a corpus: their table, their reasons in groups with counts, and the report on stderr."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from corpus.masks import MISSING, PREFIX
from runtime.errors import UserError
from runtime.notices import notice

#: File with id and reason of the unreadable images, in the directory of a corpus stage and of a selection.
QUARANTINE = "quarantine.parquet"
#: Largest number of groups of reasons that a line names.
NAMED = 5
#: Largest length of a reason in a line, in characters.
LONGEST = 120
#: Parts of a reason that differ between images: a colour, a text in brackets or quotes, a number.
VALUE = re.compile(r"#[0-9a-fA-F]{3,8}\b|\([^()]*\)|'[^']*'|(?<![\w.])-?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


def quarantined(manifest: pd.DataFrame) -> pd.DataFrame:
    """Table with id and reason of every unreadable image."""
    return manifest.loc[~manifest["readable"], ["id", "reason"]].reset_index(drop=True)


def reason_counts(reasons: Iterable[str]) -> dict[str, int]:
    """Number of images for each reason, the most frequent first.

    Reasons that differ only in numbers, colours or texts in brackets or quotes form one group. The name of a group has
    "…" in place of a value that differs within the group: `mask: class … of 2`.
    """
    counts: dict[str, int] = defaultdict(int)
    for reason in reasons:
        counts[str(reason).replace("\0", " ")] += 1
    groups: dict[str, list[str]] = defaultdict(list)
    for reason in counts:
        groups[VALUE.sub("\0", reason)].append(reason)
    named = {_name(template, group): sum(counts[reason] for reason in group) for template, group in groups.items()}
    return dict(sorted(named.items(), key=lambda item: (-item[1], item[0])))


def _name(template: str, reasons: list[str]) -> str:
    """The reason itself, or the template with the values that all reasons of the group share."""
    values = zip(*(VALUE.findall(reason) for reason in reasons), strict=True)
    filled = iter([result[0] if len(set(result)) == 1 else "…" for result in values])
    return re.sub("\0", lambda _: next(filled), template)


def counted(counts: dict[str, int]) -> str:
    """Text with the `NAMED` most frequent reasons, such as `duplicate key 20, empty file 3 and 2 more reasons`."""
    named = [f"{_short(reason)} {count:,}" for reason, count in list(counts.items())[:NAMED]]
    rest = len(counts) - len(named)
    more = f" and {rest} more reason{'s' if rest > 1 else ''}" if rest else ""
    return ", ".join(named) + more


def _short(reason: str) -> str:
    reason = " ".join(reason.split())
    return reason if len(reason) <= LONGEST else reason[: LONGEST - 1] + "…"


def announce(manifest: pd.DataFrame, name: str, directory: Path) -> None:
    """Print one line on stderr: how many images of a corpus are quarantined, and why; nothing if there are none.

    Args:
        manifest: manifest of the corpus, with `readable` and `reason`.
        name: name of the corpus and its split, for the line.
        directory: directory of the corpus stage, which holds the table.
    Raises:
        UserError: no image can be read.
    """
    result, table = quarantined(manifest), directory / QUARANTINE
    if result.empty:
        return
    reasons = counted(reason_counts(result["reason"]))
    if len(result) == len(manifest):
        raise UserError(
            f"{name}: none of {len(manifest):,} images can be read: {reasons} (table: {table}): correct these "
            "problems, or give other images"
        )
    notice(f"{name}: {len(result):,} of {len(manifest):,} images quarantined: {reasons} (table: {table})")


def announce_masks(manifest: pd.DataFrame, name: str) -> None:
    """Print one line on stderr: how many of the readable images have a mask."""
    reasons = manifest["reason"]
    able = manifest["readable"] | reasons.str.startswith(PREFIX)
    missing = manifest.loc[reasons == PREFIX + MISSING, "id"]
    example = f"; {len(missing):,} missing (e.g. {missing.iloc[0]})" if len(missing) else ""
    notice(f"{name}: masks: {able.sum() - len(missing):,} of {able.sum():,} images have one{example}")
