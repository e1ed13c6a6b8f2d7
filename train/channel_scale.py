"""Scales of an autoencoder's latent channels, folded into its own convolutions: a pipeline needs no code for them."""

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
    """Gains (std / largest std)^-exponent, float64 [C]: the loudest channel stays as it is, quiet ones are raised.

    At one time all channels get the same noise, so a loud one is distinguished from it at late times and a quiet one at
    early times; an exponent between 0 (as they are) and 1 (all of one deviation) brings them nearer together
    (docs/method.md, section 4).
    """
    relative = (deviations / deviations.max()).clamp_min(1e-6)
    return relative**-exponent


@torch.no_grad()
def scale_channels(autoencoder: AutoencoderTiny, deviations: torch.Tensor, exponent: float) -> None:
    """Give every latent channel its gain, and all together the variance 1 by `scaling_factor`.

    The encoder's last convolution takes the gains, the decoder's first one their inverses. Between them the decoder
    bends values by 3 tanh(x / 3); with the loudest channel as it was, it bends no value much more than before.

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
