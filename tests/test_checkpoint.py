"""Checkpoints: complete or absent, only the newest K, only safetensors and JSON."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train import checkpoint
from train.checkpoint import Checkpoints


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "a.half": torch.randn(5, generator=generator).bfloat16(),
        "steps": torch.tensor(float(seed)),
        "view": torch.randn(4, 3, generator=generator).T,  # not contiguous
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoint_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.newest() is None and checkpoints.metadata() == {}
    for step in (90, 100):
        checkpoints.save(step, {"net": tensors(step), "net_average": tensors(-step)}, {"step": step, "losses": [0.1]})
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.newest() == tmp_path / "checkpoints" / "00000100"
    assert again.metadata() == {"step": 100, "losses": [0.1]}
    for name, seed in (("net", 100), ("net_average", -100)):
        result = again.tensors(name)
        assert result.keys() == tensors(seed).keys()
        for key, value in tensors(seed).items():
            assert result[key].dtype == value.dtype and torch.equal(result[key], value)


def test_only_the_newest_k_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "00000030.partial").mkdir()
    for step in (9, 10, 40, 100):
        checkpoints.save(step, {"net": tensors(step)}, {})
    assert names(tmp_path) == ["00000040", "00000100"]
    assert names(tmp_path / "00000100") == ["net.safetensors", "state.json"]  # no pickle
    checkpoints.save(100, {"net": tensors(1)}, {"again": True})  # the same step again
    assert checkpoints.metadata() == {"again": True} and torch.equal(
        checkpoints.tensors("net")["steps"], torch.tensor(1.0)
    )


@pytest.mark.parametrize("fails_at", ["second file", "metadata", "rename"])
def test_an_interrupted_write_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"net": tensors(3), "optimizer": tensors(4)}, {"step": 3})

    def killed(*given: object) -> None:
        if fails_at != "second file" or "optimizer" in str(given[1]):
            raise KeyboardInterrupt
        save_file(*given)

    save_file = checkpoint.save_file
    target = {
        "second file": (checkpoint, "save_file"),
        "metadata": (checkpoint, "write_json"),
        "rename": (checkpoint.os, "rename"),
    }
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*target[fails_at], killed)
        checkpoints.save(6, {"net": tensors(6), "optimizer": tensors(7)}, {"step": 6})
    assert names(tmp_path) == ["00000003", "00000006.partial"]
    assert checkpoints.metadata() == {"step": 3} and torch.equal(checkpoints.tensors("net")["view"], tensors(3)["view"])

    checkpoints.save(6, {"net": tensors(8), "optimizer": tensors(9)}, {"step": 6})
    assert names(tmp_path) == ["00000006"]
    assert torch.equal(load_file(tmp_path / "00000006" / "optimizer.safetensors")["view"], tensors(9)["view"])
