"""A selection as a table, from a command or from arrays, and as tags of a data set's samples."""

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
    """One row an image, in the order of the arrays; columns as in the selection.parquet of `prune/run.py`.

    Args:
        ids: str [N], names of the images, each once: paths, keys, sample ids.
        weights: float32 [N] of `images_represented`; None: the table has no column `weight`.
    Returns:
        id, kept (bool), reason, scene, scene_similarity, cluster, centroid_distance and perhaps weight.
    Raises:
        UserError: there are not as many ids or weights as images, or an id is there twice.
    """
    size = len(selection.reason)
    names = pd.Series(np.asarray(ids).astype(str))
    for what, values in (("ids", names), ("weights", weights)):
        if values is not None and len(values) != size:
            raise UserError(f"there are {len(values)} {what} and {size} images: give one an image")
    if names.duplicated().any():
        raise UserError(f"the id {names[names.duplicated()].iloc[0]} is there twice: ids must name one image each")
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
    """The table of a selection that `prune/run.py` made; one row an image, in corpus order.

    Args:
        directory: what the command prints after `selection:`, or the selection.parquet in it.
    Returns:
        id, kept (bool), reason, entropy (bits), scene, scene_similarity, cluster, centroid_distance and weight (images
        that a kept one stands for).
    Raises:
        UserError: there is no selection.
    """
    path = Path(directory)
    path = path / _TABLE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: give the directory that `python prune/run.py` printed after selection:"
        )
    table = pd.read_parquet(path)
    if missing := {"id", "kept", "reason"} - set(table):
        raise UserError(f"{path} is no selection: it has no column {', '.join(sorted(missing))}")
    return table


def selection_tags(table: pd.DataFrame, prefix: str = "rsprune") -> dict[str, list[str]]:
    """Tags of every image: `rsprune:kept`, or `rsprune:dropped` and the reason, `rsprune:redundant` for example.

    Args:
        table: of `selection_table` or `read_selection`.
        prefix: before the colon.
    Returns:
        tags by id, for FiftyOne's `sample.tags` or any tool that tags samples.
    """
    return {
        str(name): [f"{prefix}:kept"] if kept else [f"{prefix}:dropped", f"{prefix}:{reason}"]
        for name, kept, reason in zip(table["id"], table["kept"], table["reason"], strict=True)
    }
