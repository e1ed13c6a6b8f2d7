"""A training of a few weights, in one process or as the script of a launch: `tiny_loop.py DIRECTORY MICRO_BATCH`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn

from train.loop import LoopOptions, Modules, OnSnapshot, train_loop

OPTIONS = LoopOptions(steps=12, batch_size=8, learning_rate=1e-2, warmup=2, ema_halflife=8, checkpoint_every=3, seed=5)


def fit(
    directory: Path, options: LoopOptions = OPTIONS, dropout: float = 0.0, on_snapshot: OnSnapshot | None = None
) -> dict[str, torch.Tensor]:
    """Train two small networks, one with a frozen layer; returns the first one's weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1))
    shift = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 1))
    shift[0].requires_grad_(False)

    def draw(random, rows):
        return (torch.from_numpy(random.standard_normal((options.batch_size, 6), dtype=np.float32))[rows],)

    def loss(modules, batch):
        drawn = modules["net"](batch[0]) + modules["shift"](batch[0])
        return (drawn - batch[0].sum(1, keepdim=True)).square().mean()

    accelerator = Accelerator(cpu=True)
    best = train_loop(
        accelerator,
        {"net": module, "shift": shift},
        draw,
        loss,
        options,
        directory,
        label="t",
        snapshots=(5, 12),
        on_snapshot=on_snapshot,
    )
    return best["net"].state_dict()


if __name__ == "__main__":
    folder, snapshots = Path(sys.argv[1]), []

    def on_snapshot(step: int, loss: float, seconds: float, modules: Modules) -> None:
        snapshots.append([step, loss, modules["net"][0].weight.tolist()])

    state = fit(folder, replace(OPTIONS, micro_batch=int(sys.argv[2])), on_snapshot=on_snapshot)
    seen = gather_object([snapshots])  # from all processes
    if PartialState().is_main_process:
        losses = json.loads((folder / "checkpoints" / "00000012" / "state.json").read_text())["losses"]
        message = {"processes": PartialState().num_processes, "kind": PartialState().distributed_type.value}
        print(json.dumps({**message, "losses": losses, "weights": state["0.weight"].tolist(), "snapshots": seen}))
