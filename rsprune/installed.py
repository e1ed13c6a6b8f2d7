"""What must be installed: our own packages, not another project's of the same name, and those of an extra."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

#: Top-level packages that the library uses, installed beside it.
PACKAGES = ("runtime", "corpus", "encoders", "captioning", "prune", "eval")


@cache
def refuse_strangers() -> None:
    """Raise an ImportError where a folder or module of another project is found under the name of one of ours.

    Names such as `eval` or `runtime` are common, and the directory that Python starts in comes first on its path.
    """
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = find_spec(name)
        # a folder without __init__.py has a path alone, a module a file alone
        positions = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
        result = next((Path(place).resolve() for place in positions if place), None)
        if result != home / name:
            raise ImportError(
                f"rsprune needs its own package `{name}`, but Python finds {result or 'none'}: rename that one, or "
                f"start Python where no `{name}` of another project comes first"
            )


@contextlib.contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Turn the error of an import of a package that is not installed into one line.

    Args:
        extra: of pyproject.toml, which has it.
        what: needs it.
    Raises:
        UserError: instead of the ModuleNotFoundError.
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
