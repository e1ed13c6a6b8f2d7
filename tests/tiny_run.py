"""A complete pretraining in seconds: a folder of small images and random networks, used in the real config."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from tiny_networks import SIZE, UNET, pictures, tiny_autoencoder

from runtime.application import CONFIGS
from train.text_encoder import clip_tokenizer, small_clip

STEPS = 20  # the loop reports its speed every 20 steps
SCENES = ("beach", "river")
NETWORK = [f"model.unet.{key}={str(value).replace(' ', '')}" for key, value in UNET.items()]


def write_images(root: Path, count: int = 12) -> Path:
    """`count` images of each scene and split."""
    for number, split in enumerate(("train", "test", "val")):
        for shade, scene in enumerate(SCENES):
            (root / split / scene).mkdir(parents=True)
            for index, image in enumerate(pictures(count, seed=2 * number + shade)):
                Image.fromarray(image).save(root / split / scene / f"{index:02d}.png")
    return root


def tiny_overrides(folder: Path) -> list[str]:
    """Overrides that make `train/pretrain.py` small, except `NETWORK`; images and frozen networks go to `folder`."""
    write_images(folder / "images")
    tiny_autoencoder().save_pretrained(folder / "autoencoder")
    small_clip(SIZE, width=32, layers=1, patch=8, max_length=8, seed=0).save_pretrained(folder / "clip")
    clip_tokenizer(8).save_pretrained(folder / "clip")
    (folder / "clip" / "preprocessor_config.json").write_text("{}")
    return [
        "corpus=folder", f"corpus.root={folder}/images", "corpus.name=tiny", f"corpus.train.resolution={SIZE}",
        "corpus.workers=0", "encoder.input_size=32", f"autoencoder.path={folder}/autoencoder", "text_encoder=clip_hub",
        f"text_encoder.path={folder}/clip", "prune=random", "ratio=0.5", f"train.loop.steps={STEPS}",
        "train.loop.batch_size=4", "train.loop.warmup=2", "eval.images=8", "eval.convergence_images=6",
        "train.snapshots=2", "eval.steps=2", f"runs={folder}/runs", f"results={folder}/results", "tracker=none",
    ]  # fmt: skip


def tiny_config(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", [*tiny_overrides(folder), *NETWORK, *overrides])
