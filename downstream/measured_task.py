"""Measuring of a task: outputs of its network, or of a baseline, for the held-out images; and the run's result files.

Outputs are drawn once and measured once, in separate stages; a run's summary.json and samples/ repeat their results.
Baselines are measured in the same way as networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from omegaconf import DictConfig
from PIL import Image

from downstream.conditional import NETWORK
from downstream.controlnet import CONTROLNET, load_controlnet
from downstream.corpora import held_out_images
from downstream.segmenter import Segmenter, trained_segmenter
from downstream.task import Task
from encoders.embedding import Encoder, device
from encoders.perceptual import PerceptualScorer, perceptual_scorer
from eval.convergence import CONVERGENCE
from eval.generate import generate, starting_noise
from eval.held_out import HeldOut
from eval.measuring import embed_rows, encoders_of
from eval.metrics import METRICS, compute
from eval.models import SNAPSHOT, snapshots_of
from eval.processes import first_process_decides, over_processes
from eval.restoration import spread_map
from report.figures import comparison_sheet
from runtime.artefacts import is_main_process, read_json, stage, write_json
from runtime.tracking import Tracker
from train.measured_run import MEASURED, TRAINING, write_lines
from train.sampler import pipeline_fingerprint

#: File in the directory of a task's outputs: uint8 [N, R, R, 3].
OUTPUTS = "outputs.npy"
METRICS_FILE = "metrics.json"
#: Number of columns of a sample sheet, and of images kept for the report.
SHOWN = 12
#: Factor by which a sheet multiplies the grey levels of the spread of an input's outputs.
SPREAD_GAIN = 4
#: First noise number of further outputs of an image, and of further samples of one output.
VARIANTS, SAMPLES = 10**8, 10**10


@dataclass(frozen=True)
class TaskJudges:
    """The frozen networks for measuring a task; None if no metric needs one, or if its weights are missing."""

    encoders: tuple[Encoder, ...]
    segmenter: Segmenter | None
    perceptual: PerceptualScorer | None = None

    @classmethod
    def of(cls, cfg: DictConfig, task: Task) -> TaskJudges:
        """Load them for a config; the segmenter is trained if it does not exist."""
        needs = {need for key in task.metrics for need in METRICS[key].needs}
        return cls(
            encoders_of(cfg),
            trained_segmenter(cfg) if "segmentation" in needs else None,
            perceptual_scorer(cfg.eval.lpips) if "lpips_scores" in needs else None,
        )


# ---------------------------------------------------------------- outputs


def draw_outputs(cfg: DictConfig, task: Task, run: Path, held: HeldOut, snapshot: Path | None = None) -> Path:
    """Draw one output per held-out image; returns the stage's directory, with outputs.npy.

    The noise of output i depends only on `eval.seed` and i. All processes of a launch take part.

    Args:
        run: directory of a training, with pipeline/.
        snapshot: a snapshot of the run; its network replaces the pipeline's.
    """

    def build(directory: Path) -> None:
        pipeline = load_pipeline(run / "pipeline", snapshot)
        numbers = np.arange(len(held))
        draw = partial(_drawn, cfg, task, pipeline, held, numbers)
        _save_outputs(directory, over_processes(draw, len(held)))

    inputs = _drawing_inputs(cfg, task, run, held)
    inputs |= {} if snapshot is None else {"snapshot": pipeline_fingerprint(snapshot)}
    return stage(cfg.runs, "task_outputs", inputs, build, together=first_process_decides)


def draw_variants(cfg: DictConfig, task: Task, run: Path, held: HeldOut) -> Path:
    """`downstream.variants` outputs per held-out image, each from different noise: uint8 [N, k, R, R, 3] in a stage."""
    count = int(cfg.downstream.variants)

    def build(directory: Path) -> None:
        pipeline = load_pipeline(run / "pipeline")
        numbers = VARIANTS + np.arange(len(held) * count)
        draw = partial(_drawn, cfg, task, pipeline, _repeated(held, count), numbers)
        outputs = over_processes(draw, len(numbers))
        _save_outputs(directory, outputs.reshape(len(held), count, *outputs.shape[1:]))

    inputs = {**_drawing_inputs(cfg, task, run, held), "variants": count}
    return stage(cfg.runs, "task_outputs", inputs, build, together=first_process_decides)


def _repeated(held: HeldOut, count: int) -> HeldOut:
    """Repeat each image `count` times in a row, without features."""
    captions = [caption for caption in held.captions for _ in range(count)]
    return replace(held, rows=held.rows.repeat(count), features={}, captions=captions)


def _drawing_inputs(cfg: DictConfig, task: Task, run: Path, held: HeldOut) -> dict[str, Any]:
    inputs = {
        "model": pipeline_fingerprint(run / "pipeline"),
        "condition": [task.name, task.metadata, task.draw_metadata, task.guidance, task.samples],
        "held_out": held.key,
        "captions": task.texts(held.corpus, held.rows),
        "sampling": [int(cfg.downstream.steps), int(cfg.eval.seed)],
    }
    return inputs | ({"scales": list(task.scales)} if task.scales else {})


def _drawn(
    cfg: DictConfig, task: Task, pipeline: DiffusionPipeline, held: HeldOut, numbers: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Outputs uint8 [K, R, R, 3] of some rows of a held-out set; `numbers` int64 [N] determine their noise."""
    picked, seed = held.rows[rows], int(cfg.eval.seed)
    if task.draw is not None:
        noise = task_noise(pipeline, numbers[rows], seed, task.samples)
        return task.draw(pipeline, held.corpus, picked, noise)
    options: dict[str, Any] = task.guidance.arguments(bool(task.controls))
    if task.scales:
        options["controlnet_conditioning_scale"] = list(task.scales)
    return generate(
        pipeline,
        task.texts(held.corpus, picked),
        steps=int(cfg.downstream.steps),
        guidance_scale=options.pop("guidance_scale"),
        seed=seed,
        label=f"draw {task.name}",
        noise_of=numbers[rows],
        options=options,
        image=_pipeline_images(task, held, picked),
    )


