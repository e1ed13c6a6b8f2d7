"""One-line messages on stderr that a command prints only once."""

from __future__ import annotations

import sys
from functools import cache

from runtime.artefacts import is_main_process
from runtime.redaction import redacted


@cache
def notice(line: str) -> None:
    """Print a line on stderr once per process, and only in the first process of a launch."""
    if is_main_process():
        print(redacted(" ".join(line.split())), file=sys.stderr, flush=True)
