"""Records of a pretraining in its trackers: W&B, replaced by a recorder, and TensorBoard's event files."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import STEPS, tiny_config

from eval.convergence import CONVERGENCE
from runtime import tracking
from runtime.application import CONFIGS
from runtime.artefacts import read_json
from runtime.tracking import track
from train.foundation import pretrain

SPEED = {"loss", "learning_rate", "images_per_second", "model_flops_utilisation"}


class Run:
    """A run that stores the logged values."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.logged, self.artifacts = options, [], []
        self.summary, self.axes, self.finished = {}, {}, False

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values, step))

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def finish(self) -> None:
        self.finished = True

    def values(self, name: str) -> dict[int | None, Any]:
        """The values logged under a name, by step."""
        return {step: values[name] for values, step in self.logged if name in values}


class Artifact:
    def __init__(self, name: str, type: str) -> None:
        self.name, self.type, self.files = name, type, {}

    def add_file(self, path: str) -> None:
        self.files[Path(path).name] = Path(path).read_bytes()


def recorder(runs: list[Run]) -> ModuleType:
    """A module `wandb` that stores its runs in a list and sends nothing."""
    wandb = ModuleType("wandb")

    def init(**options: Any) -> Run:
        runs.append(Run(options))
        return runs[-1]

    wandb.init, wandb.Artifact, wandb.Settings = init, Artifact, SimpleNamespace
    wandb.Image = lambda path, caption: SimpleNamespace(pixels=pixels(Path(path)), caption=caption)
    wandb.Table = lambda dataframe: dataframe
    return wandb


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    result: list[Run] = []
    monkeypatch.setattr(tracking, "_failed_modes", set())
    monkeypatch.setitem(sys.modules, "wandb", recorder(result))
    return result


def pixels(path: Path | io.BytesIO) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def config(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", [f"runs={folder}/runs", *overrides])


# ---------------------------------------------------------------- one tracker


def test_files_pictures_and_numbers_are_logged_to_wandb(runs: list[Run], tmp_path: Path) -> None:
    (tmp_path / "selection.parquet").write_bytes(b"rows")
    Image.fromarray(np.full((4, 6, 3), 77, np.uint8)).save(tmp_path / "sheet.png")
    cfg = config(tmp_path, "tracker=wandb", "tracker.mode=offline", "tracker.group=mine", "tracker.project=mine_too")
    with track(cfg, "pretrain", "random-0.85") as tracker:
        tracker.artifact("selection", "0123", tmp_path / "selection.parquet")
        tracker.image("samples", tmp_path / "sheet.png", 7, caption="a desert | an ocean")
        tracker.log({"loss": 0.5, "model_flops_utilisation": 0.25}, 8)
        tracker.summary({"kid": np.float32(1.5)})
        (run,) = runs
        assert not run.finished
    assert run.finished and run.summary == {"kid": 1.5}
    expected = {"name": "pretrain-random-0.85", "job_type": "pretrain", "mode": "offline"}
    expected |= {"group": "mine", "project": "mine_too", "dir": f"{tmp_path}/runs"}
    assert expected.items() <= run.options.items() and run.options["config"]["ratio"] == 0.85
    (artifact,) = run.artifacts
    assert (artifact.type, artifact.name) == ("selection", "selection-0123")
    assert artifact.files == {"selection.parquet": b"rows"}
    assert run.values("samples")[7].caption == "a desert | an ocean" and (run.values("samples")[7].pixels == 77).all()
    assert run.logged[-1] == ({"loss": 0.5, "model_flops_utilisation": 0.25}, 8)


def test_event_files_are_written_without_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    picture = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(picture).save(tmp_path / "sheet.png")
    with track(config(tmp_path, "tracker=tensorboard"), "pretrain", "random-0.85") as tracker:
        tracker.artifact("selection", "0123", tmp_path / "sheet.png")
        tracker.table("scenes", pd.DataFrame({"scene": ["ice"]}))
        tracker.image("samples", tmp_path / "sheet.png", 7, caption="a desert")
        tracker.log({"loss": 0.5, "model_flops_utilisation": 0.25}, 8)
        tracker.log({"loss": 0.25}, 9)
        tracker.summary({"kid": 1.0})
    (folder,) = (tmp_path / "runs" / "tensorboard").glob("pretrain-random-0.85-*")
    events = read(folder)
    assert sorted(events.Tags()["scalars"]) == ["loss", "model_flops_utilisation"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(8, 0.5), (9, 0.25)]
    (event,) = events.Images("samples")
    assert event.step == 7
    np.testing.assert_array_equal(pixels(io.BytesIO(event.encoded_image_string)), picture)


@pytest.mark.parametrize("choice", ["none", "wandb"])
def test_an_interrupted_stage_still_closes_its_run(runs: list[Run], tmp_path: Path, choice: str) -> None:
    cfg = config(tmp_path, f"tracker={choice}")
    with pytest.raises(KeyboardInterrupt), track(cfg, "pretrain", "name") as tracker:
        tracker.log({"loss": 1.0}, 1)
        raise KeyboardInterrupt
    assert [run.finished for run in runs] == ([True] if choice == "wandb" else [])


def test_only_the_first_process_of_a_launch_tracks(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, "tracker=wandb", "tracker.tensorboard=true")
    monkeypatch.setenv("RANK", "1")
    with track(cfg, "pretrain", "name") as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert not runs and not (tmp_path / "runs").exists()


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("no connection\nto the server")


@pytest.mark.parametrize("online_only", [True, False])
def test_a_failed_start_of_wandb_does_not_end_the_stage(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, online_only: bool
) -> None:
    init = sys.modules["wandb"].init
    works = lambda options: online_only and options["mode"] == "offline"  # noqa: E731
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **all: init(**all) if works(all) else broken())
    with track(config(tmp_path, "tracker=wandb", "tracker.mode=online"), "prune", "name") as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.summary({"kid": 1.0})
    first, *more = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: Weights & Biases, online, failed (no connection to the server)")
    assert len(more) == (not online_only) and [run.logged for run in runs] == [[({"loss": 1.0}, 1)]] * online_only


