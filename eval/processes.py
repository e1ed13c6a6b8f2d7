"""Work over all processes of a launch: each draws, embeds or encodes its fraction, and all get the whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch

from runtime.artefacts import alone_in_launch


def _state():
    from accelerate import PartialState

    return PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))


def first_process_decides(own: bool) -> bool:
    """What the first process of a launch says; all processes must ask."""
    state = _state()
    answer = torch.tensor(int(own and state.is_main_process), device=state.device)
    torch.distributed.all_reduce(answer)
    return bool(answer)


def place_in_launch() -> tuple[int, int]:
    """This process's number and how many take part; (0, 1) in a build of the first process alone."""
    if alone_in_launch():
        return 0, 1
    state = _state()
    return state.process_index, state.num_processes


def from_first_process(numbers: Sequence[int]) -> list[int]:
    """Whole numbers of the first process of a launch; all processes must ask, with as many numbers."""
    if alone_in_launch():
        return list(numbers)
    state = _state()
    given = torch.tensor(numbers, dtype=torch.int64, device=state.device)
    torch.distributed.broadcast(given, src=0)
    return given.tolist()


def gathered(own: np.ndarray) -> list[np.ndarray]:
    """What every process of a launch has, in the order of the processes; all must call it, with one shape and dtype."""
    if alone_in_launch():
        return [own]
    state = _state()
    sent = torch.from_numpy(np.ascontiguousarray(own)).to(state.device)
    parts = [torch.empty_like(sent) for _ in range(state.num_processes)]
    torch.distributed.all_gather(parts, sent)
    return [part.cpu().numpy() for part in parts]


def over_processes(function: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    """`function` of rows 0..count-1, computed over all processes of a launch and gathered, in the order of the rows.

    Every process must call it, and gets the whole. Process r of n computes rows r, r + n, r + 2 n ... In a build of the
    first process alone (`runtime.artefacts.stage` without `together`) that one computes all.

    Args:
        function: int64 [K] rows to an array [K, ...]; it must take no rows as well.
    """
    if alone_in_launch():
        return function(np.arange(count))
    state = _state()
    rows = np.arange(state.process_index, count, state.num_processes)
    longest = -(-count // state.num_processes)
    padded = rows if len(rows) == longest else np.append(rows, rows[-1] if len(rows) else 0)
    own = torch.from_numpy(np.ascontiguousarray(function(padded))).to(state.device)
    parts = [torch.empty_like(own) for _ in range(state.num_processes)]
    torch.distributed.all_gather(parts, own)
    # row i of the whole is row i // n of process i % n
    return torch.stack(parts, dim=1).flatten(0, 1)[:count].cpu().numpy()
