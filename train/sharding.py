"""How a training lies over the processes of a launch: copies (DDP), shards (FSDP2), shared updates (DeepSpeed's ZeRO).

Which one is said by the config of `accelerate launch`. The latter two are PyTorch's and DeepSpeed's own functions, not
Accelerate's plugins: those run on GPUs alone, and these over gloo too, where tests compare all three.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from runtime.errors import UserError

Modules = Mapping[str, nn.Module]
NewOptimiser = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]

#: What the launcher tells its processes; hidden from Accelerate, which would set up its plugins.
FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
#: What AdamW keeps of every weight.
MOMENTS = ("exp_avg", "exp_avg_sq")
#: What a launch may choose of DeepSpeed's zero_optimization, and the defaults here: its buckets of 5e8 elements would
#: take more memory than sharing the updates of a network of this size saves.
ZERO = {
    "stage": 2,
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "overlap_comm": False,
    "contiguous_gradients": True,
    "reduce_scatter": True,
}


@dataclass(frozen=True)
class Sharding:
    """What a launch asks for.

    Args:
        kind: "copies", "fsdp" or "deepspeed".
        reshard: let go of a block's gathered weights after its forward pass (FSDP2).
        config: DeepSpeed's.
    """

    kind: str = "copies"
    reshard: bool = True
    config: dict[str, Any] = field(default_factory=dict)


COPIES = Sharding()


def requested() -> Sharding:
    """The sharding that the config of `accelerate launch` names.

    Raises:
        UserError: it asks for something that is not supported, or whose library is not there.
    """
    accumulation = os.environ.get(ACCUMULATION, "1")
    if accumulation not in ("1", "auto"):
        raise UserError(
            f"the launch sets gradient_accumulation_steps={accumulation}: leave it out, and give train.loop.micro_batch"
        )
    if _flag(FSDP):
        return _fsdp()
    return _deepspeed_zero() if _flag(DEEPSPEED) else COPIES


def _fsdp() -> Sharding:
    for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        if _flag(name):
            raise UserError(f"the launch sets {name.lower()}, which is not supported: leave it out of its config")
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError("the launch asks for FSDP 1: give fsdp_version: 2, as configs/accelerate/fsdp.yaml does")
    return Sharding("fsdp", reshard=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")


def _deepspeed_zero() -> Sharding:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "the launch asks for DeepSpeed, which is not installed: .venv/bin/python -m pip install '.[deepspeed]', or "
            "launch with configs/accelerate/fsdp.yaml"
        )
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    try:
        given = json.loads(Path(file).read_text()) if file else {}
        zero = {key: value for key, value in given.get("zero_optimization", {}).items() if value != "auto"}
        zero["stage"] = int(zero.get("stage", os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"DeepSpeed's config {file} cannot be read ({error}): give a JSON object with zero_optimization"
        ) from None
    strange = sorted(zero.keys() - ZERO.keys())
    devices = {os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("OPTIMIZER", "PARAM")}
    if strange or devices != {"none"}:
        wrong = ", ".join(strange) or "offloading"
        raise UserError(f"the launch sets {wrong} for DeepSpeed, which is not supported: leave it out of its config")
    if zero["stage"] not in (1, 2):
        raise UserError(
            f"DeepSpeed's zero_stage={zero['stage']} is not supported: give 1 or 2, or launch with "
            "configs/accelerate/fsdp.yaml, which spreads the weights too"
        )
    return Sharding("deepspeed", config={"zero_optimization": {**ZERO, **zero}})


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Keep the launch's sharding from Accelerate, which then sets up processes, device and precision alone."""
    found = {name: os.environ.pop(name) for name in (FSDP, DEEPSPEED, ACCUMULATION) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(found)


def layout_of(sharding: Sharding) -> type[Layout]:
    """The class of layouts that a kind of sharding names."""
    return {"copies": Copies, "fsdp": Shards, "deepspeed": SharedUpdates}[sharding.kind]


def check(sharding: Sharding, accelerator: Accelerator) -> None:
    """Refuse (UserError) a sharding without processes or with fp16."""
    if sharding.kind != "copies":
        if accelerator.scaler is not None:
            raise UserError(f"{sharding.kind} does not go with train.mixed_precision=fp16: give bf16 or no")
        if not torch.distributed.is_initialized():
            raise UserError(f"{sharding.kind} needs several processes: `accelerate launch --num_processes 2` or more")


class Layout(ABC):
    """The networks as they are trained, their running average, and what updates them.

    Args:
        modules: spread or copied over the processes, in place.
        average: plain copies of the modules, which will hold the averaged weights.
        new_optimiser: of a list of parameters.
        gradient_clip: largest gradient norm.
    Raises:
        UserError: sharding without processes or with fp16.

    Attributes:
        live: what to compute with.
        averaged: the average's weights, as spread as those of the modules, in the order of their parameters.
    """

    live: Modules
    averaged: dict[str, list[torch.Tensor]]

    def __init__(
        self,
        sharding: Sharding,
        accelerator: Accelerator,
        modules: Modules,
        average: Modules,
        new_optimiser: NewOptimiser,
        gradient_clip: float,
    ) -> None:
        check(sharding, accelerator)
        self.live = modules
        self._sharding, self._accelerator, self._average = sharding, accelerator, average
        self._gradient_clip = gradient_clip
        self._spread(modules)
        self._parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self._optimiser = new_optimiser(self._parameters)
        self._prepare()

    def _spread(self, modules: Modules) -> None:
        """Bring the modules to the device, and the averaged weights to where they are kept."""
        for module in (*modules.values(), *self._average.values()):
            module.to(self._accelerator.device)
        self.averaged = {name: list(module.parameters()) for name, module in self._average.items()}

    def _prepare(self) -> None:
        """What is to be done once there is an optimiser."""
        self._prepared = self._optimiser

    def begin(self, learning_rate: float) -> None:
        """Set the rate and forget the last step's gradients."""
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        self._optimiser.zero_grad(set_to_none=True)

    @abstractmethod
    def part(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of a part of the batch; after the last the gradients are the whole batch's."""

    def precision(self) -> contextlib.AbstractContextManager:
        """Around the forward pass."""
        return self._accelerator.autocast()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a part's loss."""
        loss.backward()

    def step(self) -> None:
        """Clip the gradients and update the weights."""
        nn.utils.clip_grad_norm_(self._parameters, self._gradient_clip)
        self._prepared.step()

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimiser's state, "<parameter>.<key>" and tensor, one at a time; all processes must ask for it."""
        for index, parameter in enumerate(self._parameters):
            for key, value in self._optimiser.state.get(parameter, {}).items():
                yield f"{index}.{key}", whole(value)

    def load_moments(self, moments: Mapping[str, torch.Tensor]) -> None:
        """Take up the optimiser's state from what `moments` gave, on any layout."""
        for name, value in moments.items():
            index, key = name.split(".", 1)
            parameter = self._parameters[int(index)]
            value = value.to(parameter.device)
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            self._optimiser.state[parameter][key] = value

    def average(self) -> Modules:
        """The averaged networks as plain modules, on the first process; all must ask for them."""
        return self._average

    def measuring(self) -> contextlib.AbstractContextManager:
        """While it lasts the averaged networks are on the device."""
        return contextlib.nullcontext()

    def finish(self, modules: Modules) -> Modules:
        """The trained networks without their average, as plain modules."""
        return modules


class Copies(Layout):
    """One process, or a copy of everything on each (DDP)."""

    def _prepare(self) -> None:
        *prepared, self._prepared = self._accelerator.prepare(*self.live.values(), self._optimiser)
        self.live = dict(zip(self.live, prepared, strict=True))

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module in self.live.values() if not last else ():
                stack.enter_context(self._accelerator.no_sync(module))
            yield

    def precision(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # Accelerate's own forward functions see to it

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def step(self) -> None:
        if self._accelerator.scaler is not None:
            # Accelerate's own clipping would unscale the gradients of earlier loops too
            self._accelerator.unscale_gradients(self._prepared)
        super().step()


class Shards(Layout):
    """Weights, average, gradients and moments spread over the processes block by block (FSDP2)."""

    def _spread(self, modules: Modules) -> None:
        mesh = init_device_mesh(self._accelerator.device.type, (self._accelerator.num_processes,))
        for module in modules.values():
            blocks = [
                block
                for child in module.children()
                for block in (child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child])
                if any(True for _ in block.parameters())
            ]
            for block in (*blocks, module):
                fully_shard(block, mesh=mesh, reshard_after_forward=self._sharding.reshard)
        self.averaged = {  # the copies themselves stay in the main memory
            name: [
                distribute_tensor(value.detach().to(like.device), like.device_mesh, like.placements).clone()
                for value, like in zip(self._average[name].parameters(), module.parameters(), strict=True)
            ]
            for name, module in modules.items()
        }

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        for module in self.live.values():
            module.set_requires_gradient_sync(last)
        yield

    @torch.no_grad()
    def average(self) -> Modules:
        for name, values in self.averaged.items():
            for target, value in zip(self._average[name].parameters(), values, strict=True):
                value = value.full_tensor()
                if self._accelerator.is_main_process:
                    target.copy_(value)
        return self._average

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        for module in self._average.values():
            module.to(self._accelerator.device)
        yield
        for module in self._average.values():
            module.cpu()

    def finish(self, modules: Modules) -> Modules:
        if self._accelerator.is_main_process:  # which alone goes on with them
            for module in self._average.values():
                module.to(self._accelerator.device)
        return self._average  # without a half-life the average is the last step's weights


class SharedUpdates(Layout):
    """Whole weights on each process, each of which updates its share of them (DeepSpeed's ZeRO, stages 1 and 2).

    Its own checkpoints are pickles, so the moments are taken out and put in tensor by tensor.
    """

    def _prepare(self) -> None:
        config = {
            **self._sharding.config,
            "gradient_clipping": self._gradient_clip,
            "train_micro_batch_size_per_gpu": 1,  # for its reports; batches are the loop's
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        networks = nn.ModuleDict(dict(self.live))
        self._engine, self._optimiser, *_ = _deepspeed(self._accelerator).initialize(
            model=networks, optimizer=self._optimiser, config=config
        )

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()
        if not self._engine.was_step_applied():  # it skips what is not finite, on all processes alike
            raise UserError(
                "a gradient is not finite: lower learning_rate, raise warmup, or give mixed_precision=no; run again, "
                "and it goes on from its last checkpoint"
            )

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = next(state["step"] for state in self._optimiser.optimizer.state.values())
        for index, parameter in enumerate(self._parameters):
            yield f"{index}.step", steps.clone()
            for key in MOMENTS:
                yield f"{index}.{key}", safe_get_full_optimizer_state(parameter, key)

    def load_moments(self, moments: Mapping[str, torch.Tensor]) -> None:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

        state, zero = self._optimiser.optimizer.state, self._optimiser
        steps = next(value for name, value in moments.items() if name.endswith(".step"))
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            state[flat]["step"] = steps.to(flat.device, copy=True)
            state[flat].update({key: torch.zeros_like(flat) for key in MOMENTS})
            lazy_init_hp_params_optimizer_state(group, flat, state)
        for index, parameter in enumerate(self._parameters):
            for key in MOMENTS:
                if f"{index}.{key}" in moments:  # not of a weight that never had a gradient
                    safe_set_full_optimizer_state(parameter, moments[f"{index}.{key}"].to(parameter.device), key)

    def finish(self, modules: Modules) -> Modules:
        self._engine.destroy()
        return modules


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")


def _deepspeed(accelerator: Accelerator) -> ModuleType:
    """DeepSpeed, quiet, on the device and the process group that Accelerate has set up."""
    if accelerator.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)  # not its own choice for this device
    return deepspeed


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over the processes; they all must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that may be spread over them."""
    return value.to_local() if isinstance(value, DTensor) else value
