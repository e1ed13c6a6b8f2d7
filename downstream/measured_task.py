"""Measuring a task: what its network, or a method without one, makes of the held-out images, and the run's files.

Outputs are drawn once and measured once, in stages of their own; a run's summary.json and samples/ repeat what they
found. Baselines go the same way as networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionInstructPix2PixPipeline
from omegaconf import DictConfig
from PIL import Image

from downstream.corpora import held_out_images
from downstream.segmenter import Segmenter, trained_segmenter
from downstream.task import Task
from encoders.embedding import Encoder, device
from eval.generate import generate
from eval.held_out import HeldOut
from eval.measuring import Sampling, embed_rows, encoders_of
from eval.metrics import METRICS, compute
from eval.models import Model
from eval.processes import first_process_says, over_processes
from report.figures import comparison_sheet
from runtime.artefacts import is_main_process, read_json, stage, write_json
from runtime.tracking import Tracker
from train.measured_run import MEASURED, TRAINING

#: In the directory of a task's outputs: uint8 [N, R, R, 3].
OUTPUTS = "outputs.npy"
METRICS_FILE = "metrics.json"
#: Columns of a sample sheet, and images kept for the report.
SHOWN = 12


@dataclass(frozen=True)
class TaskJudges:
    """The frozen networks that a task is measured with; `segmenter` is None where no metric needs one."""

    encoders: tuple[Encoder, ...]
    segmenter: Segmenter | None

    @classmethod
    def of(cls, cfg: DictConfig, task: Task) -> TaskJudges:
        """Of a config; the segmenter is trained if it is not there."""
        needs = {need for key in task.metrics for need in METRICS[key].needs}
        return cls(encoders_of(cfg), trained_segmenter(cfg) if "segmentation" in needs else None)


# ---------------------------------------------------------------- outputs


def draw_outputs(cfg: DictConfig, task: Task, pipeline: Path, held: HeldOut) -> Path:
    """One output a held-out image, without guidance; the stage's directory, with outputs.npy.

    Output i starts from noise that depends on `eval.seed` and i alone. All processes of a launch take part.
    """
    sampling = Sampling(steps=int(cfg.downstream.steps), guidance_scale=1.0, seed=int(cfg.eval.seed))

    def build(directory: Path) -> None:
        draw = partial(_drawn, load_pipeline(pipeline), task, held, sampling)
        _save_outputs(directory, over_processes(draw, len(held)))

    inputs = {
        "model": Model(pipeline).key,
        "condition": [task.name, task.facts],
        "held_out": held.key,
        "captions": _captions(task, held),
        "sampling": sampling,
    }
    return stage(cfg.runs, "task_outputs", inputs, build, together=first_process_says)


def _captions(task: Task, held: HeldOut) -> list[str]:
    return held.captions if task.captioned else [""] * len(held)


def _drawn(
    pipeline: StableDiffusionInstructPix2PixPipeline, task: Task, held: HeldOut, sampling: Sampling, rows: np.ndarray
) -> np.ndarray:
    captions = _captions(task, held)
    conditions = task.condition(held.corpus, held.rows[rows])
    return generate(
        pipeline,
        [captions[row] for row in rows],
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        seed=sampling.seed,
        label=f"draw {task.name}",
        noise_of=rows,
        image=[Image.fromarray(image) for image in conditions],
    )


def load_pipeline(folder: Path) -> StableDiffusionInstructPix2PixPipeline:
    """A pipeline that `fine_tune` has left, on this machine's accelerator."""
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        folder, use_safetensors=True, local_files_only=True
    )
    return pipeline.to(device())


def baseline_outputs(cfg: DictConfig, task: Task, baseline: str, held: HeldOut) -> Path:
    """What a task's baseline makes of the held-out images, as `draw_outputs`."""

    def build(directory: Path) -> None:
        _save_outputs(directory, task.baselines[baseline](held))

    inputs = {"baseline": baseline, "condition": [task.name, task.facts], "held_out": held.key}
    return stage(cfg.runs, "task_outputs", inputs, build)


def _save_outputs(directory: Path, outputs: np.ndarray) -> None:
    if is_main_process():
        np.save(directory / OUTPUTS, outputs)


# ---------------------------------------------------------------- metrics


