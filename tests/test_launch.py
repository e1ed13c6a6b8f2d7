"""`accelerate launch --cpu --num_processes N` starts N processes; unsupported launches are refused in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.launch import check_launch, launcher_of, options_of, requested_plugin

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys, torch
sys.path.insert(0, {root!r})
from runtime.application import run

def main(cfg):
    from accelerate import Accelerator
    state = Accelerator()
    told = torch.tensor([state.process_index + 1.0])
    if state.num_processes > 1:
        torch.distributed.all_reduce(told)
    print("processes", state.num_processes, "sum", int(told), "device", state.device.type, "ratio", cfg.ratio)
    if state.num_processes > 1:  # a process that leaves while the other still listens makes that one abort
        state.wait_for_everyone()
        torch.distributed.destroy_process_group()

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


def test_accelerate_launch_starts_the_requested_number_of_processes(script, tmp_path):
    """The command of docs/training.md; gloo sums over all of them."""
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    command = (accelerate, "launch") if accelerate else (sys.executable, "-m", "accelerate.commands.launch")
    done = launched(*command, "--cpu", "--num_processes", "2", str(script), "ratio=0.5", "tracker=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = "processes 2 sum 3 device cpu ratio 0.5"
    assert done.stdout.splitlines() == [expected]  # only the first process prints


BUILDS = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import numpy as np
from runtime.application import run
from runtime.artefacts import is_main_process, stage

def main(cfg):
    from accelerate import Accelerator
    from eval.processes import first_process_decides, over_processes
    state = Accelerator()

    def rows(directory):
        found = over_processes(lambda rows: np.stack([rows, np.full(len(rows), state.process_index)], 1), 5)
        if is_main_process():
            np.save(directory / "found.npy", found)

    def together(seed):
        return stage({runs!r}, "bench", {{"seed": seed}}, rows, together=first_process_decides)

    def alone(directory):
        rows(directory)
        together(1)

    places = together(0), stage({runs!r}, "bench", {{"seed": 2}}, alone), together(1)
    print(*(str(np.load(place / "found.npy")[:, 1].tolist()) for place in places), sep=" | ")
    state.wait_for_everyone()

run(main)
"""


def test_a_build_by_the_first_process_alone_does_not_wait_for_other_processes(tmp_path):
    """It may call functions in which all processes synchronise elsewhere; here it computes all rows itself."""
    script = tmp_path / "script.py"
    script.write_text(BUILDS.format(root=str(ROOT), runs=str(tmp_path / "runs")))
    command = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(script))
    done = launched(*command, "tracker=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["[0, 1, 0, 1, 0] | [0, 0, 0, 0, 0] | [0, 0, 0, 0, 0]"]


def test_several_machines_are_refused_in_one_line(script, tmp_path):
    done = launched(
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "2", "--machine_rank", "0",
        "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "29611", str(script),
        cwd=tmp_path,
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and "multi_cpu.yaml" in errors[0]
    assert done.stdout == ""


def test_options_of_recognises_accelerate_launch_commands():
    assert options_of(["/v/bin/python3", "/v/bin/accelerate", "launch", "--cpu", "a.py"]) == ["--cpu", "a.py"]
    assert options_of(["/v/bin/python3", "/v/bin/accelerate-launch", "a.py"]) == ["a.py"]
    assert options_of(["python", "-m", "accelerate.commands.launch", "a.py"]) == ["a.py"]
    for other in ([], ["bash", "launch"], ["python", "-m", "torch.distributed.run", "a.py"], ["accelerate", "config"]):
        assert options_of(other) is None


def test_cpu_launches_of_several_processes_use_torch_distributed_run():
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    assert launcher_of(["--cpu", "--num_processes", "2", "a.py", "b=c d"]) == [*start, "2", "a.py", "b=c d"]
    assert launcher_of(["--num-processes=3", "--cpu", "-m", "pkg.mod", "b=1"]) == [*start, "3", "-m", "pkg.mod", "b=1"]
    assert launcher_of(["--cpu", "--num_processes", "2", "--num_processes", "4", "a.py"])[5] == "4"
    for got in (
        ["--num_processes", "2", "a.py", "--cpu"],  # GPUs; the script's own option
        ["--cpu", "a.py"],
        ["--cpu", "--num_processes", "1", "a.py"],
        ["--cpu", "--num_processes", "2", "--mpirun_hostfile", "hosts", "a.py"],
    ):
        assert launcher_of(got) is None
    with pytest.raises(UserError, match=r"multi_cpu\.yaml"):
        launcher_of(["--cpu", "--num_processes", "2", "--num_machines", "2", "a.py"])


def test_variables_of_batch_systems_do_not_count_as_a_launch(script, tmp_path, monkeypatch):
    """Variables that batch systems export do not count as a launch."""
    for name, value in {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "1234", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, str(script), "ratio=0.5"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines() == ["processes 1 sum 1 device cpu ratio 0.5"], done.stderr[-3000:]


@pytest.mark.parametrize("config", ["fsdp", "deepspeed"])
def test_gpu_plugins_are_refused_on_cpus(tmp_path, config):
    """In a launch that requests them, every process ends before the corpus is read, with the same single line."""
    if config == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: Accelerate's launcher says so by itself")
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file",
            str(ROOT / "configs" / "accelerate" / f"{config}.yaml"), "--num_processes", "2", "--main_process_port", "0",
            str(ROOT / "train" / "pretrain.py"), "profile=smoke", f"runs={tmp_path / 'runs'}",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    lines = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert done.returncode != 0 and len(lines) == 1, done.stderr[-3000:]
    assert "only on GPUs" in lines.pop() and "run: " not in done.stdout and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_a_refused_launch_ends_with_a_one_line_error_and_exit_code_2(tmp_path, name):
    """The process sees no GPU."""
    environment = {**os.environ, f"ACCELERATE_USE_{name.upper()}": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train" / "pretrain.py"), "profile=smoke", f"runs={tmp_path / 'runs'}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "runs").exists()
    assert line.startswith(f"error: the launch asks for {name}, ") and "configs/accelerate/multi_cpu.yaml" in line


def test_check_launch_accepts_fsdp_2_and_refuses_unsupported_options(monkeypatch):
    assert requested_plugin() is None
    check_launch()
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    for variables, message in (
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps=4.*micro_batch"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "True"}, "only on GPUs"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "not installed"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
            patch.setattr("importlib.util.find_spec", lambda name: None)
            for key, value in variables.items():
                patch.setenv(key, value)
            check_launch()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert requested_plugin() == "FSDP"
    check_launch()
