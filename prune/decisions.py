"""Changes of a selection by people: another ratio or uniformity, images moved in or out by hand, saved separately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from prune.kept import Kept
from prune.library import budget_of
from prune.pool import Method, Pool, Selection
from prune.selection import CORPUS, REFERENCE, corpus_pool, selection_table, summarise, with_reference, write_selection
from prune.weights import images_represented
from runtime.artefacts import plain, stage
from runtime.cost import Clock
from runtime.errors import UserError

ADDED, REMOVED = "added_by_hand", "removed_by_hand"
#: Entries of a summary that describe the corpus and not the kept images.
OF_CORPUS = ("source", "strata", "leaks")
#: Package of the methods. A stage's file names classes; only classes of this package are built from it.
METHODS = "prune.methods."


@dataclass(frozen=True)
class Settings:
    """Settings that can be changed on the page; None: the value of the opened selection.

    Attributes:
        ratio: fraction of the images to remove.
        uniformity: uniformity of the allocation, for methods that have this parameter.
    """

    ratio: float | None = None
    uniformity: float | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Read the settings from a mapping.

        Raises:
            UserError: a setting is not a number or out of range.
        """
        ratio, uniformity = given.get("ratio"), given.get("uniformity")
        if ratio is not None:
            budget_of(1, ratio)
        if uniformity is not None and (not _number(uniformity) or not 0 <= uniformity <= 1):
            raise UserError(f"uniformity={uniformity} is outside [0, 1]: 0 is proportional to size, 1 is uniform")
        return cls(*(None if value is None else float(value) for value in (ratio, uniformity)))


@dataclass(frozen=True)
class Edits:
    """Rows of the corpus that are moved into or out of the subset by hand, each int64 and ascending."""

    added: np.ndarray
    removed: np.ndarray

    @classmethod
    def of(cls, given: Mapping[str, Any], count: int) -> Edits:
        """Read the edits from a mapping.

        Raises:
            UserError: a row is not one of a corpus of `count` images.
        """
        return cls(*(_rows(given.get(name, []), name, count) for name in ("added", "removed")))

    def __bool__(self) -> bool:
        return bool(len(self.added) + len(self.removed))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rows(given: Any, name: str, count: int) -> np.ndarray:
    right = isinstance(given, list) and all(isinstance(row, int) and not isinstance(row, bool) for row in given)
    if not right or any(not 0 <= row < count for row in given) or len(set(given)) < len(given):
        raise UserError(f"{name}: give a list of different rows from 0 to {count - 1}")
    return np.array(sorted(given), dtype=np.int64)


@dataclass(frozen=True)
class Decision:
    """An opened selection that can be computed again with other settings.

    Attributes:
        table: all rows of selection.parquet.
        pool: the corpus, with the scenes that the selection was made with.
        method: the pruning method; None if the selection cannot be computed again, for the reason in `fixed`.
    """

    kept: Kept
    table: pd.DataFrame
    pool: Pool
    method: Method | None
    fixed: str = ""

    @property
    def uniformity(self) -> float | None:
        """The uniformity of the method; None if the method has no such parameter."""
        return getattr(self.method, "uniformity", None)

    def changed(self, settings: Settings) -> bool:
        """Whether the settings differ from those of the opened selection."""
        own = (self.kept.summary["ratio"], self.uniformity)
        given = (settings.ratio, settings.uniformity)
        return any(value is not None and value != mine for value, mine in zip(given, own, strict=True))

    def as_it_stands(self) -> Selection:
        """The selection as stored in the opened directory."""
        columns = ("reason", "scene", "scene_similarity", "cluster", "centroid_distance")
        kept = np.flatnonzero(self.table["kept"].to_numpy())
        summary = self.kept.summary
        diagnostics = {**(summary.get("diagnostics") or {}), "entropy_threshold": summary.get("entropy_threshold")}
        return Selection(kept, *(self.table[name].to_numpy() for name in columns), diagnostics)

    def select(self, settings: Settings) -> Selection:
        """The selection that `prune/run.py` makes with these settings and all others unchanged, bit for bit.

        Raises:
            UserError: the method has no uniformity, or cannot be run again from the stored data.
        """
        if self.method is None:
            raise UserError(self.fixed)
        method, ratio = self.method, self.kept.summary["ratio"] if settings.ratio is None else settings.ratio
        if settings.uniformity is not None and settings.uniformity != self.uniformity:
            if self.uniformity is None:
                raise UserError(f"the method {self.kept.summary['method']} has no uniformity: leave it unchanged")
            method = replace(method, uniformity=settings.uniformity)
        generator = np.random.default_rng([int(self.kept.inputs["seed"]), 2])
        return method.select(self.pool, budget_of(len(self.pool), ratio), generator)


