"""Captions, scene words and facts out of the rows that people keep beside their images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def caption_of(row: Mapping[str, Any], scene: str) -> str:
    """The caption of a row (`captions`, the first; `text`; `caption`), else one made of the scene, else ""."""
    captions = row.get("captions") or [row.get("text") or row.get("caption")]
    caption = captions if isinstance(captions, str) else captions[0]
    if isinstance(caption, str) and caption.strip():
        return caption.strip()
    return f"a satellite image of {words(scene)}" if scene else ""


def words(name: str) -> str:
    """`BaseballField`, `baseball_field` and `baseball-field` to "baseball field"."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.sub(r"[\s_-]+", " ", spaced).strip().lower()


def scalars(row: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The numbers and texts of a row that the manifest has no word for: place, resolution, date, whatever else."""
    own = ("id", "scene", "label", "caption", "text", "stamp", "readable", "reason", "file_name")
    known = {str(key): value for key, value in row.items() if isinstance(value, (str, int, float, bool))}
    return {key: value for key, value in known.items() if key not in own}
