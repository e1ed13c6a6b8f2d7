"""Publish what results/local holds: its rows, README's tables and pictures, docs/: `make readme`."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from report.documents import fill_readme, publish, screenshot, write_benchmarks, write_results
from report.scale import write_scale
from runtime.application import run
from runtime.artefacts import read_json
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def main(cfg: DictConfig) -> None:
    results = Path(cfg.results) / cfg.profile.name
    if not (results / "report.html").is_file():
        raise UserError(f"no report in {results}: run `make reproduce PROFILE={cfg.profile.name}` first")
    readme = ROOT / "README.md"
    published = publish(Path(cfg.results), cfg.profile.name)
    fill_readme(published, readme)
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    screenshot(results / "report.html", images / "report.png", 1200, 1500)
    (foundation, *_) = read_json(results / "runs.json")["foundation/rsprune"]
    samples = sorted((Path(foundation) / "samples").glob("step_*.png"))[-1]
    shutil.copy(samples, images / "samples.png")
    write_results(published, ROOT / "docs" / "results.md")
    write_benchmarks(Path(cfg.results), ROOT / "docs" / "benchmarks.md")
    write_scale(results / "bench_scale.json", ROOT / "docs" / "scale.md")
    print(f"results: {readme}")


if __name__ == "__main__":
    run(main)
