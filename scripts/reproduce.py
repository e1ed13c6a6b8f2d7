"""The complete chain of `make reproduce`: prune -> pretrain -> downstream -> measure -> tables and report."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from downstream.corpora import held_out_images
from downstream.fine_tuning import fine_tune, loop_options
from downstream.measured_task import measure_baselines, measure_drawn, real_segmentation_metrics
from downstream.registry import TASKS, suitable_names, suitable_tasks
from downstream.regression import REGRESSION, measured_regression
from downstream.task import Task
from encoders.pixels import to_tensor, to_uint8
from eval.convergence import CONVERGENCE
from eval.distances import kernel_distance_difference
from eval.held_out import second_sets
from eval.measuring import Evaluators, encoders_of, evaluation_sets, scene_captions
from eval.memorisation import TrainingImages
from eval.metrics import Quantity
from eval.reference_rows import Rebuild, reference_rows
from prune.features import scan_corpus
from prune.measured_subset import measured_subset
from prune.selection import select
from report.documents import overview_table
from report.results import BASELINE, SUBJECT, append_result, read_results, result_row, run_name, weighting_name
from report.results_report import rebuild
from report.starts import DIAL, LENGTHS
from runtime.application import changed_config, run
from runtime.artefacts import fingerprint, is_main_process, read_json, write_json
from runtime.tracking import track
from scripts.chain import Part, chain, check_profile
from scripts.plan import dry_run
from train.components import load_autoencoder, load_text_parts
from train.foundation import pretrain
from train.latents import PatchPCA, decode, encode, fit_pca
from train.measured_run import MEASURED, TRAINING, corpus_features

ROOT = Path(__file__).resolve().parent.parent
SUPER_RESOLUTION = "super_resolution"


class TableCell(NamedTuple):
    """A finished cell of the tables.

    Attributes:
        cfg: its config; `train.weighting` distinguishes two trainings on one subset.
        kind: its stage in results.jsonl.
        directory: of the computation, for its commit.
        run: of the training, for the report's images; None: the directory.
    """

    cfg: DictConfig
    kind: str
    method: str
    step: int
    metrics: Mapping[str, float | None]
    directory: Path
    run: Path | None = None


def rebuilds(cfg: DictConfig) -> dict[str, Rebuild]:
    """The autoencoder, and PCA of its latent size, as functions that encode and decode images."""
    corpus = scan_corpus(instantiate(cfg.corpus.train), cfg.runs, instantiate(cfg.entropy), instantiate(cfg.encoder))
    autoencoder, key = load_autoencoder(cfg)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    autoencoder.to(device)

    @cache
    def pca() -> PatchPCA:
        return fit_pca(corpus, autoencoder.config.latent_channels, cfg.seed)

    @torch.inference_mode()
    def by_autoencoder(images: np.ndarray) -> np.ndarray:
        generator = torch.Generator(device).manual_seed(int(cfg.seed))  # KL autoencoders sample their latents
        parts = (to_tensor(images[start : start + 100]).to(device) for start in range(0, len(images), 100))
        return np.concatenate([to_uint8(decode(autoencoder, encode(autoencoder, part, generator))) for part in parts])

    def by_pca(images: np.ndarray) -> np.ndarray:
        return to_uint8(pca().decode(pca().encode(to_tensor(images))))

    pca_key = fingerprint(corpus=corpus.fingerprint, channels=autoencoder.config.latent_channels, seed=cfg.seed)
    return {"reconstructed_train": Rebuild(key, by_autoencoder), "pca": Rebuild(pca_key, by_pca)}


def references(cfg: DictConfig, split: str | None = None) -> Path:
    """Measure the reference rows on a split (default: `eval.split`, then also for the downstream tasks)."""
    corpus = scan_corpus(instantiate(cfg.corpus.train), cfg.runs, instantiate(cfg.entropy), instantiate(cfg.encoder))
    images = cfg.eval.images if split is None else cfg.eval.convergence_images
    sets = evaluation_sets(cfg, split, images=images)
    held = next(iter(sets.values()))
    further = second_sets(held.corpus, encoders_of(cfg), len(held), int(cfg.eval.seed), cfg.runs)
    if split is None:  # those tables compare fewer images, and a Fréchet distance depends on the number
        count = min(cfg.downstream.images, len(held))
        sets[""] = sets["balanced"].first(count)
        further |= {"": further["balanced"].first(count)} if "balanced" in further else {}
    judges = Evaluators(encoders_of(cfg), load_text_parts(cfg, corpus).scorer, scene_captions(corpus))
    training = TrainingImages(
        {"corpus": corpus.fingerprint}, np.flatnonzero(corpus.readable), corpus_features(cfg, corpus)
    )
    return reference_rows(sets, further, corpus, judges, rebuilds(cfg), int(cfg.eval.seed), cfg.runs, training)


def differences(cfg: DictConfig, foundations: Mapping[str, Path], method: str, name: str) -> dict[str, float]:
    """Paired differences of a run's KID to that of the `BASELINE`, on both held-out sets and for every encoder.

    For the `SUBJECT`, also the differences to every other run, which the report's verdict needs.

    Args:
        foundations: runs by `run_name`.
        method: method of the training.
        name: its name, a key of `foundations`.
    """
    others = [other for other in foundations if other == BASELINE or method == SUBJECT]
    others = [other for other in others if other != name and other.partition(",")[0] != SUBJECT]
    run_folders = {who: read_json(foundations[who] / MEASURED) for who in (name, *others)}
    metrics = {}
    for held_out, held in evaluation_sets(cfg).items():
        for encoder, reference in held.features.items():
            features = {who: np.load(Path(place[held_out]) / f"{encoder}.npy") for who, place in run_folders.items()}
            for other in others:
                values = kernel_distance_difference(features[name], features[other], reference)
                for part, value in zip(("", "low", "high"), values, strict=True):
                    metrics[Quantity("kid_x1000", encoder, held_out, other, part).name] = value
    return metrics


def foundation_cells(part: Part, foundations: dict[str, Path]) -> Iterator[TableCell]:
    """Every method's subset, convergence and final model; adds the runs to `foundations` by name."""
    chosen = {}
    for training in part.pretrainings:
        changed, method, name = training.cfg, training.method, training.name
        if training.new_subset:
            directory = measured_subset(changed, method)
            yield TableCell(changed, "subset", method, 0, read_json(directory / "metrics.json"), directory)
        chosen[name], foundations[name] = (changed, method), pretrain(changed, method)
        for line in pd.read_json(foundations[name] / CONVERGENCE, lines=True).to_dict("records"):
            metrics = {key: value for key, value in line.items() if not _biased(key)}
            step = int(metrics.pop("step"))
            yield TableCell(changed, "convergence", method, step, metrics, foundations[name])
    for name, directory in foundations.items():
        summary = read_json(directory / "summary.json")
        metrics = summary["metrics"] | differences(part.cfg, foundations, chosen[name][1], name)
        measured = Path(read_json(directory / MEASURED)["balanced"])
        yield TableCell(chosen[name][0], "generation", chosen[name][1], summary["steps"], metrics, measured)


