"""Selection of a subset of a corpus: entropy, embeddings, scenes, clusters, budget allocation and all methods."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune.library import RSPrune, select_from_arrays
    from prune.pool import Selection

_HOME = {"RSPrune": "prune.library", "select_from_arrays": "prune.library", "Selection": "prune.pool"}

__all__ = ["RSPrune", "Selection", "select_from_arrays"]


def __getattr__(name: str) -> Any:
    """Import the requested name only: a worker process that measures entropies does not load the methods' libraries."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
