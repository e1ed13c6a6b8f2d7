"""`accelerate launch --cpu --num_processes N` as one means it: N processes.

Accelerate starts several processes on a CPU through MPI alone, and without a list of MPI's hosts a single one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import PurePath

from runtime.errors import UserError


def options_of(command: Sequence[str]) -> list[str] | None:
    """What follows `accelerate launch` on a command line; None if it is another one."""
    for position, word in enumerate(command):
        name = PurePath(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return list(command[position + 1 :])
        if name == "accelerate" and command[position + 1 : position + 2] == ["launch"]:
            return list(command[position + 2 :])
    return None


def launcher_of(options: Sequence[str]) -> list[str] | None:
    """The command that starts the processes which these options of `accelerate launch` ask for and do not get.

    None where they get them: on GPUs, through MPI, or because one is enough.

    Raises:
        UserError: they ask for several machines.
    """
    if "--cpu" not in options:
        return None
    from accelerate.commands.launch import launch_command_parser

    asked = launch_command_parser().parse_args(list(options))
    if not asked.cpu or asked.mpirun_hostfile is not None or (asked.num_processes or 1) == 1:
        return None
    if (asked.num_machines or 1) > 1:
        raise UserError(
            "accelerate launch --cpu joins several machines through MPI alone, and no --mpirun_hostfile is given: give "
            "one, or use configs/accelerate/multi_cpu.yaml with ACCELERATE_USE_CPU=true in place of --cpu"
        )
    kind = ["--no-python"] if asked.no_python else ["-m"] if asked.module else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return [*launcher, str(asked.num_processes), *kind, asked.training_script, *asked.training_script_args]


def start_the_others() -> None:
    """Become the launcher of all processes that `accelerate launch --cpu` was asked for, if it started this one only.

    Raises:
        UserError: they are on several machines.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes"):
        return
    import psutil

    parent = psutil.Process().parent()
    options = options_of(parent.cmdline()) if parent else None
    command = launcher_of(options) if options else None
    if command:
        os.environ.pop("KMP_AFFINITY", None)  # Accelerate's, which would put all of them on the same cores
        os.execv(command[0], command)
