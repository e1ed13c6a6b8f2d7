"""Checks of the installation: RS-Prune's packages are not hidden by another project's, and an extra is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

#: Top-level packages that are installed together with `rsprune` and that it uses.
PACKAGES = ("runtime", "corpus", "encoders", "captioning", "prune", "eval")


@cache
def refuse_strangers() -> None:
    """Raise an ImportError if Python finds another project's folder or module under the name of one of `PACKAGES`.

    Names such as `eval` or `runtime` are common, and Python searches the directory that it was started in first.
    """
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = find_spec(name)
        # a folder without __init__.py has only search locations, a module has only an origin
        positions = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
        result = next((Path(place).resolve() for place in positions if place), None)
        if result != home / name:
            raise ImportError(
                f"rsprune needs its own package `{name}`, but Python finds {result or 'none'}: rename the other one, "
                f"or start Python where no `{name}` of another project comes first in the path"
            )


@contextlib.contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Context manager that replaces the ModuleNotFoundError of a missing third-party package by a one-line message.

    Args:
        extra: the extra of pyproject.toml that contains the package.
        what: name of the function that needs the package, for the message.
    Raises:
        UserError: a third-party package is not installed.
        ModuleNotFoundError: the missing module is one of `PACKAGES`.
    """
    from runtime.errors import UserError

    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in PACKAGES:
            raise
        raise UserError(
            f"{what} needs `{error.name}`, which is not installed: pip install 'rs-prune[{extra}]'"
        ) from error
