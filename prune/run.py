"""Prune a corpus: `python prune/run.py corpus=bluemarble prune=rsprune ratio=0.85`."""

from __future__ import annotations

from omegaconf import DictConfig

from prune.planning import plan_lines
from prune.selection import method_name, select
from runtime.application import run


def main(cfg: DictConfig) -> None:
    if cfg.dry_run:
        print("\n".join(plan_lines(cfg, method_name())))
        return
    directory, _ = select(cfg, method_name())
    print(f"selection: {directory}")


if __name__ == "__main__":
    run(main)
