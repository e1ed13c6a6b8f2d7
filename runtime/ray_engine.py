"""`engine=ray`: the steps of a stage as `map_batches` of Ray Data, on this machine or on a cluster.

The driver, which is the command itself, alone reads and writes the run directory: workers need no disk in common. So a
cluster that dies leaves a run that another one, or `engine=local`, goes on with.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from runtime.engine import Done, Result, Step, functions_of, through
from runtime.errors import UserError
from runtime.parallel import WINDOW, cores
from runtime.provenance import ROOT
from runtime.quiet import native_stderr_closed, silence_libraries

#: Items of one Ray data set: it bounds what the driver holds of them, and how often actors load their networks.
ITEMS = 2048
#: The column of a block, which holds one pickled `Done`.
COLUMN = "done"
#: Packages of this project that go to the workers of a cluster.
PACKAGES = ("runtime", "corpus", "encoders", "captioning", "prune", "report", "eval", "train")


@dataclass(frozen=True)
class RayEngine:
    """Runs steps on Ray: tasks for steps without a network, a pool of actors for steps with one.

    Args:
        address: of a cluster ("auto", "HOST:PORT", "ray://HOST:PORT"); None: one on this machine, for this command.
        cpus: of the cluster on this machine; None: all of this process's.
        cpus_per_worker: CPUs that a task or an actor takes.
        gpus_per_actor: GPUs that an actor takes; 0.25: four actors share one.
        actors: most actors of a step; None: as many as there are CPUs or, with `gpus_per_actor`, GPUs for.
        retries: of an item whose worker dies, before the command ends.
        object_store_gb: memory for what is under way on this machine's cluster; None: Ray's own rule.
        ship_code: send this project's packages to the workers of a cluster, whose installed ones may be older.
        runtime_env: more of Ray's runtime environment, such as env_vars or pip.
    """

    address: str | None = None
    cpus: int | None = None
    cpus_per_worker: float = 1
    gpus_per_actor: float = 0
    actors: int | None = None
    retries: int = 3
    object_store_gb: float | None = None
    ship_code: bool = True
    runtime_env: dict[str, Any] = field(default_factory=dict)
    name: str = "ray"
    shares_files: bool = False

    def run(self, steps: Sequence[Step], items: Iterable[Any], workers: int | None = None) -> Iterator[Done]:
        """See `runtime.engine.Engine.run`; `workers` is the local engine's, here `cpus` or the cluster decides."""
        source = iter(items)
        while window := list(islice(source, ITEMS)):
            with _explained():
                self._connect()
                yield from self._results(steps, window)

    def map_rows(
        self, function: Callable[..., Result], table: Any, groups: Sequence[np.ndarray], arguments: Sequence[tuple]
    ) -> Iterator[Result]:
        """See `runtime.engine.Engine.map_rows`: a task a group, whose rows travel through the object store."""
        with _explained():
            ray = self._connect()
            task = ray.remote(_on_rows).options(num_cpus=self.cpus_per_worker, max_retries=self.retries)
            jobs = iter(zip(groups, arguments, strict=True))

            def submitted(count: int) -> list[Any]:
                parts = ((table.restricted(rows), len(rows), own) for rows, own in islice(jobs, count))
                return [task.remote(function, *part) for part in parts]

            running = deque(submitted(WINDOW * max(1, int(ray.cluster_resources().get("CPU", 1)))))
            while running:
                done = ray.get(running.popleft())
                running.extend(submitted(1))
                yield done

    def close(self) -> None:
        """End the cluster that this command started, or the connection to another one, and leave nothing behind."""
        ray = _ray()
        if ray.is_initialized():
            ray.shutdown()
        while _folders:
            shutil.rmtree(_folders.pop(), ignore_errors=True)

    def _connect(self) -> Any:
        """Ray, connected.

        Raises:
            UserError: Ray is not installed, or the cluster cannot be reached.
        """
        ray = _ray()
        if ray.is_initialized():
            return ray
        logging.getLogger("ray").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ part writes to the terminal
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if self.address is None:
            _folders.append(tempfile.mkdtemp(prefix="rs-"))  # Ray's sockets allow no long path, as of a run directory
            memory = None if self.object_store_gb is None else int(self.object_store_gb * 2**30)
            own = {"num_cpus": self.cpus or cores(), "object_store_memory": memory, "include_dashboard": False}
            with native_stderr_closed():  # it says there that it says nothing
                ray.init(**own, **quiet, _temp_dir=_folders[-1], runtime_env=self.runtime_env or None)
        else:
            environment = dict(self.runtime_env)
            if self.ship_code:
                environment.setdefault("py_modules", [str(ROOT / name) for name in PACKAGES])
            try:
                with native_stderr_closed():
                    ray.init(self.address, **quiet, runtime_env=environment or None)
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise UserError(
                    f"engine.address={self.address}: no Ray cluster answers there ({reason}): start one with "
                    "`ray start --head`, or take engine=local"
                ) from None
        return ray

    def _results(self, steps: Sequence[Step], window: Sequence[Any]) -> Iterator[Done]:
        """One Ray data set of a window of items: a block an item, so that blocks keep their order."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the stage's own bar counts what all workers have done
        context.execution_options.preserve_order = True
        context.max_errored_blocks = 0
        for name in ("ray.data", "ray.data._internal"):
            logging.getLogger(name).setLevel(logging.ERROR)
        data = ray.data.from_items([{COLUMN: _packed(Done(item))} for item in window], override_num_blocks=len(window))
        for part in _fused(steps, split=self.gpus_per_actor > 0):
            with warnings.catch_warnings():  # of `max_retries`, for which Ray has no other name yet
                warnings.simplefilter("ignore", DeprecationWarning)
                data = data.map_batches(**self._stage(part, len(window)))
        for table in data.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
            yield _unpacked(table)

    def _stage(self, steps: tuple[Step, ...], items: int) -> dict[str, Any]:
        """Arguments of `map_batches` for steps that run in one worker, one after the other."""
        import ray
        from ray.data import ActorPoolStrategy, TaskPoolStrategy

        functions, batches = functions_of(steps), {"batch_size": 1, "batch_format": "pyarrow"}
        if steps[0].home:  # it copies from a disk, and must find room beside actors that have taken all CPUs
            here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
            own = {"num_cpus": 0, "label_selector": here, "compute": TaskPoolStrategy(size=2)}
            return {"fn": partial(_task, functions), **own, "max_retries": self.retries, **batches}
        if not any(step.network for step in steps):
            own = {"num_cpus": self.cpus_per_worker, "compute": TaskPoolStrategy()}
            return {"fn": partial(_task, functions), **own, "max_retries": self.retries, **batches}
        actors = ActorPoolStrategy(size=min(items, self.actors or self._room()))
        own = {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_actor or None, "compute": actors}
        own |= {"max_restarts": -1, "max_task_retries": self.retries}
        return {"fn": _actor(functions, self.gpus_per_actor), **own, **batches}

    def _room(self) -> int:
        """Actors for which the cluster has CPUs or GPUs."""
        import ray

        kind, each = ("GPU", self.gpus_per_actor) if self.gpus_per_actor else ("CPU", self.cpus_per_worker)
        found = int(ray.cluster_resources().get(kind, 0) / max(each, 1e-9))
        if not found:
            raise UserError(
                f"engine.gpus_per_actor={self.gpus_per_actor}: the Ray cluster has not so many GPUs on any machine: "
                "take 0 to embed on CPUs"
            )
        return found


_folders: list[str] = []  # of the clusters that this process started


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


def _fused(steps: Sequence[Step], split: bool) -> list[tuple[Step, ...]]:
    """Steps that run in one worker together: neighbours but those at home and, if `split`, those before a network,
    which then fill GPUs from all CPUs."""
    groups: list[tuple[Step, ...]] = []
    for step in steps:
        last = groups[-1][-1] if groups else None
        if last and last.home == step.home and (last.network == step.network or not split):
            groups[-1] = (*groups[-1], step)
        else:
            groups.append((step,))
    return groups


def _packed(done: Done) -> bytes:
    import cloudpickle

    return cloudpickle.dumps(done)


def _unpacked(table: Any) -> Done:
    return pickle.loads(table[COLUMN][0].as_buffer())


def _table(done: Done) -> Any:
    import pyarrow as pa

    return pa.table({COLUMN: pa.array([_packed(done)], pa.large_binary())})


def _task(functions: tuple[Callable[[Any], Any], ...], table: Any) -> Any:
    """A batch of one item through steps without a network."""
    from runtime.parallel import keep_freed_memory

    keep_freed_memory()
    silence_libraries()
    return _table(through(functions, _unpacked(table)))


def _actor(functions: tuple[Callable[[Any], Any], ...], gpus: float) -> type:
    """A class of workers that keep their networks. Ray makes new ones where some die, so they take no arguments, which
    could be lost with a machine."""

    class Actor:
        def __init__(self) -> None:
            from runtime.application import prepare_process

            prepare_process()

        def __call__(self, table: Any) -> Any:
            return _table(through(functions, _unpacked(table), gpus))

    return Actor


def _on_rows(function: Callable[..., Result], table: Any, count: int, arguments: tuple) -> Result:
    return function(table, np.arange(count), *arguments)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Ray's errors as what they mean: our own error that a worker raised, or one line on what to do."""
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
            f"the Ray cluster or its workers died ({type(error).__name__}): what is done is kept, run the same command "
            "again, or with engine=local"
        ) from error
