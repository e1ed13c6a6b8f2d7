"""Downstream tasks in seconds: a folder of small images with masks and random networks, used in the real config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict
from PIL import Image
from tiny_networks import CHANNELS, SIZE, tiny_autoencoder
from tiny_run import NETWORK, write_images

from runtime.application import CONFIGS
from runtime.artefacts import plain, write_json
from train.networks import new_unet, text_to_image_pipeline
from train.objective import Objective
from train.text_encoder import clip_tokenizer, small_clip

CLASSES = ("dark", "bright")
WIDTH = 32  # of the text encoder


def write_masks(images: Path, masks: Path) -> None:
    """Masks of all images below a folder: 1 where the mean over the channels exceeds 128."""
    for path in images.rglob("*.png"):
        target = masks / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.asarray(Image.open(path)).mean(axis=2)
        Image.fromarray((pixels > 128).astype(np.uint8)).save(target)


def task_config(folder: Path, *overrides: str) -> DictConfig:
    """A config that makes a downstream task small; writes images, masks and frozen networks to `folder`."""
    if not (folder / "images").exists():
        write_masks(write_images(folder / "images"), folder / "masks")
        tiny_autoencoder().save_pretrained(folder / "autoencoder")
        small_clip(SIZE, width=WIDTH, layers=1, patch=8, max_length=8, seed=0).save_pretrained(folder / "clip")
        clip_tokenizer(8).save_pretrained(folder / "clip")
        (folder / "clip" / "preprocessor_config.json").write_text("{}")
    options = [
        "corpus=folder", f"corpus.root={folder}/images", "corpus.name=tiny", f"corpus.train.resolution={SIZE}",
        "corpus.workers=0", f"corpus.masks={folder}/masks", f"corpus.classes=[{','.join(CLASSES)}]",
        "encoder.input_size=32", f"autoencoder.path={folder}/autoencoder", "text_encoder=clip_hub",
        f"text_encoder.path={folder}/clip", *NETWORK, "eval.images=8", "downstream.training_images=16",
        "downstream.images=8", "downstream.steps=2", "downstream.loop.steps=4", "downstream.loop.batch_size=4",
        "downstream.loop.checkpoint_every=2", "downstream.segmenter.encoder=tu-test_resnet",
        "downstream.segmenter.channels=32", "downstream.segmenter.batch_size=4",
        "downstream.segmenter.round_images=8", "downstream.segmenter.val_images=8", "downstream.segmenter.patience=1",
        "downstream.segmenter.most_rounds=2", f"runs={folder}/runs", f"results={folder}/results", "tracker=none",
    ]  # fmt: skip
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", [*options, *overrides])
    with open_dict(cfg):  # the defaults may name no evaluation encoder, and a corpus may have no split val
        cfg.setdefault("evaluation_encoder", cfg.encoder)
        cfg.corpus.setdefault("val", cfg.corpus.test)
    return cfg


def tiny_foundation(folder: Path, cfg: DictConfig) -> Path:
    """A pretraining run of the method rsprune with the networks of `task_config`, untrained."""
    from downstream.corpora import corpus_of
    from train.components import load_text_parts

    text = load_text_parts(cfg, corpus_of(cfg, "train"))
    unet = new_unet(plain(cfg.model.unet), CHANNELS, SIZE // 8, WIDTH, seed=7)
    pipeline = text_to_image_pipeline(
        tiny_autoencoder(), text.text_encoder, text.tokenizer, unet, Objective().scheduler()
    )
    pipeline.save_pretrained(folder / "pipeline")
    write_json(folder / "summary.json", {"method": "rsprune"})
    return folder
