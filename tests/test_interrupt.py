"""Real commands killed at random moments; `python scripts/interrupt.py` kills twenty times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("what", ["prune", "pretrain"])
def test_a_run_killed_at_random_moments_leaves_the_same_bytes(what: str, repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/interrupt.py", f"interrupt.what={what}", "interrupt.kills=2",
               "interrupt.images=600", "tracker=none", f"runs={tmp_path}", f"results={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "killed 2 times; every resumed run left the same" in done.stdout
