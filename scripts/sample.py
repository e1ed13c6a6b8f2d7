"""Images of a foundation model: `python scripts/sample.py foundation=DIR prompt="a satellite image of desert"`."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from report.figures import contact_sheet
from runtime.application import run
from runtime.artefacts import plain, stage, write_json
from runtime.errors import UserError
from train.sampler import Sampler, check_prompt, check_settings, load_sampler, pipeline_fingerprint
from train.shipped import SHIPPED, foundation_path

#: Images per row of a sheet with only one prompt and location, and the smallest width of an image in screen pixels.
COLUMNS, TILE = 8, 128


@dataclass(frozen=True)
class Row:
    """The common settings of a row of images.

    Attributes:
        place: name of the location on the sheet; "" without metadata.
    """

    prompt: str
    place: str
    metadata: Mapping[str, float]


def prompts_of(value: Any) -> list[str]:
    """The prompts of an option that is one prompt or a list.

    Raises:
        UserError: there is none, or one is empty.
    """
    value = plain(value)
    prompts = [str(prompt) for prompt in (value if isinstance(value, list) else [value]) if prompt is not None]
    for prompt in prompts or [""]:
        check_prompt(prompt)
    return prompts


def rows_of(cfg: DictConfig, sampler: Sampler) -> list[Row]:
    """One row for every prompt, or for every pair of a prompt and a location.

    Raises:
        UserError: the prompts, the metadata or the locations are invalid or unknown to the model.
    """
    shared, locations = plain(cfg.sample.metadata) or {}, plain(cfg.sample.locations)
    if not isinstance(shared, Mapping):
        raise UserError(f"sample.metadata={shared}: give a number for each field, e.g. sample.metadata.lon=-60")
    if locations is None:
        locations = [{}]
    if not isinstance(locations, list) or not locations or not all(isinstance(place, Mapping) for place in locations):
        raise UserError(
            f"sample.locations={locations}: give a list of locations, e.g. "
            "'sample.locations=[{name:Amazon,lon:-60,lat:-3}]'"
        )
    result = []
    for place in locations:
        metadata = sampler.known({**shared, **{key: value for key, value in place.items() if key != "name"}})
        described = ", ".join(f"{name} {number:g}" for name, number in metadata.items())
        result.append((str(place.get("name", described)), metadata))
    return [Row(prompt, name, metadata) for prompt in prompts_of(cfg.prompt) for name, metadata in result]


def sheet_of(images: Sequence[np.ndarray], rows: Sequence[Row]) -> Image.Image:
    """All images on a sheet, one row each, with the prompt below and the location beside them.

    Args:
        images: uint8 [K, H, W, 3] for each of the rows.
    """
    columns = len(images[0]) if len(rows) > 1 else min(len(images[0]), COLUMNS)
    locations = [row.place for row in rows]
    return contact_sheet(
        np.concatenate(images),
        columns,
        [row.prompt for row in rows for _ in images[0]],
        scale=max(1, TILE // images[0].shape[2]),
        row_labels=locations if any(locations) else None,
    )


def write_samples(
    directory: Path, images: Sequence[np.ndarray], rows: Sequence[Row], metadata: Mapping[str, Any]
) -> None:
    """Write sheet.png, 0000.png and so on, row by row, and samples.json, which describes each of them.

    Args:
        images: uint8 [K, H, W, 3] for each of the rows.
        metadata: of all images.
    """
    listed = []
    for row, drawn in zip(rows, images, strict=True):
        for number, image in enumerate(drawn):
            name = f"{len(listed):04d}.png"
            Image.fromarray(image).save(directory / name)
            listed.append({"file": name, **asdict(row), "seed": metadata["seed"], "number": number})
    sheet_of(images, rows).save(directory / "sheet.png")
    write_json(directory / "samples.json", {**metadata, "images": listed})


def main(cfg: DictConfig) -> None:
    options = cfg.sample
    settings = {
        "count": cfg.images,
        "seed": cfg.seed,
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
    }
    check_settings(**settings)
    foundation = foundation_path(SHIPPED if cfg.foundation is None else cfg.foundation)
    sampler = load_sampler(foundation, options.batch_size)
    rows = rows_of(cfg, sampler)
    drawn_with = {"model": pipeline_fingerprint(sampler.folder), "batch_size": sampler.batch_size, **settings}
    metadata = {"foundation": str(foundation), "pipeline": type(sampler.pipeline).__name__, **drawn_with}

    def build(directory: Path) -> None:
        images = [
            sampler.draw(row.prompt, metadata=row.metadata, label=row.place or row.prompt[:40], **settings)
            for row in rows
        ]
        write_samples(directory, images, rows, metadata)

    if options.out is None:
        target = stage(cfg.results, "samples", {**drawn_with, "rows": [asdict(row) for row in rows]}, build)
    else:
        target = Path(str(options.out)).expanduser()
        write_whole(target, build)
    print(f"samples: {target}")


def write_whole(target: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a temporary directory, which then becomes the target.

    Raises:
        UserError: the target exists and is not empty.
    """
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise UserError(f"sample.out={target} is not empty: name another, or remove it")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        build(partial)
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Convert a command line to Hydra's grammar.

    `prompt=TEXT` is quoted, because a comma would mean several runs; lists, quoted values, null and multiruns are left
    unchanged. `sample.metadata.NAME=VALUE` gets the plus signs with which Hydra adds keys.
    """
    several = bool({"-m", "--multirun"} & set(arguments))
    changed = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "prompt" and value and value[0] not in "['\"" and value != "null" and not several:
            # a backslash is literal except before a quote
            value = re.sub(r"(\\*)('|\Z)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), value)
            argument = f"prompt='{value}'"
        elif key.startswith("sample.metadata."):
            argument = f"++{argument}"
        changed.append(argument)
    return changed


if __name__ == "__main__":
    sys.argv[1:] = hydra_arguments(sys.argv[1:])
    run(main)
