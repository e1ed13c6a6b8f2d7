"""The one training loop: Accelerate, stateless randomness, EMA, exact resume, progress."""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits
from torch import nn

from runtime.artefacts import is_main_process, read_json, write_json
from runtime.errors import UserError
from runtime.progress import progress
from train.sharding import COPIES, Layout, Modules, Sharding, layout_of, local, whole

#: Tensors with the images of a (part of a) batch along their first dimension.
Batch = tuple[torch.Tensor, ...]
#: (randomness of this step, rows of the global batch that this process computes) -> those rows, on the CPU.
DrawBatch = Callable[[np.random.Generator, slice], Batch]
#: (modules, batch on the device) -> mean loss over the batch
ComputeLoss = Callable[[Modules, Batch], torch.Tensor]

#: Steps between two looks at the loss, which make a GPU's queue run dry.
REPORT_EVERY = 20


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast to train.

    Args:
        steps: optimiser steps.
        batch_size: images a step over all processes.
        learning_rate: peak learning rate of AdamW.
        warmup: steps of linear warm-up.
        decay: share of the steps, at the end, over which the rate falls linearly to zero.
        ema_halflife: half-life of the weight average in images; 0 keeps no average.
        gradient_clip: largest gradient norm.
        weight_decay: AdamW weight decay.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: newest ones that stay.
        micro_batch: images a forward pass of one process, gradients summed up to the batch; None: its whole share.
        divergence: stop when the loss, averaged over `REPORT_EVERY` steps, exceeds its lowest by this factor; 0: never.
        compile: compile the networks (torch.compile).
        sharding: how weights and updates lie over the processes.
        seed: of the batches and the noise.
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
    sharding: Sharding = COPIES
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a zero-based step: linear warm-up, flat, linear decay."""
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
    milestones: Sequence[int] = (),
    on_milestone: Callable[[int, float, float, Modules], None] | None = None,
    log: Callable[[dict[str, float], int], None] | None = None,
) -> Modules:
    """Train `modules` and return the weights to use: their average where `ema_halflife` is set.

    Every random number of a step comes from generators seeded by (seed, step), and every process draws the whole batch
    and computes its rows: there is no state of a generator or of a sampler to keep, a resumed run repeats the
    undisturbed one, and the world size does not change the data. The next batch is drawn while this one is computed.

    Args:
        draw: the rows of one step's global batch.
        compute_loss: its mean loss.
        directory: takes `checkpoints/`; a checkpoint found there is resumed.
        milestones: one-based steps after which `on_milestone(step, mean_loss, seconds, averaged_modules)` is called;
            the seconds are of training, without these calls.
        log: takes loss, learning rate and images a second every `REPORT_EVERY` steps.
    Raises:
        UserError: the batch does not divide over the processes, half precision meets sharding, or the loss is no longer
            finite or has run away.
    """
    _check(accelerator, options)
    checkpoints = directory / "checkpoints"
    layout, state = _set_up(accelerator, modules, options, checkpoints)
    pending: list[torch.Tensor] = []

    def settle(done: int) -> None:
        """Fetch the losses since the last time from the device, the mean over all processes, and judge them."""
        if pending:
            fetched = accelerator.reduce(torch.stack(pending), "mean").tolist()
            pending.clear()
            state.losses = (state.losses + fetched)[-100:]
            _judge(state, fetched, done, options, label, checkpoints)

    steps = range(state.step, options.steps)
    bar = progress(steps, label, initial=state.step, total=options.steps, unit="step")
    clock, reported = time.perf_counter() - state.seconds, (state.step, state.seconds)
    for step, batch in zip(bar, _batches(draw, options, steps, accelerator), strict=True):
        layout.begin(options.rate(step))
        torch.manual_seed(np.random.SeedSequence([options.seed, step, accelerator.process_index]).generate_state(1)[0])
        pending.append(_backward(layout, compute_loss, batch, options))
        layout.step()
        done = step + 1
        _update_average(layout.averaged, modules, done, options)
        at_milestone = done in milestones and on_milestone is not None
        at_checkpoint = done % options.checkpoint_every == 0 or done == options.steps
        if not (done % REPORT_EVERY == 0 or at_milestone or at_checkpoint):
            continue
        settle(done)
        spent = time.perf_counter() - clock
        if done % REPORT_EVERY == 0 and accelerator.is_main_process:
            if hasattr(bar, "set_postfix"):
                bar.set_postfix(loss=f"{state.loss:.4f}", refresh=False)
            if log is not None:
                rate = (done - reported[0]) * options.batch_size / (spent - reported[1])
                log({"loss": state.loss, "learning_rate": options.rate(step), "images_per_second": rate}, done)
            reported = (done, spent)
        if at_milestone or at_checkpoint:
            average = layout.average()
            _copy_buffers(average, modules)
            if at_milestone:
                if accelerator.is_main_process:
                    with layout.measuring():
                        on_milestone(done, state.loss, spent, average)
                accelerator.wait_for_everyone()  # here and not in a group of a library's, which has less patience
            if at_checkpoint:
                state.step, state.seconds = done, spent
                tensors = _checkpoint_tensors(modules, average, layout)
                if accelerator.is_main_process:
                    _save_checkpoint(checkpoints, state, options, tensors, accelerator.scaler)
                del tensors
            accelerator.wait_for_everyone()
            clock = time.perf_counter() - spent  # neither evaluation nor writing is training
    average = layout.average()
    _copy_buffers(average, modules)
    trained = layout.finish(modules)
    return average if options.ema_halflife else trained


@dataclass
class _State:
    """How far the training is: beside the weights, all that a checkpoint needs."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    lowest: float = math.inf

    @property
    def loss(self) -> float:
        """Mean of the last (at most 100) steps."""
        return float(np.mean(self.losses))


