"""Tables, figures and report.html of a results directory, from results.jsonl and the runs it names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from corpus.index import Corpus, open_corpus
from eval.convergence import AXES
from report.figures import comparison_sheet, confusion_figure, convergence_figure, entropy_histogram, scene_bars
from report.page import Gallery, figure_bytes, write_report
from report.tables import build_tables, read_results, scene_table, write_tables
from runtime.artefacts import read_json
from runtime.errors import UserError
from train.foundation import CONVERGENCE

SHOWN = 16  # tiles of a gallery


def rebuild(results: Path) -> dict[str, pd.DataFrame]:
    """Write tables/, figures/ and report.html of a finished results directory; returns the tables.

    Raises:
        UserError: there are no results yet.
    """
    if not (results / "runs.json").is_file():
        raise UserError(f"no finished results in {results}: run `make reproduce PROFILE={results.name}` first")
    places = {key: Path(value) for key, value in read_json(results / "runs.json").items()}
    tables = build_tables(read_results(results / "results.jsonl"))
    if confusions := _confusions(places):
        tables["scenes"] = scene_table(confusions)
    write_tables(tables, results / "tables")
    figures = _figures(places, results / "figures")
    write_report(
        results / "report.html",
        title=f"RS-Prune, profile {results.name}",
        intro="Each method keeps a part of the same corpus; the same latent diffusion model is trained on each part "
        "with the same steps, batches and noise, and judged on images that no stage has seen.",
        tables=tables,
        figures=figures,
        galleries=_galleries(places),
        sheets=_sheets(places, results / "figures"),
        facts=_facts(places),
    )
    return tables


def _of(places: dict[str, Path], kind: str) -> dict[str, Path]:
    return {key.split("/")[1]: path for key, path in places.items() if key.startswith(kind + "/")}


def _confusions(places: dict[str, Path]) -> dict[str, dict[str, dict[str, int]]]:
    """What CLIP sees in the held-out photographs and in each method's images; empty where there are no scenes."""
    found = {}
    for method, path in _of(places, "generation").items():
        scenes = read_json(path / "summary.json").get("scenes") or {}
        if scenes.get("generated"):
            found |= {"photographs": scenes["real"]} if not found else {}
            found[method] = scenes["generated"]
    return found


def _figures(places: dict[str, Path], directory: Path) -> list[tuple[str, str, bytes]]:
    directory.mkdir(parents=True, exist_ok=True)
    figures = []

    def add(name: str, title: str, caption: str, figure) -> None:
        data = figure_bytes(figure)
        (directory / f"{name}.png").write_bytes(data)
        figures.append((title, caption, data))

    curves = {
        method: pd.read_json(path / CONVERGENCE, lines=True) for method, path in _of(places, "convergence").items()
    }
    floor_rows = read_json(next(iter(_of(places, "floor").values())) / "floors.json")
    columns = next(iter(curves.values())).columns
    distance = next(key for key in columns if key.startswith(("balanced_fid", "balanced_fd_")))
    for name, metric, title in (
        ("convergence_kid", "balanced_kid_x1000", "Convergence, KID"),
        ("convergence_fd", distance, "Convergence, Fréchet distance"),
    ):
        # the curves use fewer images than the floors do: only the unbiased KID may stand beside them
        floors = (
            {key: row[metric] for key, row in floor_rows.items() if key == "reconstruction"}
            if "kid" in metric
            else None
        )
        caption = "Distance to the scene-balanced held-out set by steps, images seen and seconds of training."
        add(name, title, caption, convergence_figure(curves, metric, x=AXES, floors=floors))
    if confusions := _confusions(places):
        caption = "Held-out photographs, and images generated from their captions. A bright diagonal is good."
        add("scenes_seen", "What CLIP sees in each scene", caption, confusion_figure(confusions))
    for method, path in _of(places, "selection").items():
        if method == "full":
            continue
        summary, table = read_json(path / "summary.json"), pd.read_parquet(path / "selection.parquet")
        scenes = summary["true_scenes"]
        before = {scene: counts["before"] for scene, counts in scenes.items()}
        after = {scene: counts["after"] for scene, counts in scenes.items()}
        add(
            f"scenes_{method}", f"Scenes before and after, {method}", "Images of each scene.", scene_bars(before, after)
        )
        if summary["entropy_threshold"] is not None:
            histogram = entropy_histogram(
                table["entropy"].to_numpy(), summary["entropy_threshold"], table["kept"].to_numpy()
            )
            add(f"entropy_{method}", f"Local entropy, {method}", "Images left of the threshold go first.", histogram)
    return figures


def _corpus_of(selection: Path) -> Corpus:
    key = read_json(selection / "stage.json")["inputs"]["corpus"]
    return open_corpus(selection.parent.parent / "corpus" / key)


def _galleries(places: dict[str, Path]) -> dict[str, list[Gallery]]:
    galleries = {}
    for method, path in _of(places, "selection").items():
        if method == "full":
            continue
        corpus, table = _corpus_of(path), pd.read_parquet(path / "selection.parquet")
        kept, scenes = table["kept"].to_numpy(), corpus.manifest["scene"].to_numpy(dtype=object)
        generator = np.random.default_rng(0)
        galleries[method] = []
        for scene in sorted(set(scenes)):
            inside = (scenes == scene) & corpus.readable
            taken, left = np.flatnonzero(inside & kept), np.flatnonzero(inside & ~kept)
            shown = [np.sort(generator.permutation(rows)[:SHOWN]) for rows in (taken, left)]
            pictures = [np.array(corpus.images[rows]) for rows in shown]
            galleries[method].append(Gallery(scene or "unlabelled", *pictures, len(taken), len(left)))
    return galleries


def _sheets(places: dict[str, Path], directory: Path) -> list[tuple[str, str, Path]]:
    sheets = []
    for method, path in _of(places, "generation").items():
        last = sorted((path / "samples").glob("step_*.png"))[-1]
        sheets.append((f"Samples, {method}", "The same prompts and the same noise for every method.", last))
    floor = next(iter(_of(places, "floor").values()))
    sheet = directory / "reconstructions.png"
    names = {"held out": "truth", "autoencoder": "reconstruction", "PCA": "pca"}
    comparison_sheet({label: np.load(floor / f"{name}.npy") for label, name in names.items()}).save(sheet)
    sheets.append(
        ("Reconstructions", "What the frozen autoencoder and PCA of its latent size keep of an image.", sheet)
    )
    for task in ("super_resolution", "semantic_synthesis"):
        runs = {method: path for method, path in _of(places, task).items() if (path / "samples").is_dir()}
        if not runs:
            continue
        first = next(iter(runs.values())) / "samples"
        rows = {"input": np.load(first / "inputs.npy")}
        rows |= {method: np.load(path / "samples" / "outputs.npy") for method, path in runs.items()}
        rows["truth"] = np.load(first / "truth.npy")
        sheet = directory / f"{task}.png"
        comparison_sheet(rows).save(sheet)
        title = task.replace("_", " ").capitalize()
        sheets.append((title, "Input, each foundation's output, and the true image.", sheet))
    return sheets


def _facts(places: dict[str, Path]) -> dict[str, str]:
    facts = {}
    for method, path in _of(places, "selection").items():
        summary = read_json(path / "summary.json")
        facts[f"{method}, images kept"] = f"{summary['kept']:,} of {summary['images']:,}"
    for method, path in _of(places, "generation").items():
        summary = read_json(path / "summary.json")
        facts[f"{method}, training"] = f"{summary['steps']:,} steps, {summary['parameters'] / 1e6:.1f} M parameters"
    return facts
