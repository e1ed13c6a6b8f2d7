"""The exponential moving average of weights that a training returns."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

Modules = Mapping[str, nn.Module]

#: Largest half-life as a fraction of the images seen.
RAMPUP = 0.1


class Average:
    """Exponential moving average of the weights of several modules, with a half-life that rises with training.

    The half-life is min(halflife, 0.1 * images seen), and an update keeps 0.5 ** (batch_size / half-life) of the
    average. This corresponds to `ema_halflife_kimg` and `ema_rampup_ratio` of EDM (Karras et al. 2022), after the
    rampup of StyleGAN2-ADA (Karras et al. 2020). EDM2 (Karras et al. 2024) calls it the traditional average.

    Weights that are sharded over processes (DTensor of FSDP2) are averaged shard by shard.

    Args:
        modules: the modules before Accelerate prepares them; they are copied.
        halflife: in images; 0: no averaging, the average equals the weights.
        batch_size: images per step.

    Attributes:
        modules: the averaged modules, without gradients, in evaluation mode. Copies of sharded modules are complete
            only after `gather`, on the processes that keep them; at other times they are in main memory.
    """

    def __init__(self, modules: Modules, halflife: float, batch_size: int) -> None:
        self.modules = {name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in modules.items()}
        self._halflife, self._batch_size = halflife, batch_size

    def follow(self, modules: Modules, device: torch.device, keep: bool) -> None:
        """Start to average the weights of `modules`, from the current values of `self.modules`.

        Args:
            modules: the modules given to the constructor, now prepared by Accelerate.
            device: where the averages are kept.
            keep: whether this process wants the averages of sharded modules from `gather`.
        """
        self._live, self._device, self._keep = modules, device, keep
        self._weights = [weight for module in modules.values() for weight in module.parameters()]
        self._sharded = any(isinstance(weight, DTensor) for weight in self._weights)
        if not self._sharded:
            self._move(device)
        self._averages = [_like(copied, weight) for copied, weight in zip(self._copies(), self._weights, strict=True)]

    def decay(self, step: int) -> float:
        """The fraction of the average that is kept by the update after this one-based step."""
        halflife = min(self._halflife, RAMPUP * step * self._batch_size)
        return 0.5 ** (self._batch_size / halflife) if halflife else 0.0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after this one-based step."""
        averages, weights = ([_local(tensor) for tensor in given] for given in (self._averages, self._weights))
        torch._foreach_lerp_(averages, weights, 1 - self.decay(step))

    @torch.no_grad()
    def gather(self) -> Modules:
        """The averaged modules, with the buffers of the trained modules; all processes must call it together."""
        for copied, average in zip(self._copies(), self._averages, strict=True) if self._sharded else ():
            whole = average.full_tensor()
            if self._keep:
                copied.copy_(whole)
        for name, module in self._live.items():
            for target, source in zip(self.modules[name].buffers(), module.buffers(), strict=True):
                target.copy_(source)
        if self._keep:
            self._move(self._device)
        return self.modules

    def release(self) -> None:
        """Free the device memory that `gather` used."""
        if self._sharded:
            self._move(torch.device("cpu"))

    def _copies(self) -> list[nn.Parameter]:
        return [weight for module in self.modules.values() for weight in module.parameters()]

    def _move(self, device: torch.device) -> None:
        for module in self.modules.values():
            module.to(device)


def _like(copied: nn.Parameter, weight: torch.Tensor) -> torch.Tensor:
    """The tensor to update: the copy itself or, if the weight is sharded, the same shard of the copy."""
    if not isinstance(weight, DTensor):
        return copied
    return distribute_tensor(copied.detach().to(weight.device), weight.device_mesh, weight.placements).clone()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
