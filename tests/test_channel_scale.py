"""The scales of latent channels, folded into the autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from train.channel_scale import channel_deviations, channel_gains, scale_channels
from train.latents import decode, encode


@pytest.fixture
def autoencoder() -> AutoencoderTiny:
    """A small random autoencoder with different deviations of its channels and small latents."""
    torch.manual_seed(0)
    made = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, latent_channels=4,
        num_encoder_blocks=(0, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1), scaling_factor=8.0,
    )  # fmt: skip
    with torch.no_grad():
        made.encoder.layers[-1].weight *= torch.tensor([2.0, 0.5, 0.2, 0.1])[:, None, None, None] * 0.2
        made.encoder.layers[-1].bias *= 0.01
    return made.eval()


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_scaled_channels_have_the_deviations_required_by_the_exponent(
    autoencoder: AutoencoderTiny, exponent: float, tmp_path: Path
) -> None:
    images = torch.rand(250, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before, picture = encode(autoencoder, images), decode(autoencoder, encode(autoencoder, images))
    result = channel_deviations(autoencoder, images)
    torch.testing.assert_close(result.float(), before.std((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    scale_channels(autoencoder, result, exponent)
    with torch.no_grad():
        after, again = encode(autoencoder, images), decode(autoencoder, encode(autoencoder, images))
    deviations = after.std((0, 2, 3), correction=0)
    assert float(deviations.square().mean()) == pytest.approx(1, rel=1e-3)
    ratio = (deviations / deviations[0]) / (result / result[0]).float() ** (1 - exponent)
    torch.testing.assert_close(ratio, torch.ones(4), rtol=1e-3, atol=0)
    gains = channel_gains(result, exponent) * (autoencoder.config.scaling_factor / 8)
    torch.testing.assert_close(after, before * gains[:, None, None].float(), rtol=1e-3, atol=1e-4)
    assert (again - picture).abs().max() < 0.05 * picture.std()
    autoencoder.save_pretrained(tmp_path)
    loaded = AutoencoderTiny.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(decode(loaded, encode(loaded, images)), again)


def test_the_gain_of_a_constant_channel_is_finite() -> None:
    assert torch.isfinite(channel_gains(torch.tensor([1.0, 0.0]).double(), 1.0)).all()
