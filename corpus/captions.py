"""Captions, scene words and facts out of the rows that people keep beside their images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from typing import Any


def caption_facts(row: Mapping[str, Any], scene: str) -> dict[str, Any]:
    """`caption`, the first that a row has (`captions`, a list or one; `text`; `caption`), and `captions` if several.

    A row without one is called after its scene, and by "" where there is none.
    """
    found = row.get("captions") or row.get("text") or row.get("caption") or []
    texts = [text.strip() for text in (found if isinstance(found, (list, tuple)) else [found]) if isinstance(text, str)]
    texts = [encodable(text) for text in texts if text] or ([f"a satellite image of {words(scene)}"] if scene else [""])
    return {"caption": texts[0], **({"captions": texts} if len(texts) > 1 else {})}


def words(name: str) -> str:
    """`BaseballField`, `baseball_field` and `baseball-field` to "baseball field"."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.sub(r"[\s_-]+", " ", spaced).strip().lower()


def scalars(row: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The numbers and texts of a row that the manifest has no word for: place, resolution, date, whatever else.

    Also left out is `ground`, a promise that only a source which cuts its images itself can make.
    """
    own = ("id", "scene", "label", "caption", "captions", "text", "stamp", "readable", "reason", "file_name", "split")
    own = (*own, "ground")
    dated = {key: value.isoformat() if isinstance(value, date) else value for key, value in row.items()}
    known = {str(key): value for key, value in dated.items() if isinstance(value, (str, int, float, bool))}
    return {key: _storable(value) for key, value in known.items() if key not in own}


def encodable(text: str) -> str:
    """Halves of characters, as cut emojis leave them, escaped: no file could hold them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return encodable(value)
    return str(value) if isinstance(value, int) and abs(value) >= 2**63 else value  # beyond a column of integers
