"""The registry of metrics: names composed and parsed, inputs of each metric, and a metric added in ten lines."""

from __future__ import annotations

import numpy as np
import pytest

from eval.convergence import lower_is_better
from eval.distances import Interval
from eval.metrics import METRICS, SETS, Metric, Quantity, compute
from report.page import write_report
from report.tables import build_tables, show, to_markdown


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("held_out", ["", *SETS])
@pytest.mark.parametrize("part", ["", "low", "high"])
def test_metric_names_are_parsed_back_to_their_parts(metric, held_out, part):
    of = {"encoder": "efficientnet_lite0", "clip": "vit_l14", "": ""}[METRICS[metric].by]
    for minus in ("", "random", "kmeans_uniform"):
        quantity = Quantity(metric, of, held_out, minus, part)
        assert Quantity.parse(quantity.name) == quantity


def test_fixed_metric_names_are_built_and_parsed_and_other_keys_are_not():
    assert Quantity("fd", "inception", "balanced").name == "balanced_fid"
    assert Quantity.parse("fd_infinity_dinov2") == Quantity("fd_infinity", "dinov2")
    assert Quantity.parse("natural_fid") == Quantity("fd", "inception", "natural")
    assert Quantity("fd", "efficientnet_lite0").name == "fd_efficientnet_lite0"
    assert Quantity("clip", "local", "balanced").name == "balanced_clip_local"
    for name in ("seconds", "images_seen", "step", "kid_x1000", "balanced", "fdx", "clip", "psnr_of"):
        assert Quantity.parse(name) is None, name


def test_the_registry_gives_the_better_direction_of_each_metric():
    better = {name: lower_is_better(name) for name in ("loss", "balanced_fid", "natural_recall_dinov2", "psnr")}
    assert better == {"loss": True, "balanced_fid": True, "natural_recall_dinov2": False, "psnr": False}


def test_metrics_are_computed_from_available_inputs_and_undefined_ones_are_null():
    features = np.random.default_rng(0).standard_normal((40, 3))
    result = compute({"features": features, "reference": features + 1}, of={"encoder": "e"}, held_out="balanced")
    names = {"fd", "kid_x1000", "precision", "recall", "density", "coverage", "fd_infinity"}
    assert {Quantity.parse(name).metric for name in result} == names
    assert result["balanced_kid_x1000_e_low"] < result["balanced_kid_x1000_e"] < result["balanced_kid_x1000_e_high"]
    assert compute({"confusion": {}}, of={"clip": "m"}) == {"scene_accuracy_m": None}
    assert compute({"clip_scores": np.array([np.nan])}, of={"clip": "m"}) == {"clip_m": None}
    some = compute({"features": features, "reference": features}, of={"encoder": "e"}, only=["recall"])
    assert set(some) == {"recall_e"}


def test_a_registered_metric_appears_in_tables_and_report(monkeypatch, tmp_path):
    brightness = Metric("brightness", "higher", 1, ("images",), lambda images: Interval(float(images.mean()), 1.0, 9.0))
    monkeypatch.setitem(METRICS, "brightness", brightness)
    rows = []
    for method, value in (("full", 3), ("random", 7)):
        metrics = compute({"images": np.full((2, 4, 4, 3), value)}, of={}, held_out="balanced")
        rows.append({"stage": "generation", "corpus": "c", "prune": method, "seed": 0, "step": 1, "metrics": metrics})
    table = build_tables(rows)["generation"]
    assert "balanced brightness ↑" in show(table).headings
    assert "**7.0** [1.0, 9.0]" in to_markdown("generation", table)
    write_report(tmp_path / "report.html", title="t", intro="i", tables={"generation": table})
    assert "balanced brightness" in (tmp_path / "report.html").read_text(encoding="utf-8")
