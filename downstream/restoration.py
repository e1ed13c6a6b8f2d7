"""Super-resolution with a conditional pipeline: the steps beyond plain diffusers (docs/method.md, section 7).

The network draws the difference between the latents of the image and those of its interpolated input; the sum is
computed here. There are three options. Residual: the output is the interpolated input plus the difference of two
decoded latents, so the autoencoder's loss of input detail has no effect. Dial: latents between the mean of all images
that fit the input, which one solver step gives, and one sample of these images. Consistency: the reduced output equals
the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from torch import nn

from downstream.consistency import back_project
from downstream.interpolation import enlarge
from encoders.pixels import to_tensor
from runtime.errors import UserError
from runtime.progress import progress
from train.text_encoder import encode_prompts

BATCH = 100


@dataclass(frozen=True)
class Restoration:
    """How an output is computed from the network's draws.

    Attributes:
        dial: 0: the mean image, smooth and with a small pixel error; 1: one draw, with all detail; or a value between.
        samples: number of draws whose mean replaces one draw; more draws give a smaller pixel error and smoother
            images.
        mean_draws: number of noises over which the mean image is averaged, at one solver step each.
        residual: add the difference of decoded latents to the interpolated input, instead of using the decoded latents.
        consistency: rounds of back-projection; 0: none.
        kind: the reduction that consistency assumes, area or bicubic.
        relative: whether the network draws the difference between the image's latents and those of the interpolated
            input, instead of the image's latents.
    Raises:
        UserError: an option is out of range.
    """

    dial: float
    samples: int
    mean_draws: int
    residual: bool
    consistency: int
    kind: str
    relative: bool

    def __post_init__(self) -> None:
        if not 0 <= self.dial <= 1:
            raise UserError(f"downstream.super_resolution.dial={self.dial}: give a number from 0 (mean) to 1 (detail)")
        for name, least in (("samples", 1), ("mean_draws", 1), ("consistency", 0)):
            if getattr(self, name) < least:
                raise UserError(f"downstream.super_resolution.{name}={getattr(self, name)}: give at least {least}")

    @property
    def noises(self) -> int:
        """Number of noises from which an output is drawn."""
        return max(self.samples if self.dial else 0, self.mean_draws if self.dial < 1 else 0)


@dataclass(frozen=True)
class Restorer:
    """A super-resolution model.

    Attributes:
        pipeline: an image-conditioned pipeline that was trained on interpolated pictures.
        factor: side of an output over side of an input.
        steps: number of solver steps of a draw.
        options: how an output is computed.
        prompt: prompt of all images for which no other prompt is given.
    """

    pipeline: StableDiffusionInstructPix2PixPipeline
    factor: int
    steps: int
    options: Restoration
    prompt: str = ""

    @property
    def side(self) -> int:
        """Side of an output in pixels."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of an output's noise; the noises of several draws are concatenated along the channels."""
        size = self.pipeline.unet.config.sample_size
        return self.pipeline.vae.config.latent_channels * self.options.noises, size, size

    def __call__(
        self,
        low: np.ndarray,
        noise: np.ndarray,
        prompts: Sequence[str] | None = None,
        label: str | None = None,
        rebuilt: np.ndarray | None = None,
    ) -> np.ndarray:
        """Outputs float32 [N, factor h, factor w, 3] in 0..255.

        Args:
            low: uint8 [N, h, w, 3].
            noise: float32 [N, k, C, H / 8, W / 8], or [N, k C, H / 8, W / 8]; if k is below `options.noises`, averages
                that need more noises use only k.
            prompts: prompt of each image; None: `prompt` for all.
            label: label of a progress bar; None: no bar.
            rebuilt: result of `rebuilt_inputs` for the enlarged images, if already computed.
        """
        if noise.ndim == 4:
            channels = self.pipeline.vae.config.latent_channels
            noise = noise.reshape(len(noise), -1, channels, *noise.shape[2:])
        prompts = [self.prompt] * len(low) if prompts is None else list(prompts)
        starts = range(0, len(low), BATCH)
        parts = []
        for start in progress(starts, label, unit="batch") if label else starts:
            part = slice(start, start + BATCH)
            known = None if rebuilt is None else rebuilt[part]
            parts.append(self._restored(low[part], noise[part], prompts[part], known))
        height, width = (side * self.factor for side in low.shape[1:3])
        return np.concatenate(parts) if parts else np.empty((0, height, width, 3), np.float32)

    @torch.inference_mode()
    def _restored(
        self, low: np.ndarray, noise: np.ndarray, prompts: Sequence[str], rebuilt: np.ndarray | None
    ) -> np.ndarray:
        options, vae = self.options, self.pipeline.vae
        enlarged = enlarge(low, self.factor, "bicubic")
        condition = _encoded(vae, enlarged)
        texts, text_of = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
        text = encode_prompts(self.pipeline.text_encoder, self.pipeline.tokenizer, list(texts)).to(vae.device)[text_of]
        drawn = self._between(condition, torch.from_numpy(np.ascontiguousarray(noise)).to(vae.device), text)
        raw = drawn / vae.config.scaling_factor
        result = _decoded(vae, raw + condition if options.relative else raw)
        if options.residual:
            result = enlarged + result - (_decoded(vae, condition) if rebuilt is None else rebuilt)
        if options.consistency:
            result = back_project(result.astype(np.float32), low, self.factor, options.kind, options.consistency)
        return result.clip(0, 255).astype(np.float32)

    def _between(self, condition: torch.Tensor, noise: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] of unit scale at the position of the dial."""
        dial, options = self.options.dial, self.options
        result = torch.zeros_like(noise[:, 0])
        if dial < 1:  # one solver step: the network's estimate of the latents from pure noise
            means = [self.draw(condition, part, text, 1) for part in noise[:, : options.mean_draws].unbind(1)]
            result += (1 - dial) * torch.stack(means).mean(0)
        if dial > 0:
            draws = [self.draw(condition, part, text, self.steps) for part in noise[:, : options.samples].unbind(1)]
            result += dial * torch.stack(draws).mean(0)
        return result

    @torch.inference_mode()
    def draw(self, condition: torch.Tensor, noise: torch.Tensor, text: torch.Tensor, steps: int) -> torch.Tensor:
        """Latents of unit scale [N, C, h, w], as the pipeline draws them without guidance.

        The pipeline itself would encode the pictures again for every draw.

        Args:
            condition: raw latents of the interpolated inputs, [N, C, h, w].
            noise: standard normal [N, C, h, w].
            text: hidden states of the prompts, [N, L, D].
            steps: number of solver steps.
        """
        scheduler, unet = self.pipeline.scheduler, self.pipeline.unet
        scheduler.set_timesteps(steps, device=unet.device)
        latents = noise * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            seen = torch.cat([scheduler.scale_model_input(latents, time), condition], dim=1)
            predicted = unet(seen, time, encoder_hidden_states=text).sample
            latents = scheduler.step(predicted, time, latents).prev_sample
        return latents


def rebuilt_inputs(vae: nn.Module, enlarged: np.ndarray) -> np.ndarray:
    """The autoencoder's reconstructions of interpolated inputs, float32 [N, H, W, 3] of uint8; not clipped."""
    parts = [_decoded(vae, _encoded(vae, enlarged[start : start + BATCH])) for start in range(0, len(enlarged), BATCH)]
    return np.concatenate(parts)


@torch.inference_mode()
def _encoded(vae: nn.Module, images: np.ndarray) -> torch.Tensor:
    """Raw latents of uint8 [N, H, W, 3], encoded like the pipeline's condition."""
    output = vae.encode(to_tensor(images).to(vae.device))
    return output.latents if hasattr(output, "latents") else output.latent_dist.mode()


@torch.inference_mode()
def _decoded(vae: nn.Module, latents: torch.Tensor) -> np.ndarray:
    """Decode raw latents to float32 [N, H, W, 3] in 0..255, not clipped."""
    images = vae.decode(latents.to(vae.dtype)).sample
    return ((images.float() + 1) * 127.5).permute(0, 2, 3, 1).cpu().numpy()
