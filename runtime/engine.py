"""Execution of a stage's work: by processes and threads of this machine or on a Ray cluster (`runtime.ray_engine`).

A stage describes its work as steps that every item passes through, and receives the results in the order of the items.
Therefore the engine changes neither a result nor its fingerprint.
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
    """A function that every item passes through.

    Attributes:
        function: picklable, takes one argument.
        network: whether it holds a network, which is loaded once per worker and may use a GPU.
        home: whether it reads files of the run directory, which may exist only on the machine that runs the command.
    """

    function: Callable[[Any], Any]
    network: bool = False
    home: bool = False


@dataclass(frozen=True)
class Done:
    """A result and its cost.

    Attributes:
        worker: host and process number of the worker; for several steps, of the first step's worker.
        seconds: wall-clock seconds of the workers.
        cpu_seconds, gpu_seconds: CPU and GPU seconds that the workers used.
    """

    value: Any
    worker: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0


class Engine(Protocol):
    """Runs the steps of a stage.

    Attributes:
        name: name in configs/engine.
        shares_files: whether a worker can write to the run directory.
    """

    name: str
    shares_files: bool

    def run(self, steps: Sequence[Step], items: Iterable[Any], workers: int | None = None) -> Iterator[Done]:
        """Pass every item through all steps; results come in the order of the items, with a bounded number in progress.

        Args:
            workers: number for the steps without a network; 0 or 1: in this process, if the engine supports it; None:
                one per core.
        Raises:
            UserError: an item's workers were killed repeatedly, or the cluster is gone.
        """

    def map_rows(
        self, function: Callable[..., Result], table: Any, groups: Sequence[np.ndarray], arguments: Sequence[tuple]
    ) -> Iterator[Result]:
        """Call `function(table, rows, *arguments)` for every group of rows in parallel; results come in order.

        The function may use `rows` only to select them from `table`: a worker may receive a table that contains only
        these rows, numbered from 0.

        Args:
            table: with a method `restricted(rows)` that makes such a table.
        """


@dataclass(frozen=True)
class LocalEngine:
    """Worker processes and threads of this machine. Networks run in this process and may use all cores."""

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
    """Number of accelerators that the networks of this process use, 0 or 1."""
    return int("torch" in sys.modules and sys.modules["torch"].accelerator.is_available())


def through(functions: Sequence[Callable[[Any], Any]], before: Done, gpus: float = 0) -> Done:
    """Pass a value through functions, one after the other, and measure the cost in this process.

    Args:
        gpus: number of GPUs that this worker holds.
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


#: CPU seconds of other processes, and GPU seconds, that engines have used for this command so far.
spent: Counter[str] = Counter()


def noted(result: Iterable[Done]) -> Iterator[Done]:
    """Yield the results of workers and add their CPU seconds to `spent` as they arrive."""
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
    """Context in which stages run on this engine; a cluster that the engine started ends with the context."""
    token = _current.set(chosen)
    try:
        yield
    finally:
        _current.reset(token)
        if close := getattr(chosen, "close", None):
            close()
