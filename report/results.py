"""results.jsonl: one line per finished cell; it is replaced atomically, so readers see the old or the new file."""

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
#: Fields that identify a row.
KEY = ("stage", "corpus", "prune", "ratio", "seed", "step", "fingerprint")
#: The method that all others are compared with, image by image.
BASELINE = "random"
#: The method of this project, which is compared with all others.
SUBJECT = "rsprune"


def read_results(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a results file, the oldest first; none if the file does not exist.

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
            raise UserError(f"{path}:{number} is not a result row (stage, metrics): remove the line and run again")
        rows.append(row)
    return rows


def weighting_name(weighting: float) -> str:
    """Name of a `train.weighting` in tables: uniform (0), natural (1), or the exponent."""
    return {0.0: "uniform", 1.0: "natural"}.get(float(weighting), f"{weighting:g}")


def run_name(method: str, weighting: str | None) -> str:
    """Name of a training in comparisons: its method, and its weighting if images are not drawn uniformly."""
    return method if weighting in (None, weighting_name(0)) else f"{method}, {weighting} weights"


def append_result(path: Path | str, row: Row) -> None:
    """Append a row to a results file; an existing row with the same `KEY` is removed.

    Values that JSON cannot represent (NaN, infinity) become null.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = finite(plain(row))
    with _locked(path.parent):
        rows = [old for old in read_results(path) if _key(old) != _key(new)]
        write_text(path, "".join(json.dumps(item, allow_nan=False) + "\n" for item in [*rows, new]))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: write to a temporary file, then rename it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: write to a temporary file, then rename it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock that allows one writer at a time in a directory, because cells of a sweep may finish simultaneously."""
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
    """A row of results.jsonl: the common fields, and further fields of an ablation.

    Args:
        cfg: configuration of the command.
        kind: stage of the row.
        method: name of the pruning method.
        ratio: fraction of removed images.
        metrics: metrics, those of the evaluation encoder before those of others.
        directory: stage directory in which the metrics were computed. The row records its commit and, for a training,
            the seconds of training.
        step: training step.
        fields: further fields.
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
