"""The log of a stage, its sums, and the plan of a pruning."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from corpus.index import CHUNK
from prune.planning import plan_lines
from prune.selection import select
from runtime.application import CONFIGS
from runtime.cost import COST, LOG, Clock, StageLog, cost_of, logged
from runtime.engine import Done, spent


def line(worker: str, elapsed: float, images: int, cpu: float) -> dict:
    return {"worker": worker, "engine": "local", "elapsed": elapsed, "images": images, "cpu_seconds": cpu} | {
        "gpu_seconds": 0.5
    }


def test_costs_are_summed_over_all_runs_of_a_stage() -> None:
    first = [line("a:1", 2.0, 10, 1.5), line("a:2", 3.0, 10, 2.5)]
    second = [line("a:3", 1.0, 5, 0.25), line("a:3", 4.0, 5, 0.25) | {"engine": "ray"}]
    assert cost_of([*first, *second]) == {
        "seconds": 7.0, "images": 30, "cpu_seconds": 4.5, "gpu_seconds": 2.0, "workers": 3, "engine": "local+ray",
    }  # fmt: skip
    assert cost_of([])["seconds"] == 0


def test_a_log_continues_after_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    log = StageLog(tmp_path, "corpus", "tiles (train)")
    log.add(Done(None, "host:7", 1.25, 0.5), np.array([0, 1, 4]), 1, ["a.tar", "b.tar"])
    with (tmp_path / LOG).open("a") as file:
        file.write('{"stage": "cor')
    [result] = logged(tmp_path)
    assert result["rows"] == [0, 4] and result["images"] == 3 and result["unreadable"] == 1
    assert (
        result["shards"] == ["a.tar", "b.tar"] and result["worker"] == "host:7" and result["corpus"] == "tiles (train)"
    )
    again = StageLog(tmp_path, "corpus", "tiles (train)")
    again.add(Done(None, "host:8", 1.0, 0.25), np.array([5]))
    again.close()
    assert [part["rows"] for part in logged(tmp_path)] == [[0, 4], [5, 5]]
    assert json.loads((tmp_path / COST).read_text())["cpu_seconds"] == 0.75


def test_a_clock_distinguishes_cpu_time_from_waiting() -> None:
    clock = Clock()
    with clock("wait"):
        time.sleep(0.3)
    end = time.process_time() + 0.3
    with clock("work"):
        while time.process_time() < end:
            pass
    with clock("workers"):
        spent["cpu_seconds"] += 2.0
    assert clock.cost["wait"]["seconds"] >= 0.3 and clock.cost["wait"]["cpu_seconds"] < 0.2
    assert clock.cost["work"]["cpu_seconds"] >= 0.29
    assert clock.cost["workers"]["cpu_seconds"] == pytest.approx(2, abs=0.1)
    assert clock.seconds["wait"] == clock.cost["wait"]["seconds"]


def configured(root: Path, runs: Path, *more: str):
    own = ("corpus=folder", f"corpus.root={root}", f"runs={runs}", "corpus.train.resolution=16", "tracker=none")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", [*own, "corpus.train.split=all", "encoder.input_size=32", "prune=random", *more])


def states(lines: list[str]) -> list[str]:
    return [" ".join(part.split()) for part in lines[1:3]]


def test_a_plan_counts_finished_work_and_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, runs, generator = tmp_path / "data", tmp_path / "runs", np.random.default_rng(0)
    root.mkdir()
    for number in range(2 * CHUNK + 8):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / f"{number}.png")
    cfg = configured(root, runs, "ratio=0.75")
    lines = plan_lines(cfg, "random")
    assert states(lines) == [
        "index, entropy and embedding of the corpus 520 520 to do not known",
        "select by random 520 520 to do not known",
    ]
    assert "kept: 130 of 520 images" in lines and not runs.exists()

    calls = []
    before = StageLog.add
    with monkeypatch.context() as patched:

        def stop(*arguments) -> None:
            if calls:
                raise KeyboardInterrupt
            calls.append(before(*arguments))

        patched.setattr(StageLog, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            select(cfg, "random")
    assert states(plan_lines(cfg, "random"))[0].startswith(
        "index, entropy and embedding of the corpus 520 264 begun: 256 images"
    )
    select(cfg, "random")
    result = states(plan_lines(cfg, "random"))
    assert [part.split()[-2:] for part in result] == [["0", "done"], ["0", "done"]]
    other = plan_lines(configured(root, runs, "corpus.train.resolution=24"), "random")
    assert "about" in other[1], "what an image took before is what it may take again"
