"""Regenerate tables, figures and report from finished results, docs/results.md from published ones: `make tables`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from report.documents import PUBLISHED, fill_readme, write_results
from report.results_report import rebuild
from runtime.application import run
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def main(cfg: DictConfig) -> None:
    results, published = Path(cfg.results) / cfg.profile.name, ROOT / "results" / PUBLISHED
    finished = (results / "runs.json").is_file()
    if not finished and not (published.is_dir() and Path(cfg.results).is_dir()):
        raise UserError(f"no finished results in {results}: run `make reproduce PROFILE={cfg.profile.name}` first")
    if published.is_dir():
        fill_readme(published, ROOT / "README.md")
        write_results(published, ROOT / "docs" / "results.md")
        print(f"documents: {ROOT / 'docs' / 'results.md'}")
    if finished:
        rebuild(results)
        for path in sorted((results / "tables").glob("*.md")):
            print(path.read_text())
        print(f"results: {results}")


if __name__ == "__main__":
    run(main)
