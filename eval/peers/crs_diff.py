"""CRS-Diff (Tang et al. 2024, arXiv 2403.11614): Stable Diffusion under six images, a content vector and metadata.

Of a caption alone its own code (src/test/inference.py of github.com/Sonettoo/CRS-Diff) still runs a local adapter on
black maps, which adds to every block of the U-Net's decoder, puts four tokens of a content adapter behind those of the
caption, and adds an embedding of seven zeros to the time's. Without those the weights of Stable Diffusion in its
checkpoint are another model: to convert them alone would measure something that is not CRS-Diff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eval.peers.drawn import DrawnImages


@dataclass(frozen=True)
class CRSDiff(DrawnImages):
    """Its images of captions alone, drawn by its own code."""

    reason: ClassVar[str] = (
        "its local adapter, content adapter and metadata embedding, without which its U-Net is another model, are not "
        "of diffusers"
    )
