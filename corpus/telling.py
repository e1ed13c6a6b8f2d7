"""What a source has to say about its files: one line on stderr, once."""

from __future__ import annotations

import sys
from functools import cache

from runtime.artefacts import is_main_process


@cache
def tell(line: str) -> None:
    """Once, though every split of a corpus finds it out."""
    if is_main_process():
        print(line, file=sys.stderr, flush=True)
