"""Masks by a ControlNet (Zhang et al. 2023): the foundation stays frozen, a trained copy of its encoder steers it.

Saved as a StableDiffusionControlNetPipeline, which loads with plain diffusers. Its `image` is a tensor: one-hot masks.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from corpus.masks import IGNORED
from downstream.conditional import Parts
from runtime.errors import UserError
from train.objective import Objective, denoising_loss

#: What the pipeline calls it, and its folder.
CONTROLNET = "controlnet"


def one_hot(masks: np.ndarray, classes: int) -> np.ndarray:
    """A channel a class, float32 [N, K, H, W] of uint8 [N, H, W]; a pixel without a class is 0 in all of them."""
    return (masks[:, None] == np.arange(classes, dtype=np.uint8)[:, None, None]).astype(np.float32)


def new_controlnet(parts: Parts, classes: int, seed: int) -> ControlNetModel:
    """A ControlNet with the encoder of the foundation's network, whose output is zero at first.

    Raises:
        UserError: there is no foundation, or its autoencoder's factor is not 8, which a ControlNet reduces masks by.
    """
    if parts.unet is None:
        raise UserError("a ControlNet steers a foundation: give foundation=DIR, or network=shares for scratch")
    factor = 2 ** (len(parts.autoencoder.config.block_out_channels) - 1)
    if factor != 8:
        raise UserError(f"a ControlNet reduces masks by 8, this autoencoder by {factor}: give network=shares")
    if classes >= IGNORED:
        raise UserError(f"{classes} classes are too many: masks hold at most {IGNORED - 1}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ControlNetModel.from_unet(parts.unet, conditioning_channels=classes)


def steered_loss(
    controlnet: nn.Module,
    unet: nn.Module,
    objective: Objective,
    latents: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    time: torch.Tensor,
    condition: torch.Tensor,
) -> torch.Tensor:
    """Mean loss of a batch.

    Args:
        unet: the foundation's, frozen.
        latents, noise: float [B, C, h, w]; time: float [B]; text: float [B, L, D].
        condition: float [B, K, H, W], one-hot masks.
    """
    noisy, timesteps, target, weights = objective.noisy(latents, noise, time)
    down, middle = controlnet(noisy, timesteps, text, controlnet_cond=condition, return_dict=False)
    predicted = unet(
        noisy,
        timesteps,
        encoder_hidden_states=text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    return denoising_loss(predicted, target, weights)


def steered_pipeline(
    parts: Parts, controlnet: ControlNetModel, scheduler: SchedulerMixin
) -> StableDiffusionControlNetPipeline:
    """The foundation and its ControlNet. Call it with `image=` one-hot masks, float [N, K, H, W]."""
    pipeline = StableDiffusionControlNetPipeline(
        vae=parts.autoencoder,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        controlnet=controlnet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
