"""GeoRSSD (Zhang et al. 2024, arXiv 2306.11300): Stable Diffusion 2.1, fine-tuned on a part of RS5M.

It is a plain pipeline of diffusers that receives only the caption.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers import StableDiffusionPipeline

from eval.peers.parts import check_parts, network_config, pipeline_of, plain_network
from eval.peers.peer import Peer


@dataclass(frozen=True)
class GeoRSSD(Peer):
    """A checkpoint of the hub's Zilun/GeoRSSD, converted to safetensors; or any other StableDiffusionPipeline."""

    def check(self, folder: Path) -> None:
        check_parts(folder, self.name, ("StableDiffusionPipeline",))
        network_config(folder / "unet", self.name, "UNet2DConditionModel")

    def load(self, folder: Path) -> StableDiffusionPipeline:
        return pipeline_of(StableDiffusionPipeline, folder, plain_network(folder / "unet"), self.scheduler)
