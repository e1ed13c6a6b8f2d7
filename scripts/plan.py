"""The plan of `make reproduce`: computations and their costs, finished parts and missing inputs.

Its rows are the trainings of `scripts.chain`, which the chain itself uses. To find out whether one is done, the plan
calls the functions that would compute it inside `runtime.artefacts.nothing_built`, so nothing is computed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from transformers import CLIPConfig, CLIPTextConfig

from downstream.conditional import load_parts
from downstream.corpora import corpus_of
from downstream.fine_tuning import loop_options, training_inputs
from downstream.measured_task import measured_fine_tuning
from downstream.registry import TASKS, chain_tasks, suitable_names
from downstream.segmenter import SegmenterOptions
from eval.metrics import SETS
from eval.models import snapshots_of
from prune.library import budget_of
from prune.measured_subset import measured_subset
from prune.selection import select
from runtime.application import explained
from runtime.artefacts import COMPLETE, NotBuilt, nothing_built, plain, stage_fingerprint
from runtime.errors import UserError
from scripts.chain import FineTuning, Part, Pretraining, chain
from scripts.needs import (
    HERE,
    MISSING,
    Need,
    absent_line,
    autoencoder_weights,
    needs,
    not_given,
    pipeline_weights,
    text_weights,
)
from train.checkpoint import Checkpoints
from train.components import load_text_parts
from train.data import sampling_fractions
from train.foundation import objective_of, run_directory, snapshot_steps
from train.latents import Views
from train.loop import LoopOptions
from train.measured_run import Evaluation, measured_model, measured_snapshot
from train.networks import new_network, new_unet
from train.resume import start_of
from train.utilisation import training_flops

T = TypeVar("T")
DONE, TO_DO, UNKNOWN = "done", "to do", "not known"


@dataclass(frozen=True)
class Row:
    """A cell of the plan.

    Attributes:
        stage: the kind of work.
        name: of the training.
        steps: optimizer steps; None without training.
        images: number of images that are used for training, drawn or read; None: unknown before the corpus is indexed.
        flops: floating-point operations of the denoising network; None: not counted.
        state: the part that already exists.
    """

    stage: str
    name: str
    seed: int
    steps: int | None = None
    images: int | None = None
    flops: float | None = None
    state: str = UNKNOWN


class Sizes(NamedTuple):
    """Sizes of a network's training data: latents [channels, side, side], hidden states [tokens, width]."""

    channels: int
    side: int
    tokens: int
    width: int


class Plan(NamedTuple):
    """The rows of a plan, and problems.

    Attributes:
        missing: one line for everything that keeps the chain from running: what it is and what to do.
    """

    rows: list[Row]
    needs: list[Need]
    missing: list[str]


def dry_run(cfg: DictConfig, references: Callable[..., Path]) -> None:
    """Print the plan of a config.

    Args:
        references: measures the reference rows for a config and a split.
    Raises:
        UserError: something is missing.
    """
    plan = plan_of(cfg, references)
    print("\n".join(lines_of(plan, cfg)))
    if plan.missing:
        count = len(plan.missing)
        raise UserError(
            f"the chain cannot run: {count} {'thing is' if count == 1 else 'things are'} missing, see above"
        )


