"""RSDiff (Sebaq and ElHelw 2024; code, weights and figures: github.com/asebaq/rsdiff): a cascade in pixels on RSICD.

Two U-Nets of the package imagen-pytorch, 128 and 256 px, under a frozen T5. That package is not among ours. Its
`sample_grid.py` writes images and a `captions.txt`, which are read as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eval.peers.drawn import DrawnImages


@dataclass(frozen=True)
class RSDiff(DrawnImages):
    """Its images, drawn by its own code."""

    reason: ClassVar[str] = "its two U-Nets are of the package imagen-pytorch, not of diffusers"
