"""Super-resolution by a fine-tuned foundation model: `python downstream/super_resolution.py foundation=DIR`."""

from __future__ import annotations

from omegaconf import DictConfig

from downstream.command import run_task
from runtime.application import run


def main(cfg: DictConfig) -> None:
    run_task(cfg, "super_resolution")


if __name__ == "__main__":
    run(main)
