"""Products of one file a band, as Sentinel-2 and Landsat are delivered: which files show one place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

#: A file's pixel size, in its name or its folder's: 10m, R20m.
_SIZE = r"r?(\d+)m"
#: What bands are called in the names of files; red edge and narrow infrared have a letter more (B8A).
_BAND = r"b\d{1,2}a?"


def stacks(files: Sequence[str], bands: Sequence[int | str]) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """Files that are the named bands of one place, and every further file of these places.

    Of a band in several pixel sizes the finest is taken.

    Args:
        files: POSIX paths.
        bands: names such as B04; B4 is the same. A number is no name.
    Returns:
        by place (the first band's path without band, pixel size and suffix) a file for each band; and the files of
        these places that show something else, such as other bands or a map of classes.
    """
    if not all(isinstance(band, str) for band in bands):
        return {}, set()
    places: dict[str, dict[int, str]] = defaultdict(dict)
    for file in sorted(files, key=lambda file: (_metres(file), file)):
        for position, band in enumerate(bands):
            place = _place(file, _pattern(str(band)))
            if place is not None:
                places[place].setdefault(position, file)
    whole = {
        place: tuple(found[position] for position in range(len(bands)))
        for place, found in places.items()
        if len(found) == len(bands)
    }
    used = {file for group in whole.values() for file in group}
    others = {file for file in files if file not in used and _belongs(file, whole)}
    return dict(sorted(whole.items())), others


def single_bands(files: Sequence[str]) -> list[str]:
    """Files of a place that has at least three bands in files of their own; empty where there is none."""
    places: dict[str, list[str]] = defaultdict(list)
    for file in files:
        place = _place(file, _BAND)
        if place is not None:
            places[place].append(file)
    return next((sorted(group) for group in places.values() if len(group) >= 3), [])


def _pattern(band: str) -> str:
    numbered = re.fullmatch(r"b0*(\d+a?)", band.lower())
    return f"b0*{numbered[1]}" if numbered else re.escape(band.lower())


def _place(file: str, pattern: str) -> str | None:
    """A path without the band that the pattern finds in its name, and without pixel sizes; None: no such band."""
    path = PurePosixPath(file)
    stem, found = re.subn(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])", "", path.stem, flags=re.IGNORECASE)
    if not found:
        return None
    stem = re.sub(rf"(?<![a-z0-9]){_SIZE}(?![a-z0-9])", "", stem, flags=re.IGNORECASE)
    stem = re.sub(r"[_.\-]{2,}", "_", stem).strip("_.-")
    folders = [part for part in path.parent.parts if not re.fullmatch(_SIZE, part, re.IGNORECASE)]
    return "/".join([*folders, stem])


def _belongs(file: str, places: dict[str, tuple[str, ...]]) -> bool:
    """Whether a file's name begins as a place's does, in the same folder but for pixel sizes."""
    path = PurePosixPath(file)
    folders = [part for part in path.parent.parts if not re.fullmatch(_SIZE, part, re.IGNORECASE)]
    parent = "/".join(folders)
    for place in places:
        folder, _, stem = place.rpartition("/")
        if folder == parent and re.match(rf"{re.escape(stem)}(?![a-z0-9])", path.stem, re.IGNORECASE):
            return True
    return False


def _metres(file: str) -> int:
    sizes = re.findall(rf"(?<![a-z0-9]){_SIZE}(?![a-z0-9])", file, re.IGNORECASE)
    return min(map(int, sizes), default=0)
