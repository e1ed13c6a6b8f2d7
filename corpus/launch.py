"""`accelerate launch --cpu --num_processes N` as one means it: N processes.

Accelerate starts several processes on a CPU through MPI alone, and without a list of MPI's hosts a single one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from corpus.errors import UserError

#: What PyTorch's and MPI's launchers give each of their processes.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def started_alone(environment: Mapping[str, str]) -> bool:
    """Whether Accelerate was asked for several processes on the CPU and started this one only.

    It names a meeting point to one process of several, but no number of processes to one that is alone.
    """
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return on_cpu and "MASTER_PORT" in environment and not any(name in environment for name in WORLD_SIZES)


def option(command: Sequence[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value` on a command line, with hyphens or underscores."""
    for position, word in enumerate(command):
        key, equals, value = word.partition("=")
        if key.replace("-", "_") == f"__{name}":
            return value if equals else next(iter(command[position + 1 :]), None)
    return None


def launcher_of(launch: Sequence[str], script: Sequence[str]) -> list[str]:
    """The command that starts a script in as many processes as a command line of `accelerate launch` names.

    Raises:
        UserError: it names none, or several machines.
    """
    processes = option(launch, "num_processes") or ""
    if not processes.isdecimal() or option(launch, "num_machines") not in (None, "1"):
        raise UserError(
            "accelerate launch --cpu started one process of several: on the CPU it starts more by MPI alone; give "
            "--num_processes and one machine, or use configs/accelerate/multi_cpu.yaml with ACCELERATE_USE_CPU=true"
        )
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *script]


def start_the_others() -> None:
    """Become the launcher of all processes that `accelerate launch --cpu` was asked for, if it started this one only.

    Raises:
        UserError: how many they are cannot be told.
    """
    if started_alone(os.environ):
        import psutil

        launch = psutil.Process().parent()
        command = launcher_of(launch.cmdline() if launch else [], sys.argv)
        os.execv(command[0], command)
