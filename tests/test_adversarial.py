"""The critic of textures: the gradients of both losses, and its effect on a decoder's detail."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from train.adversarial import PROBE, SMOOTHNESS, Bands, Critic, adversarial_losses


def test_each_loss_has_gradients_only_for_its_own_network() -> None:
    torch.manual_seed(0)
    critic, images = Critic(width=8), torch.rand(2, 3, 32, 32) * 2 - 1
    made = images.clone().requires_grad_()
    of_decoder, of_critic = adversarial_losses(critic, images, made)
    (gradient,) = torch.autograd.grad(of_decoder, made, retain_graph=True)
    assert gradient.abs().max() > 0
    of_decoder.backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in critic.parameters())
    made.grad = None
    of_critic.backward()
    assert made.grad is None
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_the_losses_are_logistic_and_the_critic_has_a_smoothness_penalty() -> None:
    torch.manual_seed(0)
    critic = nn.Conv2d(3, 1, 1)
    real, made = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    torch.manual_seed(1)
    of_decoder, of_critic = adversarial_losses(critic, real, made)
    torch.manual_seed(1)
    change = functional.conv2d(PROBE * torch.randn(8, 3, 8, 8), critic.weight)
    right = -functional.logsigmoid(critic(real)).mean() - functional.logsigmoid(-critic(made)).mean()
    torch.testing.assert_close(of_critic, right + 2 * SMOOTHNESS * change.square().mean())
    torch.testing.assert_close(of_decoder, -functional.logsigmoid(critic(made)).mean())


def test_bands_are_the_image_and_its_difference_from_the_smoothed_image() -> None:
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    bands = Bands()(images)
    smooth = functional.conv2d(images, torch.full((3, 1, 3, 3), 1 / 9, dtype=torch.float64), groups=3)
    torch.testing.assert_close(bands[:, :3], images)
    torch.testing.assert_close(bands[:, 3:6, 1:-1, 1:-1], 10 * (images[..., 1:-1, 1:-1] - smooth))
    assert Bands()(torch.full((1, 3, 16, 16), 0.7))[:, 3:].abs().max() < 1e-5  # also at the edges
