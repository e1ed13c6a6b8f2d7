"""Where the work of a stage runs: on this machine by processes and threads, or on a Ray cluster (`runtime.ray_engine`).

A stage describes its work as steps that every item goes through, and takes the results in the order of the items. So
the engine changes neither a result nor its fingerprint.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Protocol, TypeVar

import numpy as np

from runtime.parallel import cores, in_processes, in_threads

Result = TypeVar("Result")


@dataclass(frozen=True)
class Step:
    """A function that every item goes through.

    Attributes:
        function: picklable, of one argument.
        network: it holds a network, which is loaded once a worker and may use a GPU.
        home: it reads files of the run directory, which only the machine that runs the command has for certain.
    """

    function: Callable[[Any], Any]
    network: bool = False
    home: bool = False


@dataclass(frozen=True)
class Done:
    """A result, and what it cost.

    Attributes:
        worker: who computed it, as host and process number; of several steps the first one's.
        seconds: that workers were at it; cpu_seconds, gpu_seconds: that they used.
    """

    value: Any
    worker: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0


class Engine(Protocol):
    """Runs the steps of a stage.

    Attributes:
        name: as in configs/engine.
        shares_files: whether a worker can write to the run directory.
    """

    name: str
    shares_files: bool

    def run(self, steps: Sequence[Step], items: Iterable[Any], workers: int | None = None) -> Iterator[Done]:
        """Every item through all steps, in the order of the items, a bounded number under way.

        Args:
            workers: of the steps without a network; 0 or 1: in this process, where the engine can; None: as many as
                there are cores.
        Raises:
            UserError: a worker was killed for good, or the cluster is gone.
        """

    def map_rows(
        self, function: Callable[..., Result], table: Any, groups: Sequence[np.ndarray], arguments: Sequence[tuple]
    ) -> Iterator[Result]:
        """`function(table, rows, *arguments)` of every group of rows, in order, side by side.

        The function must use `rows` for nothing but taking them from `table`: a worker may get a table that holds
        these rows alone, numbered from 0.

        Args:
            table: with a method `restricted(rows)` that makes such a table.
        """


@dataclass(frozen=True)
class LocalEngine:
    """Worker processes and threads of this machine; networks run in this process, which has all cores."""

    name: str = "local"
    shares_files: bool = True

    def run(self, steps: Sequence[Step], items: Iterable[Any], workers: int | None = None) -> Iterator[Done]:
        first_network = next((at for at, step in enumerate(steps) if step.network), len(steps))
        in_workers = partial(through, functions_of(steps[:first_network]))
        here = partial(through, functions_of(steps[first_network:]), gpus=accelerators())
        result = noted(in_processes(in_workers, map(Done, items), workers if first_network else 0))
        for done in result:
            part = here(done) if first_network < len(steps) else done
            spent["gpu_seconds"] += part.gpu_seconds
            yield part

    def map_rows(
        self, function: Callable[..., Result], table: Any, groups: Sequence[np.ndarray], arguments: Sequence[tuple]
    ) -> Iterator[Result]:
        jobs = list(zip(groups, arguments, strict=True))
        yield from in_threads(lambda job: function(table, job[0], *job[1]), jobs, min(cores(), len(jobs)))


def functions_of(steps: Sequence[Step]) -> tuple[Callable[[Any], Any], ...]:
    return tuple(step.function for step in steps)


def accelerators() -> int:
    """How many accelerators the networks of this process use, 0 or 1."""
    return int("torch" in sys.modules and sys.modules["torch"].accelerator.is_available())


def through(functions: Sequence[Callable[[Any], Any]], before: Done, gpus: float = 0) -> Done:
    """The value through some functions, one after the other, and what that costs in this process.

    Args:
        gpus: that this worker holds.
    """
    start, cpu = time.perf_counter(), time.process_time()
    value = reduce(lambda value, function: function(value), functions, before.value)
    seconds = time.perf_counter() - start
    return replace(
        before,
        value=value,
        worker=before.worker or worker_name(),
        seconds=before.seconds + seconds,
        cpu_seconds=before.cpu_seconds + time.process_time() - cpu,
        gpu_seconds=before.gpu_seconds + seconds * gpus,
    )


#: CPU seconds of other processes than this one, and GPU seconds, that engines have used for this command so far.
spent: Counter[str] = Counter()


def noted(result: Iterable[Done]) -> Iterator[Done]:
    """Results of workers, whose CPU seconds are noted in `spent` as they arrive."""
    for done in result:
        if done.worker != worker_name():
            spent["cpu_seconds"] += done.cpu_seconds
        yield done


def worker_name() -> str:
    """Host and process number."""
    return f"{socket.gethostname()}:{os.getpid()}"


_current: contextvars.ContextVar[Engine] = contextvars.ContextVar("engine", default=LocalEngine())  # noqa: B039


def engine() -> Engine:
    """The engine of the running command."""
    return _current.get()


@contextlib.contextmanager
def using(chosen: Engine) -> Iterator[None]:
    """While this lasts, stages run on this engine; a cluster that it started ends with it."""
    token = _current.set(chosen)
    try:
        yield
    finally:
        _current.reset(token)
        if close := getattr(chosen, "close", None):
            close()