def plan_of(cfg: DictConfig, references: Callable[..., Path]) -> Plan:
    """The plan of a config.

    Raises:
        UserError: the profile names a method that it does not train, or the numbers for the estimate are invalid.
    """
    if not (cfg.plan.peak_tflops > 0 and 0 < cfg.plan.utilisation <= 1):
        raise UserError("plan.peak_tflops: give more than 0; plan.utilisation: more than 0 and at most 1")
    look = _Looking(cfg)
    names = look.at(lambda: suitable_names(cfg), list(chain_tasks()))
    parts = chain(cfg, names)
    trainings = [training for part in parts for training in part.pretrainings]
    scenes = any(getattr(instantiate(one.cfg.prune, _convert_="all"), "uses_reference", False) for one in trainings)
    result = needs(cfg, with_reference=scenes and cfg.reference.source is not None)
    look.problems[:] = [need.advice for need in result if need.state == MISSING]
    look.problems += [absent_line(key) for key in not_given(cfg) if key.startswith("model.")]
    look.able = not look.problems and all(need.state == HERE for need in result)
    sizes = look.at(lambda: sizes_of(cfg), None)
    for part in parts:
        _check(part, sizes, look)
    rows = [*_shared_rows(cfg, parts[0], references, look)] if parts else []
    for part in parts:
        rows += _rows(part, Cost(part.cfg, sizes), look)
    return Plan(rows, result, list(dict.fromkeys(look.problems)))


class _Looking:
    """Queries for existing results. Refusals of the configuration are collected in `problems`.

    Attributes:
        able: whether all networks and data are on this machine, so that a query downloads nothing.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.runs, self.problems, self.able = str(cfg.runs), [], False

    def at(self, ask: Callable[[], T], otherwise: T) -> T:
        """The result of `ask`, or `otherwise` if it refuses the configuration or needs a stage that is not built."""
        try:
            with nothing_built(), contextlib.redirect_stderr(io.StringIO()):
                return ask()
        except NotBuilt:
            return otherwise
        except Exception as error:
            message = explained(error, self.runs)
            if message is None:
                raise
            self.problems.append(" ".join(message.split()))
            return otherwise

    def state(self, ask: Callable[[], object]) -> str:
        """Whether all stages that `ask` requests are done."""
        if not self.able:
            return UNKNOWN
        return self.at(lambda: (ask(), DONE)[1], TO_DO)

    def training(self, ask: Callable[[], Path]) -> str:
        """The same for a training whose directory `ask` returns, with the steps of an interrupted one."""
        return self.at(lambda: progress_of(ask()), TO_DO) if self.able else UNKNOWN


def progress_of(directory: Path) -> str:
    """The existing progress of a training with this directory."""
    if (directory / COMPLETE).is_file():
        return DONE
    newest = Checkpoints(directory.with_name(directory.name + ".partial") / "checkpoints").newest()
    return TO_DO if newest is None else f"begun: step {int(newest.name)}"


# ---------------------------------------------------------------- sizes and costs


def sizes_of(cfg: DictConfig) -> Sizes | None:
    """Sizes of latents and hidden states, from the networks' files, else from the configuration; None: unknown.

    Raises:
        UserError: the autoencoder cannot encode images of this side.
    """
    latents, text = _latents(cfg), _text(cfg)
    if latents is None or text is None:
        return None
    (channels, factor), side = latents, Views(**cfg.train.views).side(cfg.corpus.train.resolution)
    if side % factor:
        raise UserError(
            f"image side {side} px is not a multiple of the autoencoder's {factor}: change corpus.train.resolution"
        )
    return Sizes(channels, side // factor, *text)


def _latents(cfg: DictConfig) -> tuple[int, int] | None:
    """Channels of the latents, and the factor between the sides of images and latents."""
    weights = autoencoder_weights(cfg)
    metadata = weights.metadata(weights.files[0][0])
    if cfg.model.get("pretrained"):
        metadata = pipeline_weights(cfg).metadata("vae/config.json")
    if metadata is not None and "latent_channels" in metadata:
        return metadata["latent_channels"], 2 ** (len(metadata.get("block_out_channels", [0] * 4)) - 1)
    recipe = cfg.autoencoder.get("recipe") or {}
    channels = cfg.autoencoder.get("latent_channels") or recipe.get("latent_channels")
    factor = cfg.autoencoder.get("factor") or 2 ** (len(recipe.get("encoder_blocks", [0] * 4)) - 1)
    return None if channels is None else (int(channels), int(factor))


def _text(cfg: DictConfig) -> tuple[int, int] | None:
    """Number of tokens of a caption, and the width of their hidden states."""
    options = cfg.text_encoder
    text = None
    if cfg.model.get("pretrained"):
        if (metadata := pipeline_weights(cfg).metadata("text_encoder/config.json")) is not None:
            text = CLIPTextConfig.from_dict(metadata)
    elif options.kind != "train" and (metadata := text_weights(cfg).metadata()) is not None:
        text = CLIPConfig.from_dict(metadata).text_config
    if text is not None:
        return text.max_position_embeddings, text.hidden_size
    known = options.get("max_length"), options.get("width")
    return None if None in known else (int(known[0]), int(known[1]))


def network_of(cfg: DictConfig, sizes: Sizes, conditioned: bool = False) -> nn.Module | None:
    """The denoising network without weights (on `meta`); None if its shape is unknown.

    Args:
        conditioned: with the additional input channels of a task.
    """
    channels, more = sizes.channels, sizes.channels * conditioned
    with torch.device("meta"):
        if cfg.model.get("pretrained"):
            metadata = pipeline_weights(cfg).metadata("unet/config.json")
            return metadata and UNet2DConditionModel.from_config(metadata, in_channels=metadata["in_channels"] + more)
        if not cfg.model.get("unet") and (conditioned or not cfg.model.get("transformer")):
            return None
        if conditioned:
            return new_unet(plain(cfg.model.unet), channels, sizes.side, sizes.width, cfg.seed, more)
        return new_network(cfg.model, channels, sizes.side, sizes.width, cfg.seed)


class Cost:
    """Operations of the denoising network per training image and per drawn image."""

    def __init__(self, cfg: DictConfig, sizes: Sizes | None) -> None:
        self.cfg, self.sizes = cfg, sizes

    def _count(self, conditioned: bool) -> float | None:
        network = None if self.sizes is None else network_of(self.cfg, self.sizes, conditioned)
        if network is None:
            return None
        channels, side, tokens, width = self.sizes
        with torch.device("meta"):
            latents = torch.zeros(1, channels * (1 + conditioned), side, side)
            return training_flops(network, latents, torch.zeros(1, tokens, width))

    @cached_property
    def training(self) -> float | None:
        """Operations per image of the pretraining."""
        return self._count(False)

    @cached_property
    def tuning(self) -> float | None:
        """Operations per image of a task's training."""
        return self._count(True)

    def drawing(self) -> float | None:
        """Operations to draw an image from a caption: one forward pass per solver step, two with guidance."""
        passes = self.cfg.eval.steps * (1 if self.cfg.eval.guidance_scale == 1 else 2)
        return times(self.training, passes / 3)

    def task_drawing(self) -> float | None:
        """Operations to draw an image from its condition, without guidance."""
        return times(self.tuning, self.cfg.downstream.steps / 3)


