"""Scaling of an autoencoder's latent channels, folded into its convolutions, so that pipelines need no extra code."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny

from train.latents import encode

BATCH = 100


@torch.no_grad()
def channel_deviations(autoencoder: AutoencoderTiny, images: torch.Tensor) -> torch.Tensor:
    """Standard deviation of every latent channel at unit scale, float64 [C], over images float [N, 3, H, W]."""
    count, total, squares = 0, 0.0, 0.0
    for part in images.split(BATCH):
        latents = encode(autoencoder, part).double()
        count += latents.shape[0] * latents.shape[2] * latents.shape[3]
        total, squares = total + latents.sum((0, 2, 3)), squares + latents.square().sum((0, 2, 3))
    return (squares / count - (total / count).square()).clamp_min(0).sqrt()


def channel_gains(deviations: torch.Tensor, exponent: float) -> torch.Tensor:
    """Gains (std / largest std)^-exponent, float64 [C]: the channel of the largest std is unchanged, others are
    amplified.

    At a given time all channels get the same noise. So a channel with a large deviation becomes distinguishable from
    noise at late times, and one with a small deviation at early times. An exponent between 0 (no change) and 1 (equal
    deviations) reduces the difference (docs/method.md, section 4).
    """
    relative = (deviations / deviations.max()).clamp_min(1e-6)
    return relative**-exponent


@torch.no_grad()
def scale_channels(autoencoder: AutoencoderTiny, deviations: torch.Tensor, exponent: float) -> None:
    """Multiply every latent channel by its gain, and set `scaling_factor` so that all channels together have variance
    1.

    The gains go into the encoder's last convolution, their inverses into the decoder's first one. Between them the
    decoder limits values by 3 tanh(x / 3). The channel of the largest deviation is unchanged, so values are limited
    hardly more than before.

    Args:
        deviations: of every channel, float64 [C] (`channel_deviations`).
    """
    last, first = autoencoder.encoder.layers[-1], autoencoder.decoder.layers[0]
    gains = channel_gains(deviations, exponent)
    together = float((gains * deviations).square().mean().sqrt())
    gains = gains.to(last.weight)
    last.weight *= gains[:, None, None, None]
    last.bias *= gains
    first.weight /= gains[:, None, None]
    autoencoder.register_to_config(scaling_factor=round(autoencoder.config.scaling_factor / together, 4))
