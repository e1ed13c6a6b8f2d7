"""Quote paths on a command line for Hydra's grammar, so that users need only the shell's own quoting.

Hydra reads `key=value` with a grammar in which `=`, commas, brackets, quotes, `#` and other characters have a meaning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from runtime.errors import UserError

#: Keys of the config that hold a path, whole, or by their last part (`corpus.root`, `corpus.val.root`, `encoder.path`).
PATH_KEYS = (
    *("runs", "results", "foundation", "selection", "of", "in", "mask", "run", "copy_to"),
    *("arrive.after", "demo.super_resolution", "demo.semantic_synthesis"),
)
PATH_NAMES = ("root", "path", "folder", "dir", "masks", "urls", "out", "pretrained", "resume")
#: Key of shards: commas in its brace lists do not separate the cells of a sweep; several values are joined by `::`.
SHARDS = "urls"

_OVERRIDE = re.compile(r"(\+{0,2}[A-Za-z_][\w./@-]*)=(.*)", re.DOTALL)
_QUOTED = re.compile(r"""\s*(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')\s*""", re.DOTALL)
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")  # the escapes of Hydra's grammar
_SWEEP = re.compile(r"(?:choice|glob|range|interval|shuffle|sort|tag)\s*\(.*\)", re.DOTALL)


def is_path(key: str) -> bool:
    """Whether an override's key, such as `corpus.root` or `+out`, holds a path."""
    key = key.lstrip("+")
    return key in PATH_KEYS or key.rpartition(".")[2] in PATH_NAMES


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether Hydra reads the arguments of a command as a sweep (`-m`)."""
    from hydra._internal.utils import get_args_parser

    options, _ = get_args_parser().parse_known_args(list(arguments))
    return bool(options.multirun) or "hydra.mode=MULTIRUN" in options.overrides


def refuse_unknown(arguments: Sequence[str]) -> None:
    """Refuse arguments that Hydra does not accept.

    Hydra itself would print its usage and the arguments verbatim, including any credentials.

    Raises:
        UserError: Hydra does not accept some arguments.
    """
    from hydra._internal.utils import get_args_parser

    unknown = get_args_parser().parse_known_args(list(arguments))[1]
    if unknown:
        raise UserError(f"unknown arguments: {' '.join(unknown)}: give options such as -m first")


def quote_paths(arguments: Sequence[str], sweep: bool = False) -> list[str]:
    """Quote the values of paths in a command's arguments for Hydra; all other arguments are returned unchanged.

    Values that are empty, null or already quoted are returned unchanged. An existing path is always taken literally. If
    no path with the given name exists: escapes of Hydra's grammar (`a\\,b`) are interpreted, a leading `~` is the home
    directory, `${…}` is interpolated, and in a sweep commas separate cells. If a shell expands
    `corpus.urls=DIR/{0..9}.tar` to several words, all of these shards are used.

    Args:
        sweep: whether the command runs once for every combination of the values (`-m`).
    """
    result = []
    for key, value in _joined(arguments):
        if key is None or not is_path(key):
            result.append(value if key is None else f"{key}={value}")
        else:
            result.append(f"{key}={_quote_value(value, _is_shards(key), sweep)}")
    return result


def _joined(arguments: Sequence[str]) -> list[tuple[str | None, str]]:
    """Keys and values of arguments; the key is None without an override. Adjacent shards are joined by `::`."""
    result: list[tuple[str | None, str]] = []
    for argument in arguments:
        override = _OVERRIDE.fullmatch(argument)
        key, value = override.groups() if override else (None, argument)
        before, others = result[-1] if result else (None, "")
        if key is not None and key == before and _is_shards(key) and not any(map(_is_quoted, (others, value))):
            result[-1] = (key, f"{others}::{value}")
        else:
            result.append((key, value))
    return result


def _is_quoted(value: str) -> bool:
    return value[:1] in ("'", '"') and _QUOTED.match(value) is not None


def _is_shards(key: str) -> bool:
    return key.rpartition(".")[2] == SHARDS


def _is_there(path: str) -> bool:
    """Whether a path exists, checked up to the path component that contains its last special character."""
    end = path.find("/", max(path.rfind(mark) for mark in ",$~'\"\\"))
    return os.path.lexists(path if end < 0 else path[:end])


def _quote_value(value: str, shards: bool, sweep: bool) -> str:
    if value == "" or value.lower() == "null":
        return value
    if not sweep or _is_there(value):
        return _quote(value, shards)
    return value if _SWEEP.fullmatch(value) else ",".join(_quote(cell, shards) for cell in _cells(value, shards))


def _quote(value: str, shards: bool) -> str:
    """Quote one path as a string of Hydra's grammar that OmegaConf reads back as that path."""
    from hydra.core.override_parser.types import Quote, QuotedString

    text = value
    if _is_there(value):
        if os.path.normpath(value).startswith("~"):  # would be expanded later
            text = os.path.join(os.getcwd(), value)
        if "${" in text:  # otherwise an interpolation; OmegaConf unescapes only backslashes before it
            text = re.sub(r"(\\*)\$\{", lambda result: 2 * result[1] + r"\${", text)
    elif _QUOTED.fullmatch(value) or value.lower() == "null":
        return value
    else:
        text = _ESCAPED.sub(r"\1", value)
        text = "::".join(map(os.path.expanduser, text.split("::"))) if shards else os.path.expanduser(text)
    if text == "???":  # OmegaConf's marker of a missing value
        text = "./???"
    return QuotedString(text, Quote.single).with_quotes()


def _cells(value: str, shards: bool) -> list[str]:
    """The values between the commas of a sweep.

    Commas do not separate cells if they belong to an existing path, are quoted or escaped, or stand in braces.
    """
    parts = _parts(value, shards)
    cells: list[str] = []
    while parts:
        joined = (count for count in range(len(parts), 1, -1) if _is_there(",".join(parts[:count])))
        count = next(joined, 1)
        cells.append(",".join(parts[:count]))
        parts = parts[count:]
    return cells


def _parts(value: str, shards: bool) -> list[str]:
    part = rf"""(?:{_QUOTED.pattern}(?=,|$)|(?:\\.|{r"{[^{}]*}|" if shards else ""}[^,])*)"""
    parts, start = [], 0
    while True:
        end = re.compile(part, re.DOTALL).match(value, start).end()
        parts.append(value[start:end])
        if end >= len(value):
            return parts
        start = end + 1
