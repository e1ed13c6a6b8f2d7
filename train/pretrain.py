"""Pretrain the foundation model on a subset: `python train/pretrain.py prune=rsprune ratio=0.85`."""

from __future__ import annotations

import time

from omegaconf import DictConfig

from corpus.application import run
from corpus.artefacts import read_json
from prune.selection import method_name
from train.foundation import pretrain


def main(cfg: DictConfig) -> None:
    start = time.perf_counter()
    directory = pretrain(cfg, method_name())
    metrics = read_json(directory / "summary.json")["metrics"]
    for key in sorted(metrics):
        print(f"{key}: {metrics[key]:.4g}")
    print(f"seconds: {time.perf_counter() - start:.0f}")
    print(f"run: {directory}")


if __name__ == "__main__":
    run(main)
