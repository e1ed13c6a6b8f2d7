"""Images from masks by a fine-tuned foundation model: `python downstream/semantic_synthesis.py foundation=DIR`."""

from __future__ import annotations

from omegaconf import DictConfig

from downstream.command import run_task
from runtime.application import run


def main(cfg: DictConfig) -> None:
    run_task(cfg, "semantic_synthesis")


if __name__ == "__main__":
    run(main)
