"""The training loop that all trainings use: Accelerate, stateless randomness, EMA, exact resume, progress."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from threadpoolctl import threadpool_limits
from torch import nn

from runtime.errors import UserError
from runtime.progress import progress
from runtime.ranges import check_options
from train.checkpoint import Checkpoints
from train.ema import Average, Modules
from train.processes import load_optimizer_tensors, network_tensors, optimizer_tensors, prepare

#: Tensors of a batch, or of a part of it; the first dimension runs over the images.
Batch = tuple[torch.Tensor, ...]
#: (randomness of this step, rows of the global batch that this process computes) -> those rows, on the CPU.
DrawBatch = Callable[[np.random.Generator, slice], Batch]
#: (modules, batch on the device) -> mean loss over the batch
ComputeLoss = Callable[[Modules, Batch], torch.Tensor]
#: (step, mean loss, seconds of training, averaged modules)
OnSnapshot = Callable[[int, float, float, Modules], None]

#: Steps between two readings of the loss; each reading makes the GPU wait.
REPORT_EVERY = 20


@dataclass(frozen=True)
class LoopOptions:
    """Length and speed of a training.

    Args:
        steps: optimizer steps.
        batch_size: images per step, over all processes.
        learning_rate: peak learning rate of AdamW.
        warmup: steps of linear warm-up.
        decay: fraction of the steps, at the end, over which the rate falls linearly to zero.
        ema_halflife: half-life of the weight average in images; 0: no average.
        gradient_clip: largest gradient norm.
        weight_decay: weight decay of AdamW.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: number of newest checkpoints to keep.
        micro_batch: images per forward pass of one process; gradients are accumulated over the batch. None: no
            splitting.
        divergence: stop when the loss, averaged over `REPORT_EVERY` steps, exceeds its lowest by this factor; 0: never.
        compile: compile the networks (torch.compile).
        seed: seed of the batches and the noise.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 50
    decay: float = 0.4
    ema_halflife: float = 0.0
    gradient_clip: float = 1.0
    weight_decay: float = 0.0
    checkpoint_every: int = 200
    keep_checkpoints: int = 1
    micro_batch: int | None = None
    divergence: float = 0.0
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(
            self,
            "loop",
            counts=("steps", "batch_size", "checkpoint_every", "keep_checkpoints", "micro_batch"),
            counts_or_zero=("warmup", "seed"),
            fractions=("decay",),
            at_least_zero=("learning_rate", "ema_halflife", "weight_decay", "divergence"),
            above_zero=("gradient_clip",),
        )

    def rate(self, step: int) -> float:
        """Learning rate at a zero-based step: linear warm-up, constant, linear decay."""
        rise = (step + 1) / max(1, self.warmup)
        fall = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, rise, fall)


