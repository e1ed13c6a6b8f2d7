"""Random networks of a few thousand weights, of the same classes as the real ones, for images of 16 px."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from scipy.ndimage import gaussian_filter
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from encoders.pixels import to_tensor
from train.networks import new_unet
from train.text_encoder import clip_tokenizer

SIZE = 16  # px of the tiny networks' images
CHANNELS = 4
UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def tiny_autoencoder(scaling_factor: float = 8.0) -> AutoencoderTiny:
    """A random autoencoder, f8; its latents vary about as much as a trained one's: 1 / scaling_factor."""
    torch.manual_seed(1)
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=CHANNELS,
        scaling_factor=scaling_factor,
    ).eval()
    last = autoencoder.encoder.layers[-1]
    with torch.no_grad():
        spread = autoencoder.encode(to_tensor(pictures(32))).latents.std((0, 2, 3))
        last.weight.div_(spread[:, None, None, None] * scaling_factor)
        last.bias.zero_()
    return autoencoder


def tiny_unet(latent_size: int = SIZE // 8, condition_channels: int = 0) -> UNet2DConditionModel:
    return new_unet(UNET, CHANNELS, latent_size, 8, seed=2, condition_channels=condition_channels).eval()


def tiny_text_encoder() -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A random text encoder of width 8 for captions of 8 tokens."""
    tokenizer = clip_tokenizer(8)
    torch.manual_seed(3)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    return CLIPTextModel(text).eval(), tokenizer


def pictures(count: int, seed: int = 0, size: int = SIZE) -> np.ndarray:
    """Smooth coloured noise, uint8 [N, size, size, 3]."""
    noise = np.random.default_rng(seed).standard_normal((count, size, size, 3))
    smooth = gaussian_filter(noise, (0, 2, 2, 0))
    return (128 + 60 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)
