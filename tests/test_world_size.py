"""Two processes start and are interrupted, one continues from their checkpoint: the curve is that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny_loop import OPTIONS, fit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
STOP_AT = 9  # the step that neither process finishes; the preceding checkpoint is that of step 6
BEGINNING = f"""
import sys
from pathlib import Path
from torch import nn
from tiny_loop import fit

calls, forward = [0], nn.Tanh.forward


def stop(self, value):
    calls[0] += 1
    if calls[0] == {STOP_AT}:
        raise KeyboardInterrupt
    return forward(self, value)


nn.Tanh.forward = stop
print("begins", flush=True)
fit(Path(sys.argv[1]))
"""


def begun(directory: Path) -> None:
    """Run two processes until both raise KeyboardInterrupt in the same step."""
    script = directory.with_suffix(".py")
    script.write_text(BEGINNING)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "configs/accelerate/multi_cpu.yaml"), "--num_processes", "2"]
    command += ["--main_process_port", "0", str(script), str(directory)]
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.count("begins\n") == 2, done.stderr[-3000:]
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr, done.stderr[-3000:]


def losses(directory: Path, step: int) -> list[float]:
    return json.loads((directory / "checkpoints" / f"{step:08d}" / "state.json").read_text())["losses"]


def test_one_process_resumes_where_two_were_interrupted(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    expected = losses(tmp_path / "whole", OPTIONS.steps)

    begun(tmp_path / "begun")
    assert [path.name for path in (tmp_path / "begun" / "checkpoints").iterdir()] == ["00000006"]
    first = losses(tmp_path / "begun", 6)
    np.testing.assert_allclose(first, expected[:6], rtol=1e-4)

    later = fit(tmp_path / "begun")
    result = losses(tmp_path / "begun", OPTIONS.steps)
    assert result[:6] == first  # reused, not computed again
    np.testing.assert_allclose(result, expected, rtol=1e-4)
    for key, value in whole.items():
        np.testing.assert_allclose(later[key], value, rtol=1e-3, atol=1e-5)
    for name in ("net", "shift", "net_average", "optimizer"):
        requested, got = (
            load_file(tmp_path / run / "checkpoints" / f"{OPTIONS.steps:08d}" / f"{name}.safetensors")
            for run in ("whole", "begun")
        )
        assert got.keys() == requested.keys()
        for key, value in requested.items():
            np.testing.assert_allclose(got[key], value, rtol=1e-3, atol=1e-5)
