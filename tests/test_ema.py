"""The running average of weights compared with sums over the history of the weights, complete and sharded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from train.ema import Average

CPU = torch.device("cpu")


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def moved(average: Average, modules: dict[str, nn.Module], steps: int) -> list[dict[str, np.ndarray]]:
    """Weights of all steps, each added to the average; they are changed in place, as by an optimizer."""
    history = []
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        for module in modules.values():
            for weight in module.parameters():
                local = weight.to_local() if isinstance(weight, DTensor) else weight
                local.data += torch.randn(local.shape, generator=generator)
        average.update(step)
        history.append({name: weight.detach().clone().numpy() for name, weight in modules["net"].named_parameters()})
    return history


def test_the_average_is_the_weighted_sum_of_all_past_weights() -> None:
    """The weight of step k is (1 - b_k) times the product of all later b; the initial weights get the remainder."""
    modules, batch, halflife = {"net": network(0), "other": network(1)}, 4, 32
    start = {name: weight.detach().numpy().copy() for name, weight in modules["net"].named_parameters()}
    average = Average(modules, halflife, batch)
    average.follow(modules, CPU, keep=True)
    history = moved(average, modules, 100)
    kept = [0.5 ** (batch / min(halflife, 0.1 * step * batch)) for step in range(1, 101)]
    later = np.append(np.cumprod(kept[::-1])[::-1], 1.0)
    result = dict(average.gather()["net"].named_parameters())
    for name, weight in result.items():
        past = np.stack([step[name] for step in history]).astype(np.float64)
        terms = [(1 - b) * rest * value for b, rest, value in zip(kept, later[1:], past, strict=True)]
        np.testing.assert_allclose(weight, np.sum(terms, 0) + later[0] * start[name], rtol=1e-4, atol=1e-5)


def test_after_a_half_life_old_weights_contribute_one_half() -> None:
    modules = {"net": nn.Linear(3, 2)}
    nn.init.ones_(modules["net"].weight)
    average = Average(modules, halflife=32, batch_size=4)
    nn.init.zeros_(modules["net"].weight)
    average.follow(modules, CPU, keep=True)
    for step in range(500, 508):  # long after the ramp; eight steps of four images are a half-life
        average.update(step)
    torch.testing.assert_close(average.gather()["net"].weight, torch.full((2, 3), 0.5))


@pytest.mark.parametrize(("step", "halflife"), [(1, 0.4), (10, 4.0), (79, 31.6), (80, 32.0), (400, 32.0)])
def test_the_half_life_rises_with_the_images_seen(step: int, halflife: float) -> None:
    """It is a tenth of the images seen, `0.1 * step * batch`, up to the requested one."""
    assert Average({}, halflife=32, batch_size=4).decay(step) == pytest.approx(0.5 ** (4 / halflife), rel=1e-9)


def test_without_a_half_life_the_average_equals_the_weights_and_buffers() -> None:
    modules = {"net": network(0)}
    average = Average(modules, halflife=0, batch_size=4)
    average.follow(modules, CPU, keep=True)
    moved(average, modules, 3)
    modules["net"][1].running_mean += 2
    result = average.gather()["net"]
    assert result is not modules["net"] and not result.training
    assert not any(weight.requires_grad for weight in result.parameters())
    for key, value in modules["net"].state_dict().items():
        assert torch.equal(result.state_dict()[key], value), key


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group with only this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("keep", [True, False])
def test_sharded_weights_are_averaged_like_unsharded_weights(keep: bool) -> None:
    """FSDP2's weights; a process that does not keep the average is left with the former values."""
    averages = []
    for sharded in (False, True):
        modules = {"net": network(0)}
        average = Average(modules, halflife=32, batch_size=4)
        if sharded:
            fully_shard(modules["net"], mesh=init_device_mesh("cpu", (1,)))
            assert all(isinstance(weight, DTensor) for weight in modules["net"].parameters())
        average.follow(modules, CPU, keep=keep or not sharded)
        for step in range(1, 11):
            for weight in modules["net"].parameters():
                local = weight.to_local() if sharded else weight
                local.data += step
            average.update(step)
        averages.append(average.gather()["net"].state_dict())
        average.release()
    for key, value in averages[0].items():
        expected = value if keep else network(0).state_dict()[key]
        assert type(averages[1][key]) is torch.Tensor and torch.equal(averages[1][key], expected), key
