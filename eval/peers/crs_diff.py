"""CRS-Diff (Tang et al. 2024, arXiv 2403.11614): Stable Diffusion with six images, a content vector and metadata.

Even for a caption alone, its code (src/test/inference.py of github.com/Sonettoo/CRS-Diff) runs a local adapter on black
maps, which adds to every block of the U-Net's decoder; appends four tokens of a content adapter to those of the
caption; and adds an embedding of seven zeros to that of the time. Without these parts, the weights of Stable Diffusion
in its checkpoint are a different model, so converting only them would not measure CRS-Diff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eval.peers.drawn import DrawnImages


@dataclass(frozen=True)
class CRSDiff(DrawnImages):
    """Images of captions alone that the code of CRS-Diff has drawn."""

    reason: ClassVar[str] = (
        "its local adapter, content adapter and metadata embedding do not exist in diffusers, and its U-Net alone is a "
        "different model"
    )
