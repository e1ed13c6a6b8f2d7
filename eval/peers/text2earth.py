"""Text2Earth (Liu et al. 2025, arXiv 2501.00895): Stable Diffusion whose U-Net receives the resolution.

The pipeline of Text2Earth takes the resolution as a prefix of the prompt, `16_GOOGLE_LEVEL_a caption`. It removes the
prefix before the text is encoded and gives the number to the class embedding of the U-Net, which embeds it in the same
way as the time. Level L means 2^(17 - L) metres per pixel, for L from 10 to 18; 0 is unknown (README.md and
pipeline_text2earth_diffusion.py of github.com/Chen-Yang-Liu/Text2Earth).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.peers.labels import LabelledPipeline
from eval.peers.parts import check_parts, network_config, pipeline_of, plain_network
from eval.peers.peer import Peer, metres
from runtime.errors import UserError

LOWEST, HIGHEST, UNKNOWN = 10, 18, 0


@dataclass(frozen=True)
class Text2Earth(Peer):
    """The hub's lcybuaa/Text2Earth, or a folder with the same files."""

    def check(self, folder: Path) -> None:
        check_parts(folder, self.name, ("Text2EarthDiffusionPipeline", "StableDiffusionPipeline"))
        config = network_config(folder / "unet", self.name, "UNet2DConditionModel")
        if config.get("class_embed_type") != "timestep":
            raise UserError(
                f"{folder / 'unet'} has no input for the resolution (class_embed_type is "
                f"{config.get('class_embed_type')}, not timestep), so it is not a {self.name} model: measure a plain "
                "pipeline with peer=georssd"
            )

    def load(self, folder: Path) -> LabelledPipeline:
        return pipeline_of(LabelledPipeline, folder, plain_network(folder / "unet"), self.scheduler)

    def extra(self, row: Mapping[str, Any], side: int) -> dict[str, int]:
        """`labels`: the level."""
        return {"labels": level_of(metres(row, side, self.resolution))}


def level_of(distance: float) -> int:
    """The level nearest to `distance` metres per pixel, within the levels of its training; 0 for NaN."""
    if not distance > 0:
        return UNKNOWN
    return min(max(round(17 - math.log2(distance)), LOWEST), HIGHEST)
