"""Work shared by all processes of a launch: each draws, embeds or encodes a part, and all get the whole result."""

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
    """The value of the first process of a launch; all processes must call this function."""
    state = _state()
    answer = torch.tensor(int(own and state.is_main_process), device=state.device)
    torch.distributed.all_reduce(answer)
    return bool(answer)


def place_in_launch() -> tuple[int, int]:
    """Number of this process and number of processes; (0, 1) in a build that only the first process runs."""
    if alone_in_launch():
        return 0, 1
    state = _state()
    return state.process_index, state.num_processes


def from_first_process(numbers: Sequence[int]) -> list[int]:
    """Whole numbers of the first process of a launch; all processes must call this with equally many numbers."""
    if alone_in_launch():
        return list(numbers)
    state = _state()
    given = torch.tensor(numbers, dtype=torch.int64, device=state.device)
    torch.distributed.broadcast(given, src=0)
    return given.tolist()


def gathered(own: np.ndarray) -> list[np.ndarray]:
    """The arrays of all processes of a launch, in order; all must call this with arrays of one shape and dtype."""
    if alone_in_launch():
        return [own]
    state = _state()
    sent = torch.from_numpy(np.ascontiguousarray(own)).to(state.device)
    parts = [torch.empty_like(sent) for _ in range(state.num_processes)]
    torch.distributed.all_gather(parts, sent)
    return [part.cpu().numpy() for part in parts]


def over_processes(function: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    """Compute `function` for rows 0..count-1 over all processes of a launch, and gather the results in row order.

    Every process must call this and gets the whole result. Process r of n computes rows r, r + n, r + 2 n ... In a
    build that only the first process runs (`runtime.artefacts.stage` without `together`), it computes all rows.

    Args:
        function: function from rows int64 [K] to an array [K, ...]; it must accept an empty array of rows.
        count: number of rows.
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
