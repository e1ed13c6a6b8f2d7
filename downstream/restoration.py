"""Super-resolution with a conditional pipeline: what plain diffusers does not do (docs/method.md, section 6).

Three steps on top of what the network draws. The residual: the output is the interpolated input plus the difference of
two decoded latents, so that what the autoencoder loses of the input stays. The dial: latents between the mean of all
images that fit the input, which one solver step gives, and one of these images. Consistency: the output, reduced again,
is the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from downstream.consistency import back_project
from downstream.interpolation import enlarge
from encoders.pixels import to_tensor
from runtime.errors import UserError
from runtime.progress import progress

BATCH = 100


@dataclass(frozen=True)
class Restoration:
    """How an output is made of what the network draws.

    Attributes:
        dial: 0 the mean image, smooth and near in pixels; 1 one draw, with all detail; between them both.
        samples: draws whose mean stands for one draw; more of them are nearer in pixels and smoother.
        residual: add the difference of decoded latents to the interpolated input, in place of the decoded latents.
        consistency: rounds of back-projection; 0: none.
        kind: the reduction that consistency assumes, area or bicubic.
    """

    dial: float
    samples: int
    residual: bool
    consistency: int
    kind: str

    def __post_init__(self) -> None:
        if not 0 <= self.dial <= 1:
            raise UserError(f"downstream.super_resolution.dial={self.dial}: give a number from 0 (mean) to 1 (detail)")
        for name, least in (("samples", 1), ("consistency", 0)):
            if getattr(self, name) < least:
                raise UserError(f"downstream.super_resolution.{name}={getattr(self, name)}: give at least {least}")


@dataclass(frozen=True)
class Restorer:
    """A super-resolution model.

    Attributes:
        pipeline: image-conditioned, trained on interpolated pictures.
        factor: side of an output over side of an input.
        steps: solver steps of a draw.
    """

    pipeline: StableDiffusionInstructPix2PixPipeline
    factor: int
    steps: int
    options: Restoration

    @property
    def side(self) -> int:
        """Of an output, in pixels."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of an output's noise."""
        size = self.pipeline.unet.config.sample_size
        return self.pipeline.vae.config.latent_channels, size, size

    def __call__(
        self, low: np.ndarray, noise: np.ndarray, prompts: Sequence[str] | None = None, label: str | None = None
    ) -> np.ndarray:
        """Outputs float32 [N, factor h, factor w, 3] in 0..255.

        Args:
            low: uint8 [N, h, w, 3].
            noise: float32 [N, samples, C, H / 8, W / 8], or [N, C, H / 8, W / 8] of one sample.
            prompts: of each image; None: no text.
            label: of a progress bar; None: none.
        """
        noise = noise[:, None] if noise.ndim == 4 else noise
        prompts = [""] * len(low) if prompts is None else list(prompts)
        starts = range(0, len(low), BATCH)
        parts = []
        for start in progress(starts, label, unit="batch") if label else starts:
            part = slice(start, start + BATCH)
            parts.append(self._restored(low[part], noise[part], prompts[part]))
        return np.concatenate(parts) if parts else np.empty((0, *np.multiply(low.shape[1:3], self.factor), 3))

    def _restored(self, low: np.ndarray, noise: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        options, vae = self.options, self.pipeline.vae
        enlarged = enlarge(low, self.factor, "bicubic")
        pictures = [Image.fromarray(image) for image in enlarged]
        latents = self._between(pictures, torch.from_numpy(np.ascontiguousarray(noise)), prompts)
        found = _decoded(vae, latents / vae.config.scaling_factor)
        if options.residual:
            with torch.inference_mode():
                raw = vae.encode(to_tensor(enlarged).to(vae.device))
            raw = raw.latents if hasattr(raw, "latents") else raw.latent_dist.mode()
            found = enlarged + found - _decoded(vae, raw)
        if options.consistency:
            found = back_project(found.astype(np.float32), low, self.factor, options.kind, options.consistency)
        return found.clip(0, 255).astype(np.float32)

    def _between(self, pictures: list[Image.Image], noise: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Latents [N, C, h, w] of unit scale, where the dial points to."""
        dial = self.options.dial
        mean = self._drawn(pictures, noise[:, 0], prompts, steps=1) if dial < 1 else 0
        if not dial:
            return mean
        draws = [self._drawn(pictures, noise[:, index], prompts, self.steps) for index in range(noise.shape[1])]
        return (1 - dial) * mean + dial * torch.stack(draws).mean(0)

    def _drawn(
        self, pictures: list[Image.Image], noise: torch.Tensor, prompts: Sequence[str], steps: int
    ) -> torch.Tensor:
        """Latents of plain calls of the pipeline. One solver step gives the mean: the network's estimate from noise."""
        with torch.inference_mode():
            return self.pipeline(
                prompt=list(prompts),
                image=pictures,
                latents=noise.to(self.pipeline.unet.device),
                num_inference_steps=steps,
                guidance_scale=1.0,
                output_type="latent",
            ).images


@torch.inference_mode()
def _decoded(vae: torch.nn.Module, latents: torch.Tensor) -> np.ndarray:
    """Float32 [N, H, W, 3] in 0..255, not clipped, of raw latents."""
    images = vae.decode(latents.to(vae.dtype)).sample
    return ((images.float() + 1) * 127.5).permute(0, 2, 3, 1).cpu().numpy()