def _biased(name: str) -> bool:
    """Whether a metric depends on the number of images; convergence uses fewer than the other tables."""
    quantity = Quantity.parse(name)
    return quantity is not None and quantity.entry.biased


def downstream_cells(part: Part, tasks: Mapping[str, Task], foundations: Mapping[str, Path]) -> Iterator[TableCell]:
    """The networks and baselines of every task."""
    for name, task in tasks.items():
        for chosen, _, method, start in (tuning for tuning in part.fine_tunings if tuning.task == name):
            own = TASKS[name](chosen)  # a palette depends on the seed's training images
            foundation = None if start is None else foundations[start]
            directory = fine_tune(chosen, own, foundation, method)
            measured = Path(next(iter(read_json(directory / MEASURED).values())))
            summary = read_json(directory / "summary.json")
            yield TableCell(chosen, name, method, summary["steps"], summary["metrics"], measured, directory)
            for line in pd.read_json(directory / CONVERGENCE, lines=True).to_dict("records"):
                step = int(line["step"])
                metrics = {key: value for key, value in line.items() if Quantity.parse(key) is not None}
                yield TableCell(chosen, name + LENGTHS, method, step, metrics, measured)
            if name == SUPER_RESOLUTION and method == SUBJECT and part.first:
                yield from dial_cells(chosen, directory)
                if part.cfg.profile.slow_rivals:
                    yield regression_cell(chosen, own, directory)
        if part.first:
            for baseline, directory in measure_baselines(part.cfg, task).items():
                yield TableCell(part.cfg, name, baseline, 0, read_json(directory / "metrics.json"), directory)


def regression_cell(cfg: DictConfig, task: Task, run: Path) -> TableCell:
    """The regression network with as many weights and training steps as a super-resolution run."""
    metadata = read_json(run / TRAINING)
    options = loop_options(cfg, run)
    directory, measured = measured_regression(cfg, task, int(metadata["parameters"]), options)
    metrics = read_json(measured / "metrics.json")
    return TableCell(cfg, SUPER_RESOLUTION, REGRESSION, options.steps, metrics, directory)


def dial_cells(cfg: DictConfig, run: Path) -> Iterator[TableCell]:
    """One super-resolution network with each value of `profile.dials`."""
    for dial in cfg.profile.dials:
        chosen = cfg.copy()
        chosen.downstream.super_resolution.dial = float(dial)
        directory = measure_drawn(chosen, TASKS[SUPER_RESOLUTION](chosen), run)
        metrics = read_json(directory / "metrics.json")
        steps = read_json(run / "summary.json")["steps"]
        yield TableCell(chosen, DIAL, SUBJECT, steps, metrics, directory, run)


