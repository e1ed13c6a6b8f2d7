"""Stage directories: named by a fingerprint of their inputs, written under a temporary name, renamed when complete."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from runtime.provenance import ROOT, origin
from runtime.redaction import ACCESS, public
from runtime.versions import versions_of

COMPLETE = "stage.json"


def plain(value: Any) -> Any:
    """A JSON-ready copy of configs, dataclasses, paths and NumPy scalars.

    Two kinds of values that change no result are omitted: dataclass fields with the metadata {"fingerprint": False},
    and the options for how a source's files are reached. Credentials are removed from URLs (`runtime.redaction`).
    """
    omegaconf = sys.modules.get("omegaconf")  # the library works without it; where there is a config, it is imported
    if omegaconf and isinstance(value, (omegaconf.DictConfig, omegaconf.ListConfig)):
        return plain(omegaconf.OmegaConf.to_container(value, resolve=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.metadata.get("fingerprint", True)]
        return {"_class_": class_name(type(value)), **{f.name: plain(getattr(value, f.name)) for f in fields}}
    if isinstance(value, Mapping):
        left_out = ACCESS if "_target_" in value else ()
        return {str(key): plain(item) for key, item in value.items() if key not in left_out}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    return public(value) if isinstance(value, str) else value


def finite(value: Any) -> Any:
    """A copy of JSON-ready values with None in place of NaN and infinity, which JSON cannot represent."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def class_name(kind: type) -> str:
    """Module and name of a class; the same whether its module is imported or runs as the main program."""
    module, program = kind.__module__, Path(getattr(sys.modules["__main__"], "__file__", None) or ROOT).resolve()
    if module == "__main__" and program.is_relative_to(ROOT):
        module = ".".join(program.relative_to(ROOT).with_suffix("").parts)
    return f"{module}.{kind.__qualname__}"


