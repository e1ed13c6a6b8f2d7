"""Images from any text-to-image pipeline of diffusers; the noise of an image depends on seed and image number only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline

from runtime.progress import progress


def starting_noise(numbers: Sequence[int], shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """Standard normal noise, float32 [N, C, h, w]; the noise of an image depends on the seed and its number only."""
    rows = [np.random.default_rng([seed, int(number)]).standard_normal(shape, dtype=np.float32) for number in numbers]
    return torch.from_numpy(np.stack(rows) if rows else np.empty((0, *shape), np.float32))


def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 100,
    label: str = "generate",
    noise_of: Sequence[int] | None = None,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    **conditions: Sequence,
) -> np.ndarray:
    """One image per prompt, uint8 [N, H, W, 3].

    Args:
        pipeline: a StableDiffusionPipeline or a variant of it, or a PixArtAlphaPipeline.
        prompts: the N prompts.
        steps: solver steps.
        guidance_scale: scale of classifier-free guidance; 1 switches it off.
        seed: seed of the starting noise, the same for all methods that are compared.
        batch_size: images per call of the pipeline.
        label: name of the progress bar.
        noise_of: for each image, the number that its starting noise depends on; None: its position.
        size: side of the images in pixels; None: the size that the network was trained with.
        options: further arguments of the pipeline, the same for all images.
        conditions: further per-image arguments of the pipeline (for example `image`), divided into the same batches;
            `prompt_embeds` replace the prompts.
    """
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    side = network.config.sample_size if size is None else size // pipeline.vae_scale_factor
    numbers = range(len(prompts)) if noise_of is None else noise_of
    noise = starting_noise(numbers, (pipeline.vae.config.latent_channels, side, side), seed)
    size = side * pipeline.vae_scale_factor
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in progress(range(0, len(prompts), batch_size), label, unit="batch"):
        part = slice(start, start + batch_size)
        extra = {key: value[part] for key, value in conditions.items()}
        if "image" not in extra:
            extra |= {"height": size, "width": size}
        if "prompt_embeds" not in extra:
            extra["prompt"] = list(prompts[part])
        with torch.inference_mode():
            output = pipeline(
                latents=noise[part].to(network.device),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="np",
                **extra,
                **(options or {}),
                **of_its_kind(pipeline),
            ).images
        images.append((np.asarray(output) * 255).round().astype(np.uint8))
    return np.concatenate(images)


def of_its_kind(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Further arguments for a PixArtAlphaPipeline, because its defaults are for T5 and 1024 px."""
    if not isinstance(pipeline, PixArtAlphaPipeline):
        return {}
    return {
        "max_sequence_length": pipeline.tokenizer.model_max_length,
        "use_resolution_binning": False,
        "clean_caption": False,
    }
