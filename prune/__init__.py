"""Corpus to subset: entropy, embedding, scenes, clusters, allocation, every method."""

from prune.library import RSPrune, select_from_arrays
from prune.pool import Selection

__all__ = ["RSPrune", "Selection", "select_from_arrays"]
