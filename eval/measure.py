"""Metrics of any run, snapshot, diffusers pipeline or image folder: `python eval/measure.py of=DIR`."""

from __future__ import annotations

import json

from omegaconf import DictConfig

from eval.measuring_any import measure_any
from runtime.application import run
from runtime.artefacts import read_json


def main(cfg: DictConfig) -> None:
    directory = measure_any(cfg)
    print(json.dumps(read_json(directory / "metrics.json")))
    print(f"results: {directory}")


if __name__ == "__main__":
    run(main)
