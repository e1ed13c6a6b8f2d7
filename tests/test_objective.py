"""Objectives: noise, targets and weights compared with the papers' formulas; samplers remove the added noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from runtime.errors import UserError
from train.objective import Objective, denoising_loss, prediction_of

SHAPE = (4, 3, 5, 5)
DISCRETE = [
    Objective("epsilon"),
    Objective("v_prediction"),
    Objective("v_prediction", zero_terminal_snr=True),
]


def alphas(objective: Objective) -> np.ndarray:
    """Stable Diffusion's cumulative alphas, computed independently; rescaled as in Lin et al. (algorithm 1)."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.sqrt(np.cumprod(1 - betas))
    if objective.zero_terminal_snr:
        kept = (kept - kept[-1]) * kept[0] / (kept[0] - kept[-1])
    return kept**2


@pytest.mark.parametrize("objective", DISCRETE, ids=str)
def test_discrete_objectives_follow_their_formulas(objective: Objective) -> None:
    random = np.random.default_rng(0)
    latents = torch.from_numpy(random.standard_normal(SHAPE, dtype=np.float32))
    noise, time, _ = objective.draw(random, SHAPE)
    assert time.min() >= 0 and time.max() < 1000 and torch.equal(time, time.round())
    noisy, timesteps, target, weights = objective.noisy(latents, noise, time)
    assert weights is None and torch.equal(timesteps, time.long())
    fraction = torch.from_numpy(alphas(objective)[timesteps.numpy()]).float()[:, None, None, None]
    a, s = fraction.sqrt(), (1 - fraction).sqrt()
    torch.testing.assert_close(noisy, a * latents + s * noise, rtol=1e-4, atol=1e-4)
    expected = noise if objective.prediction == "epsilon" else a * noise - s * latents
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)


def test_times_cover_the_schedule_evenly() -> None:
    _, time, _ = Objective("epsilon").draw(np.random.default_rng(0), (1000, 1, 1, 1))
    assert sorted(time.int().tolist()) == list(range(1000))  # one in each stratum


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_follow_the_formula(prediction: str, gamma: float) -> None:
    """Hang et al. 2023, section 3.4: min(SNR, gamma) over SNR, and over SNR + 1 for v."""
    objective = Objective(prediction, min_snr_gamma=gamma)
    time = torch.tensor([0.0, 100.0, 500.0, 999.0])
    *_, weights = objective.noisy(torch.zeros(SHAPE), torch.zeros(SHAPE), time)
    fraction = alphas(objective)[time.long().numpy()]
    snr = fraction / (1 - fraction)
    expected = np.minimum(snr, gamma) / (snr if prediction == "epsilon" else snr + 1)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-3)


def test_min_snr_losses_of_both_prediction_types_are_equal() -> None:
    """A network with an error d of the predicted image has the same weighted loss for both prediction types."""
    time, difference = torch.tensor([300.0]), torch.randn(1, 3, 5, 5)
    losses = []
    for prediction in ("epsilon", "v_prediction"):
        objective = Objective(prediction, min_snr_gamma=5.0)
        fraction = float(alphas(objective)[300])
        error = (
            difference * (fraction / (1 - fraction)) ** 0.5
        )  # error of the noise, for an image error of `difference`
        error = error if prediction == "epsilon" else difference / (1 - fraction) ** 0.5
        *_, weights = objective.noisy(torch.zeros(1, 3, 5, 5), torch.zeros(1, 3, 5, 5), time)
        losses.append(float(denoising_loss(error, torch.zeros_like(error), weights)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    assert float(Objective("v_prediction", zero_terminal_snr=True).schedule.alphas_cumprod[-1]) == 0
    assert float(Objective("v_prediction").schedule.alphas_cumprod[-1]) > 0.001


def test_offset_noise_adds_one_value_per_image_and_channel() -> None:
    plain, *_ = Objective().draw(np.random.default_rng(3), (64, 4, 8, 8))
    offset, *_ = Objective(offset_noise=0.5).draw(np.random.default_rng(3), (64, 4, 8, 8))
    added = offset - plain
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added), rtol=0, atol=1e-6)
    assert float(added[..., 0, 0].std()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("objective", [Objective(), *DISCRETE], ids=str)
def test_the_sampler_of_an_objective_recovers_the_data(objective: Objective) -> None:
    """A network that knows the only image leads the sampler to it."""
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    scheduler = objective.scheduler()
    scheduler.set_timesteps(25)
    sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        if objective.prediction == "flow":
            fraction = float(step) / 1000
            message = (sample - latents) / fraction  # noise - latents, as x = (1 - t) latents + t noise
        else:
            fraction = float(alphas(objective)[int(step)])
            noise = (sample - fraction**0.5 * latents) / (1 - fraction) ** 0.5
            message = (
                noise if objective.prediction == "epsilon" else fraction**0.5 * noise - (1 - fraction) ** 0.5 * latents
            )
        sample = scheduler.step(message, step, sample).prev_sample
    torch.testing.assert_close(sample, latents, rtol=0, atol=0.08)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prediction": "x0"}, "prediction=x0"),
        ({"min_snr_gamma": 5.0}, "min_snr_gamma"),
        ({"prediction": "epsilon", "zero_terminal_snr": True}, "v_prediction"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
    ],
)
def test_invalid_or_incompatible_objective_options_are_refused(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Objective(**options)


def test_prediction_of_returns_the_prediction_type_of_a_scheduler() -> None:
    assert [prediction_of(objective.scheduler()) for objective in (Objective(), *DISCRETE[:2])] == [
        "flow",
        "epsilon",
        "v_prediction",
    ]
    assert prediction_of(FlowMatchEulerDiscreteScheduler()) == "flow"
    assert prediction_of(DDIMScheduler()) == "epsilon"
    assert prediction_of(DPMSolverMultistepScheduler(prediction_type="sample")) == "sample"
