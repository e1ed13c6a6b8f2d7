"""Generated images as training data of a segmenter, in addition to real ones and instead of them: `make augmentation`.

Every training is measured on real held-out images of `eval.split`. Finished cells are not computed again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from downstream.augmentation import PRUNED, TRAINING, Cell, Study, grid, images_of, measured_cell, trained_cell
from report.results import append_result, result_row
from report.tables import publish
from runtime.application import changed_config, run
from runtime.artefacts import read_json

NAME = "augmentation"


def cell_row(study: Study, cell: Cell) -> dict[str, Any]:
    """The result row of a cell; computed if it does not exist."""
    directory = measured_cell(study, cell)
    metrics, training = read_json(directory / "metrics.json"), read_json(trained_cell(study, cell) / TRAINING)
    images = images_of(study, cell)
    row = result_row(
        study.cfg,
        NAME,
        cell.choice,
        None if cell.choice is None else study.options.ratio,
        metrics,
        directory,
        step=study.options.steps,
        **{name.replace("_", " "): str(images[name]) for name in ("real_images", "generated_images")},
    )
    return {**row, "seed": cell.seed, "seconds": training["seconds"]}


def compare(study: Study, results: Path) -> None:
    """Compute every cell, append its row to `results/results.jsonl`, and write the table."""
    cells = grid(study.options)
    for number, cell in enumerate(cells, start=1):
        row = cell_row(study, cell)
        append_result(results / "results.jsonl", row)
        images = f"{row['real images']} real, {row['generated images']} generated"
        chosen = f" ({cell.choice})" if cell.choice else ""
        miou = row["metrics"]["miou"]
        print(f"{number} of {len(cells)}: {images}{chosen}, seed {cell.seed}: mIoU {miou:.3f}", flush=True)
    publish(results, NAME)


def main(cfg: DictConfig) -> None:
    study = Study.of(cfg, changed_config(f"prune={PRUNED}"))
    compare(study, Path(cfg.results) / cfg.profile.name / NAME)


if __name__ == "__main__":
    run(main)
