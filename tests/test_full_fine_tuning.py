"""Training all weights of a pipeline, as a real command, and pushing the result to the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from tiny_networks import SIZE, tiny_autoencoder, tiny_text_encoder, tiny_unet
from tiny_run import tiny_overrides

from runtime.application import CONFIGS
from runtime.artefacts import read_json, write_json
from train import pretrain as command
from train.networks import text_to_image_pipeline
from train.objective import Objective

ROOT = Path(__file__).resolve().parent.parent
DRAW = """
import sys
import numpy as np
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
images = pipeline("a satellite image of beach", num_inference_steps=2, output_type="np").images
print(type(pipeline).__name__, images.shape, bool(np.isfinite(images).all()))
"""


@pytest.mark.slow
def test_full_fine_tuning_changes_all_weights_of_the_diffusion_network(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    text_to_image_pipeline(
        tiny_autoencoder(), *tiny_text_encoder(), tiny_unet(), Objective().scheduler()
    ).save_pretrained(folder)
    done = subprocess.run(
        [
            sys.executable, "train/pretrain.py", "profile=smoke", *tiny_overrides(tmp_path), "model=pretrained",
            f"model.pretrained={folder}", "train.loop.steps=2", "train.snapshots=1",
        ],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = Path(done.stdout.strip().splitlines()[-1].removeprefix("run: "))
    old, new = (load_file(path / "unet" / "diffusion_pytorch_model.safetensors") for path in (folder, run / "pipeline"))
    assert new.keys() == old.keys()
    # self-attention over a single token (side 1) does not depend on its queries and keys
    idle = (".attn1.to_q.weight", ".attn1.to_k.weight")
    unchanged = [key for key, value in new.items() if value.equal(old[key]) and not key.endswith(idle)]
    assert not unchanged and all(value.isfinite().all() for value in new.values())
    for frozen in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        old, new = (load_file(path / f"{frozen}.safetensors") for path in (folder, run / "pipeline"))
        assert all(value.equal(old[key]) for key, value in new.items())
    assert not (run / "lora").exists()

    summary, card = read_json(run / "summary.json"), (run / "pipeline" / "README.md").read_text()
    assert np.isfinite(summary["loss"]) and summary["steps"] == 2
    assert "tiny, 24 images, of which 12 were kept" in card and f"{summary['parameters']:,} parameters, 2 steps" in card
    assert all(f"| {name} | {value:.4g} |" in card for name, value in summary["metrics"].items())
    drawn = subprocess.run(
        [sys.executable, "-c", DRAW, str(run / "pipeline")], cwd="/", capture_output=True, text=True, timeout=300
    )
    assert drawn.stdout.strip() == f"StableDiffusionPipeline (1, {SIZE}, {SIZE}, 3) True", drawn.stderr[-2000:]


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config")


@pytest.mark.parametrize(
    ("requested", "rank", "expected"),
    [("owner/name", "0", ["owner/name"]), (None, "0", []), ("owner/name", "1", [])],
    ids=["requested", "not requested", "another process"],
)
def test_a_finished_pipeline_is_pushed_only_if_requested_and_by_one_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    composed: DictConfig,
    requested: str | None,
    rank: str,
    expected: list[str],
) -> None:
    calls = []
    write_json(tmp_path / "summary.json", {"metrics": {"balanced_kid_x1000_e": 12.5}})
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(command, "method_name", lambda: "random")
    monkeypatch.setattr(command, "pretrain", lambda cfg, name: tmp_path)
    monkeypatch.setattr(command, "push", lambda *given: calls.append(given))
    command.main(OmegaConf.merge(composed, {"push_to_hub": requested}))
    assert calls == [(tmp_path / "pipeline", name) for name in expected]
    printed = capsys.readouterr().out.splitlines()
    assert "balanced_kid_x1000_e: 12.5" in printed and printed[-1] == f"run: {tmp_path}"
