"""`accelerate launch --cpu --num_processes N` starts N processes, though Accelerate alone starts one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from corpus.errors import UserError
from corpus.launch import launcher_of, option, started_alone

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import os, sys, torch
sys.path.insert(0, {root!r})
from corpus.application import run
from corpus.artefacts import is_main_process

def main(cfg):
    from accelerate import Accelerator
    state = Accelerator()
    told = torch.tensor([state.process_index + 1.0])
    if state.num_processes > 1:
        torch.distributed.all_reduce(told)
    print("processes", state.num_processes, "sum", int(told), "device", state.device.type, "ratio", cfg.ratio)

run(main)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    return path


def launched(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    names = ("ACCELERATE_USE_CPU", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


def test_as_many_processes_as_asked_for(script, tmp_path):
    """The command of the README and of Accelerate's own help, and gloo adds up over all of them."""
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    command = (accelerate, "launch") if accelerate else (sys.executable, "-m", "accelerate.commands.launch")
    done = launched(*command, "--cpu", "--num_processes", "2", str(script), "ratio=0.5", "tracker=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = "processes 2 sum 3 device cpu ratio 0.5"
    assert done.stdout.splitlines() == [expected]  # the first process alone prints


def test_several_machines_are_refused_in_one_line(script, tmp_path):
    done = launched(
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "2", "--machine_rank", "0",
        "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "29611", str(script),
        cwd=tmp_path,
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and "multi_cpu.yaml" in errors[0]
    assert done.stdout == ""


def test_who_started_alone():
    asked = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}
    assert started_alone(asked)
    assert not started_alone({})  # no launcher
    assert not started_alone({"ACCELERATE_USE_CPU": "True"})  # --num_processes 1
    assert not started_alone({**asked, "ACCELERATE_USE_CPU": "False"})  # GPUs
    for size in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        assert not started_alone({**asked, size: "2"})  # torchrun, Open MPI, Intel MPI


def test_options_of_the_launch():
    assert option(["accelerate", "launch", "--num_processes=3", "a.py"], "num_processes") == "3"
    assert option(["accelerate", "launch", "--num-processes", "4", "a.py"], "num_processes") == "4"
    assert option(["accelerate", "launch", "--num_processes"], "num_processes") is None
    assert launcher_of(["--num_processes", "2"], ["a.py", "b=1"])[-3:] == ["2", "a.py", "b=1"]
    for launch in ([], ["--num_processes", "two"], ["--num_processes", "2", "--num_machines", "2"]):
        with pytest.raises(UserError, match=r"multi_cpu\.yaml"):
            launcher_of(launch, ["a.py"])
