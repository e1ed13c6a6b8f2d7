"""Half precision and compiled networks in the loop, in separate processes, because Accelerate's state is global."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
STEPS = 24
SCRIPT = f"""
import json, sys
from pathlib import Path
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from train.loop import LoopOptions, train_loop

directory, stop_at, compiled = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
scale = float(sys.argv[4])
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
target = np.random.default_rng(9).standard_normal((16, 1), dtype=np.float32)
calls, types = [0], set()
net[0].register_forward_hook(lambda module, given, output: types.add(str(output.dtype).removeprefix("torch.")))


def draw(random, rows):
    numbers = random.standard_normal((32, 16), dtype=np.float32)
    return torch.from_numpy(numbers)[rows], torch.from_numpy(numbers @ target)[rows]


def loss(modules, batch):
    calls[0] += 1
    if calls[0] == stop_at:
        raise KeyboardInterrupt
    return scale * (modules["net"](batch[0]).float() - batch[1]).square().mean()


options = LoopOptions(steps={STEPS}, batch_size=32, learning_rate=1e-2, warmup=4, ema_halflife=64,
                      checkpoint_every=8, seed=5, compile=compiled)
try:
    accelerator = Accelerator(cpu=True)
except (ValueError, RuntimeError) as error:
    print(json.dumps({{"refused": " ".join(str(error).split())}}))
    sys.exit()
if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
    # on the CPU Accelerate leaves fp16 out in silence: set up what it sets up on a GPU
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
best = train_loop(accelerator, {{"net": net}}, draw, loss, options, directory, label="t")
print(json.dumps({{
    "precision": accelerator.mixed_precision,
    "types": sorted(types),
    "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    "bits": {{key: value.numpy().tobytes().hex() for key, value in best["net"].state_dict().items()}},
}}))
"""


@dataclass(frozen=True)
class Trained:
    """Output of a process, and the metadata and weights of its newest checkpoint."""

    message: dict[str, Any]
    state: dict[str, Any]
    weights: dict[str, torch.Tensor]


def process(
    directory: Path, precision: str, *, stop_at: int = 0, compiled: bool = False, scale: float = 0.01
) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_MIXED_PRECISION": precision, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(directory), str(stop_at), str(compiled), str(scale)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def newest(directory: Path) -> Path:
    return max((directory / "checkpoints").iterdir())


def trained(directory: Path, precision: str = "no", **options: float) -> Trained:
    """A complete training; the test is skipped if Accelerate refuses the precision."""
    done = process(directory, precision, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    message = json.loads(done.stdout.strip().splitlines()[-1])
    if "refused" in message:
        pytest.skip(f"Accelerate refuses mixed_precision={precision} here: {message['refused']}")
    assert message["precision"] == precision
    result = newest(directory)
    return Trained(message, json.loads((result / "state.json").read_text()), load_file(result / "net.safetensors"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    result = trained(tmp_path_factory.mktemp("full"))
    assert result.message["types"] == ["float32"] and result.message["graphs"] == 0
    assert len(result.state["losses"]) == STEPS and result.state["losses"][-1] < 0.5 * result.state["losses"][0]
    return result


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_losses_agree_with_full_precision(full: Trained, tmp_path: Path, precision: str) -> None:
    half = trained(tmp_path, precision)
    assert half.message["types"] == [{"bf16": "bfloat16", "fp16": "float16"}[precision]]
    assert {str(value.dtype) for value in half.weights.values()} == {"torch.float32"}
    assert half.message["bits"] != full.message["bits"]
    np.testing.assert_allclose(half.state["losses"], full.state["losses"], rtol=0.03)
    assert (half.state["scaler"] is None) == (precision == "bf16")


def test_a_resumed_fp16_run_ends_with_the_same_bits_and_loss_scale(tmp_path: Path) -> None:
    """Gradients overflow at the initial scale, so a run with a reset scale would skip updates again after the kill."""
    whole = trained(tmp_path / "whole", "fp16", scale=4)
    done = process(tmp_path / "cut", "fp16", scale=4, stop_at=13)
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr
    assert newest(tmp_path / "cut").name == "00000008"
    saved = json.loads((newest(tmp_path / "cut") / "state.json").read_text())["scaler"]
    shutil.copytree(tmp_path / "cut", tmp_path / "forgotten")
    resumed = trained(tmp_path / "cut", "fp16", scale=4)
    assert saved["scale"] < 65536 and saved["_growth_tracker"] > 0
    assert resumed.state["scaler"] == whole.state["scaler"] != saved
    assert resumed.state["losses"] == whole.state["losses"] and resumed.message["bits"] == whole.message["bits"]

    state = newest(tmp_path / "forgotten") / "state.json"  # without the scaler the run differs
    state.write_text(json.dumps({**json.loads(state.read_text()), "scaler": None}))
    assert trained(tmp_path / "forgotten", "fp16", scale=4).message["bits"] != whole.message["bits"]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_losses_of_compiled_networks_agree_with_plain_ones(full: Trained, tmp_path: Path, precision: str) -> None:
    compiled = trained(tmp_path, precision, compiled=True)
    assert compiled.message["graphs"] > 0
    assert compiled.weights.keys() == full.weights.keys()  # without compile's prefix
    np.testing.assert_allclose(compiled.state["losses"], full.state["losses"], rtol=1e-3 if precision == "no" else 0.03)


def test_fp16_is_refused_on_a_cpu(repository: Path) -> None:
    """Accelerate accepts fp16 on a CPU but trains in float32."""
    if torch.cuda.is_available():
        pytest.skip("a GPU has half precision")
    code = """
from omegaconf import OmegaConf
from runtime.errors import UserError
from train.components import make_accelerator
try:
    make_accelerator(OmegaConf.create({"seed": 0, "train": {"mixed_precision": "fp16"}}))
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=300)
    assert "train.mixed_precision=fp16 does not work here" in done.stdout and "give no or bf16" in done.stdout, done
