"""Grouping of products with one file per band (Sentinel-2, Landsat, BigEarthNet): which files show the same location.

In this module, a "place" is the common path of the files of one image, without band and pixel size.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from corpus.raster import quiet_gdal
from runtime.errors import UserError
from runtime.notices import notice

#: Pattern of the pixel size in the name of a file or folder: 10m, R20m.
_SIZE = r"r?(\d+)m"
#: Pattern of bands in the names of files; red edge and narrow infrared bands can have an additional letter (B8A).
_BAND = r"b(?:and[_ ]?)?\d{1,2}a?"
#: Pattern of radar polarisations.
_RADAR = r"vv|vh|hh|hv"
#: Suffixes of files that may hold a single band.
_RASTERS = (".tif", ".tiff", ".jp2", ".img", ".vrt")
#: Part that follows the product's name only in files of reflectances: LC09_…_T1_SR_B4, but LC09_…_T1_QA_PIXEL.
_LEVEL = r"[_.\-](?:sr|st|toa|boa|refl)$"
#: Suffix of the folder of a Sentinel-2 product, and the only sub-folder whose rasters are images.
_SAFE, _SAFE_IMAGES = ".safe", "IMG_DATA"

#: A folder and the beginning of a file name, both without band and pixel size.
Place = tuple[str, str]


def grouped(
    corpus: str, root: Path, files: Sequence[str], bands: Sequence[int | str] | None
) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """`stacks` of a corpus; one line on stderr reports the number of stacks and the files that are left out.

    Args:
        corpus: name of the corpus, for messages.
        root: folder of the corpus.
        files: POSIX paths relative to the root.
        bands: the option `corpus.bands`.
    Raises:
        UserError: the corpus has one file per band, and `bands` does not name the bands to show.
    """
    stacked, others = stacks(files, bands or ())
    if stacked:
        example = f" (e.g. {min(others)})" if others else ""
        notice(
            f"{corpus}: {len(stacked):,} images are stacked from single-band files; {len(others):,} other files of "
            f"these scenes are left out{example}"
        )
    elif not any(isinstance(band, str) for band in bands or ()):
        single = single_bands(files)
        if single and all(_has_one_band(root / file) for file in single[:3]):
            names = ", ".join(PurePosixPath(file).name for file in single[:3])
            example = "[VV,VH,VV]" if _place(single[0], _RADAR) else "[B04,B03,B02]"
            raise UserError(
                f"corpus.root={root} has one file per band ({names}, …): name the bands for red, green and blue, for "
                f"example corpus.bands={example}"
            )
    return stacked, others


def scene_folders(place: str) -> tuple[str, ...]:
    """The folders of a place of `stacks`, without folders that are named like the place or belong to its product."""
    *folders, name = place.lower().split("/")
    kept = place.split("/")[: len(folders)]
    product = next((at for at, folder in enumerate(folders) if folder.endswith(_SAFE)), len(folders))
    kept, folders = kept[:product], folders[:product]
    while folders and (folders[-1].startswith(name) or name.startswith(folders[-1])):
        kept.pop()
        folders.pop()
    return tuple(kept)


def place_of(file: str, names: Collection[str]) -> str | None:
    """The place of `stacks` in the same folder whose name the file's name begins with, or None."""
    folder, slash, base = file.rpartition("/")
    stem = PurePosixPath(base).stem
    ends = sorted((result.start() for result in re.finditer(r"(?<=[A-Za-z0-9])(?![A-Za-z0-9])", stem)), reverse=True)
    return next((folder + slash + stem[:end] for end in ends if folder + slash + stem[:end] in names), None)


def stacks(files: Sequence[str], bands: Sequence[int | str]) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """Group the files that hold the named bands of one place, and find all further files of these scenes.

    The band is part of the name of the file or of a folder. If a band exists in several pixel sizes, the finest is
    used. In a Sentinel-2 product, only the folder IMG_DATA contains images.

    Args:
        files: POSIX paths.
        bands: names such as B04; B4 and band4 are the same. A number is not a name.
    Returns:
        a dictionary from each place (path of the first band without band, pixel size and suffix) to one file per band;
        and the files of these scenes that show something else, such as other bands or a class map.
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
    """Files of a place that has at least three bands, or two polarisations, in separate files; empty if none has."""
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
    """The place of a path: the path without the band that matches the pattern and without pixel sizes, else None."""
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
    """A name without the words that match a pattern, and whether there were any."""
    text, count = re.subn(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", "", text, flags=re.IGNORECASE)
    return (re.sub(r"[_.\-]{2,}", "_", text).strip("_.-"), True) if count else (text, False)


def _folder(parts: Sequence[str]) -> str:
    return "/".join(part for part in parts if part and not re.fullmatch(_SIZE, part, re.IGNORECASE))


def _name(place: Place, file: str) -> str:
    """Name of a place; if it is empty, the name of its folder; if there is no folder, the name of its first file."""
    return "/".join(filter(None, place)) or PurePosixPath(file).stem


def _product(stem: str) -> str:
    return re.sub(_LEVEL, "", stem, flags=re.IGNORECASE)


def _belongs(file: str, begun: set[Place]) -> bool:
    """Whether a file is a further band of a place, or has a name that begins with the place's in the same folder."""
    path, band = PurePosixPath(file), _place(file, _BAND)
    folder, stem = _folder(path.parent.parts), path.stem.lower()
    ends = [0, *(result.start() for result in re.finditer(r"(?<=[a-z0-9])(?![a-z0-9])", stem))]
    if _beside_images(file) or (band is not None and (band[0], band[1].lower()) in begun):
        return True
    return any((folder, stem[:end]) in begun for end in ends)


def _beside_images(file: str) -> bool:
    """Whether a file belongs to a Sentinel-2 product but is not an image: a cloud or defect mask, or a preview."""
    folders = PurePosixPath(file).parent.parts
    return any(folder.lower().endswith(_SAFE) for folder in folders) and _SAFE_IMAGES not in folders


def _has_one_band(path: Path) -> bool:
    import rasterio

    try:
        with quiet_gdal(), rasterio.open(path) as raster:
            return raster.count == 1
    except Exception:  # the file's row in the manifest reports that it cannot be opened
        return False


def _metres(file: str) -> int:
    sizes = re.findall(rf"(?<![a-z0-9]){_SIZE}(?![a-z0-9])", file, re.IGNORECASE)
    return min(map(int, sizes), default=0)
