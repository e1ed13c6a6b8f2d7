"""Progress bars on stderr with remaining time; none for short work and for the further processes of a launch."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from runtime.artefacts import is_main_process

Item = TypeVar("Item")


def progress(items: Iterable[Item], label: str, **options: object) -> Iterable[Item]:
    """Wrap an iterable in a bar that appears after one second; in a log file it prints one line every half minute.

    In a launch of several processes only the first one shows bars.
    """
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        items, desc=label, delay=1, mininterval=interval, maxinterval=2 * interval, file=sys.stderr,
        disable=not is_main_process(), **options,
    )  # fmt: skip