def _pipeline_images(task: Task, held: HeldOut, rows: np.ndarray) -> Any:
    """The argument `image` of a pipeline: pictures, a tensor for one ControlNet, or one list per image for several."""
    if not task.controls:
        return [Image.fromarray(image) for image in task.condition(held.corpus, rows)]
    conditions = [torch.from_numpy(control(held.corpus, rows)) for control in task.controls.values()]
    return conditions[0] if len(conditions) == 1 else [list(of_one) for of_one in zip(*conditions, strict=True)]


def task_noise(pipeline: DiffusionPipeline, numbers: np.ndarray, seed: int, samples: int) -> np.ndarray:
    """Standard normal noise float32 [K, samples, C, h, w] by the outputs' numbers.

    Sample 0 is the same noise as with samples=1.
    """
    side, channels = pipeline.unet.config.sample_size, pipeline.vae.config.latent_channels
    parts = [
        starting_noise(numbers if index == 0 else [number + index * SAMPLES for number in numbers],
                       (channels, side, side), seed)
        for index in range(samples)
    ]  # fmt: skip
    return torch.stack(parts, dim=1).numpy()


def load_pipeline(folder: Path, snapshot: Path | None = None) -> DiffusionPipeline:
    """Load a pipeline of `fine_tune` on this machine's accelerator; a snapshot's network replaces the pipeline's."""
    parts = {}
    if snapshot is not None and (snapshot / NETWORK).is_dir():
        parts[NETWORK] = UNet2DConditionModel.from_pretrained(snapshot / NETWORK, use_safetensors=True)
    if snapshot is not None and (snapshot / CONTROLNET).is_dir():
        parts[CONTROLNET] = load_controlnet(snapshot / CONTROLNET)
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device())


def baseline_outputs(cfg: DictConfig, task: Task, baseline: str, held: HeldOut) -> Path:
    """Outputs of a task's baseline for the held-out images, in the format of `draw_outputs`."""
    return computed_outputs(cfg, task, baseline, held, lambda: task.baselines[baseline](held))


def computed_outputs(
    cfg: DictConfig, task: Task, method: str, held: HeldOut, compute_all: Callable[[], np.ndarray], of: str = ""
) -> Path:
    """Outputs of a deterministic method, in the format of `draw_outputs`; computed by the first process.

    Args:
        of: further dependencies of the outputs, in addition to the task and the images.
    """

    def build(directory: Path) -> None:
        _save_outputs(directory, compute_all())

    inputs = {"baseline": method, "condition": [task.name, task.metadata], "held_out": held.key, "of": of}
    return stage(cfg.runs, "task_outputs", inputs, build)


def _save_outputs(directory: Path, outputs: np.ndarray) -> None:
    if is_main_process():
        np.save(directory / OUTPUTS, outputs)


# ---------------------------------------------------------------- metrics


