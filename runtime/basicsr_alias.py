"""Modules of basicsr 1.4.2, which asks for a module of torchvision that is gone; its names live in another one."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType

import numpy as np


def basicsr_module(name: str) -> ModuleType:
    """A module of basicsr, for example "metrics.niqe", imported with torchvision's old module name in place.

    Its import would also switch off NumPy's warnings of divisions for everybody.
    """
    functional = import_module("torchvision.transforms.functional")
    sys.modules.setdefault("torchvision.transforms.functional_tensor", functional)
    with np.errstate(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return import_module(f"basicsr.{name}")
