"""Import of basicsr 1.4.2, which needs a torchvision module that no longer exists; its names are in another module."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType

import numpy as np


def basicsr_module(name: str) -> ModuleType:
    """Import a module of basicsr, for example "metrics.niqe", with an alias for torchvision's old module name.

    NumPy's settings for division warnings are preserved; importing basicsr alone would switch these warnings off
    globally.
    """
    functional = import_module("torchvision.transforms.functional")
    sys.modules.setdefault("torchvision.transforms.functional_tensor", functional)
    with np.errstate(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return import_module(f"basicsr.{name}")
