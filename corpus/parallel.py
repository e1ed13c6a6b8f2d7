"""Work on many items at once, by threads: in order, with a bounded number in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WINDOW = 32  # items in flight per worker


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """`function` of every item, in the order of the items, computed by threads.

    Image decoders and numba kernels release the interpreter's lock, so threads are as good as processes here.

    Args:
        workers: threads; 0 or 1 computes in the caller's; None: one a core.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers <= 1:
        yield from map(function, items)
        return
    source = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        running: deque[Future] = deque(pool.submit(function, item) for item in islice(source, WINDOW * workers))
        try:
            while running:
                done = running.popleft()
                running.extend(pool.submit(function, item) for item in islice(source, 1))
                yield done.result()
        finally:
            for future in running:
                future.cancel()
