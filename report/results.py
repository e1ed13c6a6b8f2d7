"""results.jsonl: a line for every finished cell, written so that readers see the old file or the new one."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from runtime.application import changed_options
from runtime.artefacts import fingerprint, finite, plain, provenance, read_json
from runtime.errors import UserError

Row = Mapping[str, Any]
#: What tells one row from another.
KEY = ("stage", "corpus", "prune", "ratio", "seed", "step", "fingerprint")
#: What every other method is compared with, image by image.
BASELINE = "random"
#: The method that the project is about, compared with every other one.
SUBJECT = "rsprune"


def read_results(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a results file, oldest first; none where the file is missing.

    Raises:
        UserError: a line is not a JSON object with a stage and metrics.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is not JSON ({error.msg}): remove the line and run again") from error
        if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict) or "stage" not in row:
            raise UserError(f"{path}:{number} is no result row (stage, metrics): remove the line and run again")
        rows.append(row)
    return rows


def weighting_name(weighting: float) -> str:
    """How a table names a `train.weighting`: uniform (0), natural (1), or the exponent."""
    return {0.0: "uniform", 1.0: "natural"}.get(float(weighting), f"{weighting:g}")


def run_name(method: str, weighting: str | None) -> str:
    """What a training is called beside others: its method, and its weighting where images are not drawn alike."""
    return method if weighting in (None, weighting_name(0)) else f"{method}, {weighting} weights"


def append_result(path: Path | str, row: Row) -> None:
    """Add a row at the end of a results file; a row with the same `KEY` goes.

    Values that JSON cannot hold (NaN, infinity) become null.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = finite(plain(row))
    with _locked(path.parent):
        rows = [old for old in read_results(path) if _key(old) != _key(new)]
        write_text(path, "".join(json.dumps(item, allow_nan=False) + "\n" for item in [*rows, new]))


def write_text(path: Path, text: str) -> None:
    """Write beside and rename into place."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside and rename into place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One writer at a time in this directory: the cells of a sweep may finish together."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def result_row(
    cfg: DictConfig,
    kind: str,
    method: str,
    ratio: float | None,
    metrics: Mapping[str, float | None],
    directory: Path,
    *,
    step: int = 0,
    **fields: str,
) -> dict[str, Any]:
    """A row of results.jsonl: the contract's fields, and further ones of an ablation.

    Args:
        kind: the row's stage.
        metrics: the evaluation encoder's before those of others.
        directory: the stage directory in which the metrics were computed; its commit goes into the row, and the seconds
            of training where it is a training's.
    """
    summary = directory / "summary.json"
    seconds = read_json(summary).get("seconds") if summary.is_file() else None
    return {
        "stage": kind,
        "corpus": cfg.corpus.name,
        "prune": method,
        "ratio": ratio,
        "seed": int(cfg.seed),
        "step": step,
        **fields,
        "metrics": dict(metrics),
        "fingerprint": fingerprint(directory=directory.name, step=step, **fields),
        "commit": provenance(directory)["commit"],
        "seconds": seconds,
        "config": changed_options(cfg),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
