"""`make autoencoder` as a real command, and the condition under which its weights are kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import AutoencoderTiny
from hydra import compose, initialize_config_dir
from tiny_networks import SIZE
from tiny_run import write_images

from corpus.index import open_corpus
from encoders.pixels import to_tensor
from runtime.application import CONFIGS
from runtime.errors import UserError
from train import autoencoder as command
from train.channel_scale import channel_deviations

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- the command


def phase(trains: str, steps: int, perceptual: float = 0.0, adversarial: float = 0.0) -> str:
    loop = f"{{steps:{steps},batch_size:8,learning_rate:3.0e-3,warmup:1,ema_halflife:80}}"
    weights = f"perceptual_weight:{perceptual},perceptual_fraction:0.5,adversarial_weight:{adversarial}"
    return f"{{trains:{trains},{weights},loop:{loop}}}"


def overrides(folder: Path, *phases: str) -> list[str]:
    """A small recipe on the images in `folder`, whose weights go to `folder/weights`."""
    recipe = {
        "width": 48, "latent_channels": 4, "encoder_blocks": "[0,1,1,1]", "decoder_blocks": "[1,1,1,1]",
        "phases": f"[{','.join(phases)}]", "decoder_phases": f"[{phase('decoder', 1, adversarial=0.02)}]",
    }  # fmt: skip
    return [
        "autoencoder=corpus_f8c16", f"autoencoder.path={folder}/weights",
        *(f"autoencoder.recipe.{key}={value}" for key, value in recipe.items()), "corpus=folder", "corpus.name=tiles",
        f"corpus.root={folder}/images", f"corpus.train.resolution={SIZE}", "corpus.workers=0", "corpus.licence=CC0",
        "encoder.input_size=32", "eval.images=16", f"runs={folder}/runs", f"results={folder}", "tracker=none",
    ]  # fmt: skip


@pytest.mark.slow
def test_an_autoencoder_that_does_not_beat_pca_replaces_nothing(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    weights = tmp_path / "weights" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"the weights there were")
    words = [sys.executable, "train/autoencoder.py"]
    words += overrides(tmp_path, phase("decoder", 2), phase("both", 2, perceptual=0.1))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "is not better than PCA" in error and f"{tmp_path}/weights is unchanged" in error
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["autoencoder", "pca"]  # no run is printed
    assert weights.read_bytes() == b"the weights there were" and list(weights.parent.iterdir()) == [weights]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, which also holds the cached trainings."""
    folder = tmp_path_factory.mktemp("tiles")
    write_images(folder / "images")
    return folder


@pytest.mark.parametrize(
    ("psnr", "distance", "critic", "better"),
    [
        (31.0, 90.0, 0.02, True),
        (31.0, 101.0, 0.02, False),
        (29.0, 90.0, 0.0, False),
        (29.0, 90.0, 0.02, True),
        (26.9, 90.0, 0.02, False),
    ],
)
def test_an_autoencoder_is_kept_if_it_beats_pca(
    tiles: Path, monkeypatch: pytest.MonkeyPatch, psnr: float, distance: float, critic: float, better: bool
) -> None:
    """It must be better in both measures; with a critic, which increases the pixel error, it may lose 3 dB of PSNR.

    The training has one step per phase; its metrics are replaced by given values.
    """
    pca = {"psnr": 30.0, "fd_efficientnet_lite2": 101.0, "kid_x1000_efficientnet_lite2": 35.0}
    ours = {"psnr": psnr, "fd_efficientnet_lite2": distance, "kid_x1000_efficientnet_lite2": 12.0}
    monkeypatch.setattr(command, "measure", lambda *_: {"autoencoder": ours, "pca": pca})
    weights = tiles / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        recipe = overrides(tiles, phase("decoder", 1), phase("both", 1))
        # in full precision, like the Accelerator of other tests
        recipe += ["autoencoder.recipe.mixed_precision='no'", "autoencoder.recipe.channel_scale=0.5"]
        recipe += [f"autoencoder.recipe.decoder_phases=[{phase('decoder', 1, adversarial=critic)}]"]
        cfg = compose("config", recipe)
    with contextlib.nullcontext() if better else pytest.raises(UserError, match="is not better than PCA"):
        command.main(cfg)
    assert weights.exists() == better
    if not better or psnr < pca["psnr"]:
        return
    (run,) = (tiles / "runs" / "autoencoder").glob("*[0-9a-f]")
    kept, trained = (AutoencoderTiny.from_pretrained(folder) for folder in (weights, run / "autoencoder"))
    assert kept.config.latent_channels == 4
    (index,) = (tiles / "runs" / "corpus").glob("*/corpus.json")
    deviations = channel_deviations(kept, to_tensor(open_corpus(index.parent).images[:]))
    assert float(deviations.square().mean()) == pytest.approx(1, abs=0.01)
    assert all(value.equal(trained.state_dict()[key]) for key, value in kept.state_dict().items())
    card = (weights / "README.md").read_text()
    assert "training split of tiles" in card and "CC0" in card
    assert "1 steps of decoder, 1 steps of both, 1 steps of decoder with a critic of textures" in card
    assert f"`scaling_factor` {kept.config.scaling_factor:g}." in card and kept.config.scaling_factor != 8
    assert "| autoencoder | 31.00 | 90.00 | 12.00 |" in card and "| pca | 30.00 | 101.00 | 35.00 |" in card
