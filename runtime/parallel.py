"""Work on many items at once, in order, with a bounded number under way: by threads or by processes.

joblib's `Parallel(return_as="generator")` does not bound them: it draws items, in a thread of its own, as fast as the
workers are, so results pile up in memory before a slower consumer; and a generator closed early ends the processes.
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
IDLE_SECONDS = 60  # after which a worker process that nobody needs ends


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """`function` of every item, in the order of the items, by threads that fraction this process's memory.

    For long calls that release the interpreter's lock. The libraries they call (BLAS, OpenMP) share out the cores among
    them meanwhile: with more threads than cores a k-means of many scenes took nearly half as long again.

    Args:
        workers: threads; 0 or 1 computes in the caller's; None: one a core.
    """
    workers = cores() if workers is None else workers
    if workers <= 1:
        yield from map(function, items)
        return
    each = max(1, cores() // workers)
    # BLAS counts its threads for the whole process, OpenMP for every thread that calls it
    with threadpool_limits(each), ThreadPoolExecutor(workers, initializer=lambda: threadpool_limits(each)) as pool:
        yield from _in_order(pool, function, items, WINDOW * workers)


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """`function` of every item, in the order of the items, by worker processes of one thread each.

    For many short calls that hold the interpreter's lock, such as decoders'. Function, items and results are pickled:
    large ones are better written to a file. The processes stay for the next call.

    Args:
        workers: processes; 0 or 1 computes in this one; None: one a core.
    Raises:
        UserError: a worker was killed, as the system does when memory is short.
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
            "a worker process was killed, probably for want of memory: "
            "run the same command again to go on, with fewer workers (corpus.workers=1)"
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
    """Set up a worker: one thread a library, in the background, memory kept, deaf to Ctrl-C, which its parent hears."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(19)  # a network on the same cores must not wait at its barriers for a decoder; it waits for data anyway
    threadpool_limits(1)
    keep_freed_memory()
    import cv2

    cv2.setNumThreads(1)
    silence_libraries()
