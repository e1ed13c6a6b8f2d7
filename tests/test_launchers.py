"""hydra/launcher=slurm, slurm_multi_gpu, slurm_trial and parallel: their requests, and the end of a sweep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from omegaconf import DictConfig, OmegaConf
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from runtime.application import CONFIGS
from runtime.parallel import cores

ROOT = Path(__file__).resolve().parent.parent


def launcher(name: str, *overrides: str) -> DictConfig:
    """hydra.launcher as a sweep with these overrides resolves it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", [f"hydra/launcher={name}", "runs=elsewhere", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    try:
        return OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    finally:
        HydraConfig.instance().cfg = None
        GlobalHydra.instance().clear()


def sbatch(options: dict) -> str:
    """The script that submitit gives to sbatch for these options of Hydra's launcher."""
    own = {"_target_", "submitit_folder", "max_num_timeout"}
    names = {"timeout_min": "time", "tasks_per_node": "ntasks_per_node", "name": "job_name", "mem_gb": "mem"}
    assert set(OmegaConf.structured(BaseQueueConf)) - {"submitit_folder"} <= set(options)
    equivalent = SlurmExecutor._equivalence_dict()
    assert names.items() <= {**equivalent, "name": "job_name", "mem_gb": "mem"}.items()
    given = {names.get(key, key): value for key, value in options.items() if key not in own and value is not None}
    return _make_sbatch_string("command", folder=options["submitit_folder"], map_count=3, **given)


def test_a_slurm_cell_gets_one_gpu_and_is_requeued() -> None:
    options = launcher("slurm", "hydra.launcher.partition=gpus")
    assert options["submitit_folder"] == "elsewhere/.submitit/%j"
    assert options["max_num_timeout"] > 0, "a cell out of time goes on from its checkpoint"
    lines = sbatch(options).splitlines()
    for line in ("gpus-per-node=1", "ntasks-per-node=1", "nodes=1", "partition=gpus", "requeue", "array=0-2%3"):
        assert f"#SBATCH --{line}" in lines, line
    assert any(line.startswith("#SBATCH --signal=USR2@") for line in lines)


def test_a_multi_gpu_cell_gets_a_process_per_gpu_and_all_end_together() -> None:
    options = launcher("slurm_multi_gpu", "hydra.launcher.nodes=2")
    lines = sbatch(options).splitlines()
    for line in ("gpus-per-node=8", "ntasks-per-node=8", "nodes=2", "requeue"):
        assert f"#SBATCH --{line}" in lines, line
    assert lines.index("export SLURM_KILL_BAD_EXIT=1") < next(n for n, line in enumerate(lines) if "srun" in line)


def sweep(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tests" / "sweep_command.py"), "-m", f"hydra/launcher={name}", *words]
    keep = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
    environment = {**keep, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert sorted(path.name for path in folder.iterdir()) == ["runs"], "no state outside the runs"
    return done


def message(done: subprocess.CompletedProcess) -> list[str]:
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return sorted(line for line in done.stderr.splitlines() if line.startswith("error: "))


def ended(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "runs").glob("done_*"))}


@pytest.mark.slow
def test_parallel_cells_use_one_thread_each_and_continue_after_failures_of_others(tmp_path: Path) -> None:
    done = sweep(tmp_path, "parallel", "seed=1,6,7,2")
    assert done.returncode == 1
    assert ended(tmp_path) == {f"done_{seed}_0": "processes 1 sum 1 threads 1" for seed in (1, 2)} or cores() > 4
    lines = message(done)
    assert len(lines) == 2 and lines[0] == "error: cell seed=6: seed=6 is no good"
    assert lines[1].startswith("error: cell seed=7: ValueError: nobody foresaw it (traceback: runs/failed_cells/")


@pytest.mark.slow
def test_submitted_cells_continue_after_one_fails_and_one_is_killed(tmp_path: Path) -> None:
    done = sweep(tmp_path, "slurm_trial", "seed=8,6,1")
    assert done.returncode == 1
    assert list(ended(tmp_path)) == ["done_1_0"]
    lines = message(done)
    assert len(lines) == 2 and lines[0] == "error: cell seed=6: seed=6 is no good"
    assert lines[1].startswith("error: cell seed=8: its process was lost")
    where = Path(lines[1].rpartition("see ")[2])
    assert (tmp_path / where).is_file() and where.is_relative_to(tmp_path / "runs")


@pytest.mark.slow
def test_processes_of_a_submitted_cell_form_one_group_and_a_bad_cell_exits_with_2(tmp_path: Path) -> None:
    done = sweep(tmp_path, "slurm_trial", "hydra.launcher.tasks_per_node=2", "seed=1")
    assert done.returncode == 0, done.stderr
    assert [text.rpartition(" threads")[0] for text in ended(tmp_path).values()] == ["processes 2 sum 3"] * 2
    bad = sweep(tmp_path, "slurm_trial", "seed=6")
    assert bad.returncode == 2 and message(bad) == ["error: cell seed=6: seed=6 is no good"]
    none = sweep(tmp_path, "slurm_trial", "prune=no_such,neither")
    assert none.returncode == 2 and len(message(none)) == 2
    assert "cell prune=neither: Could not find 'prune/neither'" in message(none)[0]
