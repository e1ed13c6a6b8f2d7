"""How a training lies over the processes of a launch: copies (DDP), shards (FSDP2), shared updates (DeepSpeed's ZeRO).

Which one is said by the config of `accelerate launch`. The latter two are PyTorch's and DeepSpeed's own functions, not
Accelerate's plugins: those run on GPUs alone, and these over gloo too, where tests compare all three.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from corpus.errors import UserError

Modules = Mapping[str, nn.Module]
NewOptimiser = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]

#: What the launcher tells its processes; hidden from Accelerate, which would set up its plugins.
FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
#: What AdamW keeps of every weight.
MOMENTS = ("exp_avg", "exp_avg_sq")


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
        UserError: it asks for something that is not supported.
    """
    if _flag(FSDP):
        for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
            if _flag(name):
                raise UserError(f"the launch sets {name.lower()}, which is not supported: leave it out of its config")
        return Sharding("fsdp", reshard=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")
    if not _flag(DEEPSPEED):
        return Sharding()
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    try:
        given = json.loads(Path(file).read_text()) if file else {}
    except (OSError, ValueError) as error:
        raise UserError(f"DeepSpeed's config {file} cannot be read ({error}): give the path of a JSON file") from None
    zero = {key: value for key, value in given.get("zero_optimization", {}).items() if value != "auto"}
    zero.setdefault("stage", int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    if offload != "none":
        zero.setdefault("offload_optimizer", {"device": offload})
    if zero["stage"] not in (1, 2):
        raise UserError(
            f"DeepSpeed's zero_stage={zero['stage']} is not supported: give 1 or 2, or launch with "
            "configs/accelerate/fsdp.yaml, which spreads the weights too"
        )
    return Sharding("deepspeed", config={"zero_optimization": zero})


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Keep the launch's sharding from Accelerate, which then sets up processes, device and precision alone."""
    found = {name: os.environ.pop(name) for name in (FSDP, DEEPSPEED) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(found)


class Layout(Protocol):
    """The networks as they are trained, their running average, and what updates them.

    Attributes:
        live: what to compute with.
        averaged: the average's weights, as spread as those of the modules, in the order of their parameters.
    """

    live: Modules
    averaged: dict[str, list[torch.Tensor]]

    def begin(self, learning_rate: float) -> None:
        """Forget the last step's gradients."""

    def part(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of a part of the batch; after the last the processes exchange gradients."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a part's loss."""

    def step(self) -> None:
        """Clip the gradients and update the weights."""

    def moments(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The optimiser's state, "<parameter>.<key>" and tensor, one at a time; all processes must ask for it."""

    def load_moments(self, moments: Mapping[str, torch.Tensor]) -> None:
        """Take up the optimiser's state from what `moments` gave, on any layout."""

    def average(self) -> Modules:
        """The averaged networks as plain modules; all processes must ask for them."""

    def measuring(self) -> contextlib.AbstractContextManager:
        """While it lasts the averaged networks are on the device."""

    def finish(self) -> None:
        """Leave the modules as plain ones that go on by themselves, if they can."""


def lay_out(
    sharding: Sharding,
    accelerator: Accelerator,
    modules: Modules,
    average: Modules,
    new_optimiser: NewOptimiser,
    gradient_clip: float,
) -> Layout:
    """Spread or copy `modules` over the processes, in place.

    Args:
        average: plain copies of the modules, which will hold the averaged weights.
        new_optimiser: of a list of parameters.
        gradient_clip: largest gradient norm.
    Raises:
        UserError: sharding without processes, with fp16, or without the library.
    """
    if sharding.kind != "copies":
        if accelerator.scaler is not None:
            raise UserError(f"{sharding.kind} does not go with train.mixed_precision=fp16: give bf16 or no")
        if not torch.distributed.is_initialized():
            raise UserError(f"{sharding.kind} needs several processes: `accelerate launch --num_processes 2` or more")
    for module in modules.values():
        module.to(accelerator.device)
    if sharding.kind == "fsdp":
        return Shards(sharding, accelerator, modules, average, new_optimiser, gradient_clip)
    for module in average.values():
        module.to(accelerator.device)
    if sharding.kind == "deepspeed":
        return SharedUpdates(sharding, accelerator, modules, average, new_optimiser, gradient_clip)
    return Copies(accelerator, modules, average, new_optimiser, gradient_clip)


class Copies:
    """One process, or a copy of everything on each (DDP)."""

    def __init__(
        self,
        accelerator: Accelerator,
        modules: Modules,
        average: Modules,
        new_optimiser: NewOptimiser,
        gradient_clip: float,
    ) -> None:
        self._accelerator, self._average, self._gradient_clip = accelerator, average, gradient_clip
        self._parameters = _trainable(modules)
        self._optimiser = new_optimiser(self._parameters)
        *prepared, self._prepared = accelerator.prepare(*modules.values(), self._optimiser)
        self.live = dict(zip(modules, prepared, strict=True))
        self.averaged = {name: list(module.parameters()) for name, module in average.items()}

    def begin(self, learning_rate: float) -> None:
        _begin(self._optimiser, learning_rate)

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module in self.live.values() if not last else ():
                stack.enter_context(self._accelerator.no_sync(module))
            yield

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def step(self) -> None:
        if self._accelerator.scaler is not None:
            self._accelerator.unscale_gradients(self._prepared)  # clipping by Accelerate would for earlier loops' too
        nn.utils.clip_grad_norm_(self._parameters, self._gradient_clip)
        self._prepared.step()

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        return _moments(self._parameters, self._optimiser)

    def load_moments(self, moments: Mapping[str, torch.Tensor]) -> None:
        _load_moments(moments, self._parameters, self._optimiser)

    def average(self) -> Modules:
        return self._average

    def measuring(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def finish(self) -> None:
        pass


class Shards:
    """Weights, average, gradients and moments spread over the processes block by block (FSDP2)."""

    def __init__(
        self,
        sharding: Sharding,
        accelerator: Accelerator,
        modules: Modules,
        average: Modules,
        new_optimiser: NewOptimiser,
        gradient_clip: float,
    ) -> None:
        self._accelerator, self._average, self.live = accelerator, average, modules
        self._gradient_clip = gradient_clip
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for module in modules.values():
            blocks = [
                block
                for child in module.children()
                for block in (child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child])
                if any(True for _ in block.parameters())
            ]
            for block in blocks:
                fully_shard(block, mesh=mesh, reshard_after_forward=sharding.reshard)
            fully_shard(module, mesh=mesh, reshard_after_forward=sharding.reshard)
        self._parameters = _trainable(modules)
        self._optimiser = new_optimiser(self._parameters)
        self.averaged = {  # the copies themselves stay in the main memory
            name: [
                distribute_tensor(value.detach().to(like.device), like.device_mesh, like.placements).clone()
                for value, like in zip(average[name].parameters(), module.parameters(), strict=True)
            ]
            for name, module in modules.items()
        }

    def begin(self, learning_rate: float) -> None:
        _begin(self._optimiser, learning_rate)

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        for module in self.live.values():
            module.set_requires_gradient_sync(last)
        with self._accelerator.autocast():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self._parameters, self._gradient_clip)
        self._optimiser.step()

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        return _moments(self._parameters, self._optimiser)

    def load_moments(self, moments: Mapping[str, torch.Tensor]) -> None:
        _load_moments(moments, self._parameters, self._optimiser)

    @torch.no_grad()
    def average(self) -> Modules:
        for name, values in self.averaged.items():
            for target, value in zip(self._average[name].parameters(), values, strict=True):
                target.copy_(value.full_tensor())
        return self._average

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        for module in self._average.values():
            module.to(self._accelerator.device)
        yield
        for module in self._average.values():
            module.cpu()

    def finish(self) -> None:
        if self._accelerator.is_main_process:  # which alone goes on with it
            for module in self._average.values():
                module.to(self._accelerator.device)


class SharedUpdates:
    """Whole weights on each process, each of which updates its share of them (DeepSpeed's ZeRO, stages 1 and 2).

    Its own checkpoints are pickles, so the moments are taken out and put in tensor by tensor.
    """

    def __init__(
        self,
        sharding: Sharding,
        accelerator: Accelerator,
        modules: Modules,
        average: Modules,
        new_optimiser: NewOptimiser,
        gradient_clip: float,
    ) -> None:
        deepspeed = _deepspeed(accelerator)
        self._accelerator, self._average, self.live = accelerator, average, modules
        self._parameters = _trainable(modules)
        config = {
            **sharding.config,
            "gradient_clipping": gradient_clip,
            "train_micro_batch_size_per_gpu": 1,  # for its reports; batches are the loop's
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        self._engine, self._optimiser, *_ = deepspeed.initialize(
            model=nn.ModuleDict(dict(modules)), optimizer=new_optimiser(self._parameters), config=config
        )
        self.averaged = {name: list(module.parameters()) for name, module in average.items()}

    def begin(self, learning_rate: float) -> None:
        _begin(self._optimiser, learning_rate)

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        with self._accelerator.autocast():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

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
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            state[flat]["step"] = moments["0.step"].to(flat.device, copy=True)
            state[flat].update({key: torch.zeros_like(flat) for key in MOMENTS})
            lazy_init_hp_params_optimizer_state(group, flat, state)
        for index, parameter in enumerate(self._parameters):
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, moments[f"{index}.{key}"].to(parameter.device), key)

    def average(self) -> Modules:
        return self._average

    def measuring(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def finish(self) -> None:
        self._engine.destroy()


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")


def _deepspeed(accelerator: Accelerator) -> ModuleType:
    """DeepSpeed, quiet, on the device and the process group that Accelerate has set up."""
    if accelerator.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError as error:
        raise UserError(
            f"the launch asks for DeepSpeed, which cannot be imported ({error}): pip install 'rs-prune[deepspeed]', "
            "or launch with configs/accelerate/fsdp.yaml"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)
    return deepspeed


def _trainable(modules: Modules) -> list[nn.Parameter]:
    return [weight for module in modules.values() for weight in module.parameters() if weight.requires_grad]


def _begin(optimiser: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.zero_grad(set_to_none=True)


def _moments(
    parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer
) -> Iterator[tuple[str, torch.Tensor]]:
    for index, parameter in enumerate(parameters):
        for key, value in optimiser.state.get(parameter, {}).items():
            yield f"{index}.{key}", whole(value)


def _load_moments(
    moments: Mapping[str, torch.Tensor], parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    for name, value in moments.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        value = value.to(parameter.device)
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        optimiser.state[parameter][key] = value


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over the processes; they all must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that may be spread over them."""
    return value.to_local() if isinstance(value, DTensor) else value
