"""A training of a few weights, alone or as the script of a launch: `tiny_loop.py DIRECTORY MICRO_BATCH`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import nn

from train.loop import LoopOptions, train_loop
from train.sharding import hidden, requested

OPTIONS = LoopOptions(steps=12, batch_size=8, learning_rate=1e-2, warmup=2, ema_halflife=8, checkpoint_every=3, seed=5)


def fit(directory: Path, options: LoopOptions = OPTIONS, dropout: float = 0.0, scale: float = 1.0) -> dict:
    """Train two small networks, one with a frozen layer; the first one's weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1))
    shift = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 1))
    shift[0].requires_grad_(False)

    def draw(random, rows):
        return (torch.from_numpy(random.standard_normal((options.batch_size, 6), dtype=np.float32))[rows],)

    def loss(modules, batch):
        drawn = modules["net"](batch[0]) + modules["shift"](batch[0])
        return scale * (drawn - batch[0].sum(1, keepdim=True)).square().mean()

    with hidden():
        accelerator = Accelerator(cpu=True)
    best = train_loop(accelerator, {"net": module, "shift": shift}, draw, loss, options, directory, label="t")
    return best["net"].state_dict()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    state = fit(folder, replace(OPTIONS, sharding=requested(), micro_batch=int(sys.argv[2])))
    if PartialState().is_main_process:
        losses = json.loads((folder / "checkpoints" / "00000012" / "state.json").read_text())["losses"]
        print(json.dumps([PartialState().num_processes, requested().kind, losses, state["0.weight"].tolist()]))
