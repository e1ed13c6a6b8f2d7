"""Set-up that every entry point shares: Hydra, one-line errors with exit code 2, quiet libraries, process settings."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import errno
import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.quiet import silence_libraries

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from runtime.sweep import Cells

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3), in malloc.h
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def prepare_process() -> None:
    """Set up the process: flush denormals to zero, keep freed memory, silence libraries.

    With denormals, some networks ran 2-9 times slower.
    """
    keep_freed_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # otherwise it reports every attempt to reach the hub
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach this function instead of being printed by Hydra
    silence_libraries()
    import torch

    torch.set_flush_denormal(True)
    for name in ("diffusers", "transformers"):  # an entry point that needs them has imported them by now
        if name in sys.modules:
            sys.modules[name].utils.logging.set_verbosity_error()
            sys.modules[name].utils.logging.disable_progress_bar()


def keep_freed_memory() -> None:
    """Let glibc's allocator reuse freed memory instead of returning it to the system; no effect with other C libraries.

    Networks allocate large arrays at every layer: getting fresh, zeroed pages from the system cost a third of a forward
    pass.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL("libc.so.6")
            library.mallopt(_MMAP_THRESHOLD, 2**30)
            library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def run(main: Callable) -> None:
    """Run a Hydra main function: user errors end in one line on stderr and exit code 2."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from runtime.command_line import is_sweep, quote_paths, refuse_unknown
    from runtime.errors import UserError
    from runtime.launch import check_launch, start_the_others
    from runtime.sweep import Cells

    cells = Cells()
    sys.excepthook = _print_unforeseen

    @functools.wraps(main)
    def guarded(cfg: DictConfig) -> None:
        _run_cell(main, cfg, cells)

    try:
        start_the_others()
        check_launch()
        prepare_process()
        sys.argv[1:] = quote_paths(sys.argv[1:], is_sweep(sys.argv[1:]))
        refuse_unknown(sys.argv[1:])
        with cells.survived(explained):
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(guarded)()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_one_line(error))
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted: run the same command again to go on")
    if cells.exit_code:
        sys.exit(cells.exit_code)


def _run_cell(main: Callable, cfg: DictConfig, cells: Cells) -> None:
    """Run `main` with one composed configuration, and report its errors as `cells` requires."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from runtime.artefacts import is_main_process, running_in
    from runtime.engine import using
    from runtime.launch import join_tasks
    from runtime.provenance import command
    from runtime.ranges import check_overrides, check_seed
    from runtime.redaction import hide, secret_values

    hide(secret_values(OmegaConf.to_container(cfg, resolve=False)))
    if cells.elsewhere():  # a launcher's process has not run the set-up of `run`
        join_tasks()
        prepare_process()
    with cells.counted():
        try:
            quiet = contextlib.nullcontext() if is_main_process() else contextlib.redirect_stdout(io.StringIO())
            with quiet, command(cfg), running_in(cfg.runs), using(instantiate(cfg.engine)):
                check_overrides(cfg, _set_keys(), _defaults)
                check_seed(cfg.seed)
                main(cfg)  # with several processes, only the first one prints the result
        except Exception as error:  # caught inside, otherwise Hydra prints its own report first
            _report(error, cfg.runs, cells)


def _set_keys() -> list[str]:
    """Keys of the options that the command line sets, without those of paths."""
    from hydra.core.hydra_config import HydraConfig

    from runtime.command_line import is_path

    keys = (override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task)
    return [key for key in keys if not is_path(key) and not set("~@/") & set(key)]


def _report(error: Exception, runs: str, cells: Cells) -> None:
    """Report the error of a cell: in one line if the user can fix it. Ends the process or raises where it must."""
    from runtime.artefacts import process_count

    message = explained(error, runs)
    if cells.outlives() or cells.elsewhere():
        cells.unforeseen(error, runs) if message is None else cells.foreseen(message)
    if cells.elsewhere():
        if process_count() > 1:  # other processes of this cell may wait for it in a collective operation
            sys.exit(cells.exit_code)
        raise error  # the launcher keeps it until all cells are done
    if not cells.outlives():
        if message is None:
            raise error
        _fail(message)


