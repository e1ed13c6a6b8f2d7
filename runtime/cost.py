"""Cost of a stage: a log with one line per finished part, and the sums next to the results."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from runtime.artefacts import read_json, write_json
from runtime.engine import Done, engine, spent

#: File names in the stage's directory: the log, with one line per finished part, and the sums.
LOG, COST = "log.jsonl", "cost.json"


class StageLog:
    """The structured log of a stage that is computed in parts.

    `log.jsonl` has one JSON object per line: time (UTC), stage, corpus, engine, worker (host and process), rows (first
    and last), images, unreadable, shards, elapsed (seconds since this run of the stage began), and the worker's
    seconds, cpu_seconds and gpu_seconds. A run that continues a killed run appends to its log.
    """

    def __init__(self, directory: Path, stage: str, corpus: str) -> None:
        self._about = {"stage": stage, "corpus": corpus, "engine": engine().name}
        self._directory, self._start = directory, time.perf_counter()
        path = directory / LOG
        cut = path.is_file() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n" if cut else "")

    def add(self, part: Done, rows: np.ndarray, unreadable: int = 0, shards: Sequence[str] = ()) -> None:
        """Log a finished part."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **self._about,
            "worker": part.worker,
            "rows": [int(rows[0]), int(rows[-1])],
            "images": len(rows),
            "unreadable": unreadable,
            "shards": list(shards),
            "elapsed": round(time.perf_counter() - self._start, 3),
            **{name: round(getattr(part, name), 4) for name in ("seconds", "cpu_seconds", "gpu_seconds")},
        }
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Write the sums over all runs of the stage to `cost.json`."""
        self._file.close()
        write_json(self._directory / COST, cost_of(logged(self._directory)))


def logged(directory: Path) -> list[dict[str, Any]]:
    """The lines of a stage's log; a line that was truncated by a kill is omitted."""
    path, result = directory / LOG, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            result.append(json.loads(line))
        except ValueError:
            continue
    return result


def cost_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of a log.

    The keys are `seconds` (wall-clock time), `cpu_seconds` and `gpu_seconds` of all workers, `images`, `workers` and
    `engine`.
    """
    seconds, before, workers, engines = 0.0, 0.0, set(), set()
    total = {"images": 0, "cpu_seconds": 0.0, "gpu_seconds": 0.0}
    for line in lines:
        seconds += line["elapsed"] - (before if line["elapsed"] >= before else 0.0)  # smaller than before: a new run
        before = line["elapsed"]
        workers.add(line["worker"])
        engines.add(line["engine"])
        for name in total:
            total[name] += line[name]
    rounded = {name: round(value, 3) for name, value in total.items()}
    return {"seconds": round(seconds, 3), **rounded, "workers": len(workers), "engine": "+".join(sorted(engines))}


def stage_cost(directory: Path) -> dict[str, Any] | None:
    """`cost_of` a finished stage; None if an earlier version built it without a log."""
    path = directory / COST
    return read_json(path) if path.is_file() else None


class Clock:
    """Timer by name: `with clock("embedding"): ...`. Times of a repeated name are added.

    Attributes:
        seconds: wall-clock seconds by name.
        cost: for each name `seconds`, `cpu_seconds` (of this process and of workers) and `gpu_seconds`.
    """

    def __init__(self) -> None:
        self.cost: dict[str, dict[str, float]] = {}

    @property
    def seconds(self) -> dict[str, float]:
        return {name: cost["seconds"] for name, cost in self.cost.items()}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, cpu, before = time.perf_counter(), time.process_time(), Counter(spent)
        yield
        result = Counter(spent)
        result.subtract(before)
        now = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu + result["cpu_seconds"],
            "gpu_seconds": float(result["gpu_seconds"]),
        }
        known = self.cost.get(name, dict.fromkeys(now, 0.0))
        self.cost[name] = {key: round(value + known[key], 3) for key, value in now.items()}
