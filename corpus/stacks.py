"""Products of one file a band, as Sentinel-2, Landsat and BigEarthNet are delivered: which files show one place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from corpus.raster import quiet_gdal
from runtime.errors import UserError
from runtime.notices import notice

#: A file's pixel size, in its name or its folder's: 10m, R20m.
_SIZE = r"r?(\d+)m"
#: What bands are called in the names of files; red edge and narrow infrared have a letter more (B8A).
_BAND = r"b(?:and[_ ]?)?\d{1,2}a?"
#: Polarisations of radar.
_RADAR = r"vv|vh|hh|hv"
#: Files that may hold a single band.
_RASTERS = (".tif", ".tiff", ".jp2", ".img", ".vrt")
#: What follows a product's name in those of its reflectances alone: LC09_…_T1_SR_B4 beside LC09_…_T1_QA_PIXEL.
_LEVEL = r"[_.\-](?:sr|st|toa|boa|refl)$"
#: A Sentinel-2 product's folder, and the only one in it whose rasters are images.
_SAFE, _SAFE_IMAGES = ".safe", "IMG_DATA"

#: A folder and the beginning of a name, both without band and pixel size.
Place = tuple[str, str]


def grouped(
    corpus: str, root: Path, files: Sequence[str], bands: Sequence[int | str] | None
) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """`stacks` of a corpus; how many there are, and what is left out, is reported on stderr in one line.

    Args:
        files: POSIX paths below the root.
        bands: `corpus.bands`.
    Raises:
        UserError: there is one file a band, and no names say which are shown.
    """
    stacked, others = stacks(files, bands or ())
    if stacked:
        example = f" (e.g. {min(others)})" if others else ""
        notice(
            f"{corpus}: {len(stacked):,} images are stacked from files of one band each; {len(others):,} other files "
            f"of these scenes are left out{example}"
        )
    elif not any(isinstance(band, str) for band in bands or ()):
        single = single_bands(files)
        if single and all(_has_one_band(root / file) for file in single[:3]):
            names = ", ".join(PurePosixPath(file).name for file in single[:3])
            example = "[VV,VH,VV]" if _place(single[0], _RADAR) else "[B04,B03,B02]"
            raise UserError(
                f"corpus.root={root} has one file a band ({names}, …): say which are red, green and blue by name, such "
                f"as corpus.bands={example}"
            )
    return stacked, others


def scene_folders(place: str) -> tuple[str, ...]:
    """The folders a place of `stacks` lies in but for those that are called as the place or are its product's."""
    *folders, name = place.lower().split("/")
    kept = place.split("/")[: len(folders)]
    product = next((at for at, folder in enumerate(folders) if folder.endswith(_SAFE)), len(folders))
    kept, folders = kept[:product], folders[:product]
    while folders and (folders[-1].startswith(name) or name.startswith(folders[-1])):
        kept.pop()
        folders.pop()
    return tuple(kept)


def place_of(file: str, names: Collection[str]) -> str | None:
    """The place of `stacks` that a file is about whose name begins as the place's, in the same folder; or None."""
    folder, slash, base = file.rpartition("/")
    stem = PurePosixPath(base).stem
    ends = sorted((result.start() for result in re.finditer(r"(?<=[A-Za-z0-9])(?![A-Za-z0-9])", stem)), reverse=True)
    return next((folder + slash + stem[:end] for end in ends if folder + slash + stem[:end] in names), None)


