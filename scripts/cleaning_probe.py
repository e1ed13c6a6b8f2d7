"""Measure the fraction of each scene's pairs that should be cleaned: `python scripts/cleaning_probe.py corpus=…`.

Trains a small model for every ratio of `cleaning_probe.ratios` and compares its images with held-out images, scene by
scene. The resulting file is a value for `prune.cleaning_ratio`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from captioning.probe import best_ratios
from eval.distances import kernel_distance
from eval.held_out import HeldOut
from eval.measuring import encoders_of, evaluation_sets
from report.results import append_result, result_row
from report.tables import publish
from runtime.application import changed_config, run
from runtime.artefacts import read_json, write_json
from train.foundation import pretrain
from train.measured_run import MEASURED

PROBE, RATIOS = "cleaning_probe", "ratios.json"
#: Fewest images of a scene for a measurement.
FEWEST = 4


def main(cfg: DictConfig) -> None:
    results = Path(cfg.results) / cfg.profile.name / PROBE
    ratios = np.array(sorted(float(ratio) for ratio in cfg.cleaning_probe.ratios))
    distances, everywhere = [], []
    for ratio in ratios:
        chosen = changed_config(
            "prune=dldc", "ratio=null", f"prune.cleaning_ratio={ratio:g}", "train.snapshots=1",
            f"train.loop.steps={cfg.cleaning_probe.steps}", f"eval.split={cfg.cleaning_probe.split}",
            "captioning.describe=none",
        )  # fmt: skip
        directory = pretrain(chosen, "dldc")
        held = evaluation_sets(chosen)["balanced"]
        measured = Path(read_json(directory / MEASURED)["balanced"])
        encoder = encoders_of(chosen)[0].name  # the evaluation encoder
        features = np.load(measured / f"{encoder}.npy")
        by_scene, images, names, overall = scene_distances(features, held, encoder)
        distances.append(by_scene)
        everywhere.append(overall)
        metrics = read_json(directory / "summary.json")["metrics"]
        row = result_row(chosen, PROBE, "dldc", None, metrics, directory, cleaned=f"{ratio:g}")
        append_result(results / "results.jsonl", row)
    result = best_ratios(
        np.array(distances), images, np.array(everywhere), ratios, float(cfg.cleaning_probe.prior_images)
    )
    chosen_ratios = dict(zip(names, result.tolist(), strict=True))
    chosen_ratios[""] = float(ratios[int(np.argmin(everywhere))])
    write_json(results / RATIOS, chosen_ratios)
    print(f"use it with prune=dldc ratio=null prune.cleaning_ratio={results / RATIOS}")
    publish(results, PROBE)


def scene_distances(
    features: np.ndarray, held: HeldOut, encoder: str
) -> tuple[np.ndarray, np.ndarray, list[str], float]:
    """Kernel distances of generated to held-out images per scene.

    Returns:
        Distances float64 [S], NaN for a scene with too few images; numbers of images int64 [S]; names of the scenes;
        and the distance over all scenes.
    """
    reference = held.features[encoder]
    scenes = held.scenes[: len(features)]
    names = sorted(set(scenes.tolist()) - {""})
    groups = [np.flatnonzero(scenes == name) for name in names]
    distances = [
        kernel_distance(features[rows], reference[rows]).value if len(rows) >= FEWEST else np.nan for rows in groups
    ]
    overall = kernel_distance(features, reference).value
    return np.array(distances), np.array([len(rows) for rows in groups]), names, float(overall)


if __name__ == "__main__":
    run(main)
