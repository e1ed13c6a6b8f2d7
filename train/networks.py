"""The denoising network (from a config or a pipeline), its loss, and the plain diffusers pipeline that stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from omegaconf import DictConfig
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from runtime.artefacts import plain
from runtime.errors import UserError
from train.objective import Objective, denoising_loss

LORA = "lora"


def new_unet(
    config: Mapping[str, Any],
    latent_channels: int,
    latent_size: int,
    text_width: int,
    seed: int,
    condition_channels: int = 0,
) -> UNet2DConditionModel:
    """A randomly initialised UNet2DConditionModel.

    Args:
        condition_channels: number of additional input channels for an image condition.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=latent_channels + condition_channels,
            out_channels=latent_channels,
            cross_attention_dim=text_width,
            **config,
        )


def new_transformer(
    config: Mapping[str, Any], latent_channels: int, latent_size: int, text_width: int, seed: int
) -> PixArtTransformer2DModel:
    """A randomly initialised text-conditioned DiT (Peebles and Xie 2023) with the cross-attention of PixArt-α.

    As in DiT (section 3.2), the last layer is initialised to zero, so the initial prediction is zero.
    """
    if latent_size % config["patch_size"]:
        raise UserError(
            f"model.transformer.patch_size={config['patch_size']} does not divide latents of side {latent_size}: "
            "choose another patch_size or another corpus.train.resolution"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = PixArtTransformer2DModel(
            sample_size=latent_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            cross_attention_dim=config["num_attention_heads"] * config["attention_head_dim"],
            caption_channels=text_width,
            use_additional_conditions=False,
            **config,
        )
    nn.init.zeros_(network.proj_out.weight)
    nn.init.zeros_(network.proj_out.bias)
    return network


def new_network(
    model: DictConfig, latent_channels: int, latent_size: int, text_width: int, seed: int
) -> UNet2DConditionModel | PixArtTransformer2DModel:
    """The untrained network of a config: `model.unet` or `model.transformer`."""
    sizes = (latent_channels, latent_size, text_width, seed)
    if model.get("transformer"):
        return new_transformer(plain(model.transformer), *sizes)
    return new_unet(plain(model.unet), *sizes)


def add_lora(network: nn.Module, rank: int, alpha: float, targets: list[str], seed: int) -> None:
    """Freeze a network and add trainable low-rank updates (Hu et al. 2022) to its attention layers."""
    from peft import LoraConfig

    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), adapter_name=LORA)


def lora_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The low-rank updates only, in the format of `pipeline.load_lora_weights`; empty without LoRA."""
    if not getattr(network, "peft_config", None):
        return {}
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(network, adapter_name=LORA)


def lora_metadata(network: nn.Module) -> dict[str, Any]:
    """Rank, alpha and targets of the low-rank updates, JSON-ready; without them readers take alpha for the rank."""
    metadata = network.peft_config[LORA].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in metadata.items()}


def merge_lora(network: nn.Module) -> nn.Module:
    """Merge the low-rank updates into the weights in place, so that the network is a plain one again."""
    if getattr(network, "peft_config", None):
        network.fuse_lora(adapter_names=[LORA])
        network.unload_lora()
    return network


def predict(
    network: nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The network's prediction for noisy latents [B, C, h, w] at times [B] in 0..1000.

    Args:
        text: float [B, L, D].
        mask: bool [B, L], true for the tokens to use; None: all.
    """
    known = {} if mask is None else {"encoder_attention_mask": mask}
    return network(noisy, timestep=timesteps, encoder_hidden_states=text, **known).sample


def diffusion_loss(
    network: nn.Module,
    objective: Objective,
    latents: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    time: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    condition: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean loss of a batch.

    Args:
        latents, noise: float [B, C, h, w]; time: float [B] as `Objective.draw` gives it; text: float [B, L, D];
            mask: bool [B, L] or None.
        condition: float [B, C', h, w], concatenated to the input, or None.
    """
    noisy, timesteps, target, weights = objective.noisy(latents, noise, time)
    if condition is not None:
        noisy = torch.cat([noisy, condition], dim=1)
    return denoising_loss(predict(network, noisy, timesteps, text, mask), target, weights)


def masks_padding(network: nn.Module) -> bool:
    """Whether the network's pipeline masks the padding of captions: PixArt's does, Stable Diffusion's does not."""
    return isinstance(network, PixArtTransformer2DModel)


def text_to_image_pipeline(
    autoencoder: nn.Module,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    network: UNet2DConditionModel | PixArtTransformer2DModel,
    scheduler: SchedulerMixin,
) -> DiffusionPipeline:
    """Assemble a StableDiffusionPipeline or a PixArtAlphaPipeline that loads with plain diffusers."""
    parts = {"vae": autoencoder, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
    if isinstance(network, PixArtTransformer2DModel):
        pipeline = PixArtAlphaPipeline(transformer=network, **parts)
    else:
        pipeline = StableDiffusionPipeline(
            unet=network, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