def measure_outputs(
    cfg: DictConfig, task: Task, outputs: Path, held: HeldOut, judges: TaskJudges, variants: Path | None = None
) -> Path:
    """Measure outputs; returns the stage's directory, with metrics.json.

    Args:
        outputs: directory of `draw_outputs` or `baseline_outputs`.
        held: the held-out images of the outputs, or the first of them; only their outputs are measured.
        variants: directory of `draw_variants` for the first images of the set; None: there are none.
    """

    def build(directory: Path) -> None:
        drawn = np.load(outputs / OUTPUTS, mmap_mode="r")[: len(held)]
        several = None if variants is None else np.load(variants / OUTPUTS, mmap_mode="r")
        metrics = output_metrics(task, drawn, held, judges, several)
        if is_main_process():
            write_json(directory / METRICS_FILE, metrics)

    inputs = {
        "outputs": f"{outputs.parent.name}/{outputs.name}",
        "variants": variants and variants.name,
        "held_out": held.key,
        "encoders": list(judges.encoders),
        "segmenter": judges.segmenter and judges.segmenter.key,
        "perceptual": judges.perceptual and judges.perceptual.fingerprint,
        "task": [sorted(task.metrics), task.metadata],
        "metrics": sorted(METRICS),
    }
    return stage(cfg.runs, "task_measured", inputs, build, together=first_process_decides)


def output_metrics(
    task: Task, outputs: np.ndarray, held: HeldOut, judges: TaskJudges, variants: np.ndarray | None = None
) -> dict[str, float | None]:
    """The task's metrics by their full names; all processes of a launch take part.

    Args:
        outputs: uint8 [N, R, R, 3]; image i belongs to held-out image i.
        variants: uint8 [M, k, R, R, 3], several outputs of the first M images.
    """
    inputs: dict[str, Any] = {"images": outputs, "truth": held.images}
    inputs |= {} if task.measured is None else task.measured(held, outputs)
    inputs |= {} if variants is None else {"samples": variants}
    if judges.segmenter is not None:
        inputs |= segmentation_inputs(judges.segmenter, outputs, held)
    if judges.perceptual is not None:
        inputs["lpips_scores"] = judges.perceptual.scores(outputs, held.images)
    metrics = compute(inputs, of={}, only=task.metrics)
    for encoder in judges.encoders:
        truth = held.features[encoder.name]
        inputs = {"features": embed_rows(encoder, outputs), "reference": truth, "truth_features": truth}
        if variants is not None and "diversity" in task.metrics:
            flat = embed_rows(encoder, variants.reshape(-1, *variants.shape[2:]))
            inputs["sample_features"] = flat.reshape(*variants.shape[:2], -1)
        metrics |= compute(inputs, of={"encoder": encoder.name}, only=task.metrics)
    return metrics if task.own_metrics is None else metrics | task.own_metrics(held, outputs)


def segmentation_inputs(segmenter: Segmenter, images: np.ndarray, held: HeldOut) -> dict[str, Any]:
    """The inputs of the metrics that need a segmentation, for images uint8 [N, R, R, 3].

    Image i belongs to held-out image i.
    """
    segmentation = over_processes(lambda rows: segmenter(images[rows]), len(images))
    return {"segmentation": segmentation, "masks": held.masks, "classes": len(held.corpus.mask_classes)}


def real_segmentation_metrics(cfg: DictConfig, held: HeldOut) -> dict[str, float | None]:
    """`miou` and `pixel_accuracy` of the segmenter on real held-out images: the level of a perfect generator; cached.

    Args:
        held: images with masks.
    """
    segmenter = trained_segmenter(cfg)

    def build(directory: Path) -> None:
        metrics = compute(segmentation_inputs(segmenter, held.images, held), of={})
        if is_main_process():
            write_json(directory / METRICS_FILE, metrics)

    inputs = {"segmenter": segmenter.key, "held_out": held.key, "metrics": sorted(METRICS)}
    directory = stage(cfg.runs, "real_segmentation", inputs, build, together=first_process_decides)
    return read_json(directory / METRICS_FILE)


def measure_baselines(cfg: DictConfig, task: Task) -> dict[str, Path]:
    """Measure a task's baselines like its networks; returns the directories with metrics.json, by baseline."""
    held, judges = held_out_images(cfg), TaskJudges.of(cfg, task)
    return {
        name: measure_outputs(cfg, task, baseline_outputs(cfg, task, name, held), held, judges)
        for name in task.baselines
    }


# ---------------------------------------------------------------- the run's files


def measured_fine_tuning(cfg: DictConfig, task: Task, run: Path) -> tuple[Path, Path | None, Path]:
    """Measure a finished training; returns the directories of outputs, variants (None: not needed) and metrics."""
    held, judges = held_out_images(cfg), TaskJudges.of(cfg, task)
    outputs, variants = draw_outputs(cfg, task, run, held), None
    if cfg.downstream.variants > 1 and set(task.metrics) & {"spread", "diversity"}:
        variants = draw_variants(cfg, task, run, held.first(int(cfg.downstream.varied_images)))
    return outputs, variants, measure_outputs(cfg, task, outputs, held, judges, variants)


def measured_combinations(
    cfg: DictConfig, task: Task, run: Path, held: HeldOut, judges: TaskJudges
) -> dict[str, tuple[Path, Path]]:
    """Measure all `Task.combinations` of a finished training; returns directories of outputs and metrics, by name."""
    result = {}
    for name, chosen in task.combinations().items():
        outputs = draw_outputs(cfg, chosen, run, held)
        result[name] = outputs, measure_outputs(cfg, chosen, outputs, held, judges)
    return result


