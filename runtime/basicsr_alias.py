"""Modules of basicsr 1.4.2, which asks for a module of torchvision that is gone; its names live in another one."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType


def basicsr_module(name: str) -> ModuleType:
    """A module of basicsr, for example "metrics.niqe", imported with torchvision's old module name in place."""
    functional = import_module("torchvision.transforms.functional")
    sys.modules.setdefault("torchvision.transforms.functional_tensor", functional)
    return import_module(f"basicsr.{name}")
