"""Parallel work on many items by threads or processes: results in order, a bounded number of items in progress.

joblib's `Parallel(return_as="generator")` has no such bound: a thread draws items as fast as the workers finish, so
results accumulate in memory before a slower consumer. Closing its generator early ends the worker processes.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from threadpoolctl import threadpool_limits

from runtime.application import keep_freed_memory
from runtime.errors import UserError
from runtime.quiet import silence_libraries

Item = TypeVar("Item")
Result = TypeVar("Result")

WINDOW = 2  # items in flight per worker
IDLE_SECONDS = 60  # idle time after which a worker process ends


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """Apply `function` to every item in threads of this process; results come in the order of the items.

    For long calls that release the interpreter's lock. The libraries that the calls use (BLAS, OpenMP) divide the cores
    among the threads in the meantime: with more threads than cores, k-means of many scenes took nearly 50 percent
    longer.

    Args:
        workers: number of threads; 0 or 1: in the calling thread; None: one per core.
    """
    workers = cores() if workers is None else workers
    if workers <= 1:
        yield from map(function, items)
        return
    each = max(1, cores() // workers)
    # BLAS limits its threads for the whole process, OpenMP for each calling thread
    with threadpool_limits(each), ThreadPoolExecutor(workers, initializer=lambda: threadpool_limits(each)) as pool:
        yield from _in_order(pool, function, items, WINDOW * workers)


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """Apply `function` to every item in single-threaded worker processes; results come in the order of the items.

    For many short calls that hold the interpreter's lock, such as decoders. Function, items and results are pickled;
    large ones are better written to a file. The processes are reused by the next call.

    Args:
        workers: number of processes; 0 or 1: in this process; None: one per core.
    Raises:
        UserError: a worker was killed, for example by the system when memory is short.
    """
    workers = cores() if workers is None else workers
    if workers <= 1:
        yield from map(function, items)
        return
    from loky import BrokenProcessPool, get_reusable_executor

    pool = get_reusable_executor(workers, timeout=IDLE_SECONDS, initializer=_single_thread)
    try:
        yield from _in_order(pool, function, items, WINDOW * workers)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, probably because memory ran out: "
            "run the same command again to continue, with fewer workers (corpus.workers=1)"
        ) from None


def _in_order(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], window: int
) -> Iterator[Result]:
    source = iter(items)
    running: deque[Future] = deque(pool.submit(function, item) for item in islice(source, window))
    try:
        while running:
            done = running.popleft().result()
            running.extend(pool.submit(function, item) for item in islice(source, 1))
            yield done
    finally:
        for future in running:
            future.cancel()


def _single_thread() -> None:
    """Set up a worker: one thread per library, low priority, freed memory kept, Ctrl-C left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(19)  # a decoder must not delay the barriers of a network on the same cores
    threadpool_limits(1)
    keep_freed_memory()
    import cv2

    cv2.setNumThreads(1)
    silence_libraries()