def measure_run(cfg: DictConfig, task: Task, run: Path, tracker: Tracker) -> None:
    """Write convergence.jsonl, measured.json, summary.json and samples/ of a finished training to its directory."""
    held, judges = held_out_images(cfg), TaskJudges.of(cfg, task)
    lines = [_measured_snapshot(cfg, task, run, held, judges, snapshot) for snapshot in snapshots_of(run)]
    outputs, variants, measured = measured_fine_tuning(cfg, task, run)
    combinations = measured_combinations(cfg, task, run, held, judges)
    training, shown = read_json(run / TRAINING), held.first(SHOWN)
    last = {key: training[key] for key in ("images_seen", "seconds", "loss")}
    line = {"step": training["steps"], **last, **_curve_metrics(cfg, task, outputs, held, judges)}
    if not is_main_process():
        return
    drawn = np.load(outputs / OUTPUTS, mmap_mode="r")[:SHOWN]
    several = None if variants is None else np.load(variants / OUTPUTS, mmap_mode="r")[:SHOWN]
    combined = {name: np.load(place / OUTPUTS, mmap_mode="r")[:SHOWN] for name, (place, _) in combinations.items()}
    sheet = save_samples(run / "samples", task, shown, drawn, several, combined)
    tracker.image("samples", sheet, training["steps"])
    metrics = read_json(measured / METRICS_FILE)
    write_lines(run / CONVERGENCE, [*lines, line])
    write_json(run / MEASURED, {held.name: str(measured)})
    summary = {"task": task.name, **training, "metrics": metrics, "images": len(held), "split": cfg.eval.split}
    if combinations:
        summary["combinations"] = {name: read_json(place / METRICS_FILE) for name, (_, place) in combinations.items()}
    write_json(run / "summary.json", summary)
    tracker.summary(metrics)


def measure_drawn(cfg: DictConfig, task: Task, run: Path) -> Path:
    """Metrics of a finished training with outputs drawn by this config; returns the directory of `measure_outputs`."""
    held = held_out_images(cfg)
    return measure_outputs(cfg, task, draw_outputs(cfg, task, run, held), held, TaskJudges.of(cfg, task))


def _measured_snapshot(
    cfg: DictConfig, task: Task, run: Path, held: HeldOut, judges: TaskJudges, snapshot: Path
) -> dict[str, Any]:
    """Measure a snapshot; returns a line of convergence.jsonl."""
    outputs = draw_outputs(cfg, task, run, held.first(int(cfg.downstream.length_images)), snapshot)
    return {**read_json(snapshot / SNAPSHOT), **_curve_metrics(cfg, task, outputs, held, judges)}


def _curve_metrics(
    cfg: DictConfig, task: Task, outputs: Path, held: HeldOut, judges: TaskJudges
) -> dict[str, float | None]:
    """The metrics of a curve over lengths, on the same first `downstream.length_images` images for every length."""
    curve, few = replace(task, metrics=task.curve), held.first(int(cfg.downstream.length_images))
    return read_json(measure_outputs(cfg, curve, outputs, few, judges) / METRICS_FILE)


def save_samples(
    folder: Path,
    task: Task,
    held: HeldOut,
    outputs: np.ndarray,
    variants: np.ndarray | None = None,
    combinations: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Save the sample sheet (inputs, output, truth, maps) and its images as arrays, uint8 [N, H, W, 3].

    Args:
        outputs: uint8 [N, H, W, 3] of the held-out images.
        variants: uint8 [M, k, H, W, 3], M >= N; the sheet shows the first one and the spread of all.
        combinations: outputs by `Task.combinations`, which the sheet shows instead of `outputs`.
    Returns:
        The path of the sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inputs, truth = task.inputs(held), held.images
    arrays = {"inputs": next(iter(inputs.values())), "outputs": outputs, "truth": truth}
    for name, images in arrays.items():
        np.save(folder / f"{name}.npy", images)
    rows = {**inputs, **(combinations or {"output": outputs})}
    rows["truth"] = truth
    if variants is not None and len(variants) >= len(outputs):
        rows["another output"] = np.asarray(variants[: len(outputs), 0])
        deviation = spread_map(variants[: len(outputs)])[..., None].repeat(3, axis=3)
        rows[f"spread of {variants.shape[1]} outputs, x {SPREAD_GAIN}"] = _levels(SPREAD_GAIN * deviation)
    rows |= {} if task.maps is None else task.maps(held, outputs)
    path = folder / "comparison.png"
    comparison_sheet(rows, legend=task.legend).save(path)
    return path


def _levels(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
