"""Draw images from mask, edges and low resolution together: `python downstream/joint_conditions.py foundation=DIR`."""

from __future__ import annotations

from omegaconf import DictConfig

from downstream.command import run_task
from runtime.application import run


def main(cfg: DictConfig) -> None:
    run_task(cfg, "joint_conditions")


if __name__ == "__main__":
    run(main)