def explained(error: Exception, runs: str) -> str | None:
    """One line for an error that the user can fix; None for any other error."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from runtime.errors import UserError
    from runtime.redaction import redacted

    if isinstance(error, UserError):
        return redacted(str(error))
    if isinstance(error, (OmegaConfBaseException, HydraException)):
        return redacted(_one_line(error))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk of {runs}: free some and run the same command again"
    return None


def changed_config(*overrides: str) -> DictConfig:
    """The running command's config with further overrides, for example another method, ratio or seed."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    own = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return compose("config", overrides=[*own, *overrides])


def changed_options(cfg: DictConfig) -> dict[str, Any]:
    """The options of a config that differ from configs/, by their dotted keys; of folders only the names.

    Options that change no result are omitted: where a run writes, how it is tracked, which experiment it belongs to,
    and how files behind URLs are reached.
    """
    from runtime.redaction import ACCESS

    own, defaults = (_leaves(config) for config in (cfg, _defaults()))
    changed = {key: value for key, value in own.items() if key not in defaults or defaults[key] != value}
    ignored = ("runs", "results", "tracker", "experiment", "profile", "hydra", "copy_to", "storage")
    return {
        key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in sorted(changed.items())
        if key.split(".")[0] not in ignored and not (key.startswith("corpus.") and set(key.split(".")) & set(ACCESS))
    }


@functools.cache
def _defaults() -> DictConfig:
    """The config without any override; works whether Hydra is already running or not."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():
        return compose("config")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config")


def _leaves(cfg: DictConfig) -> dict[str, Any]:
    """Options by their dotted keys, with unresolved interpolations and without secrets."""
    from runtime.provenance import unresolved

    result: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            result[prefix] = value

    visit("", unresolved(cfg))
    return result


def _one_line(error: Exception) -> str:
    """Shorten the long messages of Hydra and OmegaConf to the message and, for a missing option, the choices."""
    from runtime.errors import UserError

    cause = error
    while isinstance(cause.__cause__, Exception) and "error" in str(error).lower()[:8]:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    message = lines[0].removeprefix("In 'config': ") if lines else type(error).__name__
    if "Available options" in str(cause):
        start = next(index for index, line in enumerate(lines) if "Available options" in line)
        options = [line for line in lines[start + 1 :] if ":" not in line]
        message = message.rstrip(".") + ". Choose one of: " + ", ".join(options) + "."
    if "not in struct" in str(cause) or "Could not override" in message:
        message = message.replace("Could not override", "unknown option") + _similar_keys(message)
    if missing := re.search(r"Error locating target '([\w.]+)'", str(error)):
        message = f"_target_ {missing[1]} cannot be imported: give module and class"
    where = re.search(r"^full_key: (\S+)", str(error), re.MULTILINE)
    if where is None or isinstance(cause, UserError):
        return message
    return f"{_source_of(where[1])}: {message}{_fields_of(error, message)}"


def _similar_keys(message: str) -> str:
    """Options that are spelt like the one of a message, and the folder that lists all of its kind."""
    named = re.search(r"'([\w.]+)'", message)
    key = named[1] if named else ""
    folder = key.partition(".")[0]
    place = f"configs/{folder}/" if (CONFIGS / folder).is_dir() and folder else "configs/"
    similar = difflib.get_close_matches(key, _leaves(_defaults()), n=3, cutoff=0.75)
    return (f" Did you mean {' or '.join(similar)}?" if similar else "") + f" See {place} for the keys."


def _source_of(key: str) -> str:
    """Where the object of a key is configured: `prune=rsprune (configs/prune/rsprune.yaml)`."""
    from hydra.core.hydra_config import HydraConfig

    choice = HydraConfig.get().runtime.choices.get(key) if HydraConfig.initialized() else None
    return f"{key}={choice} (configs/{key}/{choice}.yaml)" if choice else key


def _fields_of(error: Exception, message: str) -> str:
    """The fields of the class of an instantiation that was given another one; "" for other errors."""
    target = re.search(r"'([\w.]+)'", str(error))
    if "unexpected keyword argument" not in message or target is None:
        return ""
    module, _, name = target[1].rpartition(".")
    known = getattr(sys.modules.get(module), name, None)
    names = [field.name for field in dataclasses.fields(known)] if dataclasses.is_dataclass(known) else []
    return f"; its fields are {', '.join(names)}" if names else ""


def _fail(message: str) -> None:
    from runtime.redaction import redacted

    print(f"error: {redacted(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)


def _print_unforeseen(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print Python's own report of an unforeseen error, without credentials."""
    from runtime.redaction import redacted

    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
