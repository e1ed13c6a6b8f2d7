"""What would become of a corpus, told in a minute and without an index: `python scripts/doctor.py corpus=…`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.index import Source
from corpus.inspection import Inspection, inspect, levels, shared_ground, thumbnails
from corpus.raster import Survey
from corpus.splits import thinned
from runtime.application import run
from runtime.errors import UserError

SPLITS = ("train", "val", "test")


def files_by_kind(ids: pd.Series) -> str:
    """Suffixes of the ids and how many have each, the most frequent first."""
    counts = Counter(PurePosixPath(identifier).suffix.lower() or "no suffix" for identifier in ids)
    return ", ".join(f"{suffix} {count:,}" for suffix, count in counts.most_common(8))


def split_lines(tables: dict[str, pd.DataFrame]) -> list[str]:
    """Sizes of the splits, and what they share."""
    total = max(1, sum(len(table) for table in tables.values()))
    sizes = ", ".join(f"{name} {len(table):,} ({len(table) / total:.0%})" for name, table in tables.items())
    shared = shared_ground(tables)
    ground = any("ground" in table and (table["ground"] != "").any() for table in tables.values())
    known = "no cell of ground in two splits" if ground else "places unknown, so a hash of the id splits"
    return [f"splits     {sizes}", f"overlap    {'; '.join(f'{k}: {v} cells' for k, v in shared.items()) or known}"]


def text_lines(table: pd.DataFrame) -> list[str]:
    """Scenes and captions that the rows have."""
    scenes = table["scene"].replace("", np.nan).dropna()
    names = ", ".join(f"{name} {count:,}" for name, count in scenes.value_counts().head(8).items())
    captions = int((table["caption"] != "").sum())
    return [
        f"scenes     {scenes.nunique()} on {len(scenes):,} images{': ' + names if names else ' (unlabelled)'}",
        f"captions   {captions:,} of {len(table):,} images have one"
        + (f", e.g. {table.loc[table['caption'] != '', 'caption'].iloc[0]!r}" if captions else ""),
    ]


def look_lines(source: Source, found: Inspection, looked: int) -> list[str]:
    """What the sample showed: formats, values and how they are stretched, and what will be quarantined."""
    lines = [f"formats    {count} x {what}" for what, count in found.formats.most_common(8)]
    lines += [f"values     {kind}: {low:g} to {high:g}" for kind, (low, high) in found.values.items()]
    facts = getattr(source, "survey", Survey())
    lines += [f"stretch    {line} becomes 0 to 255" for line in levels(facts)] or ["stretch    none: 8 bits"]
    lines += [f"alpha      {kind}: {'alpha' if true else 'other data'}" for kind, true in facts.alpha.items()]
    if source.mask_classes:
        lines.append(f"masks      classes {', '.join(source.mask_classes)}")
    for name, share in getattr(source, "facts", {}).get("covered", {}).items():
        if share < 0.95:
            lines.append(f"covered    {share:.0%} of {name}; corpus.edge=shift covers all of it")
    bad = sum(found.reasons.values())
    why = ", ".join(f"{reason} {count}" for reason, count in found.reasons.most_common(5))
    return [*lines, f"quarantine {bad} of the {looked} images looked at{': ' + why if why else ''}"]


def main(cfg: DictConfig) -> None:
    tables = {name: instantiate(cfg.corpus[name]).manifest() for name in SPLITS}
    source = instantiate(cfg.corpus.train, split="all", limit=None)
    table = source.manifest()
    if table.empty:
        raise UserError(f"corpus {source.name} has no images: check its root")
    rows = thinned(len(table), int(cfg.doctor.images))
    found = inspect(source, rows)
    print(f"corpus     {source.name}: {len(table):,} images")
    print(f"files      {files_by_kind(table['id'])}")
    for line in (*split_lines(tables), *text_lines(table), *look_lines(source, found, len(rows))):
        print(line)
    if len(found.images):
        picture = Path(cfg.doctor.picture)
        thumbnails(found.images).save(picture)
        print(f"picture    {picture}")
    else:
        raise UserError(f"none of the {len(rows)} images that were looked at can be read: see the reasons above")


if __name__ == "__main__":
    run(main)