def train_loop(
    accelerator: Accelerator,
    modules: Modules,
    draw: DrawBatch,
    compute_loss: ComputeLoss,
    options: LoopOptions,
    directory: Path,
    *,
    label: str,
    snapshots: Sequence[int] = (),
    on_snapshot: OnSnapshot | None = None,
    log: Callable[[dict[str, float], int], None] | None = None,
    start: Path | None = None,
    take_up: Callable[[Path], str] | None = None,
) -> Modules:
    """Train `modules` and return copies with the weights to use: the average if `ema_halflife` is not 0.

    Every random number of a step comes from generators seeded by (seed, step). Every process draws the whole batch and
    computes its own rows. Therefore no state of a generator or sampler has to be saved, a resumed run repeats the
    uninterrupted one, and the number of processes does not change the data. The next batch is drawn while the current
    one is computed.

    Args:
        draw: returns rows of one step's global batch.
        compute_loss: returns the mean loss of these rows.
        directory: folder for `checkpoints/`; training resumes from a checkpoint found there.
        snapshots: one-based steps after which all processes call `on_snapshot(step, mean_loss, seconds of training,
            averaged modules)`. Every process has complete averaged modules; under FSDP only the main process has. The
            same applies to the returned modules.
        log: receives loss, learning rate and images per second every `REPORT_EVERY` steps, on the main process.
        start: a checkpoint of another training; this training starts from its step, weights, averages and optimizer
            states, with its own options.
        take_up: returns the overrides that make the same command start from a checkpoint, for the message about a
            diverged training.
    Raises:
        UserError: the batch does not divide over the processes, the loss is not finite or has diverged, or `start` is a
            checkpoint of other networks.
    """
    checkpoints = Checkpoints(directory / "checkpoints", options.keep_checkpoints, start)
    run = _begin(accelerator, modules, options, checkpoints, take_up)
    steps = range(run.state.step, options.steps)
    bar = progress(steps, label, initial=run.state.step, total=options.steps, unit="step")
    monitor = _Monitor(run, bar, label, snapshots, on_snapshot, log)
    for step, batch in zip(bar, _batches(draw, options, steps, accelerator), strict=True):
        torch.manual_seed(np.random.SeedSequence([options.seed, step, accelerator.process_index]).generate_state(1)[0])
        monitor.after_step(step + 1, _update(run, compute_loss, batch, options.rate(step)))
    accelerator.free_memory()
    return run.average.gather()


class _Monitor:
    """Everything that follows an optimizer step: averaging, checking of losses, logging, snapshots and checkpoints.

    Args:
        bar: the progress bar of the training.
        label, snapshots, on_snapshot, log: as in `train_loop`.
    """

    def __init__(
        self,
        run: _Run,
        bar: Any,
        label: str,
        snapshots: Sequence[int],
        on_snapshot: OnSnapshot | None,
        log: Callable[[dict[str, float], int], None] | None,
    ) -> None:
        self._run, self._bar, self._label = run, bar, label
        self._snapshots, self._on_snapshot, self._log = snapshots, on_snapshot, log
        self._losses: list[torch.Tensor] = []
        self._clock = _Clock(run.state.seconds)
        self._reported = (run.state.step, self._clock.seconds)

    def after_step(self, done: int, loss: torch.Tensor) -> None:
        """Process the result of one step.

        Args:
            done: number of finished steps.
            loss: mean loss of the step, detached.
        """
        run, options = self._run, self._run.options
        self._losses.append(loss)
        run.state.images += options.batch_size
        run.average.update(done)
        at_report, at_snapshot = done % REPORT_EVERY == 0, self._on_snapshot is not None and done in self._snapshots
        at_checkpoint = done % options.checkpoint_every == 0 or done == options.steps
        if at_report or at_snapshot or at_checkpoint:
            _judge(run, run.accelerator.reduce(torch.stack(self._losses), "mean").tolist(), done, self._label)
            self._losses.clear()
        if at_report and run.accelerator.is_main_process:
            self._report(done)
        if at_snapshot or at_checkpoint:
            _keep(run, done, self._clock, self._on_snapshot if at_snapshot else None, at_checkpoint)

    def _report(self, done: int) -> None:
        """Show the loss in the progress bar, and log it with the learning rate and the images per second."""
        loss, options = self._run.state.loss, self._run.options
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if self._log is not None:
            before, seconds = self._reported
            speed = (done - before) * options.batch_size / (self._clock.seconds - seconds)
            self._log({"loss": loss, "learning_rate": options.rate(done - 1), "images_per_second": speed}, done)
        self._reported = (done, self._clock.seconds)


def _keep(run: _Run, done: int, clock: _Clock, on_snapshot: OnSnapshot | None, checkpoint: bool) -> None:
    """Pass the averaged modules to `on_snapshot`, and write a checkpoint; neither counts as training time."""
    with clock.stopped():
        averaged = run.average.gather()
        if on_snapshot is not None:
            on_snapshot(done, run.state.loss, clock.seconds, averaged)
            run.accelerator.wait_for_everyone()  # here: the process groups of libraries have shorter time limits
        if checkpoint:
            _save(run, done, clock.seconds)
        run.average.release()


