"""Train the models that the repository ships, and store them for `foundation=shipped`: `make foundation`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from corpus.index import open_corpus
from downstream.conditional import resolve_foundation
from downstream.fine_tuning import fine_tune
from downstream.registry import TASKS
from downstream.shipping import ship_task
from prune.selection import method_name, select
from runtime.application import run
from runtime.errors import UserError
from train.foundation import pretrain
from train.shipped import FOUNDATION, WEIGHTS, ship, shipped_folder, size_of, training_captions


def main(cfg: DictConfig) -> None:
    unknown = [name for name in cfg.shipped.what if name not in (FOUNDATION, "super_resolution", "semantic_synthesis")]
    if unknown:
        raise UserError(f"shipped.what: {unknown[0]} is not shipped: give {FOUNDATION} or a task")
    _, corpus = select(cfg, method_name())
    captions = open_corpus(corpus.directory).manifest["caption"].dropna().unique().tolist()
    texts = training_captions(captions, cfg)
    folder = WEIGHTS if cfg.shipped.path is None else Path(str(cfg.shipped.path)).expanduser()
    foundation = folder / shipped_folder(FOUNDATION).name
    for name in cfg.shipped.what:
        target = folder / shipped_folder(name).name
        if name == FOUNDATION:
            directory = pretrain(cfg, method_name())
            card = (directory / "pipeline" / "README.md").read_text(encoding="utf-8")
            _replace(cfg, target, lambda to, source=directory, card=card: ship(source, to, texts, card))
        else:
            tuned = OmegaConf.merge(cfg, {"foundation": str(foundation)})
            directory = fine_tune(tuned, TASKS[name](tuned), *resolve_foundation(tuned))
            _replace(cfg, target, lambda to, source=directory, cfg=tuned: ship_task(cfg, source, to, texts))
        print(f"{name}: {target}, {size_of(target):,} bytes", flush=True)


def _replace(cfg: DictConfig, target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder next to `target`, then replace `target` by it.

    Raises:
        UserError: it is larger than allowed; `target` is unchanged.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    if (size := size_of(partial)) > cfg.shipped.most_bytes:
        shutil.rmtree(partial)
        raise UserError(
            f"{target.name} has {size:,} bytes, more than shipped.most_bytes={cfg.shipped.most_bytes:,}: choose a "
            "smaller model, or raise the limit"
        )
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


if __name__ == "__main__":
    run(main)
