"""The training loop does not wait for data: a thread draws the next batch while the current one is computed."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from train.loop import Batch, LoopOptions, Modules, train_loop

OPTIONS = LoopOptions(steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=100, seed=5)
PATIENCE = 2.0  # s: without overlap, one of the two waits for this time in vain


def first_number(step: int) -> float:
    return float(np.float32(np.random.default_rng([OPTIONS.seed, step]).standard_normal()))


def test_the_next_batch_is_drawn_while_the_current_one_is_computed(tmp_path: Path) -> None:
    """Step k waits until batch k + 1 is being drawn, and the drawing of batch k + 1 waits for step k: both must
    overlap.

    Batches arrive in the order of the steps, each drawn once, in a thread other than the computing one.
    """
    numbers = [first_number(step) for step in range(OPTIONS.steps)]
    being_drawn: dict[int, threading.Event] = defaultdict(threading.Event)
    being_computed: dict[int, threading.Event] = defaultdict(threading.Event)
    drawn, computed, overlaps, threads = [], [], [], set()

    def draw(random: np.random.Generator, rows: slice) -> Batch:
        number = float(np.float32(random.standard_normal()))
        step = numbers.index(number)
        drawn.append(step)
        threads.add(threading.get_ident())
        being_drawn[step].set()
        if step:
            overlaps.append(being_computed[step - 1].wait(PATIENCE))
        return (torch.full((OPTIONS.batch_size, 1), number)[rows],)

    def loss(modules: Modules, batch: Batch) -> torch.Tensor:
        step = numbers.index(float(batch[0][0, 0]))
        computed.append(step)
        being_computed[step].set()
        if step + 1 < OPTIONS.steps:
            overlaps.append(being_drawn[step + 1].wait(PATIENCE))
        return modules["net"](batch[0]).square().mean()

    train_loop(Accelerator(cpu=True), {"net": nn.Linear(1, 1)}, draw, loss, OPTIONS, tmp_path, label="t")
    assert drawn == computed == list(range(OPTIONS.steps))
    assert overlaps == [True] * (2 * (OPTIONS.steps - 1))
    assert len(threads) == 1 and threading.get_ident() not in threads
