"""Tables, figures and report.html of a results directory, from results.jsonl and the runs it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from corpus.index import Corpus, open_corpus
from eval.convergence import CONVERGENCE
from eval.metrics import METRICS, Quantity
from eval.reference_names import REFERENCE_ROWS
from report.curves import averaged, chart
from report.figures import comparison_sheet, confusion_figure, convergence_figure, entropy_histogram, scene_bars
from report.page import Gallery, Picture, figure_bytes, write_report
from report.prune_report import reason_galleries
from report.results import read_results
from report.sheets import sample_grids
from report.starts import JUDGED, LENGTHS, dial_figure, judged_metric, length_curves, starts_table
from report.tables import build_tables, evaluation_encoder, scene_table, write_tables
from report.verdict_view import verdict_view
from runtime.artefacts import read_json
from runtime.errors import UserError

SHOWN = 16  # tiles of a gallery
#: Directories of the computations, by "<stage>/<method>": one directory per seed.
RunFolders = Mapping[str, list[Path]]
#: Folder of a downstream run with its inputs, outputs and the truth, uint8 [N, H, W, 3].
SAMPLES = "samples"


def rebuild(results: Path) -> dict[str, pd.DataFrame]:
    """Write tables/, figures/ and report.html of a finished results directory; returns the tables.

    Raises:
        UserError: there are no results yet.
    """
    if not (results / "runs.json").is_file():
        raise UserError(f"no finished results in {results}: run `make reproduce PROFILE={results.name}` first")
    run_folders = {key: [Path(place) for place in result] for key, result in read_json(results / "runs.json").items()}
    rows = read_results(results / "results.jsonl")
    tables = build_tables(rows)
    if confusions := _confusions(run_folders):
        tables["scenes"] = scene_table(confusions)
    if len(result := starts_table(rows)):
        tables["starts"] = result
    write_tables(tables, results / "tables")
    figures = _figures(run_folders, rows, results / "figures")
    write_report(
        results / "report.html",
        title=f"RS-Prune, profile {results.name}",
        intro="Each method keeps a part of the same corpus; the same latent diffusion model is trained on each part "
        "with the same steps, batches and noise, and judged on images that no stage has seen.",
        verdict=verdict_view(rows),
        tables=tables,
        figures=figures,
        galleries=_galleries(run_folders),
        grids=sample_grids(_all_of(run_folders, "generation"), _seeds(rows)),
        sheets=_sheets(run_folders, results / "figures"),
        key_figures=_key_figures(run_folders),
    )
    return tables


def _of(run_folders: RunFolders, kind: str) -> dict[str, Path]:
    """The first seed's directory of every method."""
    return {method: result[0] for method, result in _all_of(run_folders, kind).items()}


def _all_of(run_folders: RunFolders, kind: str) -> dict[str, list[Path]]:
    """The directories of every method, one per seed."""
    return {key.split("/")[1]: result for key, result in run_folders.items() if key.startswith(kind + "/")}


def _seeds(rows: list[dict]) -> list[int]:
    """The seeds of the trainings, in the order of their directories."""
    return list(dict.fromkeys(row["seed"] for row in rows if row["stage"] == "generation"))


def _confusions(run_folders: RunFolders) -> dict[str, dict[str, dict[str, int]]]:
    """Scenes that CLIP recognises in the held-out photographs and in each method's images; empty without scenes."""
    result = {}
    for method, path in _of(run_folders, "foundation").items():
        scenes = read_json(path / "summary.json").get("scenes") or {}
        if scenes.get("generated"):
            result |= {"photographs": scenes["real"]} if not result else {}
            result[method] = scenes["generated"]
    return result


def _curves(run_folders: RunFolders) -> dict[str, pd.DataFrame]:
    """Convergence of every method, averaged over its seeds; with several seeds, lowest and highest are its interval."""
    return {
        key.split("/")[1]: averaged([pd.read_json(path / CONVERGENCE, lines=True) for path in result])
        for key, result in run_folders.items()
        if key.startswith("convergence/")
    }


def _convergence_figures(run_folders: RunFolders, rows: list[dict], directory: Path) -> list[Picture]:
    encoder, curves = evaluation_encoder(rows), _curves(run_folders)
    seeds = max(len(result) for key, result in run_folders.items() if key.startswith("convergence/"))
    real = read_json(_of(run_folders, "reference")["validation"] / "reference_rows.json")
    pictures = []
    for metric, name in (("kid_x1000", "convergence_kid"), ("fd", "convergence_fd")):
        column = Quantity(metric, encoder, "balanced").name
        # curves use fewer images, so only metrics that do not depend on the number of images have reference lines
        lines = {} if METRICS[metric].biased else {key: real[key].get(column) for key in REFERENCE_ROWS if key in real}
        lines = {key: value for key, value in lines.items() if value is not None and key != "pca"}
        data = figure_bytes(convergence_figure(curves, column, x=("images_seen",), references=lines))
        (directory / f"{name}.png").write_bytes(data)
        caption = "Distance to the scene-balanced validation set during training; training did not use this set."
        drawn = chart(curves, column, references=lines, seeds=seeds)
        pictures.append(Picture(f"Convergence, {METRICS[metric].name}", caption, data, drawn))
    return pictures


