"""The model card: its statements about data, selection, training and metrics; its example runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tiny_networks import CHANNELS, SIZE, tiny_autoencoder, tiny_text_encoder, tiny_unet
from torch import nn

from runtime.application import CONFIGS
from train.model_card import model_card
from train.networks import new_transformer, text_to_image_pipeline
from train.objective import Objective

SUMMARY = {
    "method": "rsprune",
    "ratio": 0.85,
    "images": 1234,
    "steps": 4321,
    "parameters": 2_900_000,
    "training_flops_per_image": 1.5e9,
    "seconds": 61.7,
    "metrics": {"natural_kid_x1000_e": 162.34567, "balanced_fd_e": 219.04, "balanced_recall_e": None},
    "split": "test",
    "selection": "0123456789abcdef",
    "seed": 7,
}
SELECTION = {"images": 8230, "scenes": {"ocean": {"before": 8000, "after": 1004}, "": {"before": 230, "after": 230}}}
TRANSFORMER = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 1}


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", ["corpus=folder", "corpus.name=my_tiles", "eval.steps=2", *overrides])


def card(*overrides: str, pipeline: str = "StableDiffusionPipeline") -> str:
    return model_card(config(*overrides), {**SUMMARY, "pipeline": pipeline}, SELECTION)


def section(text: str, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL).group(1)


def test_a_card_names_data_selection_training_and_metrics() -> None:
    text = card("corpus.licence=CC-BY-4.0", "train.loop.batch_size=48", "train.mixed_precision=bf16", "eval.images=33")
    assert "# Latent diffusion on my_tiles, rsprune at 0.85 removed" in text and "64 px" in text
    data, training, metrics = (section(text, title) for title in ("Data", "Training", "Metrics"))
    assert "corpus: my_tiles, 8,230 images, of which 1,234 were kept" in data
    assert "`prune=rsprune ratio=0.85`, seed 7, `0123456789abcdef`" in data
    assert "licence of the data: CC-BY-4.0" in data
    assert "| ocean | 8,000 | 1,004 |" in data and "| (none) | 230 | 230 |" in data
    assert "2,900,000 parameters, 4,321 steps of 48 images" in training and "62 s, 1.5 GFLOP" in training
    assert "flow" in training and "bf16" in training
    assert "33 held-out images of each set of the split test" in metrics
    rows = [line for line in metrics.splitlines() if line.startswith("| ") and "_" in line]
    assert rows == ["| balanced_fd_e | 219 |", "| natural_kid_x1000_e | 162.3 |"]


def test_a_card_marks_an_unknown_licence_and_starts_with_hub_metadata() -> None:
    text = card()
    assert "licence of the data: not stated (corpus.licence)" in text and "## Metadata" not in text
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["library_name"] == "diffusers" and metadata["pipeline_tag"] == "text-to-image"


def test_a_card_names_the_side_of_crops_and_the_metadata() -> None:
    text = card("train.views.crop=32", "metadata=location")
    assert "images of 32 px" in text
    assert "'sample.metadata={lon:NUMBER,lat:NUMBER}'" in section(text, "Metadata")


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "PixArtAlphaPipeline"])
def test_the_example_of_a_card_runs(kind: str, tmp_path: Path) -> None:
    network = tiny_unet()
    if kind == "PixArtAlphaPipeline":
        network = new_transformer(TRANSFORMER, CHANNELS, SIZE // 8, 8, seed=0)
        nn.init.normal_(network.proj_out.weight, std=0.3)
    made = text_to_image_pipeline(tiny_autoencoder(), *tiny_text_encoder(), network, Objective().scheduler())
    assert type(made).__name__ == kind
    made.save_pretrained(tmp_path)
    example = re.search(r"```python\n(.*?)```", section(card(pipeline=kind), "Use"), re.DOTALL).group(1)
    assert example.count("PATH_OF_THIS_FOLDER") == 1 and "num_inference_steps=2" in example
    names: dict[str, Any] = {}
    exec(example.replace("PATH_OF_THIS_FOLDER", str(tmp_path)), names)
    assert names["image"].size == (SIZE, SIZE) and names["image"].getextrema() != ((0, 0),) * 3
