"""Stage directories: cached, complete or absent, resumable on request; fingerprints; JSON written atomically."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from runtime.artefacts import COMPLETE, file_digest, fingerprint, read_json, stage, stage_fingerprint, write_json

KILLED_BUILD = """
import os, signal, sys
from runtime.artefacts import stage

def build(directory):
    (directory / "first.txt").write_text("kept")
    os.kill(os.getpid(), signal.SIGKILL)

stage(sys.argv[1], "bench", {"seed": 1}, build)
"""

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-99, 99)
    | st.floats(allow_nan=False, allow_subnormal=False)  # flushed to zero in this process
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@dataclass(frozen=True)
class Options:
    rate: float = 0.1
    steps: int = 3


@dataclass(frozen=True)
class OtherOptions:
    rate: float = 0.1
    steps: int = 3


def reverse(value):
    """The same value with every dictionary's keys in the opposite order."""
    if isinstance(value, dict):
        return {key: reverse(item) for key, item in reversed(value.items())}
    return [reverse(item) for item in value] if isinstance(value, list) else value


def test_stage_builds_once_and_is_then_a_cache_hit(tmp_path: Path) -> None:
    calls = []

    def build(directory: Path) -> None:
        calls.append(directory.name)
        (directory / "out.txt").write_text("result", encoding="utf-8")

    first = stage(tmp_path, "bench", {"seed": 1}, build)
    assert stage(tmp_path, "bench", {"seed": 1}, build) == first
    assert calls == [first.name + ".partial"]
    assert first == tmp_path / "bench" / stage_fingerprint("bench", {"seed": 1})
    assert (first / "out.txt").read_text(encoding="utf-8") == "result"
    assert read_json(first / COMPLETE)["inputs"] == {"seed": 1}
    assert stage(tmp_path, "bench", {"seed": 2}, build) != first
    assert len(calls) == 2


@pytest.mark.parametrize("resumable", [False, True])
def test_failed_build_leaves_no_final_directory(tmp_path: Path, resumable: bool) -> None:
    def fail(directory: Path) -> None:
        (directory / "first.txt").write_text("kept", encoding="utf-8")
        raise RuntimeError("half-way")

    result = []

    def build(directory: Path) -> None:
        result.extend(path.name for path in directory.iterdir())

    with pytest.raises(RuntimeError, match="half-way"):
        stage(tmp_path, "bench", {"seed": 1}, fail, resumable=resumable)
    assert not (tmp_path / "bench" / stage_fingerprint("bench", {"seed": 1})).exists()
    final = stage(tmp_path, "bench", {"seed": 1}, build, resumable=resumable)
    assert result == (["first.txt"] if resumable else [])
    assert [path.name for path in final.parent.iterdir()] == [final.name]


@pytest.mark.parametrize("resumable", [False, True])
def test_killed_build_is_built_again(tmp_path: Path, repository: Path, resumable: bool) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_BUILD, str(tmp_path)], cwd=repository, check=False)
    assert killed.returncode == -signal.SIGKILL
    final = tmp_path / "bench" / stage_fingerprint("bench", {"seed": 1})
    assert not final.exists()
    assert (final.with_name(final.name + ".partial") / "first.txt").exists()
    stage(tmp_path, "bench", {"seed": 1}, lambda directory: None, resumable=resumable)
    assert (final / COMPLETE).is_file()
    assert (final / "first.txt").exists() == resumable


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4))
def test_fingerprint_ignores_the_order_of_keys(value: dict) -> None:
    assert fingerprint(inputs=value) == fingerprint(inputs=reverse(value))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(VALUES, VALUES)
def test_fingerprint_changes_with_the_value(first, second) -> None:
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (fingerprint(inputs=first) == fingerprint(inputs=second)) == same


def test_fingerprint_depends_on_every_kind_of_input() -> None:
    distinct = [
        fingerprint(options=Options()),
        fingerprint(options=Options(steps=4)),
        fingerprint(options=OtherOptions()),
        fingerprint(options=Options(), seed=0),
        fingerprint(options=Options(), seed=1),
        fingerprint(other=Options()),
        fingerprint(options={"rate": 0.1, "steps": 3}),
    ]
    assert len(set(distinct)) == len(distinct)
    assert fingerprint(x=np.float64(0.5), y=np.int64(3)) == fingerprint(x=0.5, y=3)
    assert fingerprint(x=OmegaConf.create({"a": 1, "b": "${.a}"})) == fingerprint(x={"b": 1, "a": 1})
    assert fingerprint(x=Path("a/b")) == fingerprint(x="a/b")
    assert len(distinct[0]) == 16 and int(distinct[0], 16) >= 0


def test_readers_never_see_a_partly_written_json_file(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    write_json(path, {"round": 0, "filler": "x" * 100_000})
    seen, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(read_json(path)["round"])  # raises on a truncated file

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 100):
        write_json(path, {"round": number, "filler": "x" * 100_000})
    stop.set()
    reader.join()
    assert seen == sorted(seen)
    assert seen, "the reader read at least once"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metadata.json"]


def test_write_json_keeps_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metadata.json"
    write_json(path, {"value": np.int32(1), "where": Path("a")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"value": 1, "where": "a"}
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert read_json(path)["value"] == 1

    def refuse(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"value": 2})
    assert read_json(path)["value"] == 1


def test_file_digest_changes_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    assert file_digest(path) == "ba7816bf8f01cfea"  # SHA-256 of "abc", FIPS 180-2, appendix B.1
    path.write_bytes(b"abd")
    assert file_digest(path) != "ba7816bf8f01cfea"
