"""Suggest a ratio: the curve of the loss by pruning over ratios, and its knee. `python scripts/suggest.py`.

With `suggest.images_seen=N`, the number of images that the training will see, the ratio comes from the trainings of the
experiment ratio_compute, if there are some of this corpus; otherwise ratios at which images repeat too often are
excluded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from eval.measuring import encoders_of, evaluation_sets
from eval.metrics import Quantity
from eval.subsets import knee, representation, unit
from prune.features import corpus_embeddings
from prune.selection import method_name, select
from report.experiments import best_ratio, read_experiment
from report.figures import ratio_curve
from report.page import figure_bytes
from runtime.application import changed_config, run
from runtime.artefacts import write_json
from runtime.errors import UserError


def curve(cfg: DictConfig, method: str) -> pd.DataFrame:
    """Table of ratio, number of kept images and how well the subset represents held-out images; highest ratio first.

    The held-out images are the scene-balanced ones of the validation split, as features of the evaluation encoder.
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


def affordable(table: pd.DataFrame, images_seen: float, most_repeats: float) -> pd.DataFrame:
    """The rows of a curve with subsets that a training of `images_seen` images would not repeat too often.

    Raises:
        UserError: there is none.
    """
    result = table[images_seen / table["kept"] <= most_repeats]
    if result.empty:
        raise UserError(
            f"suggest.images_seen={images_seen:g}: at every ratio of quality.curve some image is seen more than "
            f"suggest.most_repeats={most_repeats:g} times: lower one or raise the other"
        )
    return result.reset_index(drop=True)


def measured_best(cfg: DictConfig, method: str, images_seen: float) -> tuple[float, pd.DataFrame] | None:
    """The ratio with the smallest distance after `images_seen` images among the trainings of `suggest.experiment`.

    Returns:
        The ratio, and for every ratio the mean, deviation and number of seeds of the balanced distance; None if no
        training fits.
    """
    rows = [
        row
        for row in read_experiment(cfg.results, str(cfg.suggest.experiment))
        if row["corpus"] == cfg.corpus.name and (row["prune"] == method or row["ratio"] == 0)
    ]
    metric = Quantity("kid_x1000", encoders_of(cfg)[0].name, "balanced").name
    result = best_ratio(rows, metric, images_seen)
    return None if len(result) < 2 else (float(result.loc[result["mean"].idxmin(), "ratio"]), result)


def main(cfg: DictConfig) -> None:
    method, images_seen = method_name(), cfg.suggest.images_seen
    measured = None if images_seen is None else measured_best(cfg, method, float(images_seen))
    if measured is not None:
        print(measured[1].to_string(index=False, float_format=lambda value: f"{value:.4g}"))
        print(
            f"suggested: ratio={measured[0]:g}, which is nearest to the balanced validation images after "
            f"{images_seen:,} training images in the trainings of {cfg.suggest.experiment}"
        )
        return
    table = curve(cfg, method)
    allowed = table if images_seen is None else affordable(table, float(images_seen), float(cfg.suggest.most_repeats))
    best = allowed.iloc[knee(allowed["kept"].to_numpy(dtype=float), allowed["representation"].to_numpy())]
    if images_seen is not None:
        print(
            f"no trainings of {cfg.corpus.name} at several ratios reach {images_seen:,} images (make sweep "
            f"EXPERIMENT={cfg.suggest.experiment}): the suggestion is the knee of the curve over the ratios at which "
            f"no kept image is seen more than {cfg.suggest.most_repeats:g} times"
        )
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
