"""Encode latents in the processes of launches that are forked from this process: `latent_ranks.py FOLDER`.

The libraries are imported once for all launches. Every process records the batches that it encodes in FOLDER.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tiny_networks import pictures, tiny_autoencoder

from corpus.index import Corpus
from train import latents

#: Launches: name, processes, images, the batch after which all processes are killed (None: no kill).
LAUNCHES = (
    ("ranks", 1, (1, 4, 19, 33), None),
    ("ranks", 2, (1, 4, 19, 33), None),
    ("ranks", 3, (1, 4, 19, 33), None),
    ("ranks", 4, (1, 4, 19, 33), None),
    ("resumed", 3, (33,), 4),
    ("resumed", 2, (33,), None),
)
BATCH, NOTED = 4, 3


def encode_all(folder: Path, name: str, processes: int, images: tuple[int, ...], killed_after: int | None) -> None:
    """The work of one process of a launch: encode the latents of some images, two views each."""
    torch.set_num_threads(1)
    latents.ENCODE_BATCH, latents.NOTE_EVERY = BATCH, NOTED
    autoencoder, whole, encode, calls = tiny_autoencoder(), pictures(max(images)), latents.encode_moments, [0]
    log = folder / f"{name}_{processes}_{os.environ['RANK']}.txt"

    def noting(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == killed_after:
            os._exit(3)
        with open(log, "a") as file:
            file.write(f"{len(batch)} {float(batch.double().sum())!r}\n")
        return encode(model, batch)

    latents.encode_moments = noting
    for count in images:
        manifest = pd.DataFrame({"id": map(str, range(count)), "readable": True})
        corpus = Corpus(f"made {count}", Path("made"), whole[:count], manifest, None, ())
        runs = folder / (name if name == "resumed" else f"{name}_{processes}")
        views = latents.Views(symmetries=2)
        rows = np.arange(count)
        result = latents.cached_latents(autoencoder, f"key {count}", corpus, rows, runs, views=views, half=count == 19)
        assert result.shape[:2] == (2, count)
        with open(log, "a") as file:
            file.write(f"end {count}\n")


def launch(processes: int, work: Callable[[], None]) -> list[int]:
    """Run `work` in several processes that are joined as by a launcher; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"})
            try:
                work()
                if processes > 1:
                    torch.distributed.barrier()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    for name, processes, images, killed_after in LAUNCHES:
        work = partial(encode_all, Path(sys.argv[1]), name, processes, images, killed_after)
        codes = launch(processes, work)
        assert (codes == [0] * processes) == (killed_after is None), (name, processes, codes)
