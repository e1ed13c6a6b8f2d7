"""Report on a corpus within a minute, without an index: `python scripts/doctor.py corpus=…`.

Reads a sample of the images; writes only a picture of eight of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.captions import scene_caption
from corpus.decoding import reading_once
from corpus.index import Source
from corpus.inspection import (
    Inspection,
    class_fractions,
    describe_scenes,
    inspect,
    levels,
    shared_ground,
    thumbnails,
)
from corpus.masks import PREFIX
from corpus.quarantine import counted, reason_counts
from corpus.raster import RasterOptions, Survey
from corpus.splits import copies_across_splits, thinned
from runtime.application import run
from runtime.errors import UserError

SPLITS = ("train", "val", "test")
#: Largest number of scenes and kinds that are listed.
NAMED = 8
#: A scene is reported if a smaller fraction of its pixels is in tiles.
COVERED = 0.95


def file_lines(source: Source) -> list[str]:
    """Statistics of the image files, by suffix; none if the source does not list its files."""
    suffixes = Counter(PurePosixPath(file).suffix.lower() or "no suffix" for file in getattr(source, "files", ()))
    named = ", ".join(f"{suffix} {count:,}" for suffix, count in suffixes.most_common(NAMED))
    return [f"files      {named}"] if suffixes else []


def split_lines(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Sizes of the splits, and their overlap."""
    total = max(1, sum(len(table) for table in tables.values()))
    sizes = ", ".join(f"{name} {len(table):,} ({len(table) / total:.0%})" for name, table in tables.items())
    shared = [f"{count} ground cells in both {names}" for names, count in shared_ground(tables).items()]
    placed = any("ground" in table and (table["ground"] != "").any() for table in tables.values())
    copies = sum(copies_across_splits(table) for table in tables.values())
    if copies:
        shared.append(f"{copies:,} images have exact copies in another split")
    unshared = "no ground cell in two splits" if placed else "no exact copies; the locations of images are not known"
    return [f"splits     {sizes}", f"overlap    {'; '.join(shared) or unshared}"]


def text_lines(table: pd.DataFrame) -> list[str]:
    """Scenes, and captions that belong to the images."""
    scenes = table.loc[table["scene"] != "", "scene"]
    named = ", ".join(f"{name} {count:,}" for name, count in scenes.value_counts().head(NAMED).items())
    more = f" and {scenes.nunique() - NAMED} more" if scenes.nunique() > NAMED else ""
    about = f"{scenes.nunique():,} on {len(scenes):,} images: {named}{more}" if len(scenes) else "none: unlabelled"
    own = (table["caption"] != "") & (table["caption"] != table["scene"].map(scene_caption))
    example = f", e.g. {table.loc[own, 'caption'].iloc[0][:80]!r}" if own.any() else ""
    return [f"scenes     {about}", f"captions   {own.sum():,} of {len(table):,} images have their own caption{example}"]


def look_lines(source: Source, result: Inspection) -> list[str]:
    """Results of the sample: formats, values and their stretch, masks, and what will be quarantined."""
    formats = result.formats or describe_scenes(
        getattr(source, "files", ()), getattr(source, "raster", RasterOptions())
    )
    lines = [f"formats    {count} x {what}" for what, count in formats.most_common(NAMED)]
    lines += [f"values     {kind}: {low:g} to {high:g}" for kind, (low, high) in result.values.items()]
    survey: Survey = getattr(source, "survey", Survey())
    lines += stretch_lines(source, survey)
    lines += [f"check      {note}" for note in survey.notes]
    lines += [f"alpha      {kind}: {'alpha' if true else 'not alpha: left out'}" for kind, true in survey.alpha.items()]
    if source.mask_classes:
        unfit = sum(count for reason, count in result.reasons.items() if reason.startswith(PREFIX))
        fractions = class_fractions(result.classes, source.mask_classes)
        looked = len(result.images) + unfit
        lines.append(
            f"masks      {len(result.images)} of {looked} images have a valid mask"
            + (f": {fractions}" * bool(fractions))
        )
    covered = getattr(source, "metadata", {}).get("covered", {})
    if partly := sorted((fraction, name) for name, fraction in covered.items() if fraction < COVERED):
        lines.append(
            f"covered    tiles cover less than {COVERED:.0%} of {len(partly):,} of {len(covered):,} scenes, and "
            f"{partly[0][0]:.0%} of {partly[0][1]}; corpus.edge=shift covers scenes completely"
        )
    bad = sum(result.reasons.values())
    why = f": {counted(reason_counts(result.reasons.elements()))}" if bad else ""
    return [*lines, f"quarantine {bad} of the {result.looked_at} images in the sample{why}"]


def stretch_lines(source: Source, survey: Survey) -> list[str]:
    """The values that are mapped to 0 and 255."""
    options = getattr(source, "raster", None)
    if options is not None and options.stretch == "range":
        return [f"stretch    {options.low:g} to {options.high:g} becomes 0 to 255"]
    return [f"stretch    {line} becomes 0 to 255" for line in levels(survey)] or [
        "stretch    none: values are 0 to 255"
    ]


def main(cfg: DictConfig) -> None:
    most, picture, result = int(cfg.doctor.images), Path(cfg.doctor.picture).expanduser(), Inspection()
    if most < 1 or picture.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError("doctor.images: give at least 1; doctor.picture: give a file called .png or .jpg")
    names = SPLITS if cfg.corpus.train.get("split", "train") == "train" else ("train",)
    with reading_once():
        sources = {name: instantiate(cfg.corpus[name]) for name in names}
        tables = {name: source.manifest() for name, source in sources.items()}
        source, table = sources["train"], pd.concat(tables.values(), ignore_index=True)
        if table.empty:
            raise UserError(f"corpus {source.name} has no images: check its root, its splits and its limit")
        chosen, start = thinned(len(table), most), 0
        for name, part in tables.items():
            rows = chosen[(chosen >= start) & (chosen < start + len(part))] - start
            inspect(sources[name], rows, result)
            start += len(part)
        print(f"corpus     {source.name}: {len(table):,} images")
        for line in (*file_lines(source), *split_lines(tables), *text_lines(table), *look_lines(source, result)):
            print(line)
    if not result.images:
        raise UserError(f"none of the {result.looked_at} images in the sample can be read: see the reasons above")
    try:
        thumbnails(result.images).save(picture)
    except OSError as error:
        raise UserError(f"doctor.picture={picture} cannot be written ({error.strerror}): name another file") from None
    print(f"picture    {picture}")


if __name__ == "__main__":
    run(main)
