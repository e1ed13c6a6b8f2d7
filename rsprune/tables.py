"""Selections as tables (made from arrays or read from a command's output) and as tags for the samples of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from prune.pool import Selection
from runtime.errors import UserError

_TABLE = "selection.parquet"


def selection_table(
    selection: Selection, ids: Sequence[str] | np.ndarray, *, weights: np.ndarray | None = None
) -> pd.DataFrame:
    """Table of a selection with one row per image, in the order of the arrays.

    The columns have the names and meanings of those in the selection.parquet that `prune/run.py` writes.

    Args:
        selection: result of a pruning method on N images.
        ids: str [N], unique names of the images: paths, keys or sample ids.
        weights: float32 [N], result of `images_represented`; None: the table has no column `weight`.
    Returns:
        a table with the columns id, kept (bool), reason, scene, scene_similarity, cluster, centroid_distance and, if
        weights are given, weight.
    Raises:
        UserError: the number of ids or weights is not N, or an id occurs twice.
    """
    size = len(selection.reason)
    names = pd.Series(np.asarray(ids).astype(str))
    for what, values in (("ids", names), ("weights", weights)):
        if values is not None and len(values) != size:
            raise UserError(f"there are {len(values)} {what} for {size} images: give one per image")
    if names.duplicated().any():
        raise UserError(f"the id {names[names.duplicated()].iloc[0]} occurs twice: give each image its own id")
    kept = np.zeros(size, dtype=bool)
    kept[selection.kept] = True
    columns = {
        "id": names,
        "kept": kept,
        "reason": selection.reason.astype(str),
        "scene": selection.scene.astype(str),
        "scene_similarity": selection.scene_similarity,
        "cluster": selection.cluster,
        "centroid_distance": selection.centroid_distance,
    }
    return pd.DataFrame(columns if weights is None else {**columns, "weight": weights})


def read_selection(directory: str | Path) -> pd.DataFrame:
    """Read the table of a selection that `prune/run.py` made, with one row per image, in corpus order.

    Args:
        directory: the directory that the command prints after `selection:`, or the selection.parquet in that directory.
    Returns:
        a table with the columns id, kept (bool), reason, entropy (bits), scene, scene_similarity, cluster,
        centroid_distance and weight (number of images that a kept image represents).
    Raises:
        UserError: the file does not exist or lacks the columns of a selection.
    """
    path = Path(directory)
    path = path / _TABLE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: give the directory that `python prune/run.py` printed after `selection:`"
        )
    table = pd.read_parquet(path)
    if missing := {"id", "kept", "reason"} - set(table):
        raise UserError(f"{path} is not a selection: it has no column {', '.join(sorted(missing))}")
    return table


def selection_tags(table: pd.DataFrame, prefix: str = "rsprune") -> dict[str, list[str]]:
    """Tags of every image: `rsprune:kept`, or `rsprune:dropped` and the reason, for example `rsprune:redundant`.

    Args:
        table: result of `selection_table` or `read_selection`.
        prefix: text before the colon of each tag.
    Returns:
        dictionary from image id to tags, for FiftyOne's `sample.tags` or any other tool that tags samples.
    """
    return {
        str(name): [f"{prefix}:kept"] if kept else [f"{prefix}:dropped", f"{prefix}:{reason}"]
        for name, kept, reason in zip(table["id"], table["kept"], table["reason"], strict=True)
    }