class _Clock:
    """Seconds of training, without evaluation and writing."""

    def __init__(self, seconds: float) -> None:
        self._start, self._stopped = time.perf_counter() - seconds, None

    @property
    def seconds(self) -> float:
        return (self._stopped or time.perf_counter()) - self._start

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        self._stopped = time.perf_counter()
        yield
        self._start += time.perf_counter() - self._stopped
        self._stopped = None


@dataclass
class _State:
    """Progress of the training: everything that a checkpoint needs besides tensors."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    lowest: float = math.inf

    @property
    def loss(self) -> float:
        """Mean over the last (at most 100) steps."""
        return float(np.mean(self.losses))


@dataclass(frozen=True)
class _Run:
    """A running training."""

    accelerator: Accelerator
    modules: Modules
    options: LoopOptions
    checkpoints: Checkpoints
    state: _State
    average: Average
    model: nn.Module
    optimizer: torch.optim.Optimizer
    take_up: Callable[[Path], str] | None


def _begin(
    accelerator: Accelerator,
    modules: Modules,
    options: LoopOptions,
    checkpoints: Checkpoints,
    take_up: Callable[[Path], str] | None,
) -> _Run:
    """Load the latest checkpoint, if there is one, and let Accelerate prepare the networks and the optimizer."""
    if options.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size={options.batch_size} cannot be divided among {accelerator.num_processes} processes: "
            "choose a multiple of the process count"
        )
    average = Average(modules, options.ema_halflife, options.batch_size)
    metadata = checkpoints.metadata()
    if metadata:
        _load(modules, average, checkpoints)
    for module in modules.values() if options.compile else ():
        module.compile()
    new_optimizer = partial(
        torch.optim.AdamW, lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.99), fused=True
    )
    model, optimizer = prepare(accelerator, modules, new_optimizer, options.gradient_clip)
    average.follow(modules, accelerator.device, keep=accelerator.is_main_process)
    state = _State()
    if metadata:
        load_optimizer_tensors(accelerator, model, optimizer, checkpoints.tensors("optimizer"))
        scaler = metadata.pop("scaler")
        if accelerator.scaler is not None and scaler:
            accelerator.scaler.load_state_dict(scaler)
        images = metadata.get("images", metadata["step"] * options.batch_size)
        own = checkpoints.newest() is not None  # losses of another training, which may have diverged, are not used
        lowest = metadata["lowest"] if own and metadata["lowest"] is not None else math.inf
        state = _State(metadata["step"], images, metadata["seconds"], metadata["losses"] if own else [], lowest)
    return _Run(accelerator, modules, options, checkpoints, state, average, model, optimizer, take_up)


def _load(modules: Modules, average: Average, checkpoints: Checkpoints) -> None:
    """Load the weights and their averages from the latest checkpoint.

    Raises:
        UserError: it is a checkpoint of another training with other networks.
    """
    files = {f"{name}{kind}" for name in modules for kind in ("", "_average")}
    try:
        if checkpoints.names() != {*files, "optimizer"}:
            raise OSError(f"it contains {', '.join(sorted(checkpoints.names()))}")
        for name, module in modules.items():
            module.load_state_dict(checkpoints.tensors(name))
            average.modules[name].load_state_dict(checkpoints.tensors(f"{name}_average"))
    except (RuntimeError, OSError, SafetensorError) as error:
        if checkpoints.newest() is not None:
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the checkpoint {checkpoints.start} does not fit these networks ({reason}): train with the model, "
            "metadata, autoencoder and text encoder of the run that it comes from"
        ) from error


def _batches(draw: DrawBatch, options: LoopOptions, steps: range, accelerator: Accelerator) -> Iterator[Batch]:
    """This process's rows of every step's batch, on the device; the next batch is drawn in the background."""
    local = options.batch_size // accelerator.num_processes
    rows = slice(accelerator.process_index * local, (accelerator.process_index + 1) * local)
    on_gpu = accelerator.device.type == "cuda"

    def drawn(step: int) -> Batch:
        batch = draw(np.random.default_rng([options.seed, step]), rows)
        return tuple(tensor.pin_memory() for tensor in batch) if on_gpu else batch

    # one thread only: a second OpenMP team would spin on the cores that the network uses
    with ThreadPoolExecutor(1, initializer=lambda: threadpool_limits(1, user_api="openmp")) as thread:
        following = thread.submit(drawn, steps[0]) if steps else None
        for step in steps:
            batch = following.result()
            if step + 1 < steps.stop:
                following = thread.submit(drawn, step + 1)
            yield tuple(tensor.to(accelerator.device, non_blocking=True) for tensor in batch)


def _update(run: _Run, compute_loss: ComputeLoss, batch: Batch, learning_rate: float) -> torch.Tensor:
    """Run one optimizer step on a batch, in micro-batches if requested; returns the mean loss, detached."""
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    images = len(batch[0])
    size = run.options.micro_batch or images
    total = torch.zeros((), device=batch[0].device)
    for start in range(0, images, size):
        part = batch if size >= images else tuple(tensor[start : start + size] for tensor in batch)
        accelerator.sync_gradients = start + size >= images
        with contextlib.nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
            with accelerator.autocast():
                loss = model(compute_loss, part)
            if size < images:
                loss = loss * (len(part[0]) / images)
            accelerator.backward(loss)  # DeepSpeed clips and steps in its last call; the calls below then do nothing
        total += loss.detach()
    accelerator.unscale_gradients(optimizer)  # Accelerate's clipping would also unscale those of other trainings
    nn.utils.clip_grad_norm_(model.parameters(), run.options.gradient_clip)
    optimizer.step()
    return total


def _judge(run: _Run, losses: Sequence[float], done: int, label: str) -> None:
    """Record the losses of the last steps; raise UserError if the loss is not finite or has diverged."""
    state, divergence = run.state, run.options.divergence
    state.losses = [*state.losses, *losses][-100:]
    advice = _advice(run)
    bad = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        raise UserError(f"{label}: the loss is {losses[bad]} at step {done - len(losses) + bad + 1}; {advice}")
    if divergence and len(state.losses) >= REPORT_EVERY:
        recent = float(np.mean(state.losses[-REPORT_EVERY:]))
        if recent > divergence * state.lowest:
            raise UserError(
                f"{label}: the loss has diverged to {recent:.3g} at step {done}, {recent / state.lowest:.0f} times its "
                f"lowest value ({state.lowest:.3g}); {advice}"
            )
        state.lowest = min(state.lowest, recent)


def _advice(run: _Run) -> str:
    """Advice for the user of a training that has diverged."""
    latest, change = run.checkpoints.latest(), "lower learning_rate or gradient_clip, raise warmup, or use"
    if latest is None:
        return f"there is no checkpoint yet: {change} mixed_precision=no, and run again"
    if run.take_up is None:
        return f"the last good checkpoint is {latest}: {change} mixed_precision=no, and run again"
    return (
        f"continue from the last good checkpoint with the same command and {run.take_up(latest)}, or {change} "
        "mixed_precision=no"
    )


def _save(run: _Run, done: int, seconds: float) -> None:
    """Write a checkpoint; all processes contribute their parts, and the first one writes."""
    accelerator, state = run.accelerator, run.state
    state.step, state.seconds = done, seconds
    files = network_tensors(accelerator, run.model, run.modules)
    files |= {f"{name}_average": module.state_dict() for name, module in run.average.modules.items()}
    files["optimizer"] = optimizer_tensors(accelerator, run.model, run.optimizer)
    if accelerator.is_main_process:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        lowest = None if math.isinf(state.lowest) else state.lowest  # JSON has no infinity
        run.checkpoints.save(done, files, {**asdict(state), "lowest": lowest, "scaler": scaler})
