"""Rows of an experiment (configs/experiment); every finished cell of its sweep adds rows to one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from eval.convergence import CONVERGENCE, first_reached
from eval.metrics import Quantity
from report.curves import averaged
from report.figures import convergence_figure
from report.page import figure_bytes, figure_svg
from report.results import append_result, read_results, result_row, write_bytes
from report.tables import ROW_METADATA, build_tables, evaluation_encoder, write_tables
from runtime.artefacts import read_json

#: Folder in `results` with a file and a folder of tables for every experiment.
EXPERIMENTS = "experiments"
RESULTS = "results.jsonl"


def experiment_rows(cfg: DictConfig, method: str, run: Path) -> list[dict[str, Any]]:
    """The rows of a finished pretraining run: one for every snapshot, measured on val, and one for its final model.

    Every row has `experiment`, and the options that the experiment names as its columns.
    """
    name = str(cfg.experiment.name)
    fields = {str(key): _text(OmegaConf.select(cfg, key)) for key in cfg.experiment.columns}
    summary = read_json(run / "summary.json")
    ratio = 0.0 if method == "full" else None if cfg.ratio is None else float(cfg.ratio)
    metadata = {"kept": summary["images"], "seconds": summary["seconds"], "flops": summary["training_flops_per_image"]}
    lines = [
        *pd.read_json(run / CONVERGENCE, lines=True).to_dict("records"),
        {"step": summary["steps"], "images_seen": summary["images_seen"], **summary["metrics"]},
    ]
    splits = ["val"] * (len(lines) - 1) + [str(cfg.eval.split)]
    rows = []
    for number, (line, split) in enumerate(zip(lines, splits, strict=True)):
        step = int(line.pop("step"))
        what = "final" if number == len(lines) - 1 else "snapshot"
        row = result_row(cfg, name, method, ratio, line, run, step=step, what=what, split=split, **fields)
        rows.append({**row, **metadata})
    return rows


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def record(cfg: DictConfig, method: str, run: Path) -> Path:
    """Add the rows of a run to its experiment's file and rewrite the experiment's table; returns the folder."""
    folder = Path(cfg.results) / EXPERIMENTS / str(cfg.experiment.name)
    for row in experiment_rows(cfg, method, run):
        append_result(folder / RESULTS, row)
    write_experiment(folder)
    return folder


def write_experiment(folder: Path) -> None:
    """Write the table and curves of an experiment and, if possible, where training on everything overtakes subsets."""
    rows = read_results(folder / RESULTS)
    write_tables(build_tables([row for row in rows if row["what"] == "final"]), folder)
    metric = Quantity("kid_x1000", evaluation_encoder(rows), "balanced").name
    curves = snapshots(rows)
    if metric not in curves:
        return
    figure = convergence_figure(cell_curves(curves), metric, x=("images_seen",))
    write_bytes(folder / "curves.png", figure_bytes(figure))
    write_bytes(folder / "curves.svg", figure_svg(figure))
    if (curves["ratio"] == 0).any() and curves["ratio"].nunique() > 1:
        overtaken(curves, metric).to_csv(folder / "overtaken.csv", index=False)


def cell_curves(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The snapshots of every cell, averaged over its seeds, by the options in which the cells differ."""
    fields = ["prune", "ratio", *(name for name in frame if name.startswith("field:"))]
    varied = [name for name in fields if frame[name].nunique() > 1] or ["prune"]
    curves = {}
    for values, cell in frame.groupby(varied, sort=False):
        label = ", ".join(
            str(value) if name == "prune" else f"{name.removeprefix('field:')}={_text(value)}"
            for name, value in zip(varied, values, strict=True)
        )
        seeds = [part.drop(columns=[*fields, "seed"]) for _, part in cell.groupby("seed")]
        curves[label] = averaged(seeds)
    return curves


def overtaken(curves: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Where training on everything becomes better than training on a subset.

    Args:
        curves: rows of the snapshots of one experiment with the columns ratio, seed, images_seen and the metric; ratio
            0 is the whole corpus.
        metric: name of the metric; lower values are better.
    Returns:
        a table with one row for every ratio above 0 and seed: `images_seen` at which the curve of ratio 0 falls below
        that of the subset, interpolated linearly between snapshots; NaN if it never does within the experiment.
    """
    rows = []
    for seed, of_seed in curves.groupby("seed"):
        by_ratio = {ratio: part.set_index("images_seen")[metric] for ratio, part in of_seed.groupby("ratio")}
        if 0 not in by_ratio:
            continue
        for ratio, subset in by_ratio.items():
            if ratio:
                gap = (by_ratio[0] - subset).dropna().sort_index()
                result = first_reached(gap.index, gap, 0.0) if len(gap) else None
                rows.append({"ratio": ratio, "seed": seed, "images_seen": float("nan") if result is None else result})
    return pd.DataFrame(rows, columns=["ratio", "seed", "images_seen"])


def best_ratio(rows: list[dict[str, Any]], metric: str, images_seen: float) -> pd.DataFrame:
    """Metric of every ratio after `images_seen` images: mean, standard deviation and number of seeds.

    Values between two snapshots are interpolated; a run that is shorter than `images_seen` is left out.
    """
    values = []
    frame = snapshots(rows)
    for (ratio, _), run in frame.groupby(["ratio", "seed"]) if len(frame) else ():
        curve = run.sort_values("images_seen")
        if metric in curve and curve["images_seen"].iloc[0] <= images_seen <= curve["images_seen"].iloc[-1]:
            x, y = curve["images_seen"].to_numpy(float), curve[metric].to_numpy(float)
            values.append({"ratio": ratio, "value": float(np.interp(images_seen, x, y))})
    result = pd.DataFrame(values, columns=["ratio", "value"]).groupby("ratio")["value"]
    return result.agg(["mean", "std", "count"]).reset_index()


def snapshots(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Table of the snapshots of an experiment: prune, ratio, seed, step, its options as `field:<name>`, all metrics."""
    known = {"what", "split", "prune", "corpus", *ROW_METADATA}
    result = [
        {
            **{key: row[key] for key in ("prune", "ratio", "seed", "step")},
            **{f"field:{key}": text for key, text in row.items() if isinstance(text, str) and key not in known},
            **row["metrics"],
        }
        for row in rows
        if row.get("what") == "snapshot"
    ]
    return pd.DataFrame(result)


def read_experiment(results: Path | str, name: str) -> list[dict[str, Any]]:
    """The rows of an experiment; none if nothing of it was computed."""
    return read_results(Path(results) / EXPERIMENTS / name / RESULTS)
