"""`train.resume`: a run continues from another one's checkpoint, with other options or more steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tiny_run import NETWORK, STEPS, tiny_overrides

from eval.models import SNAPSHOT, SNAPSHOTS
from runtime.application import CONFIGS
from runtime.artefacts import read_json, write_json
from runtime.errors import UserError
from train.resume import Start, inherit_snapshots, start_of, take_up, training_inputs


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The training files of a run with 16 images per step, without tensors."""
    folder = tmp_path / "runs" / "pretrain" / "0123.partial"
    for step in (20, 40):
        checkpoint = folder / "checkpoints" / f"{step:08d}"
        checkpoint.mkdir(parents=True)
        write_json(checkpoint / "state.json", {"step": step, "images": 16 * step, "losses": [0.5]})
        (checkpoint / "network.safetensors").write_bytes(bytes([step]))
    (folder / "checkpoints" / "00000060.partial").mkdir()
    for step in (15, 30, 45):
        snapshot = folder / SNAPSHOTS / f"{16 * step:012d}"
        (snapshot / "unet").mkdir(parents=True)
        write_json(snapshot / SNAPSHOT, {"step": step, "images_seen": 16 * step})
    return folder


def test_start_of_accepts_a_run_its_checkpoint_folder_or_one_checkpoint(run: Path) -> None:
    newest = Start(run / "checkpoints" / "00000040", 40, 640)
    for named in (run, run / "checkpoints", run / "checkpoints" / "00000040"):
        assert start_of(config(f"train.resume={named}", "train.loop.steps=41")) == newest
    older = start_of(config(f"train.resume={run}/checkpoints/00000020"))
    assert older == Start(run / "checkpoints" / "00000020", 20, 320)
    assert older.images_seen(20, 8) == 320 and older.images_seen(25, 8) == 360
    assert start_of(config()) == Start() and Start().images_seen(25, 8) == 200


def test_paths_without_a_usable_checkpoint_are_refused(run: Path, tmp_path: Path) -> None:
    for named in (tmp_path / "no_such", tmp_path, run / SNAPSHOTS, run / "checkpoints" / "00000060.partial"):
        with pytest.raises(UserError, match="contains no checkpoint: give"):
            start_of(config(f"train.resume={named}"))
    with pytest.raises(UserError, match=r"00000040 has already 40 steps: give a larger train\.loop\.steps"):
        start_of(config(f"train.resume={run}", "train.loop.steps=40"))


def test_fingerprint_inputs_of_runs_without_resume_are_unchanged() -> None:
    inputs = training_inputs(config(), Start())
    assert set(inputs) == {"train"}
    assert set(inputs["train"]) == {
        "views", "flow_shift", "snapshots", "snapshot_every_images", "mixed_precision", "objective", "loop",
    }  # fmt: skip
    assert training_inputs(config("train.weighting=0.5"), Start())["train"]["weighting"] == 0.5


def test_the_fingerprint_includes_the_checkpoint_but_not_its_path(run: Path, tmp_path: Path) -> None:
    def of(place: Path) -> dict:
        cfg = config(f"train.resume={place}")
        return training_inputs(cfg, start_of(cfg))

    newest = of(run)
    assert set(newest) == {"train", "resume"} and newest["train"] == training_inputs(config(), Start())["train"]
    assert of(run / "checkpoints" / "00000020")["resume"] != newest["resume"]
    run.rename(tmp_path / "moved")
    assert of(tmp_path / "moved") == newest
    (tmp_path / "moved" / "checkpoints" / "00000040" / "network.safetensors").write_bytes(b"other")
    assert of(tmp_path / "moved")["resume"] != newest["resume"]


def test_snapshots_up_to_the_checkpoint_are_inherited(run: Path, tmp_path: Path) -> None:
    for _ in range(2):  # an interrupted run repeats it
        inherit_snapshots(Start(run / "checkpoints" / "00000040", 40, 640), tmp_path / "new")
        assert sorted(path.name for path in (tmp_path / "new" / SNAPSHOTS).iterdir()) == [
            "000000000240",
            "000000000480",
        ]
    inherit_snapshots(Start(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_take_up_returns_quoted_command_line_overrides() -> None:
    advice = take_up(config("train.loop.learning_rate=3"), Path("runs of/it's/00000005"))
    assert advice == """train.resume='runs of/it'"'"'s/00000005' train.loop.learning_rate=0.3"""


@pytest.mark.slow
def test_a_finished_run_can_be_trained_for_more_steps(repository: Path, tmp_path: Path) -> None:
    overrides = [*tiny_overrides(tmp_path), *NETWORK]

    def pretrained(*further: str) -> subprocess.CompletedProcess:
        call = [sys.executable, str(repository / "train/pretrain.py"), *overrides, *further]
        return subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)

    def lines(done: subprocess.CompletedProcess) -> tuple[Path, list[dict]]:
        assert done.returncode == 0, done.stderr[-3000:]
        directory = Path(done.stdout.splitlines()[-1].removeprefix("run: "))
        return directory, [json.loads(line) for line in (directory / "convergence.jsonl").read_text().splitlines()]

    first, short = lines(pretrained())
    longer = ("train.loop.steps=28", "train.loop.batch_size=2", "train.loop.learning_rate=1e-4")
    second, long = lines(pretrained(f"train.resume={first}", *longer))
    assert second != first and long[: len(short)] == short and short[-1]["step"] == STEPS
    assert [(line["step"], line["images_seen"]) for line in long[len(short) :]] == [(28, 4 * STEPS + 2 * 8)]
    summary = read_json(second / "summary.json")
    assert summary["steps"] == 28 and summary["resumed"] == {
        "checkpoint": str(first / "checkpoints" / f"{STEPS:08d}"), "step": STEPS,
    }  # fmt: skip
    done = pretrained(f"train.resume={first}", *longer, "model.unet.block_out_channels=[8,32]")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: the checkpoint ")
    assert "does not fit these networks" in done.stderr and "Traceback" not in done.stderr
