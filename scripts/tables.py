"""Regenerate tables, figures and report from finished results: `make tables`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from report.results_report import rebuild
from runtime.application import run


def main(cfg: DictConfig) -> None:
    results = Path(cfg.results) / cfg.profile.name
    rebuild(results)
    for path in sorted((results / "tables").glob("*.md")):
        print(path.read_text())
    print(f"results: {results}")


if __name__ == "__main__":
    run(main)
