"""Masks as conditions: class fractions, and the encoder that reads them from a picture inside a plain pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from PIL import Image
from tiny_networks import CHANNELS, tiny_autoencoder, tiny_text_encoder, tiny_unet

from corpus.masks import IGNORED
from downstream.conditional import Parts, conditional_pipeline
from downstream.mask_condition import class_codes, class_fractions, mask_autoencoder
from downstream.task import Guidance
from encoders.pixels import to_tensor
from eval.generate import starting_noise
from runtime.errors import UserError
from train.objective import Objective


def some_masks(classes: int, side: int, seed: int = 0) -> np.ndarray:
    """Masks with large areas in the upper half and random pixels in the lower half, some of them without a class."""
    generator = np.random.default_rng(seed)
    masks = generator.integers(0, classes + 1, (4, side, side)).astype(np.uint8)
    masks[masks == classes] = IGNORED
    masks[:, : side // 2] = np.kron(generator.integers(0, classes, (4, side // 16, side // 8)), np.ones((1, 8, 8)))
    return masks


def coloured(masks: np.ndarray, palette: np.ndarray) -> np.ndarray:
    return palette[np.where(masks == IGNORED, len(palette) - 1, masks)]


def test_class_fractions_equal_the_pixel_fractions_of_each_cell() -> None:
    masks = some_masks(5, 32)
    fractions = class_fractions(masks, class_codes(5, 7), 8)
    assert fractions.shape == (4, 7, 4, 4) and fractions.dtype == np.float32
    for image, row, column, name in np.random.default_rng(1).integers((4, 4, 4, 5), size=(60, 4)):
        cell = masks[image, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert fractions[image, name, row, column] == pytest.approx((cell == name).mean())
    assert not fractions[:, 5:].any()
    assert not class_fractions(np.full((1, 16, 16), IGNORED, np.uint8), class_codes(5, 7), 8).any()


def test_codes_of_more_classes_than_channels_differ() -> None:
    codes = class_codes(30, 16)
    assert codes.shape == (30, 16)
    assert np.linalg.norm(codes, axis=1) == pytest.approx(1, rel=1e-6)
    cosines = codes @ codes.T - np.eye(30)
    assert np.abs(cosines).max() < 0.9
    assert (class_codes(30, 16) == codes).all()


@pytest.mark.parametrize("classes", [1, 2, 8, 14, 30])
def test_the_encoder_computes_fractions_from_a_picture(classes: int) -> None:
    """The result equals counting of the pixels, for a palette of random colours."""
    palette = np.random.default_rng(classes).integers(0, 256, (classes + 1, 3)).astype(np.uint8)
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4, latent_channels=16,
    ).eval()  # fmt: skip
    codes = class_codes(classes, 16)
    masks = some_masks(classes, 64)
    made = mask_autoencoder(autoencoder, palette, codes)
    with torch.no_grad():
        result = made.encode(to_tensor(coloured(masks, palette))).latents
        latents = torch.randn(2, 16, 3, 3, generator=torch.Generator().manual_seed(0))
        assert torch.equal(made.decode(latents).sample, autoencoder.decode(latents).sample)
    np.testing.assert_allclose(result.numpy(), class_fractions(masks, codes, 8), atol=2e-4)


def test_unsuited_autoencoders_and_palettes_are_refused() -> None:
    palette, codes = np.array([[0, 0, 0], [9, 9, 9]], np.uint8), class_codes(1, 4)
    with pytest.raises(UserError, match="masks cannot be read by an autoencoder of class AutoencoderKL"):
        mask_autoencoder(AutoencoderKL(), palette, codes)
    with pytest.raises(UserError, match="same colour"):
        mask_autoencoder(tiny_autoencoder(), np.zeros((2, 3), np.uint8), class_codes(1, CHANNELS))


def test_a_plain_pipeline_takes_the_mask_as_a_picture(tmp_path: Path) -> None:
    """The loaded pipeline gives its network the class fractions, and none of the project's code is used."""
    parts = Parts(tiny_unet(), tiny_autoencoder(), *tiny_text_encoder())
    palette = np.array([[200, 30, 40], [10, 200, 60], [90, 90, 90]], np.uint8)
    codes, masks = class_codes(2, CHANNELS), some_masks(2, 16)
    conditional_pipeline(
        parts, tiny_unet(condition_channels=CHANNELS), Objective().scheduler(),
        lambda autoencoder: mask_autoencoder(autoencoder, palette, codes),
    ).save_pretrained(tmp_path)  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    pictures = [Image.fromarray(picture) for picture in coloured(masks, palette)]
    noise = starting_noise(range(4), (CHANNELS, 2, 2), seed=5)
    settings = {"prompt": [""] * 4, "image": pictures, "latents": noise, "num_inference_steps": 2}
    pipeline(**settings, **Guidance().arguments(False))
    fractions = class_fractions(masks, codes, 8)
    assert [len(batch) for batch in seen] == [4, 4]
    np.testing.assert_allclose(seen[0][:, CHANNELS:].numpy(), fractions, atol=1e-4)
    seen.clear()
    pipeline(**settings, **Guidance(1.0, 2.0).arguments(False))
    assert [len(batch) for batch in seen] == [12, 12]
    np.testing.assert_allclose(
        seen[0][:, CHANNELS:].numpy(), np.concatenate([fractions, fractions, 0 * fractions]), atol=1e-4
    )
