"""The verdict: differences and intervals recomputed from the rows, and the resulting words."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from eval.distances import kernel_distance_difference
from report.verdict import PAIRED, SEEDS, UNPAIRED, compare, headline, seeds_note, sentences, t_interval

KID = "kid_x1000_geoembed"


def row(prune: str, balanced: float, *, seed: int = 0, half: float | None = 3.0, stage: str = "generation", **more):
    metrics = {f"balanced_{KID}": balanced, **more.pop("metrics", {})}
    if half is not None:
        metrics |= {f"balanced_{KID}_low": balanced - half, f"balanced_{KID}_high": balanced + half}
    base = {"stage": stage, "corpus": "c", "prune": prune, "ratio": 0 if prune == "full" else 0.85}
    return {**base, "seed": seed, "step": 9, "metrics": metrics, **more}


def rows_of(values: dict[str, list[float]]) -> list[dict]:
    return [row(name, value, seed=seed) for name, result in values.items() for seed, value in enumerate(result)]


THREE = {"rsprune": [130.0, 141.0, 137.0], "full": [160.0, 158.0, 171.0], "random": [131.0, 140.0, 139.0]}


def test_t_interval_equals_known_numbers_and_scipy():
    # differences 1, 2, 3: deviation 1, t with two degrees of freedom 4.302653, over the root of three
    assert t_interval([1, 2, 3]) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)
    differences = [-30.0, -17.0, -34.0, 5.5]
    test = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert t_interval(differences)[1:] == pytest.approx((test.low, test.high))
    mean, low, high = t_interval([4.0])
    assert mean == 4 and math.isnan(low) and math.isnan(high)


def test_differences_are_paired_by_seed_for_any_order_of_rows():
    result = {item.other: item for item in compare(rows_of(THREE)[::-1])}
    test = stats.ttest_rel(THREE["rsprune"], THREE["full"]).confidence_interval(0.95)
    full = result["full"]
    assert (full.mean, full.low, full.high) == pytest.approx((-27.0, test.low, test.high))
    assert (full.seeds, full.basis, full.word) == (3, SEEDS, "better")
    assert result["random"].mean == pytest.approx(-2 / 3) and result["random"].word == "tie"


@pytest.mark.parametrize(("shift", "word"), [(-9, "better"), (9, "worse"), (-4, "tie"), (4, "tie")])
def test_a_difference_smaller_than_its_interval_is_a_tie(shift, word):
    [result] = compare([row("rsprune", 100 + shift, half=3), row("random", 100, half=4)])
    assert (result.mean, result.low, result.high) == pytest.approx((shift, shift - 5, shift + 5))
    assert (result.word, result.basis, result.seeds) == (word, UNPAIRED, 1)


def test_one_seed_uses_the_paired_interval_of_the_images_in_either_direction():
    minus = {f"balanced_{KID}_minus_random{end}": value for end, value in (("", -4.0), ("_low", -6.0), ("_high", -2.0))}
    [result] = compare([row("rsprune", 96, metrics=minus), row("random", 100)])
    assert (result.mean, result.low, result.high, result.basis, result.word) == (-4, -6, -2, PAIRED, "better")
    back = {key.replace("random", "rsprune"): -value for key, value in minus.items()}
    back[f"balanced_{KID}_minus_rsprune_low"], back[f"balanced_{KID}_minus_rsprune_high"] = 2.0, 6.0
    [result] = compare([row("rsprune", 96), row("random", 100, metrics=back)])
    assert (result.mean, result.low, result.high, result.basis) == (-4, -6, -2, PAIRED)


def test_a_value_without_any_interval_has_no_verdict():
    [result] = compare([row("rsprune", 96, half=None), row("random", 100, half=None)])
    assert result.word == "unknown"
    assert "without an interval against random" in sentences([result])[0]


def test_only_rows_with_the_same_settings_are_compared():
    mine = [row("rsprune", 100), row("full", 120), row("random", 130)]
    other = [
        row("random", 1, step=8),
        row("random", 1, ratio=0.5),
        row("random", 1, corpus="d"),
        row("random", 1, seed=7),
    ]
    other += [row("random", 1, stage="subset"), row("random", 1, stage="convergence")]
    assert {item.other: item.mean for item in compare([*other, *mine])} == {"full": -20, "random": -30}
    assert [item.mean for item in compare([row("random", 1), *mine])][-1] == -30  # the newest row counts
    subset = [row("rsprune", 10, stage="subset"), row("full", 50, stage="subset")]
    assert [item.mean for item in compare([*subset, *mine], "subset")] == [-40]


def test_a_training_with_natural_weights_is_compared_separately():
    natural = row("rsprune", 140, weighting="natural")
    rows = [*rows_of({"rsprune": [100], "full": [120]}), natural]
    result = {(item.subject, item.other): item.mean for item in compare(rows)}
    assert result == {("rsprune", "full"): -20, ("rsprune, natural weights", "full"): 20}


def test_the_headline_needs_rows_of_every_method_in_the_claim():
    values = {name: [100 + 30 * (name != "rsprune")] for name in ("rsprune", "full", "random", "scene_random")}
    assert headline(compare(rows_of(values))) == "The rows support the claim."
    part = headline(compare(rows_of({name: values[name] for name in ("rsprune", "full")})))
    assert part == "The rows support the claim in part. Not measured: random, scene_random."
    tied = headline(compare(rows_of(values | {"scene_random": [101]})))
    assert tied == "The rows support the claim in part."
    assert headline(compare(rows_of(values | {"rsprune": [150]}))) == "The rows do not support the claim."
    natural = [{**item, "weighting": "natural"} if item["prune"] == "rsprune" else item for item in rows_of(values)]
    assert headline(compare(natural)) == headline([]) == "The rows cannot test the claim yet."


def test_the_sentences_and_the_number_of_seeds_are_reported():
    result = compare(rows_of(THREE))
    assert sentences(result) == ["On the balanced set rsprune is better than full; tied with random."]
    assert seeds_note(result).startswith("3 seeds:") and "One seed" not in seeds_note(result)
    single = seeds_note(compare(rows_of({name: result[:1] for name, result in THREE.items()})))
    assert single.startswith("One seed:") and "not the variation between seeds" in single and "t." not in single
    mixed = seeds_note(compare(rows_of(THREE | {"random": [131.0]})))
    assert mixed.startswith("3 seeds:") and "One seed where the table says so" in mixed
    assert seeds_note([]) == ""


def test_rows_contain_the_paired_differences_that_the_verdict_needs(tmp_path, monkeypatch):
    from scripts import reproduce

    random, features, foundations = np.random.default_rng(0), {}, {}
    for name in ("full", "random", "rsprune", "rsprune, natural weights"):
        foundations[name] = tmp_path / name
        foundations[name].mkdir()
        features[name] = random.standard_normal((30, 4))
        np.save(foundations[name] / "geoembed.npy", features[name])
        (foundations[name] / "measured.json").write_text(json.dumps({"balanced": str(foundations[name])}))
    held = SimpleNamespace(features={"geoembed": random.standard_normal((30, 4))})
    monkeypatch.setattr(reproduce, "evaluation_sets", lambda cfg: {"balanced": held})
    methods = {name: name.partition(",")[0] for name in foundations}
    result = {name: reproduce.differences(None, foundations, method, name) for name, method in methods.items()}
    against = {name: {key.partition("_minus_")[2].split("_")[0] for key in values} for name, values in result.items()}
    every = {"full", "random"}
    expected = {"full": {"random"}, "random": set(), "rsprune": every, "rsprune, natural weights": every}
    assert against == expected
    pair = kernel_distance_difference(features["rsprune"], features["full"], held.features["geoembed"])
    key = f"balanced_{KID}_minus_full"
    assert [result["rsprune"][f"{key}{end}"] for end in ("", "_low", "_high")] == list(pair)
    rows = [row(method, 1, metrics=result[name]) for name, method in methods.items() if name == method]
    assert {item.basis for item in compare(rows)} == {PAIRED}