def fingerprint(**inputs: Any) -> str:
    """16 hex digits that change when any input (config, upstream fingerprint, seed) changes."""
    text = json.dumps(plain(inputs), sort_keys=True, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stage_fingerprint(name: str, inputs: Mapping[str, Any]) -> str:
    """The fingerprint of a stage, from its inputs, the version of its code and the versions of the stages that precede
    it.

    Raises:
        LookupError: `runtime.versions` does not know the stage.
    """
    return fingerprint(inputs=inputs, versions=versions_of(name))


def provenance(directory: Path) -> dict[str, Any]:
    """`commit` and `versions` with which a stage's directory was built; "unknown" and {} if they are not recorded."""
    metadata = read_json(directory / COMPLETE) if (directory / COMPLETE).is_file() else {}
    return {"commit": metadata.get("commit", "unknown"), "versions": metadata.get("versions", {})}


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the complete old or new file. NaN and infinity are not allowed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(finite(plain(value)), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def file_digest(path: Path) -> str:
    """16 hex digits of a file's SHA-256."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def file_stamp(path: Path, content_hash: bool = False) -> str:
    """A text that changes when a file changes: from its size and modification time, or from its bytes.

    Empty if the file cannot be read.

    Args:
        content_hash: use the bytes.
    """
    try:
        if content_hash and path.is_file():  # a pipe or a device may have no end
            return file_digest(path)
        status = path.stat()
        return f"{status.st_size}-{status.st_mtime_ns}" + ("" if os.access(path, os.R_OK) else "-shut")
    except OSError:  # for example a dangling link: reading the file later gives the reason
        return ""


def is_main_process() -> bool:
    """Whether this process is the first or only one of a launch (`accelerate launch`, torchrun, MPI)."""
    return _of_launch(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"), 0) == 0


def process_count() -> int:
    """Number of processes of this launch."""
    return _of_launch(("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), 1)


def _of_launch(names: Sequence[str], alone: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), alone)


class NotBuilt(Exception):
    """A stage that does not exist was requested inside `nothing_built`.

    Attributes:
        directory: the directory that the stage would have.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(f"{directory} is not built")
        self.directory = directory


_looking = contextvars.ContextVar("looking", default=False)
_run_folder: contextvars.ContextVar[Path | None] = contextvars.ContextVar("run_folder", default=None)


def run_folder() -> Path | None:
    """The run directory of the running command, for files to keep next to its stages; None outside a command."""
    return _run_folder.get()


@contextlib.contextmanager
def running_in(folder: Path | str) -> Iterator[None]:
    """Context in which `run_folder` returns this folder."""
    token = _run_folder.set(Path(folder))
    try:
        yield
    finally:
        _run_folder.reset(token)


def may_build() -> bool:
    """Whether `stage` may build missing stages; false inside `nothing_built`."""
    return not _looking.get()


@contextlib.contextmanager
def nothing_built() -> Iterator[None]:
    """Context in which `stage` returns existing stages, and raises `NotBuilt` instead of building missing ones."""
    token = _looking.set(True)
    try:
        yield
    finally:
        _looking.reset(token)


def stage(
    runs: Path | str,
    name: str,
    inputs: Mapping[str, Any],
    build: Callable[[Path], None],
    *,
    resumable: bool = False,
    together: Callable[[bool], bool] | None = None,
    code: str | None = None,
) -> Path:
    """Run `build` once for these inputs and return `runs/<name>/<fingerprint>/`.

    `build` receives a directory to fill. The directory is called `<fingerprint>.partial` until `build` returns, so a
    directory with its final name is complete. A failed or killed stage leaves only the `.partial` directory. The next
    try empties it first, unless `resumable` is set; then `build` finds the files that the earlier try left. If two runs
    want the same stage, the second waits for the first and prints a message.

    In a launch of several processes the first one builds and the others poll for the finished directory. This needs no
    process group and has no time limit; if the first process fails, the launcher ends the others.

    Args:
        together: for a build that trains over all processes of a launch, so that all of them call it: a function that
            gives every process the answer of the first one. Without it, a late process could see the directory that
            another launch has just finished and return, while the first process waits for it in the build.
        code: name of the stage's entry in `runtime.versions`; None: `name`.
    Raises:
        LookupError: `runtime.versions` has no such entry.
        NotBuilt: the stage does not exist, inside `nothing_built`.
    """
    code = code or name
    key = stage_fingerprint(code, inputs)
    final = Path(runs) / name / key
    partial = final.with_name(key + ".partial")
    if _looking.get():
        if (final / COMPLETE).is_file():
            return final
        raise NotBuilt(final)
    main, joint = is_main_process(), together is not None and not alone_in_launch()
    if not joint and (final / COMPLETE).is_file():
        return final
    with _alone(Path(runs) / ".locks" / f"{name}-{key}.lock", final) if main else contextlib.nullcontext():
        needed = main and not (final / COMPLETE).is_file()  # another run may have finished it in the meantime
        if needed:
            if partial.exists() and not resumable:
                shutil.rmtree(partial)
            partial.mkdir(parents=True, exist_ok=True)
        if joint:
            needed = together(needed)
        if needed:
            metadata = {"stage": name, "fingerprint": key, "inputs": plain(inputs), **_code_versions(code)}
            with contextlib.nullcontext() if joint else _building_alone():
                build(partial)
        if needed and main:
            write_json(partial / COMPLETE, metadata)
            os.rename(partial, final)
    while not (final / COMPLETE).is_file():
        time.sleep(0.2)
    return final


#: Whether the first process of a launch builds a stage alone, while the others wait for the finished directory.
_alone_in_build = contextvars.ContextVar("alone_in_build", default=False)


def alone_in_launch() -> bool:
    """Whether no other process takes part in the current work; a collective operation would then never end."""
    return process_count() == 1 or _alone_in_build.get()


@contextlib.contextmanager
def _building_alone() -> Iterator[None]:
    token = _alone_in_build.set(True)
    try:
        yield
    finally:
        _alone_in_build.reset(token)


def _code_versions(code: str) -> dict[str, Any]:
    """Versions of the code that builds a stage: its own, those of the preceding stages, commit, packages and config."""
    versions = versions_of(code)
    return {"version": versions.pop(code), "after": versions, **origin()}


@contextlib.contextmanager
def _alone(path: Path, final: Path) -> Iterator[None]:
    """Hold a file lock that the system releases if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another run is computing {final}: waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
