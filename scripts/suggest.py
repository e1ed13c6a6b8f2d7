"""Which ratio to prune at: the curve of what is lost over ratios, and its knee. `python scripts/suggest.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from eval.measuring import encoders_of, evaluation_sets
from eval.subsets import knee, representation, unit
from prune.features import corpus_embeddings
from prune.selection import method_name, select
from report.figures import ratio_curve
from report.page import figure_bytes
from runtime.application import changed_config, run
from runtime.artefacts import write_json


def curve(cfg: DictConfig, method: str) -> pd.DataFrame:
    """ratio, kept images and how well the subset represents held-out images, from the most pruned on.

    The images are the scene-balanced ones of the validation split, seen by the evaluation encoder.
    """
    held = evaluation_sets(cfg, cfg.quality.split)["balanced"]
    encoder = encoders_of(cfg)[0]
    scenes = held.corpus.manifest["scene"].to_numpy(dtype=str)[held.rows]
    centre = held.features[encoder.name].mean(axis=0)
    points = unit(held.features[encoder.name] - centre)
    rows = []
    for ratio in sorted({float(ratio) for ratio in cfg.quality.curve}, reverse=True):
        selection, corpus = select(changed_config(f"prune={method}", f"ratio={ratio}"), method)
        chosen = np.flatnonzero(pd.read_parquet(selection / "selection.parquet")["kept"].to_numpy())
        embeddings = corpus_embeddings(corpus, encoder, cfg.runs)
        kept = unit(np.asarray(embeddings[chosen], dtype=np.float32) - centre)
        rows.append({"ratio": ratio, "kept": len(kept), "representation": representation(points, kept, scenes)})
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
