"""Paired differences between starts of the downstream tasks, curves over lengths, and the dial's figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from report.starts import dial_figure, length_curves, starts, starts_table

KID = "kid_x1000_efficientnet_lite2"


def row(method: str, seed: int, step: int, kid: float, stage: str = "semantic_synthesis_lengths", **more: Any) -> dict:
    metrics = {KID: kid, "miou": 0.4 - kid / 1000, "psnr": 30 + kid / 100}
    return {"stage": stage, "prune": method, "seed": seed, "step": step, "metrics": metrics, "corpus": "c", **more}


#: The subject is better by 10 with little scatter; at the greater length by 1 with large scatter.
ROWS = [
    *(row("rsprune", seed, 125, 90 + seed) for seed in range(3)),
    *(row("random", seed, 125, kid) for seed, kid in enumerate((100.5, 101.0, 101.5))),
    *(row("rsprune", seed, 250, 80) for seed in range(3)),
    *(row("random", seed, 250, kid) for seed, kid in enumerate((60, 80, 103))),
    row("scratch", 0, 250, 70),
    row("nearest_mask", 0, 0, 10, "semantic_synthesis"),
]


def test_differences_are_paired_by_seed_and_have_students_interval() -> None:
    result = starts(ROWS).set_index(["step", "other", "metric"])
    differences = np.array([90 - 100.5, 91 - 101.0, 92 - 101.5])
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    line = result.loc[(125, "random", KID)]
    assert line["mean"] == pytest.approx(differences.mean())
    assert (line["low"], line["high"]) == pytest.approx((expected.low, expected.high))
    assert (line["seeds"], line["verdict"]) == (3, "better")
    assert result.loc[(125, "random", "miou"), "verdict"] == "better"  # more is better for this metric
    assert result.loc[(250, "random", KID), "verdict"] == "tie"
    alone = result.loc[(250, "scratch", KID)]
    assert (alone["mean"], alone["seeds"], alone["verdict"]) == (10, 1, "unknown")
    assert "nearest_mask" not in result.index.get_level_values("other")


def test_the_table_shows_the_verdict_of_every_length() -> None:
    table = starts_table(ROWS)
    assert table["steps"].tolist() == [125, 250, 250]
    assert table["rsprune against"].tolist() == ["random", "random", "scratch"]
    cell = table.loc[0, "KID×10³ ↓"]
    assert cell.startswith("-10.0 [") and cell.endswith("] better")
    assert table.loc[2, "KID×10³ ↓"] == "+10.0 unknown"
    assert starts_table([row("random", 0, 5, 1.0)]).empty


def test_curves_are_means_over_seeds() -> None:
    curves = length_curves(ROWS, "semantic_synthesis")
    assert list(curves) == ["random", "rsprune", "scratch"]
    assert curves["rsprune"]["step"].tolist() == [125, 250]
    assert curves["rsprune"][KID].tolist() == [91, 80]
    assert curves["random"][f"{KID}_high"].tolist() == [101.5, 103]


def test_the_dial_figure_includes_references_without_a_dial() -> None:
    dials = [row("rsprune", 0, 9, 100 - 50 * dial, "dial", dial=f"{dial:g}") for dial in (0.0, 0.5, 1.0)]
    others = [row("bicubic", 0, 0, 240, "super_resolution"), row("regression", 0, 9, 230, "super_resolution")]
    figure = dial_figure([*dials, *others, row("full", 0, 9, 5, "super_resolution")])
    assert figure is not None
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["rsprune, by its dial", "bicubic", "regression"]
    assert axes.lines[0].get_ydata() == pytest.approx([100, 75, 50])
    assert dial_figure(dials[:1]) is None