def _check(accelerator: Accelerator, options: LoopOptions) -> None:
    """Refuse options that do not go with the processes there are (UserError)."""
    if options.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size={options.batch_size} does not divide over {accelerator.num_processes} processes: "
            "choose a multiple of the process count"
        )


def _set_up(
    accelerator: Accelerator, modules: Modules, options: LoopOptions, checkpoints: Path
) -> tuple[Layout, _State]:
    """Load the newest checkpoint, spread or copy the networks over the processes, make the optimiser."""
    average = {name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in modules.items()}
    state = _load_weights(checkpoints, modules, average)
    for module in modules.values() if options.compile else ():
        module.compile()

    def new_optimiser(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.99), fused=True
        )

    kind, clip = layout_of(options.sharding), options.gradient_clip
    layout = kind(options.sharding, accelerator, modules, average, new_optimiser, clip)
    if state.step:
        newest = checkpoints / f"{state.step:08d}"
        layout.load_moments(load_file(newest / "optimiser.safetensors"))
        if accelerator.scaler is not None and (scaler := read_json(newest / "state.json")["scaler"]):
            accelerator.scaler.load_state_dict(scaler)
    return layout, state


def _batches(draw: DrawBatch, options: LoopOptions, steps: range, accelerator: Accelerator) -> Iterator[Batch]:
    """This process's rows of every step's batch, on the device; the next are drawn meanwhile."""
    local = options.batch_size // accelerator.num_processes
    rows = slice(accelerator.process_index * local, (accelerator.process_index + 1) * local)
    on_gpu = accelerator.device.type == "cuda"

    def drawn(step: int) -> Batch:
        batch = draw(np.random.default_rng([options.seed, step]), rows)
        return tuple(tensor.pin_memory() for tensor in batch) if on_gpu else batch

    # one thread alone: a second team of OpenMP's would spin on the cores that the network computes on
    with ThreadPoolExecutor(1, initializer=lambda: threadpool_limits(1, user_api="openmp")) as thread:
        following = thread.submit(drawn, steps[0]) if steps else None
        for step in steps:
            batch = following.result()
            if step + 1 < steps.stop:
                following = thread.submit(drawn, step + 1)
            yield tuple(tensor.to(accelerator.device, non_blocking=True) for tensor in batch)


def _backward(layout: Layout, compute_loss: ComputeLoss, batch: Batch, options: LoopOptions) -> torch.Tensor:
    """Gradients of the batch's mean loss, over parts of it if asked for; returns the loss, detached."""
    images = len(batch[0])
    size = options.micro_batch or images
    total = torch.zeros((), device=batch[0].device)
    for start in range(0, images, size):
        part = batch if size >= images else tuple(tensor[start : start + size] for tensor in batch)
        with layout.part(last=start + size >= images):
            with layout.precision():
                loss = compute_loss(layout.live, part)
            if size < images:
                loss = loss * (len(part[0]) / images)
            layout.backward(loss)
        total += loss.detach()
    return total


