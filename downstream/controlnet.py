"""Conditions by ControlNets (Zhang et al. 2023): trained copies of the encoder of the frozen foundation steer it.

Saved as a StableDiffusionControlNetPipeline, which loads with plain diffusers. For one ControlNet the argument `image`
is a tensor, such as one-hot masks; for several (diffusers' MultiControlNetModel) it is a list. The residuals of several
are summed, each multiplied by its scale: 0 switches a condition off, both in training and in the pipeline.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, MultiControlNetModel, StableDiffusionControlNetPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from corpus.masks import IGNORED
from downstream.conditional import Parts
from runtime.errors import UserError
from train.objective import Objective, denoising_loss

#: Name of the ControlNet in the pipeline, and of its folder; further ones are controlnet_1 and so on.
CONTROLNET = "controlnet"


def one_hot(masks: np.ndarray, classes: int) -> np.ndarray:
    """One channel per class, float32 [N, K, H, W] of uint8 [N, H, W]; 0 in all channels for a pixel without a class."""
    return (masks[:, None] == np.arange(classes, dtype=np.uint8)[:, None, None]).astype(np.float32)


def new_controlnet(parts: Parts, *channels: int, seed: int) -> ControlNetModel | MultiControlNetModel:
    """One untrained ControlNet for each condition; several are returned as one MultiControlNetModel.

    A ControlNet starts with the weights of the encoder of the foundation's network, and its output is zero. If there
    are several, the conditions' encoders are initialised so that they keep the variance.

    Args:
        channels: number of channels of each condition.
        seed: seed of the new weights.
    Raises:
        UserError: there is no foundation, there are too many classes, or the autoencoder does not reduce images by 8,
        the factor by which a ControlNet reduces masks.
    """
    if parts.unet is None:
        raise UserError("a ControlNet steers a foundation: give foundation=DIR, or network=fractions for scratch")
    factor = 2 ** (len(parts.autoencoder.config.block_out_channels) - 1)
    if factor != 8:
        raise UserError(
            f"a ControlNet reduces masks by 8, this autoencoder reduces images by {factor}: give network=fractions"
        )
    if max(channels) >= IGNORED:
        raise UserError(f"{max(channels)} classes are too many: masks hold at most {IGNORED - 1}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nets = [ControlNetModel.from_unet(parts.unet, conditioning_channels=count) for count in channels]
        if len(nets) == 1:
            return nets[0]
        for net in nets:
            _keep_variance(net.controlnet_cond_embedding)
    return MultiControlNetModel(nets)


def _keep_variance(encoder: nn.Module) -> None:
    """Initialise the weights of a condition's encoder again (He et al. 2015), except for its last layer, which is zero.

    With torch's default, differences between conditions shrink to less than a thousandth over the seven layers, and a
    short training hardly learns to use them.
    """
    for layer in (encoder.conv_in, *encoder.blocks):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)


def steered_loss(
    controlnet: nn.Module,
    unet: nn.Module,
    objective: Objective,
    latents: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    time: torch.Tensor,
    *conditions: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean denoising loss of a batch, for the frozen foundation with the residuals of the ControlNets.

    Args:
        unet: network of the foundation, frozen.
        latents, noise: float [B, C, h, w].
        time: float [B], as `Objective.draw` gives it.
        text: float [B, L, D], hidden states of the captions.
        conditions: float [B, K, H, W] each, such as one-hot masks.
        scales: float [B, n] for n conditions: factor of each condition's residuals for each image, the pipeline's
            `controlnet_conditioning_scale`. None: there is only one ControlNet.
    """
    noisy, timesteps, target, weights = objective.noisy(latents, noise, time)
    if scales is None:
        [condition] = conditions
        steering = {"controlnet_cond": condition}
    else:
        each = [scale[:, None, None, None] for scale in scales.unbind(1)]
        steering = {"controlnet_cond": conditions, "conditioning_scale": each}
    down, middle = controlnet(noisy, timesteps, text, **steering, return_dict=False)
    predicted = unet(
        noisy,
        timesteps,
        encoder_hidden_states=text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    return denoising_loss(predicted, target, weights)


def load_controlnet(folder: Path) -> ControlNetModel | MultiControlNetModel:
    """Load one or several ControlNets written by `save_pretrained`; the folders of several lie next to each other."""
    several = folder.with_name(f"{folder.name}_1").is_dir()
    kind = MultiControlNetModel if several else ControlNetModel
    return kind.from_pretrained(str(folder), use_safetensors=True)


def steered_pipeline(
    parts: Parts, controlnet: ControlNetModel | MultiControlNetModel, scheduler: SchedulerMixin
) -> StableDiffusionControlNetPipeline:
    """The foundation and its ControlNet. Call it with `image=` float [N, K, H, W], or a list of these for several."""
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
