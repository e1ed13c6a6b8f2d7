"""Train the shipped foundation model again and put it where `foundation=shipped` looks: `make foundation`."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from corpus.index import open_corpus
from prune.selection import method_name, select
from runtime.application import run
from runtime.errors import UserError
from train.foundation import pretrain
from train.shipped import FOLDER, ship, size_of, training_captions


def main(cfg: DictConfig) -> None:
    directory = pretrain(cfg, method_name())
    _, corpus = select(cfg, method_name())
    captions = open_corpus(corpus.directory).manifest["caption"].dropna().unique().tolist()
    target = FOLDER if cfg.shipped.path is None else Path(str(cfg.shipped.path))
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    ship(directory, partial, training_captions(captions, cfg))
    size = size_of(partial)
    if size > cfg.shipped.most_bytes:
        shutil.rmtree(partial)
        raise UserError(
            f"the model of {directory} takes {size:,} bytes, shipped.most_bytes={cfg.shipped.most_bytes:,} allows "
            "fewer: choose a smaller model, or raise it"
        )
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    print(f"{size:,} bytes")
    print(f"foundation: {target}")


if __name__ == "__main__":
    run(main)
