"""Launches by `accelerate launch`: start N processes on a CPU, and refuse requests that this machine cannot satisfy.

On a CPU, Accelerate starts several processes only through MPI; without a list of MPI hosts it starts a single one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import PurePath

from runtime.errors import UserError


def options_of(command: Sequence[str]) -> list[str] | None:
    """The options after `accelerate launch` on a command line; None if it is another command."""
    for position, word in enumerate(command):
        name = PurePath(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return list(command[position + 1 :])
        if name == "accelerate" and command[position + 1 : position + 2] == ["launch"]:
            return list(command[position + 2 :])
    return None


def launcher_of(options: Sequence[str]) -> list[str] | None:
    """The command that starts the processes which these options of `accelerate launch` request but do not start.

    None if Accelerate starts them itself (on GPUs or through MPI) or if one process is enough.

    Raises:
        UserError: the options request several machines.
    """
    if "--cpu" not in options:
        return None
    from accelerate.commands.launch import launch_command_parser

    requested = launch_command_parser().parse_args(list(options))
    if not requested.cpu or requested.mpirun_hostfile is not None or (requested.num_processes or 1) == 1:
        return None
    if (requested.num_machines or 1) > 1:
        raise UserError(
            "accelerate launch --cpu connects several machines only through MPI: give --mpirun_hostfile, or use "
            "configs/accelerate/multi_cpu.yaml with ACCELERATE_USE_CPU=true in place of --cpu"
        )
    kind = ["--no-python"] if requested.no_python else ["-m"] if requested.module else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return [*launcher, str(requested.num_processes), *kind, requested.training_script, *requested.training_script_args]


def start_the_others() -> None:
    """Replace this process by a launcher of all processes, if `accelerate launch --cpu` started only this one of
    several.

    Raises:
        UserError: the processes are on several machines.
    """
    if not _flag("ACCELERATE_USE_CPU"):
        return
    import psutil

    parent = psutil.Process().parent()
    options = options_of(parent.cmdline()) if parent else None
    command = launcher_of(options) if options else None
    if command:
        os.environ.pop("KMP_AFFINITY", None)  # set by Accelerate; it would pin all processes to the same cores
        os.execv(command[0], command)


def join_tasks() -> None:
    """Let the processes that submitit started for one cell of a sweep join a process group, as under torchrun.

    Each process still sees all GPUs of its machine and takes the one of its local rank.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ or "RANK" in os.environ:
        return
    from submitit.helpers import JobEnvironment, TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def requested_plugin() -> str | None:
    """The plugin of Accelerate that the launch requests: "FSDP", "DeepSpeed" or None."""
    return next((name for name in ("FSDP", "DeepSpeed") if _flag(f"ACCELERATE_USE_{name.upper()}")), None)


def check_launch() -> None:
    """Refuse a launch that requests something unsupported, before anything is computed.

    Raises:
        UserError: the launch accumulates gradients, or requests FSDP or DeepSpeed without GPUs, FSDP 1, or a DeepSpeed
            that is not installed.
    """
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise UserError(
            f"the launch sets gradient_accumulation_steps={accumulation}: leave it out and set train.loop.micro_batch"
        )
    plugin = requested_plugin()
    if plugin is None:
        return
    import torch

    if _flag("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        raise UserError(
            f"the launch asks for {plugin}, which Accelerate supports only on GPUs: on CPUs, launch with "
            "configs/accelerate/multi_cpu.yaml"
        )
    if plugin == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launch asks for FSDP 1: give fsdp_version: 2, as configs/accelerate/fsdp.yaml does")
    if plugin == "DeepSpeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "the launch asks for DeepSpeed, which is not installed: .venv/bin/python -m pip install '.[deepspeed]', or "
            "launch with configs/accelerate/fsdp.yaml"
        )


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
