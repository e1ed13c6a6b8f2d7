"""Latents over the processes of a launch: each batch encoded once, none lost at uneven ends, the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from latent_ranks import BATCH, LAUNCHES, NOTED

ROOT = Path(__file__).resolve().parent.parent
COUNTS = LAUNCHES[0][2]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of all launches of latent_ranks.py."""
    folder = tmp_path_factory.mktemp("latents")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "latent_ranks.py"), str(folder)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def files_of(runs: Path) -> dict[str, bytes]:
    """latents.npy of every stage below a folder of runs, by the stage's fingerprint."""
    return {path.parent.name: path.read_bytes() for path in runs.glob("latents/*/latents.npy")}


def batches(folder: Path, name: str, processes: int) -> list[dict[int, list[str]]]:
    """For every process the batches that it encoded, by the number of images."""
    result = []
    for rank in range(processes):
        of_rank, open_batches = {}, []
        for line in (folder / f"{name}_{processes}_{rank}.txt").read_text().splitlines():
            if line.startswith("end "):
                of_rank[int(line.split()[1])], open_batches = open_batches, []
            else:
                open_batches.append(line)
        result.append({**of_rank, -1: open_batches})
    return result


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_latents_are_bit_identical_for_any_number_of_processes(launched: Path, processes: int) -> None:
    alone, together = files_of(launched / "ranks_1"), files_of(launched / f"ranks_{processes}")
    assert len(alone) == len(COUNTS) and together == alone


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_every_batch_is_encoded_once_and_batches_are_divided_evenly(launched: Path, processes: int) -> None:
    (alone,), ranks = batches(launched, "ranks", 1), batches(launched, "ranks", processes)
    for count in COUNTS:
        expected = 2 * -(-count // BATCH)
        assert len(alone[count]) == expected
        assert sum((Counter(rank[count]) for rank in ranks), Counter()) == Counter(alone[count])
        fractions = [len(rank[count]) for rank in ranks]
        assert fractions == [len(range(rank, expected, processes)) for rank in range(processes)]


def test_two_processes_resume_where_three_were_killed(launched: Path) -> None:
    alone, resumed = files_of(launched / "ranks_1"), files_of(launched / "resumed")
    (name,) = resumed
    assert resumed[name] == alone[name]
    total = 2 * -(-33 // BATCH)
    first, later = (batches(launched, "resumed", processes) for processes in (3, 2))
    begun = sum(len(rank[-1]) for rank in first)
    assert begun == 9  # three rounds of three; the fourth was not finished
    assert sum(len(rank[33]) for rank in later) == total - NOTED * (begun // NOTED)


def test_every_row_of_the_latents_is_written_with_the_expected_type(launched: Path) -> None:
    for path in (launched / "ranks_4").glob("latents/*/latents.npy"):
        rows = json.loads((path.parent / "stage.json").read_text())["inputs"]["rows"]
        result = np.load(path)
        assert result.shape[:2] == (2, len(rows)) and result.dtype == (np.float16 if len(rows) == 19 else np.float32)
        assert (np.abs(result).reshape(2, len(rows), -1).max(axis=2) > 0).all()
