"""Foundation models as starting points of the downstream tasks: curves over lengths, paired differences; the dial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from eval.metrics import METRICS, Quantity
from report.curves import averaged
from report.figures import fidelity_figure
from report.results import SUBJECT, Row
from report.tables import evaluation_encoder, method_order
from report.verdict import t_interval

#: Tasks that foundations are fine-tuned for, and the metrics that compare their starting points.
JUDGED = {
    "super_resolution": ("kid_x1000", "feature_distance", "psnr"),
    "semantic_synthesis": ("kid_x1000", "feature_distance", "miou"),
}
#: Suffix of the stage of a task's rows by length of fine-tuning.
LENGTHS = "_lengths"
#: Stage of the rows of one model with different dial settings, and the field of the dial in these rows.
DIAL = "dial"


def _named(metric: str, encoder: str) -> str:
    return Quantity(metric, encoder if METRICS[metric].by == "encoder" else "").name


def starts(rows: Sequence[Row], subject: str = SUBJECT) -> pd.DataFrame:
    """Paired differences between the subject's foundation and every other start, over the seeds that both have.

    The lengths of fine-tuning, images, batches and noise are equal.

    Returns:
        a table with one row for every task, step, metric and other start: mean, low and high of the difference (subject
        minus other; 95 % interval by Student's t over seeds, NaN for one seed), the number of seeds, and the verdict
        better, worse, tie or unknown.
    """
    encoder = evaluation_encoder(rows)
    result = []
    for task, metrics in JUDGED.items():
        runs: dict[tuple[str, int], dict[int, Any]] = {}
        for row in rows:
            if row["stage"] == task + LENGTHS:
                runs.setdefault((row["prune"], int(row["step"])), {})[row["seed"]] = row["metrics"]
        for (method, step), mine in sorted(runs.items(), key=lambda item: item[0][1]):
            rivals = [name for name, at in runs if at == step and name != subject] if method == subject else []
            for other in sorted(rivals, key=method_order):
                for metric in metrics:
                    result.append(_difference(mine, runs[other, step], metric, encoder, (task, step, other)))
    columns = ["task", "step", "other", "metric", "mean", "low", "high", "seeds", "verdict"]
    return pd.DataFrame([row for row in result if row], columns=columns)


def _difference(
    mine: dict[int, Any], theirs: dict[int, Any], metric: str, encoder: str, place: tuple[str, int, str]
) -> dict[str, Any] | None:
    name, entry = _named(metric, encoder), METRICS[metric]
    seeds = [seed for seed in mine if seed in theirs and None not in (mine[seed].get(name), theirs[seed].get(name))]
    if not seeds:
        return None
    mean, low, high = t_interval([mine[seed][name] - theirs[seed][name] for seed in seeds])
    if len(seeds) < 2:
        verdict = "unknown"
    elif low <= 0 <= high:
        verdict = "tie"
    else:
        verdict = "better" if (mean < 0) == (entry.better == "lower") else "worse"
    task, step, other = place
    metadata = {"task": task, "step": step, "other": other, "metric": name}
    return {**metadata, "mean": mean, "low": low, "high": high, "seeds": len(seeds), "verdict": verdict}


def starts_table(rows: Sequence[Row]) -> pd.DataFrame:
    """`starts` as a readable table: one row per task, length and other start, one column per metric."""
    result = starts(rows)
    lines = []
    for (task, step, other), part in result.groupby(["task", "step", "other"], sort=False):
        line = {"task": task, "steps": step, f"{SUBJECT} against": other, "seeds": int(part["seeds"].max())}
        for row in part.to_dict("records"):
            quantity = Quantity.parse(row["metric"])
            assert quantity is not None
            decimals = quantity.entry.decimals
            interval = "" if pd.isna(row["low"]) else f" [{row['low']:+.{decimals}f}, {row['high']:+.{decimals}f}]"
            heading = f"{quantity.entry.name} {'↓' if quantity.entry.better == 'lower' else '↑'}"
            line[heading] = f"{row['mean']:+.{decimals}f}{interval} {row['verdict']}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("–")


def length_curves(rows: Sequence[Row], task: str) -> dict[str, pd.DataFrame]:
    """Every start's metrics by length of fine-tuning, averaged over its seeds."""
    frames: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["stage"] == task + LENGTHS:
            seeds = frames.setdefault(row["prune"], {})
            seeds.setdefault(row["seed"], []).append({"step": int(row["step"]), **row["metrics"]})
    return {
        method: averaged([pd.DataFrame(lines).sort_values("step") for lines in seeds.values()])
        for method, seeds in sorted(frames.items(), key=lambda item: method_order(item[0]))
    }


def judged_metric(rows: Sequence[Row], metric: str) -> str:
    """The full name of a metric by the evaluation encoder."""
    return _named(metric, evaluation_encoder(rows))


def dial_figure(rows: Sequence[Row]) -> Figure | None:
    """PSNR against distance over the dial of one model, with methods without a dial; None if there are no such rows."""
    name = judged_metric(rows, "kid_x1000")
    points = [(float(row[DIAL]), row["metrics"]) for row in rows if row["stage"] == DIAL]
    points = sorted((point for point in points if point[1].get(name) is not None), key=lambda point: point[0])
    if len(points) < 2:
        return None
    curve = [(dial, float(metrics["psnr"]), float(metrics[name])) for dial, metrics in points]
    others: dict[str, list[tuple[float, float]]] = {}  # by method, a point per seed
    for row in rows:
        point = [row["metrics"].get(key) for key in ("psnr", name)]
        if row["stage"] == "super_resolution" and _without_dial(row) and None not in point:
            others.setdefault(row["prune"], []).append((float(point[0]), float(point[1])))
    means = {method: tuple(np.mean(values, axis=0)) for method, values in others.items()}
    return fidelity_figure({SUBJECT: curve}, means)


def _without_dial(row: Row) -> bool:
    """Whether a method has no random draw: an interpolation, or the regression network at its full length."""
    return not row.get("step") or row["prune"] == "regression"
