"""RSDiff (Sebaq and ElHelw 2024; code, weights and figures: github.com/asebaq/rsdiff): a cascade in pixels on RSICD.

It consists of two U-Nets of the package imagen-pytorch, for 128 and 256 px, conditioned by a frozen T5. This project
does not include that package. The script `sample_grid.py` of RSDiff writes images and a `captions.txt`, which are read
unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eval.peers.drawn import DrawnImages


@dataclass(frozen=True)
class RSDiff(DrawnImages):
    """Images that the code of RSDiff has drawn."""

    reason: ClassVar[str] = "its two U-Nets come from the package imagen-pytorch, not from diffusers"
