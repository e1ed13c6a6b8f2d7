"""`TASKS`: all tasks, found by scanning the folder `downstream/tasks`.

A task's file may define `unsuited(cfg)`, which says why a corpus cannot be used for it, and `IN_CHAIN = False`, which
excludes it from `make reproduce`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable

from omegaconf import DictConfig

from downstream import tasks
from downstream.task import Task, Unsuited
from runtime.artefacts import is_main_process

MakeTask = Callable[[DictConfig], Task]


def find_tasks() -> dict[str, MakeTask]:
    """The function `make_task` of every file of the folder, by the file's name."""
    names = sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))
    return {name: importlib.import_module(f"{tasks.__name__}.{name}").make_task for name in names}


TASKS = find_tasks()


def chain_tasks() -> dict[str, MakeTask]:
    """The tasks of `TASKS` that are part of `make reproduce`."""
    modules = {name: sys.modules.get(make_task.__module__) for name, make_task in TASKS.items()}
    return {name: TASKS[name] for name, module in modules.items() if getattr(module, "IN_CHAIN", True)}


def suitable_names(cfg: DictConfig) -> list[str]:
    """The names of `suitable_tasks`, determined from the sources of the corpus, without an index."""
    modules = {name: sys.modules[make_task.__module__] for name, make_task in chain_tasks().items()}
    return [name for name, module in modules.items() if not getattr(module, "unsuited", lambda _: None)(cfg)]


def suitable_tasks(cfg: DictConfig) -> dict[str, Task]:
    """The tasks of `chain_tasks` for which the corpus can be used; reports on stderr why others cannot be used."""
    result = {}
    for name, make_task in chain_tasks().items():
        try:
            result[name] = make_task(cfg)
        except Unsuited as reason:
            if is_main_process():
                print(f"{name} is left out: {reason}", file=sys.stderr, flush=True)
    return result