def open_decision(kept: Kept) -> Decision:
    """Open a selection with all that is needed to compute it again: entropies, embeddings, scenes and the method.

    Raises:
        UserError: a value is not finite; see also `prune.kept.open_selection`.
    """
    table = pd.read_parquet(kept.directory / "selection.parquet")
    cfg = OmegaConf.create({"runs": str(kept.runs), "seed": kept.inputs["seed"]})
    pool = corpus_pool(cfg, kept.corpus, kept.measure, kept.encoder, Clock())
    name = kept.summary["method"]
    method = kept.instantiated(_targets(kept.inputs["method"]), _convert_="all")
    if getattr(method, "uses_captions", False):
        return Decision(kept, table, pool, None, f"the method {name} reads captions: change the ratio by prune/run.py")
    if getattr(method, "keeps_everything", False):
        return Decision(kept, table, pool, None, f"the method {name} keeps everything: there is no ratio to change")
    if "reference" in kept.inputs:
        kind = CORPUS if kept.inputs["reference"] is None else REFERENCE
        pool = with_reference(OmegaConf.merge(cfg, {"reference": kept.inputs["reference"]}), pool, kind, kept.encoder)
    return Decision(kept, table, pool, method)


def _targets(value: Any) -> Any:
    """Convert the output of `runtime.artefacts.plain` for a method into a configuration that Hydra can instantiate.

    Raises:
        UserError: the output names a class that is not a pruning method.
    """
    if isinstance(value, Mapping):
        fields = {key: _targets(item) for key, item in value.items() if key != "_class_"}
        if "_class_" not in value:
            return fields
        if not str(value["_class_"]).startswith(METHODS) or "_target_" in value:
            raise UserError(f"{value['_class_']} in the selection is not a pruning method: prune again")
        return {"_target_": value["_class_"], **fields}
    return [_targets(item) for item in value] if isinstance(value, list) else value


def edited(selection: Selection, edits: Edits, readable: np.ndarray, ids: Sequence[str]) -> Selection:
    """The selection with images moved in and out; the column `reason` marks these images.

    Raises:
        UserError: an image is already where it is moved to, a moved image is unreadable, or no image is left.
    """
    kept = np.zeros(len(ids), dtype=bool)
    kept[selection.kept] = True
    for rows, bad, text in (
        (edits.added, kept, "is kept already"),
        (edits.added, ~readable, "cannot be read"),
        (edits.removed, ~kept, "is not kept"),
    ):
        if (wrong := rows[bad[rows]]).size:
            raise UserError(f"{ids[wrong[0]]} {text}: remove it from the list of changes ({len(wrong)} such images)")
    kept[edits.added], kept[edits.removed] = True, False
    if not kept.any():
        raise UserError("no image is left: keep at least one")
    reason = np.array(selection.reason, dtype=object)
    reason[edits.added], reason[edits.removed] = ADDED, REMOVED
    return replace(selection, kept=np.flatnonzero(kept), reason=reason)


def save(decision: Decision, settings: Settings, selection: Selection, edits: Edits) -> Path:
    """Write a changed selection into a new directory; the directory of the original selection is not changed.

    Args:
        selection: the selection that these settings give, without the edits.
    Returns:
        the new directory, in the format of prune/run.py; if nothing changed, the directory of the original selection.
    """
    kept, pool = decision.kept, decision.pool
    if not edits and not decision.changed(settings):
        return kept.directory
    final = edited(selection, edits, pool.readable, pool.ids)
    moved = {"added": pool.ids[edits.added].tolist(), "removed": pool.ids[edits.removed].tolist()}
    came_from = kept.directory.resolve().name
    inputs = {**kept.inputs, "by_hand": {"selection": came_from, **moved}}
    inputs["ratio"] = kept.inputs["ratio"] if settings.ratio is None else settings.ratio
    if settings.uniformity is not None and decision.uniformity is not None:
        inputs["method"] = {**kept.inputs["method"], "uniformity": settings.uniformity}

    def build(directory: Path) -> None:
        generator, clock = np.random.default_rng([int(kept.inputs["seed"]), 5]), Clock()
        with clock("weights"):
            weights = images_represented(pool.embeddings, pool.readable, final.kept, generator)
        table = selection_table(pool, final, weights)
        summary = summarise(table, kept.corpus, final, kept.summary["method"], None, kept.inputs["seed"], clock.seconds)
        summary |= {name: kept.summary[name] for name in OF_CORPUS if name in kept.summary}
        summary["images_per_second"] = None  # unknown: part of the work was done by an earlier run
        summary["by_hand"] = {
            "selection": came_from, "added": len(edits.added), "removed": len(edits.removed), **plain(settings),
        }  # fmt: skip
        del summary["by_hand"]["_class_"]
        write_selection(directory, table, summary, kept.corpus, pool.embeddings)

    return stage(kept.runs, "edited_selection", inputs, build)
