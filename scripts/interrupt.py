"""Kill runs at random moments, resume them, and compare the results with an uninterrupted run, byte for byte.

`python scripts/interrupt.py` kills pruning runs twenty times, at any moment of indexing, scoring, embedding and
selecting. With `interrupt.what=pretrain` it kills pretraining runs, at any moment of training, evaluating and saving.
Either only the main process is killed, so that its workers are orphaned, or its whole process group.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from runtime.application import run
from runtime.artefacts import file_digest, fingerprint
from runtime.cost import LOG, logged
from runtime.errors import UserError
from runtime.progress import progress

#: Files that contain durations or times.
TIMED = ("report.html", "README.md")
#: Entries of a stage's log that depend on the moment and the process.
MOMENTARY = ("time", "worker", "elapsed")


def make_corpus(folder: Path, images: int, generator: np.random.Generator) -> None:
    """Textures of four kinds in four scenes, and one broken file per hundred."""
    for number in range(images):
        scene = folder / f"scene{number % 4}"
        scene.mkdir(parents=True, exist_ok=True)
        path = scene / f"{number:06d}.jpg"
        coarse = generator.integers(0, 256, (4 + number % 4 * 8,) * 2 + (3,), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 96)).save(path, quality=90)
        if number % 100 == 99:
            path.write_bytes(path.read_bytes()[:300])


def command(what: str, images: Path, runs: Path) -> list[str]:
    """The command of a prune of a folder, or of a small pretraining on Blue Marble."""
    options = {
        "prune": ("prune/run.py", "corpus=folder", f"corpus.root={images}", "corpus.train.split=all",
                  "encoder.input_size=64"),
        "pretrain": ("train/pretrain.py", "profile=smoke", "prune=rsprune", "train.loop.checkpoint_every=7",
                     "train.loop.steps=60", "train.snapshots=6"),
    }  # fmt: skip
    script, *rest = options[what]
    root = Path(__file__).resolve().parent.parent
    return [sys.executable, str(root / script), *rest, f"runs={runs}", f"results={runs}", "tracker=none"]


def killed_at_random(arguments: list[str], runs: Path, longest: float, generator: np.random.Generator) -> bool:
    """Start a run and kill it at a random moment of its work; False if it ended before."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not any(runs.glob("*/*.partial")):
        time.sleep(0.02)
    try:
        process.wait(generator.uniform(0, longest))
        return False
    except subprocess.TimeoutExpired:
        if generator.random() < 0.5:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def digests(runs: Path) -> dict[str, str]:
    """Digests of every file of a finished run, without times."""
    files = (path for path in runs.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {str(path.relative_to(runs)): _digest(path, runs) for path in files if path.name not in TIMED}


def _digest(path: Path, runs: Path) -> str:
    """Digest of a file; for JSON without times, and without the run's folder in paths."""
    if path.suffix not in (".json", ".jsonl"):
        return file_digest(path)
    text = path.read_text().replace(str(runs), "runs")
    if path.name == LOG:  # a chunk that was logged but not yet marked as done before a kill is logged again
        lines = (_timeless({key: line[key] for key in line if key not in MOMENTARY}) for line in logged(path.parent))
        return fingerprint(metadata=sorted({json.dumps(line) for line in lines}))
    texts = text.splitlines() if path.suffix == ".jsonl" else [text]
    return fingerprint(metadata=[_timeless(json.loads(text)) for text in texts])


def _timeless(value: Any) -> Any:
    """JSON without entries such as seconds and images_per_second, and without the config, which has the run's path."""
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if "second" not in key and key != "config"}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def fresh_runs(what: str, whole: Path, runs: Path) -> Path:
    """An empty folder; for a pretraining, a folder with all preceding stages."""
    if what == "pretrain":
        shutil.copytree(whole, runs, ignore=shutil.ignore_patterns("pretrain", ".locks"))
    return runs


def resumptions(
    what: str, folder: Path, kills: int, expected: dict[str, str], longest: float, seed: int
) -> Iterator[int]:
    """Kill until `kills` is reached, with a new run whenever one finished; yields the kills so far.

    Raises:
        UserError: the result of a killed run differs from that of the uninterrupted run.
    """
    generator, done, round_number = np.random.default_rng(seed), 0, 0
    while done < kills:
        runs = fresh_runs(what, folder / "whole", folder / f"killed{round_number}")
        arguments = command(what, folder / "images", runs)
        round_number += 1
        while done < kills and killed_at_random(arguments, runs, longest, generator):
            done += 1
            yield done
        subprocess.run(arguments, check=True, capture_output=True)
        result = digests(runs)
        if result != expected:
            names = sorted(name for name in expected.keys() | result.keys() if expected.get(name) != result.get(name))
            raise UserError(f"after kills these files differ from those of an undisturbed run: {', '.join(names[:5])}")
        shutil.rmtree(runs)


def main(cfg: DictConfig) -> None:
    options = cfg.interrupt
    what = str(options.what)
    if what not in ("prune", "pretrain"):
        raise UserError(f"interrupt.what={what} is unknown: give prune or pretrain")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder / "images", int(options.images), np.random.default_rng(cfg.seed))
        arguments = command(what, folder / "images", folder / "whole")
        start = time.perf_counter()
        subprocess.run(arguments, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        expected = digests(folder / "whole")
        longest = seconds / 2 if what == "prune" else seconds / 4
        kills = resumptions(what, folder, int(options.kills), expected, longest, int(cfg.seed))
        for done in progress(kills, "kill", total=int(options.kills)):
            print(f"killed {done} times", flush=True)
    print(f"killed {options.kills} times; every resumed run left the same {len(expected)} files as an undisturbed one")


if __name__ == "__main__":
    run(main)
