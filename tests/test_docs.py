"""The examples of docs/corpora.md, run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest


@pytest.mark.slow
def test_the_examples_run_as_written(repository: Path, tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("the repository is no git checkout: which files to copy is not known")
    for name in listed.stdout.splitlines():
        if (repository / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, tmp_path / name)
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path), "WANDB_MODE": "disabled",
    }  # fmt: skip
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", (repository / "docs" / "corpora.md").read_text(), re.M | re.S)
    examples = [(kind, text) for kind, text in blocks if not text.startswith("# corpus/")]
    assert len(examples) == 6
    for kind, text in examples:
        shell = ["bash", "-euo", "pipefail", "-c", text] if kind == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, text + done.stderr[-2000:]
    selections = list((tmp_path / "runs" / "selection").glob("*/selection.parquet"))
    assert len(selections) == 5 and all(pd.read_parquet(path)["kept"].any() for path in selections)