def cells(cfg: DictConfig) -> Iterator[TableCell]:
    """Every cell of the tables, computed or cached: the foundations of all seeds, and everything for the first seed."""
    directory = references(cfg)
    rows = read_json(directory / "reference_rows.json")
    tasks = suitable_tasks(cfg)
    if any({"miou", "pixel_accuracy"} & set(task.metrics) for task in tasks.values()):
        rows.setdefault("real_held_out", {}).update(real_segmentation_metrics(cfg, held_out_images(cfg)))
    for name, metrics in rows.items():
        yield TableCell(cfg, "reference", name, 0, metrics, directory)
    for part in chain(cfg, tasks):
        foundations: dict[str, Path] = {}
        yield from foundation_cells(part, foundations)
        yield from downstream_cells(part, tasks, foundations)


def reproduce(cfg: DictConfig) -> Path:
    """Run the chain and write `results/<profile>/`."""
    check_profile(cfg)
    results = Path(cfg.results) / cfg.profile.name
    if not is_main_process():  # the other processes only take part in the training; the first one writes
        collections.deque(cells(cfg), maxlen=0)
        references(cfg), references(cfg, "val")
        return results
    results.mkdir(parents=True, exist_ok=True)
    path = results / "results.jsonl"
    partial = path.with_name("results.jsonl.partial")  # earlier results are kept until the new ones are complete
    partial.unlink(missing_ok=True)
    run_folders: dict[str, list[str]] = {}
    for cell in cells(cfg):
        ratio = 0.0 if cell.method == "full" else float(cfg.ratio) if cell.method in cfg.profile.methods else None
        trained = cell.kind in ("convergence", "generation") and cell.cfg.train.weighting
        fields = {"weighting": weighting_name(trained)} if trained else {}
        if cell.kind == DIAL:
            fields[DIAL] = f"{cell.cfg.downstream.super_resolution.dial:g}"
        append_result(
            partial,
            result_row(cell.cfg, cell.kind, cell.method, ratio, cell.metrics, cell.directory, step=cell.step, **fields),
        )
        name = run_name(cell.method, fields.get("weighting"))
        result = run_folders.setdefault(f"{cell.kind}/{name}", [])
        place = str(cell.run or cell.directory)
        result += [place] if place not in result else []
    run_folders |= {
        "reference/published": [str(references(cfg))],
        "reference/validation": [str(references(cfg, "val"))],
    }
    for method in cfg.profile.methods:
        chosen = changed_config(f"prune={method}", f"seed={cfg.profile.seeds[0]}")
        run_folders[f"selection/{method}"] = [str(select(chosen, method)[0])]
    for name in [name for name in run_folders if name.startswith("convergence/")]:
        run_folders[name.replace("convergence/", "foundation/")] = run_folders[name]
    os.replace(partial, path)
    write_json(results / "runs.json", run_folders)
    with track(cfg, "report", cfg.profile.name) as tracker:
        for name, table in rebuild(results).items():
            tracker.table(name, table.astype(str))
    return results


def opening(cfg: DictConfig) -> list[str]:
    """A few lines about what the command will do and how long its training takes."""
    parts = chain(cfg, suitable_names(cfg))
    steps = [int(cfg.train.loop.steps)] * sum(len(part.pretrainings) for part in parts)
    tuned = [loop_options(tuning.cfg, None).steps for part in parts for tuning in part.fine_tunings]
    speed = published_seconds_per_step()
    duration = "time: not known, since no results are published in results/published"
    if speed is not None:
        duration = (
            f"time: about {max(1, round(sum(steps + tuned) * speed / 60)):,} min of training, at {speed:.2f} s per "
            "step as published for two CPU cores, the default model and 64 px; measuring needs further time"
        )
    return [
        f"profile {cfg.profile.name}: prune, train {len(steps)} foundation models ({sum(steps):,} steps), fine-tune "
        f"them {len(tuned)} times ({sum(tuned):,} steps), measure all of them, write tables and a report",
        duration,
        f"finished parts are taken from {cfg.runs}; an interrupted run continues with the same command; DRY=1 "
        "(dry_run=true) prints only the plan",
    ]


def published_seconds_per_step() -> float | None:
    """Mean seconds per optimizer step of the published pretrainings; None if no rows are published."""
    path = ROOT / "results" / "published" / "chain.jsonl"
    rows = [row for row in read_results(path) if row["stage"] == "convergence"] if path.is_file() else []
    last = {(row["prune"], row.get("weighting"), row["seed"]): row for row in rows if row.get("seconds")}
    return float(np.mean([row["seconds"] / row["step"] for row in last.values()])) if last else None


def main(cfg: DictConfig) -> None:
    if cfg.dry_run:
        if is_main_process():
            dry_run(cfg, references)
        return
    start = time.perf_counter()
    if is_main_process():
        print("\n".join(opening(cfg)), flush=True)
    results = reproduce(cfg)
    if not is_main_process():
        return
    print(overview_table(read_results(results / "results.jsonl")).to_markdown(index=False, disable_numparse=True))
    print(f"\ndone in {time.perf_counter() - start:.0f} s; where to look:")
    print(f"  {results}/report.html    everything on one page: verdict, tables, figures, images")
    print(f"  {results}/tables         the same tables as .md, .tex and .csv; docs/numbers.md explains the columns")
    print(f"results: {results}")


if __name__ == "__main__":
    run(main)
