"""Progress bars: to stderr, with ETA, silent for what takes no time and where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from runtime.artefacts import is_main_process

Item = TypeVar("Item")


def progress(items: Iterable[Item], label: str, **options: object) -> Iterable[Item]:
    """Wrap an iterable in a bar that appears after one second; on a log file it prints a line a half minute.

    In a launch of several processes only the first one shows bars.
    """
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        items, desc=label, delay=1, mininterval=interval, maxinterval=2 * interval, file=sys.stderr,
        disable=not is_main_process(), **options,
    )  # fmt: skip
