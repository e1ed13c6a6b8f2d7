"""Which ratio to prune at: the curve of what is lost over ratios, and its knee. `python scripts/suggest.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from eval.quality import SAMPLE, knee, representation, unit
from prune.features import corpus_embeddings
from prune.selection import method_name, select
from report.figures import ratio_curve
from report.page import figure_bytes
from runtime.application import run
from runtime.artefacts import write_json
from scripts.cells import with_method


def curve(cfg: DictConfig, method: str) -> pd.DataFrame:
    """ratio, kept images and scene-balanced representation of the corpus by the subset, from the most pruned on."""
    rows = []
    for ratio in sorted({float(ratio) for ratio in cfg.quality.curve}, reverse=True):
        selection, corpus = select(with_method(method, ratio), method)
        table = pd.read_parquet(selection / "selection.parquet")
        embeddings = corpus_embeddings(corpus, instantiate(cfg.encoder), cfg.runs)
        sample = np.random.default_rng([cfg.seed, 320]).permutation(np.flatnonzero(corpus.readable))[:SAMPLE]
        sample = np.sort(sample)
        centre = np.asarray(embeddings[sample], dtype=np.float32).mean(axis=0)
        points, kept = (
            unit(np.asarray(embeddings[which], dtype=np.float32) - centre)
            for which in (sample, np.flatnonzero(table["kept"].to_numpy()))
        )
        groups = table["scene"].to_numpy(dtype=str)[sample]
        rows.append({"ratio": ratio, "kept": len(kept), "representation": representation(points, kept, groups)})
    return pd.DataFrame(rows)


def main(cfg: DictConfig) -> None:
    method = method_name()
    table = curve(cfg, method)
    best = table.iloc[knee(table["kept"].to_numpy(dtype=float), table["representation"].to_numpy())]
    results = Path(cfg.results) / cfg.profile.name / "suggest"
    results.mkdir(parents=True, exist_ok=True)
    figure = ratio_curve(table, best["ratio"], f"What {method} keeps of {cfg.corpus.name}")
    (results / f"{method}.png").write_bytes(figure_bytes(figure))
    write_json(results / f"{method}.json", {"suggested": best["ratio"], "curve": table.to_dict("records")})
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(f"suggested: ratio={best['ratio']:g}, the knee of the curve in {results / method}.png")
    print(f"results: {results}")


if __name__ == "__main__":
    run(main)
