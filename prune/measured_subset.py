"""Measures of the selected images, before any training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from eval.measuring import encoders_of, evaluation_sets
from eval.metrics import METRICS
from eval.subset_quality import subset_quality
from prune.features import corpus_embeddings
from prune.selection import select
from runtime.artefacts import stage, write_json
from runtime.errors import UserError


def measured_subset(cfg: DictConfig, method: str) -> Path:
    """Select with a method and measure the selected images on `eval.split`; returns the directory of metrics.json.

    The result is cached.

    Raises:
        UserError: nothing was selected.
    """
    selection, corpus = select(cfg, method)
    sets, encoders = evaluation_sets(cfg), encoders_of(cfg)

    def build(directory: Path) -> None:
        table = pd.read_parquet(selection / "selection.parquet", columns=["kept", "weight"])
        rows = np.flatnonzero(table["kept"].to_numpy())
        if len(rows) == 0:
            raise UserError(
                f"{selection} keeps none of its {len(corpus)} images: lower ratio={cfg.ratio} to measure some"
            )
        embeddings = {encoder.name: corpus_embeddings(corpus, encoder, cfg.runs) for encoder in encoders}
        weights = table["weight"].to_numpy()[rows]
        metrics = subset_quality(rows, weights, sets, corpus, embeddings, cfg.seed)
        write_json(directory / "metrics.json", metrics)

    inputs = {"selection": selection.name, "held_out": [held.key for held in sets.values()]}
    inputs |= {"encoders": list(encoders), "metrics": sorted(METRICS), "seed": cfg.seed}
    return stage(cfg.runs, "subset", inputs, build)
