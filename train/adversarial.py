"""An adversarial critic of textures, so that a decoder draws detail that the latents do not determine, not its mean."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

#: Standard deviation of the noise for measuring the critic's smoothness; images are in [-1, 1].
PROBE = 0.05
#: Weight of the smoothness penalty.
SMOOTHNESS = 2.0
#: The two bands of detail: each is the difference of the means over two windows (side, side), times a gain.
BANDS = ((1, 3, 10.0), (3, 9, 5.0))


class Bands(nn.Module):
    """Append two bands of detail to images: float [B, 3, H, W] to [B, 9, H, W].

    The texture of ground spans a few grey levels. A critic of plain pixels needs thousands of steps to notice it.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images, *(gain * (_mean(images, a) - _mean(images, b)) for a, b, gain in BANDS)], dim=1)


def _mean(images: torch.Tensor, side: int) -> torch.Tensor:
    """Replace every pixel by the mean of the window around it; the image is mirrored at its edges."""
    half = side // 2
    return functional.avg_pool2d(functional.pad(images, (half,) * 4, mode="reflect"), side, stride=1)


class Critic(nn.Sequential):
    """A patch discriminator (Isola et al. 2017, section 3.2.2): float [B, 3, H, W] to one logit per patch."""

    def __init__(self, width: int = 48, levels: int = 3) -> None:
        layers: list[nn.Module] = [Bands(), nn.Conv2d(9, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(levels - 1):
            layers += [
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
                nn.GroupNorm(8, 2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        super().__init__(*layers, nn.Conv2d(width, 1, 3, padding=1))


def adversarial_losses(critic: nn.Module, real: torch.Tensor, made: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of the decoder and of the critic; neither has a gradient for the other network.

    Non-saturating logistic losses (Goodfellow et al. 2014, section 3). The critic's loss includes a penalty on its
    change under small noise, a finite-difference replacement of R1's gradient (Lin et al. 2025, arXiv 2501.08316,
    section 3.4).

    Args:
        real, made: float [B, 3, H, W] in [-1, 1]; `made` carries the decoder's gradient.
    """
    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    of_decoder = functional.softplus(-functional_call(critic, frozen, (made,)).float()).mean()
    images = torch.cat([real, made.detach()])
    logits, probed = (critic(part).float() for part in (images, images + PROBE * torch.randn_like(images)))
    sign = torch.ones_like(logits)
    sign[: len(real)] = -1
    of_critic = 2 * functional.softplus(sign * logits).mean() + 2 * SMOOTHNESS * (logits - probed).square().mean()
    return of_decoder, of_critic
