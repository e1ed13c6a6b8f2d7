"""The benches as real commands, as small as their options allow: what they leave is complete and positive."""

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
    """The JSON that a bench leaves in `results`."""
    done = subprocess.run(
        [sys.executable, f"scripts/{script}.py", *tiny_overrides(folder), *NETWORK, *overrides],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == f"results: {folder}/results"
    found = read_json(folder / "results" / f"{script}.json")
    for name in found["images_per_second"]:
        assert name[:60] in done.stdout
    return found


def positive(values: dict[str, float]) -> bool:
    return all(math.isfinite(value) and value > 0 for value in values.values())


def test_bench_of_training_compares_three_loops(tmp_path: Path) -> None:
    found = left_by("bench_training", tmp_path, "bench.training_images=8")
    rates, ratios = found["images_per_second"], found["ratios"]
    assert len(rates) == 4 and {"our loop, latents and text cached", "encoding latents and text, once"} <= set(rates)
    assert list(ratios) == ["our loop to the usual one", "our loop to the limit"]
    assert positive(rates) and positive(ratios)
    assert positive({key: found[key] for key in ("model_flops_utilisation", "gflop_per_image", "peak_gflops")})
    assert found["model_flops_utilisation"] < 1
    assert "latents 4 x 2 x 2, batch 4, 8 images of 16 px" in found["network"] and found["machine"]


def test_bench_of_the_stages_names_their_limits(tmp_path: Path) -> None:
    found = left_by("bench", tmp_path, "bench.files=16")
    assert found["files"] == "16 JPEGs of 400 x 400 px" and found["machine"]
    rates, shares = found["images_per_second"], found["shares"]
    assert {
        "JPEG decoding alone, ours (limit)", "entropy step at 16 px, from files",
        "bare network on ready tensors (limit)", "files to index, entropy and embeddings",
        "autoencoder, encode", "autoencoder, decode", "diffusion, bare training step",
    } <= set(rates)  # fmt: skip
    assert {"entropy step at 16 px, of pure decoding", "entropy and embedding, of the bare network"} <= set(shares)
    assert positive(rates) and positive(shares)


def test_bench_of_pairs_names_its_limits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/bench_pairs.py", *tiny_overrides(tmp_path), "bench.sizes=[400,2000]"],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == f"results: {tmp_path}/results"
    found = read_json(tmp_path / "results" / "bench_pairs.json")
    assert list(found["pairs"]) == ["400", "2000"] and found["machine"]
    assert all(positive(figures) and "products alone (limit)" in figures for figures in found["pairs"].values())
    assert positive(found["network"]) and found["network"]["CLIP scorer, of the bare network"] < 1.5
