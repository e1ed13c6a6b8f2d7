"""Super-resolution steps beyond plain diffusers: draws, the dial, the residual, consistency; noise levels; options."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import CHANNELS, pictures, tiny_autoencoder, tiny_text_encoder, tiny_unet

from downstream.conditional import Parts, conditional_pipeline, encode_condition
from downstream.consistency import back_project
from downstream.degradation import low_resolution, reduce
from downstream.interpolation import enlarge
from downstream.restoration import Restoration, Restorer, rebuilt_inputs
from downstream.tasks.super_resolution import _examples, with_level
from eval.generate import starting_noise
from runtime.errors import UserError
from train.objective import Objective
from train.text_encoder import encode_prompts

PLAIN = Restoration(dial=1, samples=1, mean_draws=1, residual=False, consistency=0, kind="area", relative=False)


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    parts = Parts(tiny_unet(), tiny_autoencoder(), *tiny_text_encoder())
    pipeline = conditional_pipeline(parts, tiny_unet(condition_channels=CHANNELS), Objective().scheduler())
    return Restorer(pipeline, factor=4, steps=5, options=PLAIN)


def noise_of(count: int, samples: int = 1) -> np.ndarray:
    return np.stack([starting_noise(range(count), (CHANNELS, 2, 2), seed) for seed in range(samples)], axis=1)


LOW = low_resolution(pictures(5), 4)


def test_a_plain_draw_equals_the_result_of_the_pipeline(restorer: Restorer) -> None:
    noise = noise_of(5)
    pipeline = restorer.pipeline
    images = pipeline(
        prompt=[""] * 5, image=[Image.fromarray(image) for image in enlarge(LOW, 4, "bicubic")],
        latents=torch.from_numpy(noise[:, 0]), num_inference_steps=5, guidance_scale=1.0, output_type="np",
    ).images  # fmt: skip
    np.testing.assert_allclose(restorer(LOW, noise), 255 * images, atol=2e-3)
    assert restorer.side == 16 and restorer.latent_shape == (CHANNELS, 2, 2)
    assert restorer(LOW[:0], noise[:0]).shape == (0, 16, 16, 3)


def with_options(restorer: Restorer, **options: object) -> Restorer:
    return replace(restorer, options=replace(restorer.options, **options))


def test_a_draw_of_one_step_equals_noise_minus_velocity(restorer: Restorer) -> None:
    """For rectified flow: noise minus velocity; the sampler starts a thousandth below pure noise."""
    noise = torch.from_numpy(noise_of(5)[:, 0])
    condition = encode_condition(restorer.pipeline.vae, enlarge(LOW, 4, "bicubic"))
    text = encode_prompts(restorer.pipeline.text_encoder, restorer.pipeline.tokenizer, [""] * 5)
    with torch.no_grad():
        seen = torch.cat([noise, condition], dim=1)
        velocity = restorer.pipeline.unet(seen, 999.0, encoder_hidden_states=text).sample
    result = restorer.draw(condition, noise, text, 1)
    torch.testing.assert_close(result, noise - velocity, rtol=0.01, atol=0.01)


def test_the_dial_interpolates_between_the_mean_and_draws(restorer: Restorer) -> None:
    noise = noise_of(5, 3)
    condition = encode_condition(restorer.pipeline.vae, enlarge(LOW, 4, "bicubic"))
    text = encode_prompts(restorer.pipeline.text_encoder, restorer.pipeline.tokenizer, [""] * 5)
    parts = torch.from_numpy(noise).unbind(1)
    mean = torch.stack([restorer.draw(condition, part, text, 1) for part in parts]).mean(0)
    draws = torch.stack([restorer.draw(condition, part, text, 5) for part in parts[:2]]).mean(0)
    between = with_options(restorer, dial=0.25, samples=2, mean_draws=3)
    result = between._between(condition, torch.from_numpy(noise), text)
    torch.testing.assert_close(result, 0.75 * mean + 0.25 * draws)
    assert between.options.noises == 3
    assert with_options(restorer, dial=1, samples=2, mean_draws=9).options.noises == 2
    assert with_options(restorer, dial=0, samples=7, mean_draws=1).options.noises == 1


def test_a_network_that_adds_nothing_gives_the_interpolated_input(restorer: Restorer) -> None:
    """If the network draws a difference of zero, the residual is zero, and losses of the autoencoder have no effect."""
    still = with_options(restorer, relative=True, residual=True)

    def nothing(*args: object) -> torch.Tensor:
        return torch.zeros(len(LOW), CHANNELS, 2, 2)

    object.__setattr__(still, "draw", nothing)
    enlarged = enlarge(LOW, 4, "bicubic")
    np.testing.assert_allclose(still(LOW, noise_of(5)), enlarged, atol=1e-3)
    rebuilt = rebuilt_inputs(still.pipeline.vae, enlarged)
    assert np.abs(rebuilt - enlarged).mean() > 1  # a random autoencoder preserves little
    object.__setattr__(still, "options", replace(still.options, consistency=3))
    np.testing.assert_allclose(
        still(LOW, noise_of(5)), back_project(enlarged.astype(np.float32), LOW, 4, "area", 3), atol=1e-3
    )


def test_consistent_outputs_reduce_to_their_inputs(restorer: Restorer) -> None:
    bent = with_options(restorer, residual=True, relative=True, consistency=3)
    loose = replace(bent, options=replace(bent.options, consistency=0))
    errors = [np.abs(reduce(model(LOW, noise_of(5)), 4, "area") - LOW).max() for model in (loose, bent)]
    assert errors[0] > 5
    assert errors[1] < 0.5


def test_given_rebuilt_inputs_do_not_change_the_output(restorer: Restorer) -> None:
    model = with_options(restorer, residual=True, relative=True)
    rebuilt = rebuilt_inputs(model.pipeline.vae, enlarge(LOW, 4, "bicubic"))
    np.testing.assert_allclose(model(LOW, noise_of(5), rebuilt=rebuilt), model(LOW, noise_of(5)), atol=1e-3)


def test_the_text_names_the_level_of_the_added_noise() -> None:
    levels, rows = (0, 20), np.arange(40)
    low = np.full((40, 4, 4, 3), 128, np.uint8)
    shown, texts = _examples(low, rows, levels, 4, [""] * 40, seed=3)
    spread = shown.astype(float).std(axis=(1, 2, 3))
    assert set(texts) == {"noise 0", "noise 20"}
    quiet = np.array(texts) == "noise 0"
    assert spread[quiet].max() == 0 < 5 < spread[~quiet].min()
    again, same = _examples(low, rows, levels, 4, [""] * 40, seed=3)
    assert (again == shown).all() and same == texts
    assert with_level("a field", (0,), 0) == "a field"
    assert with_level("a field", levels, 0) == "noise 0 a field"


@pytest.mark.parametrize(
    ("options", "named"),
    [({"dial": 1.5}, "dial=1.5"), ({"samples": 0}, "samples=0"), ({"mean_draws": 0}, "mean_draws=0"),
     ({"consistency": -1}, "consistency=-1")],
)  # fmt: skip
def test_options_outside_their_range_are_refused(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=f"downstream.super_resolution.{named}: give"):
        replace(PLAIN, **options)
