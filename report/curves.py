"""Convergence curves as data: averages over several seeds, and the data of the page's interactive chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from eval.convergence import AXES, lower_is_better
from eval.metrics import Quantity
from report.figures import is_wide, method_colours, metric_title

#: Columns that can be the horizontal axis, and their labels.
LABELS = {axis: axis.replace("_", " ") for axis in AXES} | {"flops": "FLOPs"}
ONE_SEED = "Bands: 95 % intervals for the sampling of images with one seed."
SEVERAL_SEEDS = "Bands: the lowest and the highest of {} seeds; the line is their mean."


def averaged(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean of several seeds at each step, with the lowest and highest value as interval; one seed is unchanged."""
    if len(frames) == 1:
        return frames[0]
    groups = pd.concat(frames).groupby("step", as_index=False)
    frame = groups.mean()
    for column in frames[0].columns:
        quantity = Quantity.parse(column)
        if quantity is not None and not quantity.part:
            for part, values in (("low", groups[column].min()), ("high", groups[column].max())):
                frame[replace(quantity, part=part).name] = values[column]
    return frame


def chart(
    curves: Mapping[str, pd.DataFrame], metric: str, *, references: Mapping[str, float], seeds: int = 1
) -> dict[str, Any]:
    """Data of the interactive chart of a metric, as JSON values; missing numbers are null.

    Args:
        curves: curves by method, from `averaged`; curves without the metric are left out.
        metric: full name of the metric.
        references: values of horizontal lines, by name.
        seeds: largest number of seeds of a curve.
    """
    result = {name: frame for name, frame in curves.items() if metric in frame.columns and len(frame)}
    axes = [axis for axis in LABELS if all(axis in frame.columns for frame in result.values())]
    colours = method_colours(result)
    series = [
        {"name": name, "colour": colour, "points": _points(result[name], metric, axes)}
        for name, colour in colours.items()
    ]
    shown = [point[key] for line in series for point in line["points"] for key in ("value", "low", "high")]
    return {
        "title": metric_title(metric),
        "better": "lower is better" if lower_is_better(metric) else "higher is better",
        "band": (SEVERAL_SEEDS.format(seeds) if seeds > 1 else ONE_SEED) if _has_band(series) else "",
        "log": is_wide([*(value for value in shown if value is not None), *references.values()]),
        "axes": [{"key": axis, "label": LABELS[axis]} for axis in axes],
        "series": series,
        "references": [{"name": name, "value": value} for name, value in references.items()],
    }


def _points(frame: pd.DataFrame, metric: str, axes: Sequence[str]) -> list[dict[str, float | None]]:
    columns = {axis: axis for axis in axes} | {"value": metric, "low": f"{metric}_low", "high": f"{metric}_high"}
    return [
        {key: _number(row.get(column)) for key, column in columns.items()}
        for row in frame.sort_values("step").to_dict("records")
    ]


def _has_band(series: Sequence[Mapping[str, Any]]) -> bool:
    return any(None not in (point["low"], point["high"]) for line in series for point in line["points"])


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
