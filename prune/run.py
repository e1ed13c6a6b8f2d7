"""Prune a corpus: `python prune/run.py corpus=bluemarble prune=rsprune ratio=0.85`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from corpus.remote import Target, access_of, copy_folder
from prune.planning import plan_lines
from prune.selection import method_name, select
from report.prune_report import REPORT_PAGE
from runtime.application import run
from runtime.artefacts import COMPLETE, is_main_process, read_json
from runtime.errors import UserError


def copied(directory: Path, target: Target) -> None:
    """Copy a selection to a target; metadata and then the summary are copied last: a copy with a summary is complete.

    Raises:
        UserError: the target has other files or cannot be written. The selection itself exists nevertheless.
    """
    try:
        copy_folder(
            directory, target, {"stage": "selection", "fingerprint": directory.name}, (COMPLETE, "summary.json")
        )
    except UserError as error:
        raise UserError(f"{error}; the selection is in {directory}: run the same command to copy it") from None
    print(f"copied: {target}")


def outcome(directory: Path) -> list[str]:
    """How many images a selection keeps, why the others are dropped, and where its report lies."""
    summary = read_json(directory / "summary.json")
    reasons = pd.read_parquet(directory / "selection.parquet", columns=["reason"])["reason"].value_counts()
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if reason != "kept")
    return [
        f"kept: {summary['kept']:,} of {summary['images']:,} images" + (f" (dropped: {dropped})" if dropped else ""),
        f"report: {(directory / REPORT_PAGE).resolve()}",
    ]


def main(cfg: DictConfig) -> None:
    if cfg.dry_run:
        print("\n".join(plan_lines(cfg, method_name())))
        return
    target = None if cfg.copy_to is None else Target(str(cfg.copy_to), access_of(cfg), "copy_to")
    if target is not None and is_main_process():
        target.is_empty()  # an unreachable target is refused before anything is computed
    directory, _ = select(cfg, method_name())
    if is_main_process():
        print("\n".join(outcome(directory)))
    if target is not None and is_main_process():
        copied(directory, target)
    print(f"selection: {directory}")


if __name__ == "__main__":
    run(main)
