"""A thousand mutated files over all sources through index, prune and export: exit 0 or one line, nothing lost.

`fuzzing.py` generates and checks the corpora in separate processes with bounded memory, so that a decoder that crashes,
hangs or takes all memory is detected.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
#: Output of C code and other libraries that users of a command cannot act on.
NOISE = ("Traceback", "Warning", "libpng", "TIFF", "Fax", "JPEG datastream", "Exception ignored")
#: loky's message if worker processes were started repeatedly in one process; a command starts them once.
OF_WORKERS = "leaked semlock objects"


def fuzzed(folder: Path, seed: int, plan: list[tuple[str, int]]) -> list[dict]:
    """Results for the corpora of a plan, (source, number of mutations) each."""
    arguments = [str(part) for pair in plan for part in pair]
    variables = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        process = subprocess.Popen(
            [sys.executable, str(TESTS / "fuzzing.py"), str(folder), str(seed), *arguments],
            env={**os.environ, **variables, "PYTHONPATH": path}, stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        code = process.wait()
    message = (folder / "stderr").read_text(errors="replace")
    lines = [json.loads(line) for line in (folder / "stdout").read_text().splitlines()]
    assert code == 0, f"ended with {code} in {lines[-1] if lines else 'nothing'}: {message[-3000:]}"
    assert ended(process.pid), "a worker process is left"
    noise = [line for line in message.splitlines() if any(word in line for word in NOISE) and OF_WORKERS not in line]
    assert not noise, noise[:5]
    return [line for line in lines if "starts" not in line]


def ended(group: int) -> bool:
    """Whether all processes of a group end within a few seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def check_results(result: list[dict]) -> None:
    """No corpus has a problem, and enough of them ran through all steps for the test to be meaningful."""
    problems = [
        f"seed {one['seed']} {one['source']} {one['overrides']}: {one['problem']}" for one in result if one["problem"]
    ]
    assert not problems, "\n\n".join(problems)
    through = [one for one in result if "kept" in one]
    assert len(through) >= len(result) / 2, [one["refused"] for one in result if "refused" in one]
    assert all(0 < one["readable"] <= one["rows"] for one in through)


def test_a_few_mutations_of_each_source_cause_no_problem(tmp_path: Path) -> None:
    check_results(fuzzed(tmp_path, 5, [("folder", 12), ("webdataset", 12), ("geotiff", 10), ("huggingface", 10)]))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "webdataset", "geotiff", "huggingface"])
def test_a_thousand_mutations_cause_no_problem(tmp_path: Path, source: str) -> None:
    check_results(fuzzed(tmp_path, 1000, [(source, 50)] * 5))
