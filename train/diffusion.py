"""Latent diffusion: rectified flow on cached latents, saved as a plain StableDiffusionPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from corpus.index import Corpus
from corpus.progress import progress
from train.latents import encode, to_tensor


def flow_scheduler(shift: float = 1.0) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (2M) for a model that predicts noise - data, with time as the noise share (rectified flow)."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, timestep_spacing="linspace"
    )


def new_unet(
    config: dict, latent_channels: int, latent_size: int, text_width: int, seed: int, condition_channels: int = 0
):
    """A randomly initialised UNet2DConditionModel; `condition_channels` more input channels for an image condition."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=latent_channels + condition_channels,
            out_channels=latent_channels,
            cross_attention_dim=text_width,
            **config,
        )


@dataclass(frozen=True)
class FlowOptions:
    """The objective: rectified flow (Liu et al. 2022) with logit-normal times (Esser et al. 2024, section 3.1).

    Args:
        time_mean, time_std: of the normal whose logistic is the time; larger means train noisier.
        caption_dropout: share of the captions replaced by the empty one, for classifier-free guidance.
    """

    time_mean: float = 0.0
    time_std: float = 1.0
    caption_dropout: float = 0.1


def flow_matching_loss(
    unet: nn.Module,
    latents: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    time: torch.Tensor,
    condition: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity noise - latents at x_t = (1 - t) latents + t noise.

    Args:
        latents, noise: float [B, C, h, w]; time: float [B] in (0, 1); text: float [B, L, D].
        condition: float [B, C', h, w], concatenated to the input, or None.
    """
    share = time[:, None, None, None]
    noisy = (1 - share) * latents + share * noise
    if condition is not None:
        noisy = torch.cat([noisy, condition], dim=1)
    prediction = unet(noisy, 1000 * time, encoder_hidden_states=text).sample
    return (prediction.float() - (noise - latents)).square().mean()


def draw_noise(
    random: np.random.Generator, shape: Sequence[int], options: FlowOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise float32 `shape`, times float32 [B] and caption-dropped bool [B] of one step, for the whole global batch.

    Times are stratified over the batch (one in each of B equal parts of the distribution), which lowers the variance.
    """
    from scipy.special import expit, ndtri

    size = shape[0]
    noise = random.standard_normal(shape, dtype=np.float32)
    uniform = (random.permutation(size) + random.random(size)) / size
    time = expit(options.time_mean + options.time_std * ndtri(uniform.clip(1e-6, 1 - 1e-6)))
    dropped = random.random(size) < options.caption_dropout
    return torch.from_numpy(noise), torch.from_numpy(time.astype(np.float32)), torch.from_numpy(dropped)


@torch.no_grad()
def encode_latents(autoencoder: nn.Module, corpus: Corpus, rows: np.ndarray, *, symmetries: int = 1) -> torch.Tensor:
    """Latents float32 [S, K, C, h, w] of rows of a corpus, once for each of the first S symmetries of the square."""
    device = next(autoencoder.parameters()).device
    batches = range(0, len(rows), 128)
    turned = []
    for symmetry in range(symmetries):
        parts = []
        for start in progress(batches, "encode latents", unit="batch"):
            images = symmetric(to_tensor(corpus.images[rows[start : start + 128]]), symmetry)
            parts.append(encode(autoencoder, images.to(device)).float().cpu())
        turned.append(torch.cat(parts))
    return torch.stack(turned)


def symmetric(images: torch.Tensor, symmetry: int) -> torch.Tensor:
    """One of the eight symmetries of the square: 0 none, 1 mirrored, 2-3 turned by 180 degrees, 4-7 by 90."""
    images = images.flip(3) if symmetry % 2 else images
    return torch.rot90(images, (0, 2, 1, 3)[symmetry // 2], (2, 3))


def text_to_image_pipeline(
    autoencoder: nn.Module,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    shift: float,
) -> StableDiffusionPipeline:
    """The parts as a StableDiffusionPipeline that loads without any code of ours."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=flow_scheduler(shift),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
