"""The one training loop: Accelerate, stateless randomness, EMA, exact resume, progress."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from corpus.artefacts import read_json, write_json
from corpus.errors import UserError
from corpus.progress import progress

Modules = Mapping[str, nn.Module]
#: (modules, randomness of this step, rows of the global batch that this process computes) -> mean loss
ComputeLoss = Callable[[Modules, np.random.Generator, slice], torch.Tensor]


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
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a zero-based step: linear warm-up, flat, linear decay."""
        rise = (step + 1) / max(1, self.warmup)
        fall = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, rise, fall)


def train_loop(
    accelerator: Accelerator,
    modules: Modules,
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

    Every random number of a step comes from a generator seeded by (seed, step), and every process draws the whole
    batch and computes its rows: a resumed run repeats the undisturbed one, and the world size does not change the data.

    Args:
        compute_loss: mean loss of this process's rows of the global batch.
        directory: takes `checkpoints/`; a checkpoint found there is resumed.
        milestones: one-based steps after which `on_milestone(step, mean_loss, seconds, averaged_modules)` is called.
    Raises:
        UserError: the batch does not divide over the processes, or the loss is no longer finite.
    """
    if options.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size={options.batch_size} does not divide over {accelerator.num_processes} processes: "
            "choose a multiple of the process count"
        )
    local = options.batch_size // accelerator.num_processes
    rows = slice(accelerator.process_index * local, (accelerator.process_index + 1) * local)

    average = {name: _copy(module).to(accelerator.device) for name, module in modules.items()}
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.99), fused=True
    )
    checkpoints = directory / "checkpoints"
    start, seconds, losses = _load_checkpoint(checkpoints, modules, average, optimiser)
    names = list(modules)
    *prepared, optimiser = accelerator.prepare(*modules.values(), optimiser)
    live = dict(zip(names, prepared, strict=True))
    clock = time.perf_counter() - seconds
    bar = progress(range(start, options.steps), label, initial=start, total=options.steps, unit="step")
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = options.rate(step)
        loss = compute_loss(live, np.random.default_rng([options.seed, step]), rows)
        optimiser.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, options.gradient_clip)
        optimiser.step()
        _update_average(average, modules, step + 1, options)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise UserError(
                f"{label}: the loss is {losses[-1]} at step {step + 1}; the last good checkpoint is in {checkpoints}: "
                "lower learning_rate or gradient_clip and run again"
            )
        done = step + 1
        losses = losses[-100:]
        if done % 20 == 0:
            recent = float(np.mean(losses))
            if hasattr(bar, "set_postfix"):
                bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
            if log is not None and accelerator.is_main_process:
                log({"loss": recent, "learning_rate": options.rate(step)}, done)
        if done in milestones and on_milestone is not None and accelerator.is_main_process:
            on_milestone(done, float(np.mean(losses)), time.perf_counter() - clock, average)
        if (done % options.checkpoint_every == 0 or done == options.steps) and accelerator.is_main_process:
            spent = time.perf_counter() - clock
            _save_checkpoint(checkpoints, done, spent, losses, modules, average, optimiser)
        accelerator.wait_for_everyone()
    return average if options.ema_halflife else modules


def _copy(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def _update_average(average: Modules, modules: Modules, step: int, options: LoopOptions) -> None:
    """Exponential moving average with a half-life that ramps with training (EDM2, Karras et al. 2024, section 3)."""
    halflife = min(options.ema_halflife, 0.1 * step * options.batch_size)
    decay = 0.5 ** (options.batch_size / max(halflife, 1e-8)) if options.ema_halflife else 0.0
    for name, module in modules.items():
        torch._foreach_lerp_(list(average[name].parameters()), list(module.parameters()), 1 - decay)
        for target, source in zip(average[name].buffers(), module.buffers(), strict=True):
            target.copy_(source)


def _save_checkpoint(
    folder: Path,
    step: int,
    seconds: float,
    losses: list[float],
    modules: Modules,
    average: Modules,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write `checkpoints/<step>/` beside and rename it into place; older ones go."""
    partial, final = folder / f"{step:08d}.partial", folder / f"{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, module in modules.items():
        save_file(_tensors(module.state_dict()), partial / f"{name}.safetensors")
        save_file(_tensors(average[name].state_dict()), partial / f"{name}_average.safetensors")
    state = optimiser.state_dict()["state"]
    flat = {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}
    save_file(_tensors(flat), partial / "optimiser.safetensors")
    write_json(partial / "state.json", {"step": step, "seconds": seconds, "losses": losses})
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    for old in folder.iterdir():
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def _load_checkpoint(
    folder: Path, modules: Modules, average: Modules, optimiser: torch.optim.Optimizer
) -> tuple[int, float, list[float]]:
    found = sorted(path for path in folder.glob("*[0-9]") if (path / "state.json").is_file())
    if not found:
        return 0, 0.0, []
    newest = found[-1]
    for name, module in modules.items():
        module.load_state_dict(load_file(newest / f"{name}.safetensors"))
        average[name].load_state_dict(load_file(newest / f"{name}_average.safetensors"))
    whole = optimiser.state_dict()
    whole["state"] = {}
    for key, value in load_file(newest / "optimiser.safetensors").items():
        index, field = key.split(".", 1)
        whole["state"].setdefault(int(index), {})[field] = value
    optimiser.load_state_dict(whole)
    state = read_json(newest / "state.json")
    return state["step"], state["seconds"], state["losses"]


def _tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}