def measure_outputs(cfg: DictConfig, task: Task, outputs: Path, held: HeldOut, judges: TaskJudges) -> Path:
    """Metrics of outputs, of which image i belongs to held-out image i; the stage's directory, with metrics.json.

    Args:
        outputs: directory of `draw_outputs` or `baseline_outputs`.
    """

    def build(directory: Path) -> None:
        metrics = output_metrics(task, np.load(outputs / OUTPUTS, mmap_mode="r"), held, judges)
        if is_main_process():
            write_json(directory / METRICS_FILE, metrics)

    inputs = {
        "outputs": f"{outputs.parent.name}/{outputs.name}",
        "held_out": held.key,
        "encoders": list(judges.encoders),
        "segmenter": judges.segmenter and judges.segmenter.key,
        "task": sorted(task.metrics),
        "metrics": sorted(METRICS),
    }
    return stage(cfg.runs, "task_measured", inputs, build, together=first_process_says)


def output_metrics(task: Task, outputs: np.ndarray, held: HeldOut, judges: TaskJudges) -> dict[str, float | None]:
    """The task's metrics by their full names; all processes of a launch take part.

    Args:
        outputs: uint8 [N, R, R, 3], of which image i belongs to held-out image i.
    """
    inputs: dict[str, Any] = {"images": outputs, "truth": held.images}
    if judges.segmenter is not None:
        inputs |= segmentation_inputs(judges.segmenter, outputs, held)
    metrics = compute(inputs, of={}, only=task.metrics)
    for encoder in judges.encoders:
        truth = held.features[encoder.name]
        inputs = {"features": embed_rows(encoder, outputs), "reference": truth, "truth_features": truth}
        metrics |= compute(inputs, of={"encoder": encoder.name}, only=task.metrics)
    return metrics


def segmentation_inputs(segmenter: Segmenter, images: np.ndarray, held: HeldOut) -> dict[str, Any]:
    """What metrics of a segmentation need; image i belongs to held-out image i."""
    segmentation = over_processes(lambda rows: segmenter(images[rows]), len(images))
    return {"segmentation": segmentation, "masks": held.masks, "classes": len(held.corpus.mask_classes)}


def real_segmentation_metrics(cfg: DictConfig, held: HeldOut) -> dict[str, float | None]:
    """`miou` and `pixel_accuracy` of the segmenter on real held-out images: what a perfect generator reaches; cached.

    Args:
        held: images with masks.
    """
    segmenter = trained_segmenter(cfg)

    def build(directory: Path) -> None:
        metrics = compute(segmentation_inputs(segmenter, held.images, held), of={})
        if is_main_process():
            write_json(directory / METRICS_FILE, metrics)

    inputs = {"segmenter": segmenter.key, "held_out": held.key, "metrics": sorted(METRICS)}
    directory = stage(cfg.runs, "real_segmentation", inputs, build, together=first_process_says)
    return read_json(directory / METRICS_FILE)


def measure_baselines(cfg: DictConfig, task: Task) -> dict[str, Path]:
    """Measure a task's baselines as its networks are; directories with metrics.json, by baseline."""
    held, judges = held_out_images(cfg), TaskJudges.of(cfg, task)
    return {
        name: measure_outputs(cfg, task, baseline_outputs(cfg, task, name, held), held, judges)
        for name in task.baselines
    }


# ---------------------------------------------------------------- the run's files


def measure_run(cfg: DictConfig, task: Task, run: Path, tracker: Tracker) -> None:
    """Write measured.json, summary.json and samples/ of a finished training into its directory."""
    held = held_out_images(cfg)
    outputs = draw_outputs(cfg, task, run / "pipeline", held)
    measured = measure_outputs(cfg, task, outputs, held, TaskJudges.of(cfg, task))
    if not is_main_process():
        return
    training, shown = read_json(run / TRAINING), held.first(SHOWN)
    drawn = np.load(outputs / OUTPUTS, mmap_mode="r")[:SHOWN]
    sheet = save_samples(run / "samples", task.inputs(shown), drawn, shown.images)
    tracker.image("samples", sheet, training["steps"])
    metrics = read_json(measured / METRICS_FILE)
    write_json(run / MEASURED, {held.name: str(measured)})
    summary = {"task": task.name, **training, "metrics": metrics, "images": len(held), "split": cfg.eval.split}
    write_json(run / "summary.json", summary)
    tracker.summary(metrics)


def save_samples(folder: Path, inputs: Mapping[str, np.ndarray], outputs: np.ndarray, truth: np.ndarray) -> Path:
    """The sheet (input, output, truth) and its images as arrays, uint8 [N, H, W, 3] each. Returns the sheet's path."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"inputs": next(iter(inputs.values())), "outputs": outputs, "truth": truth}
    for name, images in arrays.items():
        np.save(folder / f"{name}.npy", images)
    path = folder / "comparison.png"
    comparison_sheet({**inputs, "output": outputs, "truth": truth}).save(path)
    return path
