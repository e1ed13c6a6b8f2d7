"""Provenance of a result: the commit, package versions and the command's config, recorded when the result is built."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.redaction import SECRET, STORAGE, harmless_options, public

if TYPE_CHECKING:  # optional: the library works without it
    from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parent.parent
#: This project, and the packages on which results depend; their installed versions are recorded.
PACKAGES = (
    "rs-prune",
    *("torch", "torchvision", "numpy", "scipy", "pandas", "pyarrow", "numba", "scikit-learn", "faiss-cpu", "faiss-gpu"),
    *("pillow", "simplejpeg", "opencv-python", "opencv-python-headless", "rasterio", "tifffile", "datasets"),
    *("diffusers", "transformers", "tokenizers", "accelerate", "peft", "timm", "open_clip_torch", "safetensors"),
    *("torchmetrics", "torch-fidelity", "clean-fid", "basicsr"),
)

_config: Any = None


@contextlib.contextmanager
def command(cfg: DictConfig) -> Iterator[None]:
    """Context of a running command: its resolved config is recorded with every stage that it builds."""
    global _config
    before, _config = _config, resolved(cfg)
    try:
        yield
    finally:
        _config = before


def resolved(cfg: DictConfig) -> Any:
    """A config with interpolations resolved where possible, without secrets and values of environment variables."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    raw = OmegaConf.to_container(cfg, resolve=False)
    try:
        value = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # in a part that this command may not use
        return _clean(raw, raw, set())
    return _clean(raw, value, set(_from_environment(raw, value)))


def unresolved(cfg: DictConfig) -> Any:
    """A config with unresolved interpolations, without secrets."""
    from omegaconf import OmegaConf

    raw = OmegaConf.to_container(cfg, resolve=False)
    return _clean(raw, raw, set())


def _from_environment(raw: Any, value: Any) -> Iterator[str]:
    """Values of the entries that refer to an environment variable."""
    if isinstance(raw, (dict, list)):
        for key in raw if isinstance(raw, dict) else range(len(raw)):
            yield from _from_environment(raw[key], value[key])
    elif isinstance(raw, str) and "oc.env" in raw and value not in (None, ""):
        yield str(value)


def _clean(raw: Any, value: Any, hidden: set[str]) -> Any:
    """`value` without secrets. An entry that contains one of the hidden texts keeps its unresolved interpolation."""
    if isinstance(value, dict):
        kept = [key for key in value if not SECRET.search(str(key))]
        result = {key: _clean(raw[key] if isinstance(raw, dict) else raw, value[key], hidden) for key in kept}
        return {key: harmless_options(item) if key == STORAGE else item for key, item in result.items()}
    if isinstance(value, list):
        return [_clean(raw[index] if isinstance(raw, list) else raw, item, hidden) for index, item in enumerate(value)]
    interpolated = isinstance(raw, str) and "${" in raw
    kept = raw if interpolated and any(text in str(value) for text in hidden) else value
    return public(kept) if isinstance(kept, str) else kept


def origin() -> dict[str, Any]:
    """`commit`, `versions` and `config` of the current computation."""
    return {"commit": commit(), "versions": versions(), "config": _config}


@functools.cache
def commit(root: Path = ROOT) -> str:
    """The commit of a checkout, with `-dirty` if tracked files differ; "unknown" if the folder is no checkout."""
    if not (root / ".git").exists():  # otherwise git would search the parent folders
        return "unknown"
    own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # set by a git hook
    call = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run([*call, "--abbrev=12"], capture_output=True, text=True, timeout=30, env=own)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages; imports none of them."""
    result = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            result[name] = metadata.version(name)
    return result