def _judge(
    state: _State, fetched: Sequence[float], done: int, options: LoopOptions, label: str, checkpoints: Path
) -> None:
    """Stop a training whose loss is not finite or has run away."""
    whole = _checkpoints(checkpoints)
    kept = f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
    advice = f"{kept}: lower learning_rate or gradient_clip, raise warmup, or use mixed_precision=no, and run again"
    bad = next((index for index, loss in enumerate(fetched) if not math.isfinite(loss)), None)
    if bad is not None:
        raise UserError(f"{label}: the loss is {fetched[bad]} at step {done - len(fetched) + bad + 1}; {advice}")
    if options.divergence and len(state.losses) >= REPORT_EVERY:
        recent = float(np.mean(state.losses[-REPORT_EVERY:]))
        if recent > options.divergence * state.lowest:
            raise UserError(
                f"{label}: the loss has run away to {recent:.3g} at step {done}, {recent / state.lowest:.0f} times its "
                f"lowest ({state.lowest:.3g}); {advice}"
            )
        state.lowest = min(state.lowest, recent)


@torch.no_grad()
def _update_average(
    averaged: Mapping[str, list[torch.Tensor]], modules: Modules, step: int, options: LoopOptions
) -> None:
    """Exponential moving average with a half-life that ramps with training (EDM2, Karras et al. 2024, section 3)."""
    halflife = min(options.ema_halflife, 0.1 * step * options.batch_size)
    decay = 0.5 ** (options.batch_size / max(halflife, 1e-8)) if options.ema_halflife else 0.0
    for name, module in modules.items():
        weights = [local(value) for value in module.parameters()]
        torch._foreach_lerp_([local(value) for value in averaged[name]], weights, 1 - decay)


def _copy_buffers(average: Modules, modules: Modules) -> None:
    for name, module in modules.items():
        for target, source in zip(average[name].buffers(), module.buffers(), strict=True):
            target.copy_(source)


def _checkpoint_tensors(modules: Modules, average: Modules, layout: Layout) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each file of a checkpoint, whole, in the main memory; all processes must call it.

    One is whole on the devices at a time, and the first process alone, which writes, keeps them.
    """
    keep = is_main_process()

    def kept(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        found = {}
        for key, value in tensors:
            value = whole(value)
            if keep:
                found[key] = value.detach().cpu()
        return found

    files = {name: kept(module.state_dict().items()) for name, module in modules.items()}
    files |= {f"{name}_average": dict(module.state_dict()) for name, module in average.items()}
    files["optimiser"] = kept(layout.moments())
    return files


def _save_checkpoint(
    folder: Path,
    state: _State,
    options: LoopOptions,
    files: Mapping[str, Mapping[str, torch.Tensor]],
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Write `checkpoints/<step>/` beside and rename it into place; all but the newest go."""
    beside, final = folder / f"{state.step:08d}.partial", folder / f"{state.step:08d}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(_tensors(tensors), beside / f"{name}.safetensors")
    facts = asdict(state)
    if math.isinf(state.lowest):
        facts["lowest"] = None  # JSON knows no infinity
    write_json(beside / "state.json", {**facts, "scaler": scaler.state_dict() if scaler is not None else None})
    shutil.rmtree(final, ignore_errors=True)
    os.rename(beside, final)
    whole = sorted(path for path in folder.iterdir() if path.suffix != ".partial")
    for old in set(folder.iterdir()) - set(whole[-options.keep_checkpoints :]):
        shutil.rmtree(old, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Whole ones, the newest last."""
    return sorted(path for path in folder.glob("*[0-9]") if (path / "state.json").is_file())


def _load_weights(folder: Path, modules: Modules, average: Modules) -> _State:
    """Weights and averages of the newest checkpoint, if there is one, and how far it had come."""
    found = _checkpoints(folder)
    if not found:
        return _State()
    newest = found[-1]
    for name, module in modules.items():
        module.load_state_dict(load_file(newest / f"{name}.safetensors"))
        average[name].load_state_dict(load_file(newest / f"{name}_average.safetensors"))
    facts = read_json(newest / "state.json")
    lowest = math.inf if facts["lowest"] is None else facts["lowest"]
    return _State(facts["step"], facts["seconds"], facts["losses"], lowest)


def _tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}
