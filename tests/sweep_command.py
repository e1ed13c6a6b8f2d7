"""A command whose cells end in every possible way, depending on `seed`."""

from __future__ import annotations

import os

from omegaconf import DictConfig

from runtime.application import run
from runtime.artefacts import process_count
from runtime.errors import UserError


def main(cfg: DictConfig) -> None:
    import torch

    if cfg.seed == 6:
        raise UserError("seed=6 is no good")
    if cfg.seed == 7:
        raise ValueError("nobody foresaw it")
    if cfg.seed == 8:
        os._exit(9)  # like a kill by the system when memory is exhausted
    total = torch.tensor(1)
    if process_count() > 1:
        from accelerate import Accelerator

        state = Accelerator(cpu=True)
        total += state.process_index
        torch.distributed.all_reduce(total)
        state.wait_for_everyone()
    with open(os.path.join(cfg.runs, f"done_{cfg.seed}_{os.environ.get('RANK', '0')}"), "w") as file:
        file.write(f"processes {process_count()} sum {int(total)} threads {torch.get_num_threads()}")
    print(f"result: {cfg.seed}")


if __name__ == "__main__":
    run(main)
