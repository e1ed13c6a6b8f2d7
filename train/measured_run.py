"""Measuring of a pretraining run: its snapshots on `val`, its final model on `eval.split`, and the result files.

Training is complete by then or, for a snapshot, continues afterwards. Drawing and measuring are cached stages
(`eval.measuring`), so other metrics, more images or another sampler never require a new training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from corpus.index import Corpus
from eval.convergence import CONVERGENCE, summarise
from eval.held_out import HeldOut
from eval.measuring import (
    IMAGES,
    Evaluators,
    Sampling,
    draw_images,
    encoders_of,
    evaluation_sets,
    measure_model,
    metrics_of,
    real_confusion,
    scene_captions,
)
from eval.measuring_any import SCORER, TRAINING, kept_images
from eval.memorisation import TrainingImages
from eval.models import SNAPSHOT, Model, snapshots_of
from eval.pairs import scene_accuracy
from prune.features import corpus_embeddings
from report.figures import contact_sheet
from runtime.artefacts import finite, is_main_process, plain, read_json, write_json
from runtime.tracking import Tracker
from train.components import TextParts
from train.metadata import FOLDER, MetadataEncoder
from train.model_card import model_card
from train.sheets import COLUMNS, location_sheet, sample_sheet, save_picture, short_caption

#: File in a run's directory with the paths of the measured stages of its final model, by held-out set.
MEASURED = "measured.json"
#: Number of images of each held-out set that a run shows.
SHOWN = 64


@dataclass(frozen=True)
class Evaluation:
    """All inputs for measuring a run.

    Attributes:
        final: the held-out sets of `eval.split`.
        while_training: the balanced held-out set of `val`.
        training: the images on which the run is trained.
    """

    judges: Evaluators
    sampling: Sampling
    final: Mapping[str, HeldOut]
    while_training: HeldOut
    training: TrainingImages

    @classmethod
    def of(cls, cfg: DictConfig, corpus: Corpus, selection: Path, text: TextParts) -> Evaluation:
        """Make it from a config, the CLIP model of the text encoder and the captions of the training corpus."""
        judges = Evaluators(encoders_of(cfg), text.scorer, scene_captions(corpus))
        balanced = evaluation_sets(cfg, "val", images=cfg.eval.convergence_images)["balanced"]
        training = kept_images(selection, corpus, corpus_features(cfg, corpus))
        return cls(judges, Sampling.of(cfg), evaluation_sets(cfg), balanced, training)


def corpus_features(cfg: DictConfig, corpus: Corpus) -> Callable[[str], np.ndarray]:
    """A function from the name of an evaluation encoder to its features of a corpus, float16 [N, D]; cached."""
    encoders = {encoder.name: encoder for encoder in encoders_of(cfg)}
    return lambda name: corpus_embeddings(corpus, encoders[name], cfg.runs)


def measured_snapshot(cfg: DictConfig, run: Path, snapshot: Path, evaluation: Evaluation) -> dict[str, Path]:
    """The measured stages of a snapshot, by held-out set."""
    return _measured(cfg, Model(run / "pipeline", snapshot), {"balanced": evaluation.while_training}, evaluation)


def measured_model(cfg: DictConfig, run: Path, evaluation: Evaluation) -> dict[str, Path]:
    """The measured stages of the final model, by held-out set."""
    return _measured(cfg, Model(run / "pipeline"), evaluation.final, evaluation)


def _measured(cfg: DictConfig, model: Model, sets: Mapping[str, HeldOut], evaluation: Evaluation) -> dict[str, Path]:
    return measure_model(model, sets, evaluation.judges, evaluation.sampling, cfg.runs, evaluation.training)


def measure_snapshot(
    cfg: DictConfig, run: Path, snapshot: Path, corpus: Corpus, evaluation: Evaluation, tracker: Tracker
) -> dict[str, Any]:
    """Measure a snapshot: draw its sample sheet in `samples/` and return a line of convergence.jsonl."""
    model, measured = Model(run / "pipeline", snapshot), measured_snapshot(cfg, run, snapshot, evaluation)
    line = {**read_json(snapshot / SNAPSHOT), **metrics_of(measured)}
    if is_main_process():
        tracker.log({key: value for key, value in line.items() if key != "step" and value is not None}, line["step"])
        draw_sheets(run, model, snapshot, corpus, evaluation.sampling, tracker)
    return line


def draw_sheets(run: Path, model: Model, snapshot: Path, corpus: Corpus, sampling: Sampling, tracker: Tracker) -> None:
    """Draw `samples/step_<step>.png`, and `locations_<step>.png` if the model knows locations; keep existing files."""
    step = read_json(snapshot / SNAPSHOT)["step"]
    path = run / "samples" / f"step_{step:06d}.png"
    settings = path.with_suffix(".json")
    requested = {"model": model.key, "sampling": plain(sampling)}
    if path.is_file() and settings.is_file() and read_json(settings) == requested:
        return
    pipeline = model.load()
    path, prompts = sample_sheet(pipeline, corpus, sampling, path)
    tracker.image("samples", path, step, caption=" | ".join(prompts))
    if (snapshot / FOLDER).is_dir():
        encoder = MetadataEncoder.load(snapshot / FOLDER)
        if {"lon", "lat"} <= set(encoder.fields):
            locations = location_sheet(pipeline, encoder, sampling, run / "samples" / f"locations_{step:06d}.png")
            tracker.image("locations", locations, step, caption="the same prompt and noise, another place")
    write_json(settings, requested)


def measure_run(
    cfg: DictConfig, run: Path, corpus: Corpus, text: TextParts, evaluation: Evaluation, tracker: Tracker
) -> None:
    """Write convergence.jsonl, summary.json, the model card and samples of a finished training to its directory."""
    # values that were tracked during training are not sent again
    silent = Tracker() if cfg.eval.while_training else tracker
    lines = [measure_snapshot(cfg, run, path, corpus, evaluation, silent) for path in snapshots_of(run)]
    model, measured = Model(run / "pipeline"), measured_model(cfg, run, evaluation)
    # the images are cached by now, but all processes must call it
    drawn = {name: draw_images(model, held, evaluation.sampling, cfg.runs) for name, held in evaluation.final.items()}
    if not is_main_process():
        return
    write_lines(run / CONVERGENCE, lines)
    for name, held in evaluation.final.items():
        images = np.load(drawn[name] / IMAGES, mmap_mode="r")[:SHOWN]
        labels = [short_caption(caption) for caption in held.captions[:SHOWN]]
        save_picture(contact_sheet(images, COLUMNS, labels), run / "samples" / f"{name}.png")
    write_json(run / MEASURED, {name: str(path) for name, path in measured.items()})
    if text.place is not None:
        write_json(run / SCORER, {**text.place, **_relative(text.place, run)})
    training = read_json(run / TRAINING)
    summary = {**training, **measured_summary(cfg, measured, evaluation, lines)}
    selection = read_json(Path(cfg.runs) / "selection" / training["selection"] / "summary.json")
    card = model_card(cfg, summary, selection)
    (run / "pipeline" / "README.md").write_text(card, encoding="utf-8")
    write_json(run / "summary.json", summary)
    tracker.summary(summary["metrics"])


def measured_summary(
    cfg: DictConfig, measured: Mapping[str, Path], evaluation: Evaluation, lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """The part of a summary about a model's images."""
    balanced = evaluation.final["balanced"]
    real = real_confusion(balanced, evaluation.judges, cfg.runs)
    generated = read_json(measured["balanced"] / "confusion.json")
    return {
        "metrics": metrics_of(measured),
        "split": cfg.eval.split,
        "convergence": summarise(lines, plain(cfg.eval.targets)),
        "scenes": {"real": real, "generated": generated},
        "scene_accuracy_real": None if real is None else scene_accuracy(real),
    }


def _relative(place: Mapping[str, Any], run: Path) -> dict[str, str]:
    """The folders of a CLIP model, relative to the run's folder if both are below the same `runs`."""
    runs = run.resolve().parent.parent
    folders = {key: Path(place[key]).resolve() for key in ("folder", "tokenizer")}
    return {key: os.path.relpath(path, run.resolve()) for key, path in folders.items() if path.is_relative_to(runs)}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write JSON lines atomically: a reader sees the complete old or new file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(
        "".join(json.dumps(finite(plain(line)), allow_nan=False) + "\n" for line in lines), encoding="utf-8"
    )
    os.replace(partial, path)