def _length_figures(rows: list[dict], directory: Path) -> list[Picture]:
    """Every start by its length of fine-tuning, one figure per task; none if there is a single length."""
    pictures = []
    for task, metrics in JUDGED.items():
        metric, curves = judged_metric(rows, metrics[0]), length_curves(rows, task)
        curves = {name: frame for name, frame in curves.items() if metric in frame.columns}
        if max((len(frame) for frame in curves.values()), default=0) < 2:
            continue
        data = figure_bytes(convergence_figure(curves, metric, x=("step",)))
        (directory / f"{task}_lengths.png").write_bytes(data)
        seeds = len({row["seed"] for row in rows if row["stage"] == task + LENGTHS})
        title = f"{task.replace('_', ' ').capitalize()} by length of fine-tuning"
        caption = "Distance of the outputs to the held-out images, by the foundation that fine-tuning started from."
        pictures.append(Picture(title, caption, data, chart(curves, metric, references={}, seeds=seeds)))
    return pictures


def _figures(run_folders: RunFolders, rows: list[dict], directory: Path) -> list[Picture]:
    directory.mkdir(parents=True, exist_ok=True)
    figures = [*_convergence_figures(run_folders, rows, directory), *_length_figures(rows, directory)]

    def add(name: str, title: str, caption: str, figure) -> None:
        data = figure_bytes(figure)
        (directory / f"{name}.png").write_bytes(data)
        figures.append(Picture(title, caption, data))

    if (drawn := dial_figure(rows)) is not None:
        caption = (
            "Super-resolution by one network with several dials: 0 gives the mean image, 1 a sample with all detail."
        )
        add("super_resolution_dial", "Super-resolution, fidelity and detail", caption, drawn)
    if confusions := _confusions(run_folders):
        caption = "Held-out photographs, and images generated from their captions. A bright diagonal is good."
        add("scenes_seen", "Scenes recognised by CLIP", caption, confusion_figure(confusions))
    for method, path in _of(run_folders, "selection").items():
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
            add(
                f"entropy_{method}",
                f"Local entropy, {method}",
                "Images left of the threshold are removed first.",
                histogram,
            )
    return figures


def _corpus_of(selection: Path) -> Corpus:
    key = read_json(selection / "stage.json")["inputs"]["corpus"]
    return open_corpus(selection.parent.parent / "corpus" / key)


def _galleries(run_folders: RunFolders) -> dict[str, list[Gallery]]:
    galleries = {}
    for method, path in _of(run_folders, "selection").items():
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
        reasons = reason_galleries(table, corpus.images, generator, SHOWN)
        if len(reasons) > 1:  # a single reason is not informative
            galleries[f"{method}, dropped by reason"] = reasons
    return galleries


def _sheets(run_folders: RunFolders, directory: Path) -> list[Picture]:
    sheets = []
    for method, path in _of(run_folders, "foundation").items():
        last = sorted((path / "samples").glob("step_*.png"))[-1]
        caption = "The same prompts and the same noise for every method."
        sheets.append(Picture(f"All samples of {method}", caption, last, folded=True))
    references = _of(run_folders, "reference")["published"]
    sheet = directory / "reconstructions.png"
    names = {"training images": "real_train", "autoencoder": "reconstructed_train", "PCA": "pca"}
    comparison_sheet({label: np.load(references / f"{name}.npy") for label, name in names.items()}).save(sheet)
    caption = "Images reconstructed by the frozen autoencoder and by PCA of the same latent size."
    sheets.append(Picture("Reconstructions", caption, sheet))
    for task in dict.fromkeys(key.split("/")[0] for key in run_folders):
        runs = {
            method: path
            for method, path in _of(run_folders, task).items()
            if (path / SAMPLES / "outputs.npy").is_file()
        }
        if not runs:
            continue
        first = next(iter(runs.values())) / SAMPLES
        rows = {"input": np.load(first / "inputs.npy")}
        rows |= {method: np.load(path / SAMPLES / "outputs.npy") for method, path in runs.items()}
        rows["truth"] = np.load(first / "truth.npy")
        sheet = directory / f"{task}.png"
        comparison_sheet(rows).save(sheet)
        title = task.replace("_", " ").capitalize()
        sheets.append(Picture(title, "Input, each foundation's output, and the true image.", sheet))
    return sheets


def _key_figures(run_folders: RunFolders) -> dict[str, str]:
    key_figures = {}
    for method, path in _of(run_folders, "selection").items():
        summary = read_json(path / "summary.json")
        key_figures[f"{method}, images kept"] = f"{summary['kept']:,} of {summary['images']:,}"
    for method, path in _of(run_folders, "foundation").items():
        summary = read_json(path / "summary.json")
        key_figures[f"{method}, training"] = (
            f"{summary['steps']:,} steps, {summary['parameters'] / 1e6:.1f} M parameters"
        )
    return key_figures