def times(flops: float | None, count: float) -> float | None:
    return None if flops is None else flops * count


def gpu_hours(flops: float, cfg: DictConfig) -> float:
    """Hours on one accelerator with the speed that the options `plan` assume."""
    return flops / (cfg.plan.peak_tflops * 1e12 * cfg.plan.utilisation) / 3600


# ---------------------------------------------------------------- rows


def _check(part: Part, sizes: Sizes | None, look: _Looking) -> None:
    """Record the errors that the parts of a configuration would raise later."""
    cfg = part.cfg
    look.at(lambda: (budget_of(1, cfg.ratio), SegmenterOptions.of(cfg)), None)
    for training in part.pretrainings:
        chosen = training.cfg
        look.at(lambda chosen=chosen: (objective_of(chosen), start_of(chosen)), None)
        look.at(lambda chosen=chosen: sampling_fractions(np.ones(1), chosen.train.weighting), None)
    if sizes is not None and not cfg.model.get("pretrained"):
        look.at(lambda: network_of(cfg, sizes), None)
    tested, pretrained = cfg.corpus[str(cfg.eval.split)].resolution, Views(**cfg.train.views).crop
    tuned = cfg.corpus.train.resolution
    if tested != (pretrained or tuned) or (part.fine_tunings and tested != tuned):
        look.problems.append(
            f"held-out images have {tested} px, but pretraining uses {pretrained or tuned} px"
            + (f" and fine-tuning {tuned} px" if part.fine_tunings else "")
            + ": give all the same side (corpus.train.resolution, corpus.test.resolution, train.views.crop=null)"
        )
    if part.fine_tunings and not cfg.model.get("unet"):
        look.problems.append(
            "the tasks need model.unet, with a foundation or from scratch, and this model has no U-Net: choose "
            "model=ldm_tiny, ldm_small or ldm_base"
        )


