"""`engine=ray`: the steps of a stage as `map_batches` of Ray Data, on this machine or on a cluster.

Only the driver, which is the command itself, reads and writes the run directory; workers need no shared disk. If a
cluster dies, another cluster or `engine=local` can continue the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np

from runtime.application import keep_freed_memory
from runtime.engine import Done, LocalEngine, Result, Step, functions_of, noted, spent, through
from runtime.errors import UserError
from runtime.notices import notice
from runtime.parallel import WINDOW, cores
from runtime.provenance import ROOT
from runtime.quiet import native_stderr_closed, silence_libraries

#: Items per Ray data set. It bounds the driver's memory, and determines how often actors load their networks.
ITEMS = 2048
#: Most items of a block, and blocks that each worker gets at least.
MOST_IN_BLOCK, LEAST_BLOCKS = 4, 16
#: If a machine was lost, seconds to wait for a result before its items are started again.
PATIENCE = 15
#: Ray runs networks in threads. The heaps of glibc for threads return freed memory to the system in spite of
#: `keep_freed_memory`, and the system then zeroes its pages again for every layer. With one heap they do not.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1"}
#: If the cluster's head node is gone, Ray ends this process without a message. This shell waits for the end of the
#: process and prints the message.
WITNESS = (
    'read -r ended || echo "error: the Ray cluster is gone, or this command was killed: finished work is kept, run the '
    'same command again to continue, or with engine=local" >&2'
)
#: Columns of a block, which has one row: a `Done` and the item's number.
COLUMN, ITEM = "done", "item"
#: Packages of this project that are sent to the workers of a cluster.
PACKAGES = ("runtime", "corpus", "encoders", "captioning", "prune", "report", "eval", "train")


@dataclass(frozen=True)
class RayEngine:
    """Runs steps on Ray: tasks for steps without a network, a pool of actors for steps with one.

    Args:
        address: address of a cluster ("auto", "HOST:PORT", "ray://HOST:PORT"); None: start one on this machine for this
            command.
        cpus: CPUs of the cluster on this machine; None: all that this process may use.
        cpus_per_worker: CPUs that a task or an actor takes.
        gpus_per_actor: GPUs that an actor takes; 0.25: four actors share one.
        actors: largest number of actors of a step; None: as many as the CPUs or, with `gpus_per_actor`, the GPUs allow.
        retries: how often an item is tried again after its worker died, before the command ends.
        rows_from: number of images from which scenes and clusters are computed by tasks; fewer are computed locally.
        object_store_gb: memory of the object store of this machine's cluster; None: Ray's default.
        ship_code: send this project's packages to the workers of a cluster, which may have older ones installed.
        runtime_env: further entries of Ray's runtime environment, such as env_vars or pip.
    """

    address: str | None = None
    cpus: int | None = None
    cpus_per_worker: float = 1
    gpus_per_actor: float = 0
    actors: int | None = None
    retries: int = 3
    rows_from: int = 1_000_000
    object_store_gb: float | None = None
    ship_code: bool = True
    runtime_env: dict[str, Any] = field(default_factory=dict)
    name: str = "ray"
    shares_files: bool = False

    def run(self, steps: Sequence[Step], items: Iterable[Any], workers: int | None = None) -> Iterator[Done]:
        """See `runtime.engine.Engine.run`. `workers` applies to the local engine only; here `cpus` or the cluster
        decides."""
        source = iter(items)
        while window := list(islice(source, ITEMS)):
            done = 0
            while done < len(window):  # again after a machine was lost, with as many workers as there is room for
                with _explained():
                    self._connect()
                    for part in noted(self._results(steps, window[done:])):
                        done += 1
                        spent["gpu_seconds"] += part.gpu_seconds
                        yield part

    def map_rows(
        self, function: Callable[..., Result], table: Any, groups: Sequence[np.ndarray], arguments: Sequence[tuple]
    ) -> Iterator[Result]:
        """See `runtime.engine.Engine.map_rows`: one task per group; its rows are sent through the object store."""
        if sum(map(len, groups)) < self.rows_from:
            yield from LocalEngine().map_rows(function, table, groups, arguments)
            return
        with _explained():
            ray = self._connect()
            task = ray.remote(_on_rows).options(num_cpus=self.cpus_per_worker, max_retries=self.retries)
            jobs = iter(zip(groups, arguments, strict=True))

            def submitted(count: int) -> list[Any]:
                parts = ((table.restricted(rows), len(rows), own) for rows, own in islice(jobs, count))
                return [task.remote(function, *part) for part in parts]

            running = deque(submitted(WINDOW * max(1, int(ray.cluster_resources().get("CPU", 1)))))
            while running:
                [done] = noted([ray.get(running.popleft())])
                running.extend(submitted(1))
                yield done.value

    def close(self) -> None:
        """End the cluster that this command started, or disconnect from another one, and remove temporary files."""
        if _witnesses:  # otherwise this command has not connected
            _ray().shutdown()
        while _witnesses:
            _witnesses.pop().communicate(b"ended\n")
        while _folders:
            shutil.rmtree(_folders.pop(), ignore_errors=True)

    def _connect(self) -> Any:
        """Connect to the cluster and return the module `ray`.

        Raises:
            UserError: Ray is not installed, or the cluster cannot be reached.
        """
        ray = _ray()
        if ray.is_initialized():
            return ray
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray._private.worker.print_to_stdstream = _say  # otherwise Ray reports lost workers on stdout in many lines
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ part writes to the terminal
        for name, value in ALLOCATOR.items():  # the cluster that this process starts inherits it
            os.environ.setdefault(name, value)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if self.address is None:
            _folders.append(tempfile.mkdtemp(prefix="rs-"))  # a run directory's path is too long for Ray's sockets
            memory = None if self.object_store_gb is None else int(self.object_store_gb * 2**30)
            own = {"num_cpus": self.cpus or cores(), "object_store_memory": memory, "include_dashboard": False}
            with native_stderr_closed():  # Ray prints a note there that logging is off
                ray.init(**own, **quiet, _temp_dir=_folders[-1], runtime_env=self.runtime_env or None)
        else:
            variables = {**ALLOCATOR, **self.runtime_env.get("env_vars", {})}
            environment = {**self.runtime_env, "env_vars": variables}
            if self.ship_code:
                environment.setdefault("py_modules", [str(ROOT / name) for name in PACKAGES])
            try:
                _knock(self.address)
                with native_stderr_closed():
                    ray.init(self.address, **quiet, runtime_env=environment)
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise UserError(
                    f"engine.address={self.address}: no Ray cluster answers there ({reason}): start one with "
                    "`ray start --head`, or take engine=local"
                ) from None
        _witnesses.append(subprocess.Popen(["sh", "-c", WITNESS], stdin=subprocess.PIPE))
        return ray

    def _results(self, steps: Sequence[Step], window: Sequence[Any]) -> Iterator[Done]:
        """Process items as one Ray data set, in their order.

        Ends early if a machine was lost and no result has come since: Ray would wait forever for room for its actors.
        """
        data = self._data(steps, window)
        machines, result, ended = _machines(), Queue(maxsize=2), Event()
        Thread(target=_read, args=(data, result, ended), daemon=True).start()
        try:
            yield from self._taken(data, result, machines)
        finally:
            ended.set()
            if data._current_executor:
                data._current_executor.shutdown(force=True)

    def _taken(self, data: Any, result: Queue, machines: set[str]) -> Iterator[Done]:
        """The results from the reader of a data set, until it ends or a machine is lost."""
        last = time.monotonic()
        while True:
            try:
                block = result.get(timeout=1)
            except Empty:
                if machines - _machines() and time.monotonic() - last > PATIENCE and data._current_executor:
                    notice("ray: a machine was lost: the other machines repeat its work")
                    return
                continue
            if block is None:
                return
            if isinstance(block, BaseException):
                raise block
            last, done = time.monotonic(), block[COLUMN][0]
            if isinstance(done.value, UserError):
                raise done.value
            yield done

    def _data(self, steps: Sequence[Step], window: Sequence[Any]) -> Any:
        """The items as a Ray data set, with their steps."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the stage has its own bar for all workers
        context.execution_options.preserve_order = True
        for name in ("ray.data", "ray.data._internal"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # the logged errors are raised as well
        attempts = ray.remote(_Attempts).options(num_cpus=0, label_selector=_here()).remote(self.retries)
        rows = [{COLUMN: Done(item), ITEM: at} for at, item in enumerate(window)]
        data = ray.data.from_items(rows, override_num_blocks=self._blocks(len(window)))
        for number, part in enumerate(_fused(steps, split=self.gpus_per_actor > 0)):
            work = _Work(number, functions_of(part), attempts)
            data = data.map_batches(**self._stage(part, len(window), work))
        return data

    def _blocks(self, items: int) -> int:
        """Number of blocks of so many items: a block costs the driver time, and a worker without one waits."""
        import ray

        workers = max(1, int(ray.cluster_resources().get("CPU", 1) / max(self.cpus_per_worker, 1e-9)))
        return -(-items // max(1, min(MOST_IN_BLOCK, items // (LEAST_BLOCKS * workers))))

    def _stage(self, steps: tuple[Step, ...], items: int, work: _Work) -> dict[str, Any]:
        """Arguments of `map_batches` for steps that run in one worker, one after the other.

        Ray retries an item forever if its worker or machine is lost; `_Attempts` limits the retries.
        """
        from ray.data import ActorPoolStrategy, TaskPoolStrategy

        batches, task = {"batch_size": 1, "batch_format": "numpy"}, partial(_task, work)
        if steps[0].home:  # it only copies from a disk, and must run although actors may have taken all CPUs
            return {
                "fn": task,
                "num_cpus": 0,
                "label_selector": _here(),
                "compute": TaskPoolStrategy(size=2),
                **batches,
            }
        if not any(step.network for step in steps):
            return {"fn": task, "num_cpus": self.cpus_per_worker, "compute": TaskPoolStrategy(), **batches}
        actor = _actor(work, self.gpus_per_actor)
        pool = ActorPoolStrategy(size=min(items, self.actors or self._room()))
        needs = {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_actor or None}
        return {"fn": actor, "compute": pool, **needs, **batches}

    def _room(self) -> int:
        """Number of actors for which the cluster has CPUs or GPUs."""
        import ray

        kind, each = ("GPU", self.gpus_per_actor) if self.gpus_per_actor else ("CPU", self.cpus_per_worker)
        result = int(ray.cluster_resources().get(kind, 0) / max(each, 1e-9))
        if not result:
            raise UserError(
                f"engine.gpus_per_actor={self.gpus_per_actor}: no machine of the Ray cluster has that many GPUs: take "
                "0 to embed on CPUs"
            )
        return result


_folders: list[str] = []  # folders of the clusters that this process started
_witnesses: list[subprocess.Popen] = []


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError(
            "engine=ray needs Ray, which is not installed: .venv/bin/python -m pip install '.[ray]', or take "
            "engine=local"
        ) from None
    return ray


def _knock(address: str) -> None:
    """Open and close a connection to a cluster's address; Ray itself would try for minutes.

    Raises:
        OSError: nobody answers.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _machines() -> set[str]:
    """The machines of the cluster that are alive."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _read(data: Any, result: Queue, ended: Event) -> None:
    """Put the blocks of a data set into a queue in order, then None or the error; stop when `ended` is set."""

    def give(value: Any) -> None:
        while not ended.is_set():
            with contextlib.suppress(Full):
                result.put(value, timeout=1)
                return

    try:
        for block in data.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=2):
            if ended.is_set():
                return
            give(block)
    except BaseException as error:  # raised in the thread that takes the results
        give(error)
    else:
        give(None)


def _say(message: dict[str, Any], **_: Any) -> None:
    """Print Ray's reports of lost workers and machines on stderr, one line each."""
    line = next((line for text in message["lines"] for line in str(text).splitlines() if line.strip()), "")
    notice(f"ray: {line[:300]}")


def _fused(steps: Sequence[Step], split: bool) -> list[tuple[Step, ...]]:
    """Group adjacent steps that run together in one worker.

    Steps with `home` stay separate. With `split`, so do the steps before a network, so that all CPUs supply the GPUs.
    """
    groups: list[tuple[Step, ...]] = []
    for step in steps:
        last = groups[-1][-1] if groups else None
        if last and last.home == step.home and (last.network == step.network or not split):
            groups[-1] = (*groups[-1], step)
        else:
            groups.append((step,))
    return groups


def _here() -> dict[str, str]:
    """The label of the machine that runs the command."""
    import ray

    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


class _Attempts:
    """Counts how often workers began an item, so that an item that kills every worker is not retried forever."""

    def __init__(self, retries: int) -> None:
        self._allowed, self._begun = retries + 1, Counter()

    def begin(self, key: tuple[int, int]) -> bool:
        """Whether the stage may try the item again; `key` is (number of the stage, number of the item)."""
        self._begun[key] += 1
        return self._begun[key] <= self._allowed


@dataclass(frozen=True)
class _Work:
    """Data that the workers of a stage need: its number, its functions, and a handle of the `_Attempts`."""

    stage: int
    functions: tuple[Callable[[Any], Any], ...]
    attempts: Any


def _block(done: Done, item: int) -> dict[str, np.ndarray]:
    """A batch of one row."""
    column = np.empty(1, dtype=object)
    column[0] = done
    return {COLUMN: column, ITEM: np.array([item])}


def _through(work: _Work, gpus: float, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Pass a batch of one item through some steps.

    The value of the result is a UserError if a step raised one, or if too many workers died on the item.
    """
    import ray

    item, done = int(batch[ITEM][0]), batch[COLUMN][0]
    if isinstance(done.value, UserError):  # raised in an earlier step
        return _block(done, item)
    try:
        if not ray.get(work.attempts.begin.remote((work.stage, item))):
            raise UserError(
                "a worker was killed repeatedly at the same images, probably because memory ran out: give each worker "
                "more (engine.cpus_per_worker=2), or take engine=local corpus.workers=1"
            )
        done = through(work.functions, done, gpus)
    except UserError as error:  # Ray Data would keep only the text of the error
        done = replace(done, value=error)
    return _block(done, item)


def _task(work: _Work, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`_through` for steps without a network."""
    keep_freed_memory()
    silence_libraries()
    return _through(work, 0, batch)


def _actor(work: _Work, gpus: float) -> type:
    """A class of workers that keep their networks.

    Ray replaces actors that die. Therefore they take no arguments, which could be lost with a machine.
    """

    class Actor:
        def __init__(self) -> None:
            from runtime.application import prepare_process

            prepare_process()

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            import torch

            torch.set_flush_denormal(True)  # a setting of this thread, which may differ from the thread of `__init__`
            return _through(work, gpus, batch)

    return Actor


def _on_rows(function: Callable[..., Result], table: Any, count: int, arguments: tuple) -> Done:
    return through([lambda rows: function(table, rows, *arguments)], Done(np.arange(count)))


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Context that replaces Ray's errors by the project error that a worker raised, or by one line on what to do."""
    import_errors = _ray().exceptions
    try:
        yield
    except import_errors.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, import_errors.RayTaskError):
            cause = cause.cause
        if isinstance(cause, UserError):
            raise cause from None
        raise
    except import_errors.RayError as error:
        raise UserError(
            f"the Ray cluster or its workers died ({type(error).__name__}): finished work is kept, run the same "
            "command again, or with engine=local"
        ) from error