def stacks(files: Sequence[str], bands: Sequence[int | str]) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """Files that are the named bands of one place, and every further file of these scenes.

    The band stands in the file's name or in a folder's. Of a band in several pixel sizes the finest is taken. In a
    Sentinel-2 product only the folder IMG_DATA has images.

    Args:
        files: POSIX paths.
        bands: names such as B04; B4 and band4 are the same. A number is no name.
    Returns:
        by place (the first band's path without band, pixel size and suffix) a file for each band; and the files of
        these scenes that show something else, such as other bands or a map of classes.
    """
    if not all(isinstance(band, str) for band in bands):
        return {}, set()
    patterns = [_pattern(str(band)) for band in bands]
    positions: dict[Place, dict[int, str]] = defaultdict(dict)
    for file in sorted(files, key=lambda file: (_metres(file), file)):
        for position, pattern in enumerate(patterns):
            place = None if _beside_images(file) else _place(file, pattern)
            if place is not None:
                positions[place].setdefault(position, file)
    whole = {
        place: tuple(result[position] for position in range(len(bands)))
        for place, result in positions.items()
        if len(result) == len(bands)
    }
    used = {file for group in whole.values() for file in group}
    begun = {(folder, beginning.lower()) for folder, stem in whole for beginning in (stem, _product(stem))}
    others = {file for file in files if whole and file not in used and _belongs(file, begun)}
    return dict(sorted((_name(place, group[0]), group) for place, group in whole.items())), others


def single_bands(files: Sequence[str]) -> list[str]:
    """Files of a place that has at least three bands, or two polarisations, in files of their own; else none."""
    positions: dict[tuple[Place, int], list[str]] = defaultdict(list)
    for file in files:
        for pattern, least in ((_BAND, 3), (_RADAR, 2)):
            place = _place(file, pattern) if file.lower().endswith(_RASTERS) else None
            if place is not None:
                positions[place, least].append(file)
    return next((sorted(group) for (_, least), group in positions.items() if len(group) >= least), [])


def _pattern(band: str) -> str:
    numbered = re.fullmatch(r"b(?:and[_ ]?)?0*(\d+a?)", band.lower())
    return rf"b(?:and[_ ]?)?0*{numbered[1]}" if numbered else re.escape(band.lower())


def _place(file: str, pattern: str) -> Place | None:
    """A path without the band that the pattern finds in it, and without pixel sizes; None: no such band."""
    path = PurePosixPath(file)
    stem, result = _without(path.stem, pattern)
    folders = []
    for folder in path.parent.parts:
        rest, inside = _without(folder, pattern)
        folders.append(rest if inside else folder)
        result |= inside
    if not result:
        return None
    return _folder(folders), _without(stem, _SIZE)[0]


def _without(text: str, pattern: str) -> tuple[str, bool]:
    """A name without the words that fit a pattern, and whether there were any."""
    text, count = re.subn(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", "", text, flags=re.IGNORECASE)
    return (re.sub(r"[_.\-]{2,}", "_", text).strip("_.-"), True) if count else (text, False)


def _folder(parts: Sequence[str]) -> str:
    return "/".join(part for part in parts if part and not re.fullmatch(_SIZE, part, re.IGNORECASE))


def _name(place: Place, file: str) -> str:
    """What a place is called: without a name of its own as its folder, and without that as its first file."""
    return "/".join(filter(None, place)) or PurePosixPath(file).stem


def _product(stem: str) -> str:
    return re.sub(_LEVEL, "", stem, flags=re.IGNORECASE)


def _belongs(file: str, begun: set[Place]) -> bool:
    """Whether a file is a further band of a place, or its name begins as the place's, in the same folder."""
    path, band = PurePosixPath(file), _place(file, _BAND)
    folder, stem = _folder(path.parent.parts), path.stem.lower()
    ends = [0, *(result.start() for result in re.finditer(r"(?<=[a-z0-9])(?![a-z0-9])", stem))]
    if _beside_images(file) or (band is not None and (band[0], band[1].lower()) in begun):
        return True
    return any((folder, stem[:end]) in begun for end in ends)


def _beside_images(file: str) -> bool:
    """Whether a file is of a Sentinel-2 product but no image of it: a mask of clouds or of defects, a preview."""
    folders = PurePosixPath(file).parent.parts
    return any(folder.lower().endswith(_SAFE) for folder in folders) and _SAFE_IMAGES not in folders


def _has_one_band(path: Path) -> bool:
    import rasterio

    try:
        with quiet_gdal(), rasterio.open(path) as raster:
            return raster.count == 1
    except Exception:  # its own row says that it cannot be opened
        return False


def _metres(file: str) -> int:
    sizes = re.findall(rf"(?<![a-z0-9]){_SIZE}(?![a-z0-9])", file, re.IGNORECASE)
    return min(map(int, sizes), default=0)
