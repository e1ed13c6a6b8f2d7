"""The plan of `prune/run.py` (`dry_run=true`): which stages exist, how many images remain, and what they cost.

The functions that would build a stage also determine whether it exists; they run inside `nothing_built`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.index import Source
from prune import captioned
from prune.features import scan_corpus
from prune.library import budget_of
from prune.selection import ratio_of, select
from runtime.artefacts import NotBuilt, nothing_built, read_json
from runtime.cost import COST, logged
from runtime.engine import engine
from runtime.parallel import cores
from runtime.sweep import duration

DONE, TO_DO = "done", "to do"


@dataclass(frozen=True)
class Row:
    """A stage of the plan.

    Attributes:
        images: number of images that the stage processes.
        left: number of these images that are still to be processed.
        state: "done", "to do" or the progress of an interrupted run.
        seconds: estimated time, from an earlier run on this machine; None: it never ran on this machine.
    """

    stage: str
    images: int
    left: int
    state: str
    seconds: float | None = None


def plan_lines(cfg: DictConfig, name: str) -> list[str]:
    """The plan for a configuration and the name of a method, as lines of text.

    Raises:
        UserError: the command would refuse this configuration before it computes anything.
    """
    method = captioned.method_of(cfg)
    ratio = ratio_of(cfg, method, name)
    sources = {"corpus": instantiate(cfg.corpus.train)}
    if getattr(method, "uses_reference", False) and cfg.reference.source is not None:
        sources["reference"] = instantiate(cfg.reference.source)
    rows = [_index_row(cfg, part, source) for part, source in sources.items()]
    images = rows[0].images
    selection = _state(lambda: select(cfg, name)[0])
    rows.append(Row(f"select by {name}", images, images * (selection != DONE), selection))
    kept = "the method decides how many" if ratio is None else f"{budget_of(images, ratio):,} of {images:,} images"
    return [*_table(rows), "", f"kept: {kept}", *_needs(cfg, sources["corpus"], images)]


def _index_row(cfg: DictConfig, part: str, source: Source) -> Row:
    """The row for decoding, entropy and embedding of a source, which are done in one pass."""
    label = f"index, entropy and embedding of the {part}"
    measure, encoder = instantiate(cfg.entropy), instantiate(cfg.encoder)
    result: list[Any] = []
    state = _state(lambda: result.append(scan_corpus(source, cfg.runs, measure, encoder)))
    if state == DONE:
        return Row(label, len(result[0]), 0, DONE)
    images = len(source.manifest())
    partial = Path(state).with_name(Path(state).name + ".partial")
    done = sum(line["images"] for line in logged(partial)) if (partial / "progress.json").is_file() else 0
    left, speed = images - min(done, images), _speed(cfg.runs)
    return Row(label, images, left, f"begun: {done:,} images" if done else TO_DO, left / speed if speed else None)


def _state(ask: Callable[[], Any]) -> str:
    """ "done", or the directory that would be built."""
    try:
        with nothing_built():
            ask()
    except NotBuilt as missing:
        return str(missing.directory)
    return DONE


def _speed(runs: Path | str) -> float | None:
    """Images per second of the newest index that the same engine built in this directory; None: there is none."""
    result = sorted(Path(runs).glob(f"corpus/*/{COST}"), key=lambda path: -path.stat().st_mtime_ns)
    for path in result:
        cost = read_json(path)
        if cost["engine"] == engine().name and cost["seconds"] > 0 and cost["images"]:
            return cost["images"] / cost["seconds"]
    return None


def _needs(cfg: DictConfig, source: Source, images: int) -> list[str]:
    """Lines about the disk space that is needed and about the workers."""
    encoder = instantiate(cfg.encoder)
    masks = source.resolution**2 if source.mask_classes else 0
    size = images * (3 * source.resolution**2 + masks + 2 * encoder.dimensions + 4)
    workers = cores() if source.workers is None else source.workers
    who = (
        f"{workers} decoding processes" if engine().shares_files else f"cluster: {cfg.engine.address or 'this machine'}"
    )
    return [f"disk: {size / 2**30:.2f} GiB in {cfg.runs}", f"engine: {engine().name}, {who}"]


def _table(rows: list[Row]) -> list[str]:
    lines = [("stage", "images", "left", "state", "time")]
    for row in rows:
        state = row.state if row.state == DONE or row.state.startswith("begun") else TO_DO
        time = "" if state == DONE else "not known" if row.seconds is None else f"about {duration(row.seconds)}"
        lines.append((row.stage, f"{row.images:,}", f"{row.left:,}", state, time))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
