"""Downstream tasks: the widened network, the saved pipeline's conventions, metrics, palette, operators, commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from scipy.ndimage import gaussian_filter
from tiny_networks import CHANNELS, SIZE, pictures, tiny_autoencoder, tiny_text_encoder, tiny_unet

from corpus.index import Corpus
from downstream.conditional import (
    Parts,
    conditional_pipeline,
    encode_condition,
    for_raw_condition,
    resolve_foundation,
    training_rows,
    weights_digest,
    widen,
)
from downstream.image_metrics import LARGEST_PSNR, psnr_ssim
from downstream.semantic_synthesis import Segmenter, natural_palette, segment, semantic_synthesis, spread_colours
from downstream.super_resolution import bicubic, bicubic_baseline, low_resolution, super_resolution
from eval.generate import generate, starting_noise
from runtime.artefacts import plain, read_json, write_json
from runtime.errors import UserError
from train.networks import new_unet, text_to_image_pipeline
from train.objective import Objective
from train.text_encoder import encode_prompts


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts(tiny_unet(), tiny_autoencoder(), *tiny_text_encoder())


# ---------------------------------------------------------------- the network


def test_widened_network_ignores_the_condition_at_first(parts: Parts) -> None:
    wide = widen(parts.unet, CHANNELS).eval()
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(3, CHANNELS, 2, 2, generator=random)
    text = torch.randn(3, 8, 8, generator=random)
    time = torch.tensor([10.0, 500.0, 990.0])
    with torch.no_grad():
        before = parts.unet(latents, time, text).sample
        for condition in (torch.zeros_like(latents), 50 * torch.randn(latents.shape, generator=random)):
            after = wide(torch.cat([latents, condition], dim=1), time, text).sample
            assert torch.equal(before, after)
    assert wide.config.in_channels == 2 * CHANNELS
    assert wide.config.out_channels == CHANNELS


def test_scratch_and_foundation_have_the_same_shape(parts: Parts) -> None:
    wide, scratch = widen(parts.unet, CHANNELS), tiny_unet(condition_channels=CHANNELS)
    shapes = [{key: value.shape for key, value in unet.state_dict().items()} for unet in (wide, scratch)]
    assert shapes[0] == shapes[1]
    assert scratch.conv_in.weight[:, CHANNELS:].abs().min() > 0


def test_scaling_factor_is_folded_into_the_first_convolution() -> None:
    unet = tiny_unet(condition_channels=CHANNELS)
    folded = for_raw_condition(unet, 8.0)
    latents, raw, text = torch.randn(2, CHANNELS, 2, 2), torch.randn(2, CHANNELS, 2, 2), torch.randn(2, 8, 8)
    with torch.no_grad():
        trained = unet(torch.cat([latents, 8 * raw], 1), 300.0, text).sample
        served = folded(torch.cat([latents, raw], 1), 300.0, text).sample
    torch.testing.assert_close(trained, served, rtol=1e-5, atol=1e-6)


def test_weights_digest_sees_one_changed_weight(parts: Parts) -> None:
    changed = widen(parts.unet, 0)
    assert weights_digest(changed) == weights_digest(parts.unet)
    with torch.no_grad():
        changed.conv_out.bias[0] += 1e-6
    assert weights_digest(changed) != weights_digest(parts.unet)


# ---------------------------------------------------------------- the pipeline


@pytest.fixture(scope="module")
def conditioned() -> UNet2DConditionModel:
    """A network that heeds its condition, as trained: on conditions of unit scale."""
    return tiny_unet(condition_channels=CHANNELS)


@pytest.fixture(scope="module")
def loaded(parts: Parts, conditioned: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pipeline")
    conditional_pipeline(parts, conditioned, Objective().scheduler()).save_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_saved_pipeline_feeds_what_was_trained(loaded, parts: Parts, conditioned: UNet2DConditionModel) -> None:
    assert type(loaded) is StableDiffusionInstructPix2PixPipeline
    images = pictures(3)
    raw = encode_condition(parts.autoencoder, images)
    noise = starting_noise(3, (CHANNELS, 2, 2), seed=5)
    seen = []
    hook = loaded.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    found = loaded(
        prompt=["desert", "", "ocean"], image=[Image.fromarray(image) for image in images], latents=noise,
        num_inference_steps=5, guidance_scale=1.0, output_type="latent",
    ).images  # fmt: skip
    hook.remove()

    assert [tuple(batch.shape) for batch in seen] == [(3, 2 * CHANNELS, 2, 2)] * 5
    torch.testing.assert_close(seen[0][:, :CHANNELS], noise)
    for batch in seen:
        torch.testing.assert_close(batch[:, CHANNELS:], raw, rtol=0, atol=1e-6)

    # the same by hand, with the network as trained: unit-scale conditions, times as training gives them
    prompts = encode_prompts(parts.text_encoder, parts.tokenizer, ["desert", "", "ocean"])
    scheduler = Objective().scheduler()
    scheduler.set_timesteps(5)
    latents = noise
    with torch.no_grad():
        for time in scheduler.timesteps:
            inputs = torch.cat([latents, raw * parts.autoencoder.config.scaling_factor], dim=1)
            latents = scheduler.step(conditioned(inputs, time, prompts).sample, time, latents).prev_sample
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-5)
    assert raw.std() > 0.05  # so that a wrong scale would show


def test_times_of_the_sampler_are_noise_shares() -> None:
    scheduler = Objective().scheduler()
    scheduler.set_timesteps(8)
    torch.testing.assert_close(scheduler.timesteps / 1000, scheduler.sigmas[:-1], rtol=0, atol=2e-3)
    assert scheduler.init_noise_sigma == 1
    assert scheduler.sigmas[-1] == 0


def test_pipeline_draws_with_its_own_defaults_and_through_generate(loaded) -> None:
    images = [Image.fromarray(image) for image in pictures(3)]
    guided = loaded("ocean", image=images[0], num_inference_steps=3, output_type="np").images
    assert guided.shape == (1, SIZE, SIZE, 3)
    assert np.isfinite(guided).all()
    drawn = [
        generate(loaded, [""] * 3, steps=3, guidance_scale=1.0, seed=4, batch_size=size, image=images)
        for size in (2, 3)
    ]
    assert drawn[0].shape == (3, SIZE, SIZE, 3)
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1


def test_output_depends_on_the_condition(loaded) -> None:
    def first(seed: int) -> np.ndarray:
        image = [Image.fromarray(pictures(1, seed)[0])]
        return generate(loaded, [""], steps=3, guidance_scale=1.0, seed=4, image=image)

    assert (first(1) == first(1)).all()
    assert (first(1) != first(2)).any()


# ---------------------------------------------------------------- image metrics


def test_basicsr_is_imported_only_on_use_and_in_one_place(repository: Path) -> None:
    code = (
        "import sys, downstream.image_metrics as m; assert not any(n.startswith('basicsr') for n in sys.modules);"
        "m.basicsr_metrics(); import torchvision.transforms.functional as f;"
        "assert sys.modules['torchvision.transforms.functional_tensor'] is f; assert 'basicsr' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, timeout=120)
    sources = [path for name in ("corpus", "prune", "train", "downstream", "eval", "scripts")
               for path in (repository / name).rglob("*.py")]  # fmt: skip
    assert [path.name for path in sources if "functional_tensor" in path.read_text()] == ["image_metrics.py"]


def test_psnr_of_known_errors() -> None:
    images = np.full((2, 16, 16, 3), 100, dtype=np.uint8)
    references = images.copy()
    references[0] += 5
    references[1, :8] += 20
    expected = [10 * np.log10(255**2 / 25), 10 * np.log10(255**2 / 200)]
    assert psnr_ssim(images, references)["psnr"] == pytest.approx(np.mean(expected))


def test_equal_pictures_count_as_equal_to_eight_bits() -> None:
    images = pictures(2)
    assert psnr_ssim(images, images) == pytest.approx({"psnr": LARGEST_PSNR, "ssim": 1.0})
    assert pytest.approx(58.92, abs=0.01) == LARGEST_PSNR


def test_ssim_against_its_formula() -> None:
    """Wang et al. 2004: Gaussian window of 11 px and 1.5 px, valid positions, the mean over channels."""
    first, second = pictures(1, 0, 32).astype(float), pictures(1, 1, 32).astype(float)
    second = 0.6 * first + 0.4 * second
    first, second = first.round(), second.round()

    def blur(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, (0, 1.5, 1.5, 0), radius=(0, 5, 5, 0))[:, 5:-5, 5:-5]

    a, b = blur(first), blur(second)
    covariance = blur(first * second) - a * b
    variances = blur(first**2) - a**2 + blur(second**2) - b**2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * a * b + c1) * (2 * covariance + c2) / ((a**2 + b**2 + c1) * (variances + c2))).mean()
    found = psnr_ssim(first.astype(np.uint8), second.astype(np.uint8))["ssim"]
    assert 0.2 < found < 0.95
    assert found == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------- operators and palette


def test_low_resolution_is_the_mean_of_each_area() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    small = low_resolution(images, 4)
    assert small.shape == (3, 16, 16, 3)
    assert small.dtype == np.uint8
    for _ in range(50):
        i, y, x, c = np.random.default_rng(_).integers((3, 16, 16, 3))
        mean = images[i, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4, c].astype(float).mean()
        assert small[i, y, x, c] == np.floor(mean + 0.5)
    assert low_resolution(np.full((1, 8, 8, 3), 255, dtype=np.uint8), 4).min() == 255
    with pytest.raises(UserError, match="factor=5"):
        low_resolution(images, 5)


def test_bicubic_keeps_flat_pictures_and_size() -> None:
    flat = np.full((2, 16, 16, 3), 77, dtype=np.uint8)
    assert (bicubic(flat, 4) == np.full((2, 64, 64, 3), 77)).all()


def coloured_corpus(tmp_path: Path) -> Corpus:
    """Class 0 red on the left, class 1 nearly the same red on the right; class 2 never occurs. One unreadable row."""
    images = np.zeros((40, 16, 16, 3), dtype=np.uint8)
    images[:, :, :8], images[:, :, 8:] = (180, 30, 20), (184, 34, 24)
    images[0] = 0
    masks = np.zeros((40, 16, 16), dtype=np.uint8)
    masks[:, :, 8:] = 1
    manifest = pd.DataFrame({"scene": ["a"] * 30 + ["b"] * 10, "caption": "", "readable": [False] + [True] * 39})
    return Corpus("coloured", tmp_path, images, manifest, masks, ("left", "right", "nowhere"))


def test_palette_is_natural_and_told_apart(tmp_path: Path) -> None:
    corpus = coloured_corpus(tmp_path)
    natural = natural_palette(corpus, seed=0, distance=0)
    assert natural.tolist() == [[180, 30, 20], [184, 34, 24], [128, 128, 128]]
    apart = natural_palette(corpus, seed=0, distance=32).astype(float)
    assert np.linalg.norm(apart[0] - apart[1]) >= 31
    assert np.linalg.norm(apart[:2].mean(0) - natural[:2].mean(0)) < 2
    assert apart[2].tolist() == [128, 128, 128]
    assert (natural_palette(corpus, seed=0, distance=32) == apart).all()


@pytest.mark.parametrize("count", [2, 8, 31])
def test_spread_colours_reach_their_distance(count: int) -> None:
    for start in (np.zeros((count, 3)), np.random.default_rng(count).uniform(0, 255, (count, 3))):
        found = spread_colours(start, 40)
        distances = np.linalg.norm(found[:, None] - found[None], axis=2)[~np.eye(count, dtype=bool)]
        assert distances.min() >= 40
        assert found.min() >= 0
        assert found.max() <= 255
    far = np.diag([255.0, 255.0, 255.0])
    assert (spread_colours(far, 40) == far).all()


def test_training_rows_are_readable_different_and_balanced(tmp_path: Path) -> None:
    corpus = coloured_corpus(tmp_path)
    rows = training_rows(corpus, 12, seed=0)
    assert len(set(rows)) == 12
    assert 0 not in rows
    assert (rows == training_rows(corpus, 12, seed=0)).all()
    assert (rows >= 30).mean() >= 0.3  # a quarter of the images, half of the weight
    assert len(training_rows(corpus, 100, seed=0)) == 39


def test_segmenter_scores_every_pixel() -> None:
    torch.manual_seed(0)
    segmenter = Segmenter(5)
    assert segmenter(torch.zeros(2, 3, 24, 16)).shape == (2, 5, 24, 16)
    classes = segment(segmenter, pictures(3))
    assert classes.shape == (3, SIZE, SIZE)
    assert classes.dtype == np.uint8
    assert classes.max() < 5


# ---------------------------------------------------------------- the stages


def config(tmp_path: Path, repository: Path, *overrides: str) -> DictConfig:
    """The smallest chain on real tiles: a random autoencoder, a few steps."""
    tiny_autoencoder().save_pretrained(tmp_path / "autoencoder")
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        return compose(
            "config",
            [
                "profile=smoke", "tracker=none", f"runs={tmp_path}/runs", f"autoencoder.path={tmp_path}/autoencoder",
                "corpus.train.limit=96", "corpus.test.limit=160", "eval.images=24", "text_encoder.train.steps=1",
                "text_encoder.width=32", "text_encoder.layers=1", "text_encoder.max_length=8",
                "text_encoder.train.batch_size=4",
                "model.unet.block_out_channels=[8,16]", "model.unet.norm_num_groups=4",
                "model.unet.attention_head_dim=2",
                "downstream.training_images=16", "downstream.images=16", "downstream.steps=2",
                "downstream.loop.steps=2", "downstream.loop.batch_size=4", "downstream.segmenter.steps=2",
                "downstream.segmenter.batch_size=4", *overrides,
            ],
        )  # fmt: skip


@pytest.mark.slow
def test_both_tasks_from_a_foundation_and_from_scratch(tmp_path: Path, repository: Path) -> None:
    cfg = config(tmp_path, repository)
    from downstream.conditional import load_parts, training_corpus
    from train.components import load_text_parts

    corpus = training_corpus(cfg)
    text = load_text_parts(cfg, corpus)
    unet = new_unet(plain(cfg.model.unet), CHANNELS, 8, 32, seed=7)
    foundation = tmp_path / "foundation"
    text_to_image_pipeline(
        tiny_autoencoder(), text.text_encoder, text.tokenizer, unet, Objective().scheduler()
    ).save_pretrained(foundation / "pipeline")
    write_json(foundation / "summary.json", {"method": "rsprune"})
    cfg.foundation = str(foundation)
    assert resolve_foundation(cfg) == (foundation, "rsprune")
    assert weights_digest(load_parts(cfg, foundation, corpus).unet) == weights_digest(unet)

    runs = {}
    for stage, task in (("super_resolution", super_resolution), ("semantic_synthesis", semantic_synthesis)):
        for name, source in (("rsprune", foundation), ("scratch", None)):
            runs[stage, name] = directory = task(cfg, source, name)
            assert directory.parent == tmp_path / "runs" / stage
            summary = read_json(directory / "summary.json")
            assert (summary["task"], summary["method"], summary["images"], summary["steps"]) == (stage, name, 16, 2)
            assert summary["parameters"] == read_json(runs[stage, "rsprune"] / "summary.json")["parameters"]
            assert all(np.isfinite(value) for value in summary["metrics"].values())
            pipeline = DiffusionPipeline.from_pretrained(directory / "pipeline")
            assert pipeline.unet.config.in_channels == 2 * CHANNELS
            outputs, truth = (np.load(directory / "samples" / f"{part}.npy") for part in ("outputs", "truth"))
            assert outputs.shape == truth.shape == (12, 64, 64, 3)
            assert Image.open(directory / "samples" / "comparison.png").width > 12 * 64
            assert task(cfg, source, name) == directory
    metrics = read_json(runs["super_resolution", "scratch"] / "summary.json")["metrics"]
    fields = {"psnr", "ssim", "fd_efficientnet_lite0", "kid_x1000", "kid_x1000_low", "kid_x1000_high"}
    assert set(metrics) == fields
    baseline = bicubic_baseline(cfg)
    assert set(baseline) == fields
    assert baseline["psnr"] > metrics["psnr"]
    directory = runs["semantic_synthesis", "scratch"]
    metrics = read_json(directory / "summary.json")["metrics"]
    assert {"fd_efficientnet_lite0", "kid_x1000", "precision", "recall", "feature_distance"} < set(metrics)
    assert 0 <= metrics["mask_agreement"] <= 1
    assert 0 <= metrics["mask_agreement_real"] <= 1
    palette = read_json(directory / "palette.json")
    assert list(palette) == list(corpus.mask_classes)
    assert np.load(directory / "samples" / "inputs.npy").reshape(-1, 3).tolist()[0] in palette.values()

    # a text-to-image run is a foundation, a fine-tuned one is none
    cfg.foundation = str(directory)
    with pytest.raises(UserError, match="no pretraining run"):
        resolve_foundation(cfg)


@pytest.mark.slow
def test_killed_run_goes_on_to_the_same_network(tmp_path: Path, repository: Path, monkeypatch) -> None:
    cfg = config(tmp_path, repository, "downstream.loop.steps=4", "downstream.loop.checkpoint_every=2")
    undisturbed = super_resolution(cfg, None, "scratch")
    cfg.runs = str(tmp_path / "again")

    import downstream.conditional as conditional

    class Killed(Exception):
        pass

    def kill_at_third(*args, **kwargs):
        kill_at_third.steps += 1
        if kill_at_third.steps == 3:
            raise Killed
        return loss(*args, **kwargs)

    kill_at_third.steps = 0
    loss = conditional.diffusion_loss
    monkeypatch.setattr(conditional, "diffusion_loss", kill_at_third)
    with pytest.raises(Killed):
        super_resolution(cfg, None, "scratch")
    resumed = super_resolution(cfg, None, "scratch")
    assert kill_at_third.steps == 5
    metrics = [read_json(directory / "summary.json")["metrics"] for directory in (undisturbed, resumed)]
    assert metrics[0] == metrics[1]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    cfg = DictConfig({"foundation": str(tmp_path)})
    with pytest.raises(UserError, match="no pretraining run"):
        resolve_foundation(cfg)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert resolve_foundation(cfg) == (tmp_path, tmp_path.name)
    with pytest.raises(UserError, match="does not load"):
        from downstream.conditional import load_parts

        load_parts(cfg, tmp_path, None)
    cfg.foundation = "scratch"
    assert resolve_foundation(cfg) == (None, "scratch")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["super_resolution", "semantic_synthesis"])
def test_commands_refuse_bad_input_in_one_line(
    script: str, tiny_folder: Path, tmp_path: Path, repository: Path
) -> None:
    command = [sys.executable, f"downstream/{script}.py", "profile=smoke", "tracker=none", f"runs={tmp_path / 'runs'}"]
    if script == "semantic_synthesis":
        command += ["corpus=folder", f"corpus.root={tiny_folder}"]
    else:
        command += [f"foundation={tmp_path / 'nowhere'}"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "masks" in done.stderr if script == "semantic_synthesis" else "no pretraining run" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
