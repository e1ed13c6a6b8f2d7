"""Publish the content of results/local: its rows, README's table and pictures, docs/: `make readme`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from PIL import Image

from corpus.index import open_corpus
from report.documents import fill_readme, publish, screenshot, write_benchmarks, write_results
from report.figures import overview, toy_figure
from report.page import figure_bytes
from report.results import write_bytes
from report.scale import write_scale
from runtime.application import run
from runtime.artefacts import COMPLETE, read_json
from runtime.errors import UserError
from scripts.toy_example import toy_example

ROOT = Path(__file__).resolve().parent.parent
#: Number of images of the corpus and of the subset in README's picture, and of images on its map.
SHOWN, MAPPED = 24, 6000


def write_overview(selection: Path, target: Path) -> None:
    """Draw README's picture of a selection, for a corpus with georeferenced images; the bytes are reproducible."""
    corpus = open_corpus(
        selection.resolve().parent.parent / "corpus" / read_json(selection / COMPLETE)["inputs"]["corpus"]
    )
    kept = pd.read_parquet(selection / "selection.parquet", columns=["kept"])["kept"].to_numpy(dtype=bool)
    generator = np.random.default_rng(0)
    groups = [np.arange(len(kept)), np.flatnonzero(kept)]
    before, after = (corpus.images[np.sort(generator.permutation(group)[:SHOWN])] for group in groups)
    rows = np.sort(generator.permutation(len(kept))[:MAPPED])
    locations = corpus.manifest.iloc[rows]
    picture = overview(locations["lon"].to_numpy(), locations["lat"].to_numpy(), kept[rows], before, after)
    picture.convert("P", palette=Image.Palette.ADAPTIVE).save(target, optimize=True)


def write_toy(target: Path) -> None:
    """Draw the picture of docs/method.md."""
    example = toy_example()
    write_bytes(target, figure_bytes(toy_figure(example.points, example.classes, example.kept), dpi=100))


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
    write_overview(Path(read_json(results / "runs.json")["selection/rsprune"][0]), images / "overview.png")
    write_toy(images / "toy.png")
    (foundation, *_) = read_json(results / "runs.json")["foundation/rsprune"]
    samples = sorted((Path(foundation) / "samples").glob("step_*.png"))[-1]
    shutil.copy(samples, images / "samples.png")
    write_results(published, ROOT / "docs" / "results.md")
    write_benchmarks(Path(cfg.results), ROOT / "docs" / "benchmarks.md")
    write_scale(results / "bench_scale.json", ROOT / "docs" / "scale.md")
    print(f"results: {readme}")


if __name__ == "__main__":
    run(main)