def _shared_rows(cfg: DictConfig, part: Part, references: Callable[..., Path], look: _Looking) -> Iterator[Row]:
    """Rows before those of the seeds: the text encoder, and the measurements of real images."""
    options = cfg.text_encoder
    if options.kind == "train":
        images = options.train.steps * options.train.batch_size
        state = look.state(lambda: load_text_parts(cfg, corpus_of(cfg, "train")))
        yield Row("text encoder", "", options.seed, options.train.steps, images, state=state)
    for split, images in ((None, cfg.eval.images), ("val", cfg.eval.convergence_images)):
        state = look.state(lambda split=split: references(cfg, split))
        yield Row(f"measure real images of {split or cfg.eval.split}", "", cfg.seed, None, images, state=state)


def _rows(part: Part, cost: Cost, look: _Looking) -> Iterator[Row]:
    for training in part.pretrainings:
        yield from _pretraining_rows(training, cost, look)
    runs = {training.name: training for training in part.pretrainings}
    for tuning in part.fine_tunings:
        yield from _fine_tuning_rows(tuning, runs, cost, look)


def _pretraining_rows(training: Pretraining, cost: Cost, look: _Looking) -> Iterator[Row]:
    cfg, method = training.cfg, training.method
    row = Row("", training.name, cfg.seed)
    if training.new_subset:
        images = look.at(lambda: len(corpus_of(cfg, "train")), None) if look.able else None
        chosen = look.state(lambda: select(cfg, method))
        yield replace(row, stage="prune", name=method, images=images, state=chosen)
        measured = look.state(lambda: measured_subset(cfg, method))
        yield replace(row, stage="measure subset", name=method, state=measured)
    options = LoopOptions(**cfg.train.loop, seed=cfg.seed)
    start = look.at(lambda: start_of(cfg).step, 0)
    steps = options.steps - start
    images = steps * options.batch_size
    state = look.training(lambda: run_directory(cfg, method))
    yield replace(row, stage="pretrain", steps=steps, images=images, flops=times(cost.training, images), state=state)
    snapshots = sum(step > start for step in snapshot_steps(cfg, options))
    images = snapshots * cfg.eval.convergence_images + len(SETS) * cfg.eval.images
    done = state if state != DONE else look.state(lambda: _measured(training))
    done = TO_DO if done.startswith("begun") else done
    yield replace(row, stage="measure", images=images, flops=times(cost.drawing(), images), state=done)


def _measured(training: Pretraining) -> None:
    """Query all stages that measure a finished run."""
    cfg, method, _ = training
    run = run_directory(cfg, method)
    selection, corpus = select(cfg, method)
    evaluation = Evaluation.of(cfg, corpus, selection, load_text_parts(cfg, corpus))
    for snapshot in snapshots_of(run):
        measured_snapshot(cfg, run, snapshot, evaluation)
    measured_model(cfg, run, evaluation)


