"""The cost model, the extrapolation and the synthetic tiles; slow: the complete benchmark at a few sizes, twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report.figures import scale_figure
from report.scale import ALONE, ON_ONE_NODE, STAGES, SYNTHETIC, TILES, arithmetic, fit, memory, models, scale_document
from runtime.errors import UserError
from scripts.bench_scale import NOISE, Plan, jittered, measured

ROOT = Path(__file__).resolve().parent.parent


def rows_of(
    part: str, stage: str, a: float, b: float, c: float, d: float, sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    return [
        {
            "part": part, "stage": stage, "images": size, "seconds": a * size**b, "cpu_seconds": 2 * a * size**b,
            "peak_rss_gb": 1.0 + c + d * size, "peak_anonymous_gb": c + d * size,
        }
        for size in sizes
    ]  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    """The content of bench_scale.json for stages with known growth."""
    rows = [
        row
        for part, exponent, sizes in ((TILES, 1.0, (10_000, 30_000, 100_000)), (SYNTHETIC, 1.05, (10**6, 10**7)))
        for number, stage in enumerate(STAGES, start=1)
        for row in rows_of(part, stage, 1e-5 * number, exponent, 0.5, 1e-7, sizes)
    ]
    cluster = {
        "name": "two nodes", "nodes": 2, "gpus": 4, "vcpus": 48, "memory_gib": 192, "network_gbit": 40, "source": "a "
        "page",
        "images_per_second": 5000, "network_fraction": 0.5, "cores_fraction": 0.5,
    }  # fmt: skip
    settings = {"resolution": 64, "input_size": 32, "dimensions": 256}
    return {
        "machine": "a machine", "cores": 2, "fit_from": 30_000, "settings": settings, "bytes_per_image": 2500.0,
        "cluster": cluster, "rows": rows,
    }  # fmt: skip


def test_the_fit_recovers_the_parameters_of_the_cost_model() -> None:
    rows = rows_of(TILES, "index", 3e-5, 1.07, 0.4, 2e-7, (10_000, 30_000, 100_000, 300_000))
    rows[0]["seconds"] = 1e6  # below fit_from
    model = fit(rows, 30_000)
    assert model.sizes == (30_000, 100_000, 300_000)
    np.testing.assert_allclose([model.a, model.b, model.c, model.d], [3e-5, 1.07, 0.4, 2e-7], rtol=1e-6)
    assert model.residual < 1e-9
    rows[2]["seconds"] *= 1.3
    assert 0.1 < fit(rows, 30_000).residual < 0.3
    assert fit(rows[:1], 1) is None
    assert fit(rows[:2], 10**9).sizes == (10_000, 30_000), "all, where too few are large"


def test_extrapolated_hours_and_memory_follow_from_the_fitted_models(result: dict[str, Any]) -> None:
    fitted = {part: models(result["rows"], part, result["fit_from"]) for part in (TILES, SYNTHETIC)}
    on_node = {**fitted[SYNTHETIC], "manifest": fitted[TILES]["manifest"]}
    steps = {step.stage: step.hours for step in arithmetic(10**8, result, on_node)}
    assert list(steps) == ["read the shards", *STAGES]
    assert steps["manifest"] == pytest.approx(1e-5 * 1e8 / 3600)
    assert steps["read the shards"] == pytest.approx(1e8 * 2500 / (2 * 40e9 / 8 * 0.5) / 3600)
    assert steps["index"] == pytest.approx(1e8 * 4e-5 / (2 * 48) / 3600)
    assert steps["embedding"] == pytest.approx(1e8 / (8 * 5000) / 3600)
    assert steps["selection"] == pytest.approx(4e-5 * 1e8**1.05 / (24 / 2) / 3600)
    assert steps["table"] == pytest.approx(6e-5 * 1e8**1.05 / 3600), "one process writes it"
    message = memory(10**9, result, on_node)
    assert "= 512 GB on its disk, which does not fit" in message and "within the 206 GB" in message
    for name in ON_ONE_NODE:
        assert f"{name} 0.50 + 1.00e-07 N = 100 GB" in message or f"{name} 0.50 + 1.00e-07 N = 101 GB" in message


def test_the_document_lists_measurements_assumptions_and_the_extrapolation(result: dict[str, Any]) -> None:
    text = scale_document(result)
    for words in (
        "Assumed, not measured",
        "10^8 images",
        "10^9 images",
        "The bottleneck is **",
        "a page",
        "30,000, 100,000",
    ):
        assert words in text, words
    for stage in STAGES:
        assert f"| {stage} " in text
    early = scale_document({**result, "rows": [row for row in result["rows"] if row["stage"] == "manifest"]})
    assert "## Extrapolation" not in early and "Not measured yet." not in early
    assert len(scale_figure(result["rows"], tuple(STAGES)).axes) == 2


def test_repeated_tiles_differ_and_are_the_same_for_one_seed() -> None:
    tiles = np.random.default_rng(0).integers(60, 180, (3, 32, 32, 3), dtype=np.uint8)
    first, again = (list(jittered(tiles, np.arange(9), np.random.default_rng(1))) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len({image.tobytes() for image in first}) == 9
    for row, image in enumerate(first):
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert 0.75 * tiles[row % 3].mean() - NOISE < image.mean() < 1.25 * tiles[row % 3].mean() + NOISE


@pytest.mark.slow
def test_a_repeated_bench_measures_only_the_missing_sizes(tmp_path: Path) -> None:
    overrides = [
        "profile=smoke", f"runs={tmp_path / 'runs'}", f"results={tmp_path / 'results'}", "tracker=none",
        "corpus.train.limit=200", "bench_scale.sizes=[300,600]", "bench_scale.synthetic_sizes=[1000,2000]",
        "bench_scale.dimensions=16", "bench_scale.default_images=32", "bench_scale.shard_images=250",
        f"bench_scale.document={tmp_path / 'scale.md'}",
    ]  # fmt: skip
    command = [sys.executable, "scripts/bench_scale.py", *overrides]
    done = subprocess.run([*command, "bench_scale.synthetic_sizes=[1000]"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    noted = tmp_path / "results" / "smoke" / "bench_scale.jsonl"
    before = noted.read_text().splitlines()
    assert len(before) == 2 * len(STAGES) + 1 + len(ALONE)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in noted.read_text().splitlines()]
    assert len(rows) == len(before) + len(ALONE)
    for row in rows:
        assert row["seconds"] > 0 and row["cpu_seconds"] > 0
        assert 0 < row["peak_anonymous_gb"] <= row["peak_rss_gb"]
    assert list((tmp_path / "runs" / "bench_scale").iterdir()) == [], "a size that is done leaves nothing"
    assert "None: the largest measured synthetic set" in (tmp_path / "scale.md").read_text()
    assert (tmp_path / "results" / "smoke" / "bench_scale.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_failing_stage_ends_the_bench_with_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="manifest of 5 images ended with 1"):
        measured("manifest", Plan(TILES, 5, str(tmp_path / "nowhere"), 64, 32, 10, 16, 0))


@pytest.mark.slow
def test_both_engines_are_timed_and_select_the_same_images(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="engine=ray needs the extra ray")
    command = [
        sys.executable, "scripts/bench_engines.py", "profile=smoke", f"runs={tmp_path / 'runs'}", "tracker=none",
        f"results={tmp_path / 'results'}", "corpus.train.limit=200", "bench_scale.shard_images=100",
        "bench_engines.images=300", "bench_engines.rounds=1",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    result = json.loads((tmp_path / "results" / "smoke" / "bench_engines.json").read_text())
    assert result["selections are equal"] and result["images"] == 300
    assert result["ray of local"] == pytest.approx(result["seconds"]["ray"][0] / result["seconds"]["local"][0])
    assert not (tmp_path / "runs" / "bench_engines").exists()
