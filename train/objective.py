"""The training objective: the prediction target, the distribution of noise and times, and the matching sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.training_utils import compute_snr
from scipy.special import expit, ndtri

from runtime.errors import UserError
from runtime.ranges import check_options

PREDICTIONS = ("flow", "epsilon", "v_prediction")
TIMESTEPS = 1000


@dataclass(frozen=True)
class Objective:
    """The training objective (docs/method.md, section 4).

    `flow` is rectified flow (Liu et al. 2022) with logit-normal times (Esser et al. 2024, section 3.1): the target is
    the velocity noise - latents at x_t = (1 - t) latents + t noise. `epsilon` (Ho et al. 2020) and `v_prediction`
    (Salimans and Ho 2022) use Stable Diffusion's 1000 discrete times, x_t = a_t latents + s_t noise.

    Args:
        prediction: flow, epsilon or v_prediction.
        time_mean, time_std: parameters of a normal distribution; the time is its logistic. Larger means train at
        noisier times. For `flow` only.
        caption_dropout: fraction of the captions replaced by the empty one, for classifier-free guidance.
        min_snr_gamma: weigh the loss by min(SNR, gamma) / SNR of the predicted noise (Hang et al. 2023); None: no
            weights. For `epsilon` and `v_prediction`.
        offset_noise: standard deviation of an additional noise value per image and channel (Guttenberg 2023).
        zero_terminal_snr: rescale the schedule so that its last step is pure noise (Lin et al. 2024, section 3.1). For
            `v_prediction`: with `epsilon` the last step would have nothing to learn, since its input is the target.
    Raises:
        UserError: an option does not apply to the prediction, or is out of its range.
    """

    prediction: str = "flow"
    time_mean: float = 0.0
    time_std: float = 1.0
    caption_dropout: float = 0.1
    min_snr_gamma: float | None = None
    offset_noise: float = 0.0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise UserError(f"train.objective.prediction={self.prediction}: give one of {', '.join(PREDICTIONS)}")
        if self.prediction == "flow" and self.min_snr_gamma is not None:
            raise UserError("train.objective.min_snr_gamma weighs epsilon and v_prediction, not flow: set it to null")
        if self.prediction != "v_prediction" and self.zero_terminal_snr:
            raise UserError("train.objective.zero_terminal_snr needs train.objective.prediction=v_prediction")
        check_options(
            self,
            "train.objective",
            fractions=("caption_dropout",),
            at_least_zero=("offset_noise",),
            above_zero=("time_std", "min_snr_gamma"),
        )

    @cached_property
    def schedule(self) -> DDPMScheduler:
        """The discrete noise schedule of `epsilon` and `v_prediction`: Stable Diffusion's."""
        return DDPMScheduler(
            num_train_timesteps=TIMESTEPS,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=self.prediction,
            rescale_betas_zero_snr=self.zero_terminal_snr,
        )

    def draw(
        self, random: np.random.Generator, shape: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise float32 `shape`, times float32 [B] and dropped captions bool [B] of one step, for the global batch.

        Times are stratified over the batch (one in each of B equal parts of the distribution), which lowers the
        variance. They lie in (0, 1) for `flow` and are integers below 1000 otherwise.
        """
        size = shape[0]
        noise = random.standard_normal(shape, dtype=np.float32)
        uniform = (random.permutation(size) + random.random(size)) / size
        if self.prediction == "flow":
            time = expit(self.time_mean + self.time_std * ndtri(uniform.clip(1e-6, 1 - 1e-6)))
        else:
            time = np.minimum(np.floor(uniform * TIMESTEPS), TIMESTEPS - 1)
        dropped = random.random(size) < self.caption_dropout
        if self.offset_noise:
            offsets = random.standard_normal((*shape[:2], *[1] * (len(shape) - 2)), dtype=np.float32)
            noise += np.float32(self.offset_noise) * offsets
        return torch.from_numpy(noise), torch.from_numpy(time.astype(np.float32)), torch.from_numpy(dropped)

    @property
    def last_time(self) -> float:
        """The time at which latents are pure noise, or the noisiest time of the schedule."""
        return 1.0 if self.prediction == "flow" else TIMESTEPS - 1.0

    def noisy(
        self, latents: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The network's input and target.

        Args:
            latents, noise: float [B, C, h, w].
            time: float [B] as `draw` gives it.
        Returns:
            x_t [B, C, h, w], the network's timesteps [B] in 0..1000, the target [B, C, h, w], the loss weights [B] or
            None if all images have the same weight.
        """
        if self.prediction == "flow":
            fraction = time[:, None, None, None]
            return (1 - fraction) * latents + fraction * noise, TIMESTEPS * time, noise - latents, None
        steps = time.long()
        noisy = self.schedule.add_noise(latents, noise, steps)
        target = noise if self.prediction == "epsilon" else self.schedule.get_velocity(latents, noise, steps)
        if self.min_snr_gamma is None:
            return noisy, steps, target, None
        snr = compute_snr(self.schedule, steps)
        # the squared error of the noise is SNR times that of the predicted image, the squared error of v SNR + 1 times
        weights = snr.clamp(max=self.min_snr_gamma) / (snr if self.prediction == "epsilon" else snr + 1)
        return noisy, steps, target, weights.float()

    def scheduler(self, shift: float = 1.0) -> DPMSolverMultistepScheduler:
        """DPM-Solver++ (2M) for a model of this objective; `shift` moves the steps of `flow` towards noise."""
        if self.prediction == "flow":
            return DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, timestep_spacing="linspace"
            )
        return DPMSolverMultistepScheduler.from_config(
            self.schedule.config,
            timestep_spacing="trailing" if self.zero_terminal_snr else "leading",
            steps_offset=0 if self.zero_terminal_snr else 1,
            thresholding=False,
        )


def denoising_loss(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Mean squared error of float [B, C, h, w] against the target, weighted per image [B]."""
    error = (prediction.float() - target.float()).square()
    return error.mean() if weights is None else (error.flatten(1).mean(1) * weights).mean()


def prediction_of(scheduler: SchedulerMixin) -> str:
    """The prediction type of a pipeline with this scheduler: flow, epsilon, v_prediction or the scheduler's own."""
    result = str(scheduler.config.get("prediction_type", "flow_prediction"))  # flow-matching schedulers lack it
    return "flow" if result == "flow_prediction" else result