def _fine_tuning_rows(tuning: FineTuning, runs: dict[str, Pretraining], cost: Cost, look: _Looking) -> Iterator[Row]:
    cfg, task = tuning.cfg, tuning.task
    options = loop_options(cfg, None if tuning.foundation is None else Path(tuning.foundation))
    images = options.steps * options.batch_size
    name = tuning.method if tuning.foundation is None else f"from {tuning.foundation}"
    row = Row(f"fine-tune {task}", name, cfg.seed)
    start = None if tuning.foundation is None else runs[tuning.foundation]
    state = look.training(lambda: tuned_directory(tuning, start))
    yield replace(row, steps=options.steps, images=images, flops=times(cost.tuning, images), state=state)
    images = min(cfg.downstream.images, cfg.eval.images)
    done = state if state != DONE else look.state(lambda: _task_measured(tuning, start))
    done = TO_DO if done.startswith("begun") else done
    flops = times(cost.task_drawing(), images)
    yield replace(row, stage=f"measure {task}", images=images, flops=flops, state=done)


def tuned_directory(tuning: FineTuning, start: Pretraining | None) -> Path:
    """The directory of the run of `fine_tune`, whether it exists or not.

    Raises:
        NotBuilt: the run that it starts from does not exist.
    """
    cfg, task = tuning.cfg, TASKS[tuning.task](tuning.cfg)
    foundation = None if start is None else run_directory(start.cfg, start.method)
    if foundation is not None and not (foundation / COMPLETE).is_file():
        raise NotBuilt(foundation)
    corpus = corpus_of(cfg, "train")
    options, parts = loop_options(cfg, foundation), load_parts(cfg, foundation, corpus)
    inputs = training_inputs(cfg, task, tuning.method, corpus, parts, options)
    return Path(cfg.runs) / task.name / stage_fingerprint("downstream", inputs)


def _task_measured(tuning: FineTuning, start: Pretraining | None) -> None:
    """Query all stages that measure a finished fine-tuning."""
    measured_fine_tuning(tuning.cfg, TASKS[tuning.task](tuning.cfg), tuned_directory(tuning, start))


# ---------------------------------------------------------------- output


def lines_of(plan: Plan, cfg: DictConfig) -> list[str]:
    """The plan as text."""
    lines = [f"plan of profile {cfg.profile.name}; nothing is computed", "", *_table(plan.rows, cfg), ""]
    left = [row for row in plan.rows if row.state != DONE]
    flops = sum(row.flops or 0 for row in left)
    lines += [
        f"done: {len(plan.rows) - len(left)} of {len(plan.rows)}; left: {sum(row.steps or 0 for row in left):,} "
        f"optimizer steps, {flops:.3g} FLOP, {gpu_hours(flops, cfg):.3g} GPU-hours",
        f"assumed: {cfg.plan.utilisation:.0%} (plan.utilisation) of {cfg.plan.peak_tflops:g} TFLOP/s "
        "(plan.peak_tflops) on each GPU",
        "counted: the denoising network, three forward passes per training image; not counted: the autoencoder, the "
        "text encoder, the selection and the measurements",
    ]
    if any(need.key.startswith("corpus.") and need.state == MISSING for need in plan.needs):
        lines.append("the corpus is not on this machine: the plan assumes that it is suitable for every task")
    lines += ["", "networks and data"]
    width = max(len(need.key) for need in plan.needs)
    lines += [f"  {need.key:{width}}  {need.state:8}  {need.what}" for need in plan.needs]
    if plan.missing:
        lines += ["", "missing", *(f"  {line}" for line in plan.missing)]
    return lines


def _table(rows: Sequence[Row], cfg: DictConfig) -> list[str]:
    heads = ("stage", "of", "seed", "steps", "images", "FLOP", "GPU-hours", "state")
    cells = [
        (
            row.stage,
            row.name,
            str(row.seed),
            "" if row.steps is None else f"{row.steps:,}",
            "" if row.images is None else f"{row.images:,}",
            "" if row.flops is None else f"{row.flops:.3g}",
            "" if row.flops is None else f"{gpu_hours(row.flops, cfg):.3g}",
            row.state,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    right = range(2, 7)
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (heads, *cells)
    ]
