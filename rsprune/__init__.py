"""RS-Prune as a library: the names that other projects import (docs/library.md). The sibling packages hold the code."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rsprune.installed import refuse_strangers

if TYPE_CHECKING:
    from eval.waste import near_duplicate_fraction, perceptual_hashes
    from prune.entropy import LocalEntropy, local_entropy
    from prune.library import RSPrune, budget_of, select_from_arrays
    from prune.pool import Method, Pool, Selection
    from prune.weights import images_represented
    from rsprune.images import FolderImages, embed_images, read_folder
    from rsprune.tables import read_selection, selection_table, selection_tags
    from runtime.errors import UserError

_HOME = {
    "RSPrune": "prune.library",
    "select_from_arrays": "prune.library",
    "budget_of": "prune.library",
    "Method": "prune.pool",
    "Pool": "prune.pool",
    "Selection": "prune.pool",
    "LocalEntropy": "prune.entropy",
    "local_entropy": "prune.entropy",
    "images_represented": "prune.weights",
    "near_duplicate_fraction": "eval.waste",
    "perceptual_hashes": "eval.waste",
    "FolderImages": "rsprune.images",
    "embed_images": "rsprune.images",
    "read_folder": "rsprune.images",
    "read_selection": "rsprune.tables",
    "selection_table": "rsprune.tables",
    "selection_tags": "rsprune.tables",
    "UserError": "runtime.errors",
}

__all__ = [
    "FolderImages",
    "LocalEntropy",
    "Method",
    "Pool",
    "RSPrune",
    "Selection",
    "UserError",
    "budget_of",
    "embed_images",
    "images_represented",
    "local_entropy",
    "near_duplicate_fraction",
    "perceptual_hashes",
    "read_folder",
    "read_selection",
    "select_from_arrays",
    "selection_table",
    "selection_tags",
]


def __getattr__(name: str) -> Any:
    """Import the requested name only: measuring entropies, for example, does not load the clustering libraries.

    Raises:
        AttributeError: the library has no such name.
        ImportError: a folder or module of another project hides one of the packages of RS-Prune.
    """
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    refuse_strangers()
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
