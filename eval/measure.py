"""Metrics of any run, snapshot, diffusers pipeline or image folder, or of a named system (docs/comparison.md).

`python eval/measure.py of=DIR`, `python eval/measure.py peer=diffusionsat of=DIR`.
"""

from __future__ import annotations

import json

from omegaconf import DictConfig

from eval.measuring_any import PEER, measure_any
from runtime.application import run
from runtime.artefacts import read_json


def main(cfg: DictConfig) -> None:
    directory = measure_any(cfg)
    metadata = read_json(directory / PEER) if (directory / PEER).is_file() else {}
    print(json.dumps({**metadata, **read_json(directory / "metrics.json")}))
    print(f"results: {directory}")


if __name__ == "__main__":
    run(main)