def test_a_wandb_failure_while_logging_does_not_end_the_stage_or_tensorboard(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Run, "log", broken)
    monkeypatch.setattr(Run, "finish", broken)
    with track(config(tmp_path, "tracker=wandb", "tracker.tensorboard=true"), "prune", "name") as tracker:
        for step in range(3):
            tracker.log({"loss": 1.0}, step)
    assert capsys.readouterr().err.splitlines() == [
        "warning: Weights & Biases failed (no connection to the server): the stage goes on without it"
    ]
    (folder,) = (tmp_path / "runs" / "tensorboard").iterdir()
    assert [event.step for event in read(folder).Scalars("loss")] == [0, 1, 2]


def test_a_failed_server_is_not_contacted_again(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    requested, init = [], sys.modules["wandb"].init

    def start(**options: Any) -> Run:
        requested.append(options["mode"])
        return init(**options) if options["mode"] == "offline" else broken()

    monkeypatch.setattr(sys.modules["wandb"], "init", start)
    for stage in ("prune", "pretrain", "prune"):
        with track(config(tmp_path, "tracker=wandb", "tracker.mode=online"), stage, "name"):
            pass
    assert requested == ["online", "offline", "offline", "offline"]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_secret_reaches_a_service_or_a_log(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("SECRET_PLACE", "s3cr3t-bucket")
    cfg = config(tmp_path, "tracker=wandb", "+bucket=${oc.env:SECRET_PLACE}", "+hub_token=0123456789abcdef")
    with track(cfg, "prune", "name"):
        pass
    assert "s3cr3t" not in str(runs[0].options) and "0123456789abcdef" not in str(runs[0].options)
    assert runs[0].options["mode"] == "online"

    def refused(**_: object) -> None:
        raise RuntimeError(f"key {'0123456789' * 4} is refused")

    monkeypatch.setattr(sys.modules["wandb"], "init", refused)
    with track(cfg, "prune", "name"):
        pass
    errors = capsys.readouterr().err
    assert errors.count("key … is refused") == 2 and "0123" not in errors


def test_a_full_disk_for_event_files_does_not_end_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with track(config(tmp_path, "tracker=tensorboard"), "prune", "name") as tracker:
        monkeypatch.setattr(RecordWriter, "write", full)
        for step in range(200):
            tracker.log({"loss": 1.0}, step)
            time.sleep(0.001)  # TensorBoard writes in a thread
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: TensorBoard failed ([Errno 28] No space left on device)")


# ---------------------------------------------------------------- the real wandb and servers that fail

TRACKED = """
import sys
from hydra import compose, initialize_config_dir
from runtime.application import CONFIGS
from runtime.tracking import track
with initialize_config_dir(str(CONFIGS), version_base="1.3"):
    cfg = compose("config", ["tracker=wandb", "tracker.timeout=2", *sys.argv[1:]])
for stage in ("prune", "pretrain"):
    with track(cfg, stage, "name") as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.summary({"kid": 1.0})
print("went on")
"""
KEY = "0123456789" * 4


class Answer(BaseHTTPRequestHandler):
    """Refuses every request with a status."""

    status = 401

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b'{"errors":[{"message":"refused"}]}')

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Write no log."""


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that does not exist, accepts and never answers, or refuses with a status."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if request.param == "silent":
            listener.listen(100)  # the system accepts connections, but no process reads from them
            yield f"http://127.0.0.1:{port}"
            return
    if request.param == "absent":
        yield f"http://127.0.0.1:{port}"
        return
    handler = type("Handler", (Answer,), {"status": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{refusing.server_port}"
        refusing.shutdown()


def tracked(repository: Path, folder: Path, address: str, *overrides: str) -> subprocess.CompletedProcess:
    """Two stages with the real wandb, logged in at that server."""
    pytest.importorskip("wandb")
    variables = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    variables |= {
        "WANDB_API_KEY": KEY,
        "WANDB_BASE_URL": address,
        "WANDB_SILENT": "true",
        "PYTHONPATH": str(repository),
    }
    return subprocess.run(
        [sys.executable, "-c", TRACKED, f"runs={folder}/runs", *overrides],
        cwd=folder, capture_output=True, text=True, env=variables, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("server", ["absent", "silent", 401, 500], indirect=True)
def test_a_failing_server_gives_one_warning_and_offline_runs(repository: Path, tmp_path: Path, server: str) -> None:
    done = tracked(repository, tmp_path, server)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: Weights & Biases, online, failed (") and "wandb sync" in line and KEY not in line
    assert len(list((tmp_path / "runs" / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("server", ["absent"], indirect=True)
def test_an_unwritable_wandb_folder_does_not_end_the_stage(repository: Path, tmp_path: Path, server: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "wandb").write_text("a file where the folder should be")
    done = tracked(repository, tmp_path, server, "tracker.mode=offline")
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert all(line.startswith("warning: Weights & Biases, offline, failed (") for line in done.stderr.splitlines())


@pytest.mark.slow
def test_a_command_succeeds_if_wandb_raises(tmp_path: Path, repository: Path, tiny_folder: Path) -> None:
    code = (
        "import sys, wandb, runpy\n"
        "def init(**options): raise RuntimeError('no server')\n"
        "wandb.init, sys.argv[0] = init, 'prune/run.py'\n"
        "runpy.run_path('prune/run.py', run_name='__main__')"
    )
    options = [
        "corpus=folder", f"corpus.root={tiny_folder}", "corpus.train.split=all", "prune=random",
        "reference=folder", f"reference.root={tiny_folder}", "tracker=wandb", "tracker.mode=offline",
        f"runs={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("selection: ")
    assert [line for line in done.stderr.splitlines() if "no server" in line] == [
        "warning: Weights & Biases, offline, failed (no server): the stage goes on without it"
    ]


# ---------------------------------------------------------------- a pretraining


@dataclass(frozen=True)
class Told:
    """A finished pretraining, its cached stages, and the data that W&B and TensorBoard received."""

    directory: Path
    runs: Path
    wandb: list[Run]
    events: EventAccumulator


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder, result = tmp_path_factory.mktemp("tracked"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", recorder(result))
        directory = pretrain(tiny_config(folder, "tracker=wandb", "tracker.tensorboard=true"), "random")
    (events,) = (folder / "runs" / "tensorboard").glob("pretrain-random-0.5-*")
    return Told(directory, folder / "runs", result, read(events))


@pytest.mark.slow
def test_a_pretraining_logs_its_selection_samples_and_speed_to_wandb(given: Told) -> None:
    prune, run = given.wandb
    assert [one.options["job_type"] for one in given.wandb] == ["prune", "pretrain"] and run.finished
    assert isinstance(prune.values("scenes")[None], pd.DataFrame)

    summary = read_json(given.directory / "summary.json")
    selection = given.runs / "selection" / summary["selection"]
    (artifact,) = run.artifacts
    assert (artifact.type, artifact.name) == ("selection", f"selection-{selection.name}")
    assert artifact.files == {"selection.parquet": (selection / "selection.parquet").read_bytes()}

    sheets = run.values("samples")
    assert sorted(sheets) == [STEPS // 2, STEPS]
    for step, sheet in sheets.items():
        np.testing.assert_array_equal(sheet.pixels, pixels(given.directory / "samples" / f"step_{step:06d}.png"))
        assert "beach" in sheet.caption and " | " in sheet.caption

    (speed,) = (values for values, _ in run.logged if "images_per_second" in values)
    assert set(speed) == SPEED and all(np.isfinite(value) for value in speed.values())
    assert 0 < speed["model_flops_utilisation"] < 1 and list(run.values("learning_rate")) == [STEPS]
    assert sorted(run.values("balanced_kid_x1000_efficientnet_lite2")) == [STEPS // 2, STEPS]
    assert run.summary == summary["metrics"]


@pytest.mark.slow
def test_a_pretraining_writes_event_files_with_the_values_of_wandb(given: Told) -> None:
    lines = pd.read_json(given.directory / CONVERGENCE, lines=True).set_index("step")
    assert set(given.events.Tags()["scalars"]) == SPEED | set(lines.dropna(axis=1, how="all").columns)
    for name in given.events.Tags()["scalars"]:
        result = [(event.step, pytest.approx(event.value, rel=1e-5)) for event in given.events.Scalars(name)]
        assert [(step, values[name]) for values, step in given.wandb[1].logged if name in values] == result, name
    assert given.events.Tags()["images"] == ["samples"]
    assert [event.step for event in given.events.Images("samples")] == [STEPS // 2, STEPS]
    for event in given.events.Images("samples"):
        expected = pixels(given.directory / "samples" / f"step_{event.step:06d}.png")
        np.testing.assert_array_equal(pixels(io.BytesIO(event.encoded_image_string)), expected)
