"""Masks by a ControlNet on the frozen foundation: it has no effect at first, and loads with plain diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionControlNetPipeline
from tiny_networks import CHANNELS, tiny_autoencoder, tiny_text_encoder, tiny_unet
from tiny_task import task_config, tiny_foundation

from corpus.masks import IGNORED
from downstream.conditional import Parts, weights_digest
from downstream.controlnet import new_controlnet, one_hot, steered_loss, steered_pipeline
from downstream.fine_tuning import fine_tune
from downstream.registry import TASKS
from eval.generate import generate, starting_noise
from runtime.artefacts import read_json
from runtime.errors import UserError
from train.networks import diffusion_loss
from train.objective import Objective


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts(tiny_unet(), tiny_autoencoder(), *tiny_text_encoder())


def test_one_hot_masks_have_one_channel_per_class() -> None:
    masks = np.array([[[0, 1], [2, IGNORED]]], np.uint8)
    result = one_hot(masks, 3)
    assert result.shape == (1, 3, 2, 2) and result.dtype == np.float32
    assert result.argmax(1)[0].ravel()[:3].tolist() == [0, 1, 2]
    assert result.sum(1).tolist() == [[[1, 1], [1, 0]]]


def test_an_untrained_controlnet_does_not_steer_the_foundation(parts: Parts) -> None:
    controlnet, objective = new_controlnet(parts, 3, seed=0), Objective()
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, CHANNELS, 2, 2, generator=generator) for _ in range(2))
    text, time = torch.randn(2, 8, 8, generator=generator), torch.tensor([0.3, 0.8])
    masks = torch.from_numpy(one_hot(np.random.default_rng(0).integers(0, 3, (2, 16, 16)).astype(np.uint8), 3))
    with torch.no_grad():
        steered = steered_loss(controlnet, parts.unet, objective, latents, text, noise, time, masks)
        alone = diffusion_loss(parts.unet, objective, latents, text, noise, time)
    torch.testing.assert_close(steered, alone)


def test_a_controlnet_without_a_foundation_is_refused(parts: Parts) -> None:
    with pytest.raises(UserError, match="steers a foundation: give foundation=DIR"):
        new_controlnet(replace(parts, unet=None), 3, seed=0)


def test_the_saved_pipeline_loads_with_plain_diffusers(parts: Parts, tmp_path: Path) -> None:
    steered_pipeline(parts, new_controlnet(parts, 2, seed=0), Objective().scheduler()).save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is StableDiffusionControlNetPipeline
    masks = torch.from_numpy(one_hot(np.random.default_rng(0).integers(0, 2, (3, 16, 16)).astype(np.uint8), 2))
    drawn = generate(pipeline, ["ice"] * 3, steps=2, guidance_scale=1.0, seed=1, image=masks)
    assert drawn.shape == (3, 16, 16, 3)
    pipeline.set_progress_bar_config(disable=True)
    guided = pipeline(
        "ice", image=masks[:1], latents=starting_noise([0], (CHANNELS, 2, 2), 1), num_inference_steps=2,
        guidance_scale=3.0, output_type="np",
    ).images  # fmt: skip
    assert np.isfinite(guided).all()


def test_the_task_trains_only_the_controlnet(tmp_path: Path) -> None:
    cfg = task_config(tmp_path, "downstream.semantic_synthesis.network=controlnet", "downstream.lengths=[2]")
    foundation = tiny_foundation(tmp_path / "foundation", cfg)
    before = weights_digest(DiffusionPipeline.from_pretrained(foundation / "pipeline").unet)
    run = fine_tune(cfg, TASKS["semantic_synthesis"](cfg), foundation, "rsprune")
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert type(pipeline) is StableDiffusionControlNetPipeline
    assert weights_digest(pipeline.unet) == before
    assert any(value.abs().max() > 0 for value in pipeline.controlnet.controlnet_mid_block.parameters())
    summary = read_json(run / "summary.json")
    assert {"miou", "pixel_accuracy"} <= set(summary["metrics"])
    lines = (run / "convergence.jsonl").read_text().splitlines()
    assert len(lines) == 2
    with pytest.raises(UserError, match="steers a foundation"):
        fine_tune(cfg, TASKS["semantic_synthesis"](cfg), None, "scratch")
