"""Images from any diffusers text-to-image pipeline, with noise that depends on the image's number alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline

from corpus.progress import progress


def starting_noise(count: int, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """Standard normal float32 [N, C, h, w]; row i is the same whatever the count or the method."""
    rows = [np.random.default_rng([seed, index]).standard_normal(shape, dtype=np.float32) for index in range(count)]
    return torch.from_numpy(np.stack(rows))


def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 100,
    label: str = "generate",
    **conditions: Sequence,
) -> np.ndarray:
    """One image per prompt, uint8 [N, H, W, 3].

    Args:
        guidance_scale: classifier-free guidance; 1 switches it off.
        seed: of the starting noise: the same for every method that is compared.
        conditions: further per-image arguments of the pipeline, cut into the same batches (for example `image`).
    """
    unet = pipeline.unet
    channels = pipeline.vae.config.latent_channels
    noise = starting_noise(len(prompts), (channels, unet.config.sample_size, unet.config.sample_size), seed)
    size = unet.config.sample_size * pipeline.vae_scale_factor
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in progress(range(0, len(prompts), batch_size), label, unit="batch"):
        part = slice(start, start + batch_size)
        extra = {key: value[part] for key, value in conditions.items()}
        if "image" not in extra:
            extra |= {"height": size, "width": size}
        with torch.inference_mode():
            output = pipeline(
                prompt=list(prompts[part]),
                latents=noise[part].to(unet.device),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="np",
                **extra,
            ).images
        images.append((np.asarray(output) * 255).round().astype(np.uint8))
    return np.concatenate(images)
