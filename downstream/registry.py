"""`TASKS`: all tasks, found by looking through the folder `downstream/tasks`."""

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


def suitable_names(cfg: DictConfig) -> list[str]:
    """The names of `suitable_tasks`, told by the sources of the corpus, without an index.

    A task's file says what keeps a corpus from it with `unsuited(cfg)`, if anything can.
    """
    modules = {name: sys.modules[make_task.__module__] for name, make_task in TASKS.items()}
    return [name for name, module in modules.items() if not getattr(module, "unsuited", lambda _: None)(cfg)]


def suitable_tasks(cfg: DictConfig) -> dict[str, Task]:
    """The tasks that the corpus of a config can be used for; what keeps it from another is said on stderr."""
    found = {}
    for name, make_task in TASKS.items():
        try:
            found[name] = make_task(cfg)
        except Unsuited as reason:
            if is_main_process():
                print(f"no {name}: {reason}", file=sys.stderr, flush=True)
    return found
