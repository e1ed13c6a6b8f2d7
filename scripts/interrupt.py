"""Kill a prune at random moments, let it go on, and compare what it leaves with an undisturbed run, byte for byte.

`python scripts/interrupt.py` kills twenty times, at any moment of indexing, scoring, embedding and selecting; now the
process alone, so that its workers are orphans, now its whole group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from corpus.application import run
from corpus.artefacts import file_digest
from corpus.errors import UserError
from corpus.progress import progress

#: Files that tell how long something took, or when: they may differ.
TIMED = ("summary.json", "report.html")


def make_corpus(folder: Path, images: int, generator: np.random.Generator) -> None:
    """Textures of four kinds in four scenes, and a broken file in every hundred."""
    for number in range(images):
        scene = folder / f"scene{number % 4}"
        scene.mkdir(parents=True, exist_ok=True)
        path = scene / f"{number:06d}.jpg"
        coarse = generator.integers(0, 256, (4 + number % 4 * 8,) * 2 + (3,), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 96)).save(path, quality=90)
        if number % 100 == 99:
            path.write_bytes(path.read_bytes()[:300])


def command(folder: Path, runs: Path) -> list[str]:
    script = Path(__file__).resolve().parent.parent / "prune" / "run.py"
    options = ("corpus=folder", f"corpus.root={folder}", "corpus.train.split=all", "encoder.input_size=64")
    return [sys.executable, str(script), *options, f"runs={runs}", f"results={runs}", "tracker=none"]


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
    """Of every file that a finished run leaves, but for those that tell the time."""
    files = (path for path in runs.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {str(path.relative_to(runs)): file_digest(path) for path in files if path.name not in TIMED}


def resumptions(folder: Path, kills: int, expected: dict[str, str], longest: float, seed: int) -> Iterator[int]:
    """Kill until `kills` is reached, starting anew whenever a run got to its end; yields the kills so far.

    Raises:
        UserError: a run that had been killed left something else than the undisturbed one.
    """
    generator, done, round_number = np.random.default_rng(seed), 0, 0
    while done < kills:
        runs = folder / f"killed{round_number}"
        round_number += 1
        while done < kills and killed_at_random(command(folder / "images", runs), runs, longest, generator):
            done += 1
            yield done
        subprocess.run(command(folder / "images", runs), check=True, capture_output=True)
        found = digests(runs)
        if found != expected:
            names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise UserError(f"after kills these differ from an undisturbed run: {', '.join(names[:5])}")


def main(cfg: DictConfig) -> None:
    options = cfg.interrupt
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder / "images", int(options.images), np.random.default_rng(cfg.seed))
        start = time.perf_counter()
        subprocess.run(command(folder / "images", folder / "whole"), check=True, capture_output=True)
        seconds = time.perf_counter() - start
        expected = digests(folder / "whole")
        kills = resumptions(folder, int(options.kills), expected, seconds / 2, int(cfg.seed))
        for done in progress(kills, "kill", total=int(options.kills)):
            print(f"killed {done} times", flush=True)
    print(f"killed {options.kills} times; every resumed run left the same {len(expected)} files as an undisturbed one")


if __name__ == "__main__":
    run(main)
