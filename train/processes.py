"""The networks of a training, distributed over the processes of a launch by Accelerate: DDP, FSDP2 or DeepSpeed.

This module handles the differences between the three: how to collect a complete checkpoint on the first process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from runtime.errors import UserError
from train.ema import Modules

#: Optimizer state that AdamW keeps for every weight.
MOMENTS = ("exp_avg", "exp_avg_sq")


class Networks(nn.Module):
    """Several networks as one module: Accelerate's plugins accept one, and gather weights only for its `forward`."""

    def __init__(self, modules: Modules) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(modules)

    def forward(self, compute_loss: Callable[[Modules, Any], torch.Tensor], batch: Any) -> torch.Tensor:
        """The loss that `compute_loss` computes with the networks."""
        return compute_loss(dict(self.networks.items()), batch)


def prepare(
    accelerator: Accelerator,
    modules: Modules,
    new_optimizer: Callable[..., torch.optim.Optimizer],
    gradient_clip: float,
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Prepare the networks, as one module, and an optimizer of their trainable weights with `Accelerator.prepare`.

    Raises:
        UserError: FSDP or DeepSpeed is used with a scalar weight, such as CLIP's temperature.
    """
    networks = Networks(modules)
    optimizer = new_optimizer([weight for weight in networks.parameters() if weight.requires_grad])
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    scalars = [name for name, weight in networks.named_parameters() if weight.ndim == 0]
    if sharded and scalars:
        raise UserError(
            f"FSDP and DeepSpeed do not support scalar weights such as {scalars[0].removeprefix('networks.')}: train "
            "this network first with the same command under configs/accelerate/multi_gpu.yaml; finished stages are kept"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = _blocks(modules)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "gradient_clipping": gradient_clip,
            "train_micro_batch_size_per_gpu": 1,  # only for DeepSpeed's reports: the loop makes the batches
            "train_batch_size": accelerator.num_processes,
        }
    return accelerator.prepare(networks, optimizer)


def _blocks(modules: Modules) -> list[str]:
    """Class names of the sequential blocks of the networks; FSDP2 gathers one block at a time."""
    lists = [child for module in modules.values() for child in module.children() if isinstance(child, nn.ModuleList)]
    return sorted(
        {type(block).__name__ for blocks in lists for block in blocks if any(True for _ in block.parameters())}
    )


def network_tensors(accelerator: Accelerator, model: nn.Module, modules: Modules) -> dict[str, dict[str, torch.Tensor]]:
    """The complete state of every network by its name; sharded weights on the first process only. All must call it."""
    state = accelerator.get_state_dict(model)
    prefixes = {name: f"networks.{name}." for name in modules}
    return {
        name: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for name, prefix in prefixes.items()
    }


def optimizer_tensors(
    accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's complete state as "<weight>.<key>", on the CPU of the first process. All must call it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed_tensors(model, optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    result = get_optimizer_state_dict(model, optimizer.optimizer, options=options).get("state", {})
    return {f"{name}.{key}": value for name, state in result.items() for key, value in state.items()}


def load_optimizer_tensors(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Load the state from `optimizer_tensors`, under this kind of launch or another. All processes must call it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _load_deepspeed_tensors(model, optimizer, tensors)
        return
    fresh = get_optimizer_state_dict(model, optimizer.optimizer)
    state = {  # a weight that never had a gradient has no saved state and starts without one
        name: {key: tensors.get(f"{name}.{key}", torch.zeros_like(value)) for key, value in of_weight.items()}
        for name, of_weight in fresh["state"].items()
    }
    whole = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer.optimizer, {**fresh, "state": state}, options=whole)


def _deepspeed_tensors(model: nn.Module, optimizer: AcceleratedOptimizer) -> dict[str, torch.Tensor]:
    """Like `optimizer_tensors`, for DeepSpeed; DeepSpeed's own checkpoints are pickle files."""
    from deepspeed.utils import safe_get_full_optimizer_state

    step = next(iter(optimizer.optimizer.optimizer.state.values()))["step"]
    result = {}
    for name, weight in model.module.named_parameters():
        if weight.requires_grad:
            result[f"{name}.step"] = step.detach().cpu().clone()
            for key in MOMENTS:
                result[f"{name}.{key}"] = safe_get_full_optimizer_state(weight, key).cpu()
    return result


def _load_deepspeed_tensors(
    model: nn.Module, optimizer: AcceleratedOptimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Like `load_optimizer_tensors`, for DeepSpeed, which can set the moments of a weight only after a first step."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

    zero = optimizer.optimizer
    step = next(value for key, value in tensors.items() if key.endswith(".step"))
    for weights, shard in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        moments = {key: torch.zeros_like(shard) for key in MOMENTS}
        zero.optimizer.state[shard] = {"step": step.to(shard.device, copy=True), **moments}
        lazy_init_hp_params_optimizer_state(weights, shard, zero.optimizer.state)
    for name, weight in model.module.named_parameters():
        for key in MOMENTS:
            if (value := tensors.get(f"{name}.{key}")) is not None:
                safe_set_full_optimizer_state(weight, value.to(weight.device), key)
