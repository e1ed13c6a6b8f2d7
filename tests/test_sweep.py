"""Sweeps (`-m`): the other cells run, every failed cell is a line on stderr, and the exit code is set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig
from PIL import Image
from tiny_run import NETWORK, tiny_overrides

from runtime.application import run
from runtime.errors import UserError
from runtime.sweep import duration

ROOT = Path(__file__).resolve().parent.parent


def main(cfg: DictConfig) -> None:
    if cfg.ratio > 1:
        raise UserError(f"ratio={cfg.ratio}\nis no fraction")
    if cfg.seed == 6:
        raise OSError(28, "No space left on device")
    if cfg.seed == 7:
        raise ValueError("nobody\nforesaw it")
    print(f"result: {cfg.prune._target_.rpartition('.')[2]} {cfg.ratio} {cfg.seed}")


def sweep(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """The exit code of the command above with these arguments."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["command.py", *arguments])
    try:
        run(main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "results", "bad", "code"),
    [
        (["ratio=0.5,1.5,0.8"], ["Random 0.5 0", "Random 0.8 0"], ["ratio=1.5: ratio=1.5 is no fraction"], 2),
        (["ratio=1.5,0.8", "seed=7,1"], ["Random 0.8 1"],
         ["ratio=1.5 seed=7: ratio=1.5 is no fraction", "ratio=1.5 seed=1: ratio=1.5 is no fraction",
          "ratio=0.8 seed=7: ValueError: nobody foresaw it (traceback: runs/failed_cells/"], 1),
        (["prune=no_such,rsprune"], ["RSPrune 0.85 0"], ["prune=no_such: Could not find"], 2),
        (["prune.no_such=1,2"], [], ["prune.no_such=1: unknown option", "prune.no_such=2: unknown option"], 2),
        (["seed=6,1"], ["Random 0.85 1"], ["seed=6: no space left on the disk of runs"], 2),
        (["ratio=1.5"], [], ["prune=random ratio=1.5: ratio=1.5 is no fraction"], 2),
    ],
)  # fmt: skip
def test_a_bad_cell_does_not_end_a_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture,
    arguments: list[str], results: list[str], bad: list[str], code: int,
) -> None:  # fmt: skip
    assert sweep(monkeypatch, tmp_path, "-m", "prune=random", *arguments) == code
    output, errors = capsys.readouterr()
    assert output.splitlines() == [f"result: {result}" for result in results]
    cells = [line for line in errors.splitlines() if line.startswith("cell ")]
    lines = [line for line in errors.splitlines() if line not in cells]
    assert len(lines) == len(bad), errors
    total = len(results) + len([line for line in bad if not any(word in line for word in ("Could not", "unknown"))])
    assert [line.split(":")[0] for line in cells] == [f"cell {n} of {total}" for n in range(1, total + 1) if total > 1]
    assert [" left" in line for line in cells] == [True] * (len(cells) - 1) + [False] * bool(cells)
    for line, start in zip(lines, bad, strict=True):
        assert line.startswith(f"error: cell {start}")


@pytest.mark.parametrize(("arguments", "code"), [(["ratio=0.5,1.5,0.8"], 2), (["ratio=0.5,0.8"], 0)])
def test_a_launcher_that_starts_processes_ends_the_same_way(tmp_path: Path, arguments: list[str], code: int) -> None:
    words = [sys.executable, __file__, "-m", "prune=random", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([*words, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert sorted(done.stdout.splitlines()) == ["result: Random 0.5 0", "result: Random 0.8 0"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: cell ")]
    assert errors == (["error: cell ratio=1.5: ratio=1.5 is no fraction"] if code else [])


def test_durations_are_rounded_to_readable_units() -> None:
    assert [duration(seconds) for seconds in (0.4, 89, 90, 600, 5400, 9000)] == [
        "0 s", "89 s", "2 min", "10 min", "1.5 h", "2.5 h",
    ]  # fmt: skip


def test_the_traceback_of_an_unforeseen_error_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert sweep(monkeypatch, tmp_path, "-m", "seed=7,1") == 1
    (path,) = (tmp_path / "runs" / "failed_cells").iterdir()
    text = path.read_text()
    assert "seed=7" in text and "Traceback" in text and "ValueError: nobody" in text


def test_a_single_run_reports_errors_without_a_cell_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert sweep(monkeypatch, tmp_path, "ratio=1.5") == 2
    assert capsys.readouterr().err == "error: ratio=1.5 is no fraction\n"
    with pytest.raises(ValueError, match="nobody"):
        sweep(monkeypatch, tmp_path, "seed=7")


def test_a_failed_cell_ends_the_sweep_of_several_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The other processes would wait for it in the next collective operation."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweep(monkeypatch, tmp_path, "-m", "ratio=1.5,0.8") == 2
    assert capsys.readouterr() == ("", "error: ratio=1.5 is no fraction\n")


def test_an_interrupt_ends_the_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(cfg: DictConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(globals(), "main", interrupted)
    assert sweep(monkeypatch, tmp_path, "-m", "seed=1,2") == 2
    assert capsys.readouterr().err.startswith("error: interrupted")


@pytest.mark.slow
def test_prune_continues_after_a_cell_with_an_invalid_ratio(repository: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for index in range(12):
        (tmp_path / "images" / "sea").mkdir(parents=True, exist_ok=True)
        image = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / "sea" / f"{index}.png")
    options = [
        "-m", "corpus=folder", "corpus.root=images", "corpus.workers=0", "corpus.train.split=all",
        "reference=folder", "reference.root=images", "encoder.input_size=32", "tracker=none", "prune=random",
        "ratio=0.5,1.5,0.75",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(repository / "prune/run.py"), *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if "error" in line] == [
        line for line in done.stderr.splitlines() if line.startswith("error: cell ratio=1.5: ")
    ]
    assert done.stderr.count("error: cell") == 1 and "Traceback" not in done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("selection: ")]) == 2


@pytest.mark.slow
def test_pretraining_continues_after_a_cell_that_diverges(repository: Path, tmp_path: Path) -> None:
    overrides = [*tiny_overrides(tmp_path), *NETWORK, "train.loop.learning_rate=1e30,1e-3"]
    done = subprocess.run(
        [sys.executable, str(repository / "train/pretrain.py"), "-m", *overrides],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "error" in line)
    assert line.startswith("error: cell train.loop.learning_rate=1e+30: pretrain random: the loss is")
    assert len([line for line in done.stdout.splitlines() if line.startswith("run: ")]) == 1


if __name__ == "__main__":
    run(main)
