"""Experiments: the rows of a run, crossings of curves, suggestions from a measured grid; every file composes."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from eval.convergence import CONVERGENCE
from report.experiments import RESULTS, best_ratio, experiment_rows, overtaken, write_experiment
from report.results import append_result
from runtime.application import CONFIGS, changed_options
from runtime.errors import UserError
from scripts.suggest import affordable

KID = "balanced_kid_x1000_efficientnet_lite2"
NAMES = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml") if path.stem != "none")


def config(*overrides: str, hydra: bool = False):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=hydra)


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_composes_with_every_value_of_its_grid(name: str) -> None:
    whole = config(f"experiment={name}", hydra=True)
    assert whole.experiment.name == name and whole.experiment.about
    grid = OmegaConf.to_container(whole.hydra.sweeper.params)
    parser = OverridesParser.create()
    for key, values in grid.items():
        override = parser.parse_override(f"{key}={values}")
        choices = override.sweep_string_iterator() if override.is_sweep_override() else [values]
        for value in choices:
            cfg = config(f"experiment={name}", f"{key}={value}")
            if key != "prune":
                assert str(OmegaConf.select(cfg, key)) == str(value)
    for column in whole.experiment.columns:
        assert column in grid


def run(folder: Path, curve: dict[int, float], final: float) -> Path:
    """A run's directory with measurements: one value per step, 10 images per step."""
    folder.mkdir(parents=True)
    lines = [{"step": step, "images_seen": 10 * step, KID: value} for step, value in curve.items()]
    (folder / CONVERGENCE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = max(curve)
    summary = {"steps": last, "images_seen": 10 * last, "images": 5, "seconds": 1.5, "training_flops_per_image": 2.0}
    (folder / "summary.json").write_text(json.dumps({**summary, "metrics": {KID: final}}))
    (folder / "stage.json").write_text(json.dumps({"commit": "abc", "seconds": 9.0}))
    return folder


def test_rows_record_their_split_step_options_and_commit(tmp_path: Path) -> None:
    cfg = config("experiment=weighting", "train.weighting=0.5", "prune=rsprune", "corpus.name=tiny", f"runs={tmp_path}")
    rows = experiment_rows(cfg, "rsprune", run(tmp_path / "run", {10: 5.0, 20: 4.0}, 3.0))
    assert [(row["what"], row["split"], row["step"], row["metrics"][KID]) for row in rows] == [
        ("snapshot", "val", 10, 5.0), ("snapshot", "val", 20, 4.0), ("final", "val", 20, 3.0),
    ]  # fmt: skip
    assert len({row["fingerprint"] for row in rows}) == 3
    last = rows[-1]
    assert (last["train.weighting"], last["kept"], last["seconds"], last["commit"]) == ("0.5", 5, 1.5, "abc")
    assert last["config"] == {"corpus.name": "tiny", "eval.split": "val", "train.weighting": 0.5}


def test_changed_options_contain_no_absolute_path(tmp_path: Path) -> None:
    cfg = config("corpus=folder", f"corpus.root={tmp_path}/tiles", "seed=3", "tracker=none", f"results={tmp_path}")
    changed = changed_options(cfg)
    assert changed["corpus.root"] == "tiles" and changed["seed"] == 3
    assert not any(str(tmp_path) in str(value) for value in changed.values())
    assert changed_options(config()) == {}


def test_the_whole_corpus_overtakes_where_the_curves_cross(tmp_path: Path) -> None:
    curves = [
        ("0.0", {10: 9.0, 20: 5.0, 30: 1.0}),
        ("0.5", {10: 6.0, 20: 4.0, 30: 2.0}),
        ("0.9", {10: 0.5, 20: 0.4, 30: 0.3}),
    ]
    for ratio, curve in curves:
        cfg = config("experiment=ratio_compute", f"ratio={ratio}", "corpus.name=tiny")
        for row in experiment_rows(cfg, "rsprune", run(tmp_path / ratio, curve, curve[30])):
            append_result(tmp_path / "table" / RESULTS, row)
    write_experiment(tmp_path / "table")
    result = pd.read_csv(tmp_path / "table" / "overtaken.csv").set_index("ratio")["images_seen"]
    assert result[0.5] == pytest.approx(250) and pd.isna(result[0.9])  # gaps 3, 1, -1: zero half way from 200 to 300
    table = pd.read_csv(tmp_path / "table" / "ratio_compute.csv")
    assert table["ratio"].tolist() == [0.0, 0.5, 0.9] and table[KID].tolist() == [1.0, 2.0, 0.3]


def test_a_tie_at_the_start_counts_as_overtaking_and_seeds_are_separate() -> None:
    frame = pd.DataFrame(
        [(0.0, 1, 10, 2.0), (0.5, 1, 10, 2.0), (0.5, 2, 10, 1.0)], columns=["ratio", "seed", "images_seen", "m"]
    )
    assert overtaken(frame, "m").to_dict("records") == [{"ratio": 0.5, "seed": 1, "images_seen": 10.0}]


def test_the_best_ratio_for_a_number_of_images_is_read_from_a_measured_grid() -> None:
    def rows(ratio: float, seed: int, values: dict[int, float]) -> list[dict]:
        return [
            {
                "what": "snapshot",
                "prune": "rsprune",
                "ratio": ratio,
                "seed": seed,
                "step": x,
                "metrics": {"images_seen": x, "m": y},
            }
            for x, y in values.items()
        ]

    grid = [
        *rows(0.0, 0, {100: 9.0, 200: 1.0}),
        *rows(0.8, 0, {100: 4.0, 200: 3.0}),
        *rows(0.8, 1, {100: 6.0, 200: 3.0}),
    ]
    early, late = (best_ratio(grid, "m", images) for images in (100, 190))
    assert early.set_index("ratio")["mean"].to_dict() == {0.0: 9.0, 0.8: 5.0}
    assert early.set_index("ratio")["count"].to_dict() == {0.0: 1, 0.8: 2}
    assert late.set_index("ratio")["mean"].idxmin() == 0.0
    assert best_ratio(grid, "m", 201).empty and best_ratio([], "m", 1).empty


def test_ratios_that_repeat_images_too_often_are_left_out() -> None:
    table = pd.DataFrame({"ratio": [0.9, 0.5, 0.1], "kept": [10, 50, 90]})
    assert affordable(table, 1000, 20)["ratio"].tolist() == [0.5, 0.1]
    with pytest.raises(UserError, match="most_repeats=20"):
        affordable(table, 10_000, 20)
