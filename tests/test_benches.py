"""The benchmarks as real commands at minimal size: their results are complete and positive."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import NETWORK, tiny_overrides

from runtime.artefacts import read_json

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def left_by(script: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """The JSON that a benchmark writes to `results`."""
    done = subprocess.run(
        [sys.executable, f"scripts/{script}.py", *tiny_overrides(folder), *NETWORK, *overrides],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == f"results: {folder}/results"
    result = read_json(folder / "results" / f"{script}.json")
    for name in result["images_per_second"]:
        assert name[:60] in done.stdout
    return result


def positive(values: dict[str, float]) -> bool:
    return all(math.isfinite(value) and value > 0 for value in values.values())


def test_bench_of_training_compares_three_loops(tmp_path: Path) -> None:
    result = left_by("bench_training", tmp_path, "bench.training_images=8")
    rates, ratios = result["images_per_second"], result["ratios"]
    assert len(rates) == 4 and {"our loop, latents and text cached", "encoding latents and text, once"} <= set(rates)
    assert list(ratios) == ["our loop to the usual one", "our loop to the limit"]
    assert positive(rates) and positive(ratios)
    assert positive({key: result[key] for key in ("model_flops_utilisation", "gflop_per_image", "peak_gflops")})
    assert result["model_flops_utilisation"] < 1
    assert "latents 4 x 2 x 2, batch 4, 8 images of 16 px" in result["network"] and result["machine"]


def test_bench_of_the_stages_reports_rates_and_limits(tmp_path: Path) -> None:
    result = left_by("bench", tmp_path, "bench.files=16")
    assert result["files"] == "16 JPEGs of 400 x 400 px" and result["machine"]
    rates, fractions = result["images_per_second"], result["fractions"]
    assert {
        "JPEG decoding alone, ours (limit)", "entropy step at 16 px, from files",
        "bare network on ready tensors (limit)", "files to index, entropy and embeddings",
        "autoencoder, encode", "autoencoder, decode", "diffusion, bare training step",
    } <= set(rates)  # fmt: skip
    assert {"entropy step at 16 px, of pure decoding", "entropy and embedding, of the bare network"} <= set(fractions)
    assert positive(rates) and positive(fractions)


def test_bench_of_pairs_reports_rates_and_limits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/bench_pairs.py", *tiny_overrides(tmp_path), "bench.sizes=[400,2000]"],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == f"results: {tmp_path}/results"
    result = read_json(tmp_path / "results" / "bench_pairs.json")
    assert list(result["pairs"]) == ["400", "2000"] and result["machine"]
    assert all(positive(figures) and "products alone (limit)" in figures for figures in result["pairs"].values())
    assert positive(result["network"]) and result["network"]["CLIP scorer, of the bare network"] < 1.5
