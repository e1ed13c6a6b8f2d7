"""The foundation model's parts: networks by config, metadata, captions, cached latents, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, PixArtTransformer2DModel, StableDiffusionPipeline
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import DictConfig
from safetensors.torch import load_file
from tiny_loop import OPTIONS, fit
from tiny_networks import CHANNELS, SIZE, pictures, tiny_autoencoder, tiny_text_encoder, tiny_unet
from torch import nn

from corpus.index import Corpus
from encoders.pixels import to_tensor
from eval.convergence import area_under_curve, first_reached, summarise
from eval.generate import generate
from runtime import tracking
from runtime.application import CONFIGS
from runtime.errors import UserError
from train.captions import Captions
from train.components import TextParts, load_pretrained
from train.foundation import snapshot_steps
from train.latents import Views, cached_latents, encode_moments, symmetric
from train.loop import LoopOptions
from train.metadata import MetadataEncoder, MetadataField, drop, metadata_values, new_encoder, prompt_embeddings
from train.networks import (
    add_lora,
    diffusion_loss,
    lora_metadata,
    lora_weights,
    masks_padding,
    merge_lora,
    new_network,
    new_transformer,
    predict,
    text_to_image_pipeline,
)
from train.objective import Objective
from train.text_encoder import cached_prompts, caption_lengths, encode_prompts
from train.utilisation import peak_flops, training_flops

ROOT = Path(__file__).resolve().parent.parent
PLACE = {"lon": MetadataField(-180, 180), "lat": MetadataField(-90, 90)}
TRANSFORMER = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 1}


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", ["tracker=none", *overrides])


@pytest.fixture(scope="module")
def parts() -> TextParts:
    return TextParts(*tiny_text_encoder(), "tiny")


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("name", "channels", "side", "width", "millions"),
    [
        ("ldm_tiny", 16, 8, 128, 2.9),
        ("ldm_small", 4, 32, 768, 68),
        ("ldm_base", 4, 32, 768, 860),
        ("dit_s", 4, 32, 768, 30),
        ("dit_b", 4, 32, 768, 119),
    ],
)
def test_networks_have_the_expected_number_of_parameters(name, channels, side, width, millions) -> None:
    """A DiT of 12 blocks, width d: 16 d^2 each for two attentions and an MLP, and 6 d^2 for the times of all blocks."""
    with torch.device("meta"):
        network = new_network(config(f"model={name}").model, channels, side, width, seed=0)
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.03)


def test_a_new_transformer_predicts_zero_and_learns() -> None:
    network = new_transformer(TRANSFORMER, CHANNELS, 4, 8, seed=0)
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(4, CHANNELS, 4, 4, generator=generator), torch.randn(4, 6, 8, generator=generator)
    mask = torch.ones(4, 6, dtype=torch.bool)
    assert not predict(network, latents, torch.full((4,), 500.0), text, mask).any()
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        loss = diffusion_loss(network, Objective(), latents, text, noise, torch.full((4,), 0.5), mask=mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_a_patch_size_that_does_not_divide_the_latents_is_refused() -> None:
    with pytest.raises(UserError, match="patch_size"):
        new_transformer({**TRANSFORMER, "patch_size": 3}, CHANNELS, 4, 8, seed=0)


def test_the_pipeline_of_a_transformer_is_plain_diffusers_and_masks_padding(parts, tmp_path) -> None:
    network = new_transformer(TRANSFORMER, CHANNELS, SIZE // 8, 8, seed=0)
    nn.init.normal_(network.proj_out.weight, std=0.3)
    made = text_to_image_pipeline(
        tiny_autoencoder(), parts.text_encoder, parts.tokenizer, network, Objective().scheduler()
    )
    made.save_pretrained(tmp_path / "pipeline")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert masks_padding(pipeline.transformer) and isinstance(pipeline.transformer, PixArtTransformer2DModel)
    images = generate(pipeline, ["desert", "ocean", "desert"], steps=3, guidance_scale=1.5, seed=0)
    assert images.shape == (3, SIZE, SIZE, 3) and images.std() > 0

    # training and pipeline give the same input: hidden states with the padding masked
    texts = encode_prompts(parts.text_encoder, parts.tokenizer, ["desert"])
    length = caption_lengths(parts.tokenizer, ["desert"])[0]
    embeds, mask, *_ = pipeline.encode_prompt(
        "desert", do_classifier_free_guidance=False, max_sequence_length=parts.tokenizer.model_max_length
    )
    assert int(mask.sum()) == length
    torch.testing.assert_close(embeds[:, :length], texts[:, :length], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- training from a pipeline


@pytest.fixture
def saved(parts, tmp_path) -> Path:
    """A run with a pipeline that predicts noise."""
    text_to_image_pipeline(
        tiny_autoencoder(), parts.text_encoder, parts.tokenizer, tiny_unet(), Objective("epsilon").scheduler()
    ).save_pretrained(tmp_path / "run" / "pipeline")
    return tmp_path / "run"


def test_pretrained_weights_are_loaded_from_a_run_or_a_pipeline(saved: Path) -> None:
    for path in (saved, saved / "pipeline"):
        cfg = config("model=pretrained", f"model.pretrained={path}", "train.objective.prediction=epsilon")
        result = load_pretrained(cfg)
        ours = tiny_unet().state_dict()
        assert all(torch.equal(value, ours[key]) for key, value in result.network.state_dict().items())
        assert not any(parameter.requires_grad for parameter in result.autoencoder.parameters())


@pytest.mark.parametrize(
    ("path", "named"),
    [("{saved}", "prediction=epsilon"), ("{saved}/nothing", "model.pretrained"), ("no/name", "no/name")],
)
def test_unsuitable_pretrained_models_are_refused(saved: Path, path: str, named: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cfg = config("model=pretrained", f"model.pretrained={path.format(saved=saved)}")
    with pytest.raises(UserError, match=named) as error:
        load_pretrained(cfg)
    assert "\n" not in str(error.value)


def test_only_low_rank_updates_train_and_they_load_and_merge(parts, tmp_path) -> None:
    network = tiny_unet()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    targets = list(config("model=lora", "model.pretrained=x").model.lora.targets)
    add_lora(network, 4, 8.0, targets, seed=0)
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
    latents, text, time = torch.randn(2, CHANNELS, 2, 2), torch.randn(2, 8, 8), torch.tensor([100.0, 700.0])
    with torch.no_grad():
        adapted = predict(network, latents, time, text)
    assert set(lora_weights(network)) and not lora_weights(tiny_unet())
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora", unet_lora_layers=lora_weights(network), unet_lora_adapter_metadata=lora_metadata(network)
    )
    pipeline = text_to_image_pipeline(
        tiny_autoencoder(), parts.text_encoder, parts.tokenizer, tiny_unet(), Objective().scheduler()
    )
    pipeline.load_lora_weights(tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(predict(pipeline.unet, latents, time, text), adapted, rtol=1e-4, atol=1e-4)
    merged = merge_lora(network)
    assert set(merged.state_dict()) == set(before)
    with torch.no_grad():
        torch.testing.assert_close(predict(merged, latents, time, text), adapted, rtol=1e-4, atol=1e-4)
        plain = predict(tiny_unet(), latents, time, text)
    assert not torch.allclose(plain, adapted, atol=1e-3)
    assert [path.suffix for path in (tmp_path / "lora").iterdir()] == [".safetensors"]


# ---------------------------------------------------------------- metadata


def test_missing_metadata_fields_have_no_effect() -> None:
    unet, encoder = tiny_unet(), new_encoder(PLACE, 8, seed=0)
    latents, text, time = torch.randn(3, CHANNELS, 2, 2), torch.randn(3, 8, 8), torch.tensor([10.0, 500.0, 990.0])
    values = torch.tensor([[20.0, 10.0], [np.nan, 45.0], [np.nan, np.nan]])
    tokens, known = encoder(values)
    assert tokens.shape == (3, 2, 8) and known.tolist() == [[True, True], [False, True], [False, False]]
    mask = torch.cat([torch.ones(3, 8, dtype=torch.bool), known], dim=1)
    with torch.no_grad():
        both = predict(unet, latents, time, torch.cat([text, tokens], 1), mask)
        none = predict(unet, latents, time, text)
        latitude = predict(unet, latents[1:2], time[1:2], torch.cat([text, tokens[:, 1:]], 1)[1:2])
    torch.testing.assert_close(both[2], none[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1], latitude[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[0], none[0], atol=1e-3)


def test_metadata_fields_are_scaled_to_0_to_1000() -> None:
    np.testing.assert_allclose(PLACE["lon"].scaled(torch.tensor([-180.0, 0, 180, 999])), [0, 500, 1000, 1000])
    field = MetadataField(0.1, 1000, log=True)
    np.testing.assert_allclose(field.scaled(torch.tensor([0.1, 10.0, 1000.0])), [0, 500, 1000], atol=1e-3)


def test_metadata_values_are_read_from_the_manifest() -> None:
    manifest = pd.DataFrame(
        {
            "lon": [1.5, np.nan],
            "resolution": ["0.5", "none"],
            "date": ["2019-02-03", "not a date"],
            "empty": [None, None],
        }
    )
    fields = {
        "lon": PLACE["lon"],
        "ground_sampling_distance": MetadataField(0.1, 10, column="resolution"),
        "year": MetadataField(1980, 2100),
        "day_of_year": MetadataField(1, 366),
    }
    values = metadata_values(manifest, fields)
    np.testing.assert_array_equal(values, np.array([[1.5, 0.5, 2019, 34], [np.nan] * 4], dtype=np.float32))
    with pytest.raises(UserError, match="no column lat"):
        metadata_values(manifest, PLACE)
    with pytest.raises(UserError, match="contains no numbers"):
        metadata_values(manifest, {"empty": MetadataField(0, 1)})


def test_metadata_fields_are_dropped_independently() -> None:
    values = np.ones((4000, 2), dtype=np.float32)
    dropped = np.isnan(drop(values, np.random.default_rng(0), 0.25))
    assert dropped.mean() == pytest.approx(0.25, abs=0.02) and not np.isnan(values).any()
    assert np.corrcoef(dropped.T)[0, 1] == pytest.approx(0, abs=0.05)


def test_a_pipeline_draws_with_metadata_and_without(parts, tmp_path) -> None:
    pipeline = text_to_image_pipeline(
        tiny_autoencoder(), parts.text_encoder, parts.tokenizer, tiny_unet(), Objective().scheduler()
    )
    new_encoder(PLACE, 8, seed=1).save(tmp_path / "encoder")
    encoder = MetadataEncoder.load(tmp_path / "encoder")
    assert encoder.fields == PLACE
    options = {"steps": 3, "guidance_scale": 2.0, "seed": 0}
    plain = generate(pipeline, ["desert", "ocean"], **options)
    without = generate(
        pipeline, ["desert", "ocean"], **options, **prompt_embeddings(pipeline, encoder, ["desert", "ocean"], {})
    )
    np.testing.assert_array_equal(plain, without)
    here, there = (
        prompt_embeddings(pipeline, encoder, ["desert", "ocean"], {"lon": lon, "lat": [10, 20]}) for lon in (20, -100)
    )
    assert here["prompt_embeds"].shape == (2, 8 + 2, 8)
    assert not torch.equal(here["prompt_embeds"], there["prompt_embeds"])
    assert generate(pipeline, ["", ""], **options, **here).shape == plain.shape
    with pytest.raises(UserError, match="altitude"):
        prompt_embeddings(pipeline, encoder, ["desert"], {"altitude": 3})
    with pytest.raises(UserError, match="not a finite number"):
        prompt_embeddings(pipeline, encoder, ["desert"], {"lon": float("nan")})


# ---------------------------------------------------------------- captions and latents


def test_all_captions_of_an_image_are_picked_equally_often() -> None:
    manifest = pd.DataFrame(
        {"caption": ["a", "x", "b"], "captions": [["a", "b", "c"], None, np.array(["b", "x"])]},
    )
    captions = Captions.of(manifest)
    assert captions.texts == ["a", "b", "c", "x", ""] and captions.texts[captions.empty] == ""
    picked = captions.pick(np.repeat([0, 1, 2], 3000), np.random.default_rng(0)).reshape(3, 3000)
    fractions = [np.bincount(row, minlength=5) / 3000 for row in picked]
    np.testing.assert_allclose(fractions, [[1 / 3] * 3 + [0, 0], [0, 0, 0, 1, 0], [0, 0.5, 0, 0.5, 0]], atol=0.04)


def test_picking_a_single_caption_uses_no_random_number() -> None:
    captions, random = Captions.of(pd.DataFrame({"caption": ["a", "b", "a"]})), np.random.default_rng(0)
    assert captions.pick(np.array([2, 1, 0]), random).tolist() == [0, 1, 0]
    assert random.random() == np.random.default_rng(0).random()


def test_prompts_are_encoded_once(parts, tmp_path) -> None:
    texts = ["desert", "a much longer caption about an ocean", ""]
    prompts, lengths = cached_prompts(parts.text_encoder, parts.tokenizer, "key", texts, tmp_path)
    assert torch.equal(torch.from_numpy(np.array(prompts)), encode_prompts(parts.text_encoder, parts.tokenizer, texts))
    assert lengths.tolist() == [3, 8, 2]  # with start and end tokens; truncated at the tokenizer's maximum
    again, _ = cached_prompts(None, parts.tokenizer, "key", texts, tmp_path)
    np.testing.assert_array_equal(again, prompts)


def corpus_of(images: np.ndarray) -> Corpus:
    manifest = pd.DataFrame({"id": map(str, range(len(images))), "readable": True})
    return Corpus("made", Path("made"), images, manifest, None, ())


def test_cached_latents_equal_those_of_the_autoencoder_and_resume(tmp_path, monkeypatch) -> None:
    from train import latents as module

    monkeypatch.setattr(module, "ENCODE_BATCH", 4)
    autoencoder, corpus, rows = tiny_autoencoder(), corpus_of(pictures(120)), np.arange(0, 120, 1)
    views, encode, calls = Views(symmetries=2), encode_moments, [0]

    def killed(*arguments):
        calls[0] += 1
        if calls[0] == 45:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(module, "encode_moments", killed)
    with pytest.raises(KeyboardInterrupt):
        cached_latents(autoencoder, "key", corpus, rows, tmp_path, views=views)
    result = cached_latents(autoencoder, "key", corpus, rows, tmp_path, views=views)
    assert calls[0] == 45 + 60 - 40  # 40 of 60 batches were recorded as done
    assert result.shape == (2, 120, CHANNELS, 2, 2) and result.dtype == np.float32
    with torch.no_grad():
        for view in range(2):
            for start in range(0, 120, 4):
                images = symmetric(to_tensor(corpus.images[start : start + 4]), view)
                np.testing.assert_array_equal(result[view, start : start + 4], encode(autoencoder, images).numpy())
    half = cached_latents(autoencoder, "key", corpus, rows[:8], tmp_path, half=True)
    assert half.dtype == np.float16


def test_crops_are_parts_of_their_image_and_too_large_crops_are_refused() -> None:
    images, rows, views = to_tensor(pictures(3, size=24)), np.array([5, 9, 11]), Views(symmetries=2, crops=2, crop=16)
    assert len(views) == 4 and views.side(24) == 16
    taken = views.take(images, rows, 2, seed=0)
    assert torch.equal(taken[1:], views.take(images[1:], rows[1:], 2, seed=0))
    assert any(torch.equal(taken[0], images[0, :, y : y + 16, x : x + 16]) for y in range(9) for x in range(9))
    assert not torch.equal(taken, views.take(images, rows, 0, seed=0))
    with pytest.raises(UserError, match="crop=32"):
        Views(crop=32).side(24)


def test_latents_of_a_variational_autoencoder_are_mean_and_deviation(tmp_path) -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=2, scaling_factor=0.5
    ).eval()
    images = pictures(4)
    result = cached_latents(autoencoder, "kl", corpus_of(images), np.arange(4), tmp_path)
    with torch.no_grad():
        distribution = autoencoder.encode(to_tensor(images)).latent_dist
    np.testing.assert_allclose(result[0, :, :2], 0.5 * distribution.mean, atol=1e-6)
    np.testing.assert_allclose(result[0, :, 2:], 0.5 * distribution.std, atol=1e-6)


# ---------------------------------------------------------------- the loop


def test_micro_batches_give_the_same_weights_as_whole_batches(tmp_path) -> None:
    whole = fit(tmp_path / "whole")
    for size in (2, 3):  # the last part of three is smaller
        parts_ = fit(tmp_path / f"parts_{size}", replace(OPTIONS, micro_batch=size))
        for key, value in whole.items():
            torch.testing.assert_close(parts_[key], value, rtol=1e-4, atol=1e-6)


def test_dropout_is_reproduced_after_a_kill(tmp_path) -> None:
    whole = fit(tmp_path / "whole", dropout=0.5)
    fit(tmp_path / "cut", replace(OPTIONS, steps=12, checkpoint_every=6, keep_checkpoints=2), dropout=0.5)
    kept = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert kept == ["00000006", "00000012"]
    import shutil

    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "00000012")
    torch.manual_seed(99)
    resumed = fit(tmp_path / "cut", replace(OPTIONS, checkpoint_every=6), dropout=0.5)
    for key, value in whole.items():
        assert torch.equal(resumed[key], value)


def test_a_diverging_loss_stops_the_training(tmp_path) -> None:
    options = replace(OPTIONS, steps=400, learning_rate=30.0, gradient_clip=1e9, warmup=200, divergence=3.0)
    with pytest.raises(UserError, match="diverged to") as error:
        fit(tmp_path, options)
    assert "learning_rate" in str(error.value) and "checkpoint" in str(error.value)


def test_compiled_networks_keep_the_names_of_their_weights(tmp_path, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    fit(tmp_path, replace(OPTIONS, compile=True))
    assert len(compiled) == 2
    state = load_file(next(tmp_path.rglob("net.safetensors")))
    assert set(state) == {"0.weight", "0.bias", "3.weight", "3.bias"}


def launched(
    directory: Path, config: str = "multi_cpu", micro_batch: int = 8, script: str = "tiny_loop.py"
) -> dict[str, list]:
    """Output of a training over two processes of `accelerate launch`: losses, weights, snapshots of each process."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / f"configs/accelerate/{config}.yaml"), "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "tests" / script), str(directory), str(micro_batch)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    message = json.loads(done.stdout.strip().splitlines()[-1])
    assert message["processes"] == 2
    return message


def saved_losses(directory: Path) -> list[float]:
    return json.loads((directory / "checkpoints" / "00000012" / "state.json").read_text())["losses"]


def test_two_processes_train_like_one_and_continue_its_checkpoint(tmp_path) -> None:
    """gloo on the CPU: the same global batch, so the same curve except for the order of sums."""
    snapshots = []
    one = fit(tmp_path / "one", on_snapshot=lambda *given: snapshots.append(given))
    losses = saved_losses(tmp_path / "one")
    pair = launched(tmp_path / "two")
    np.testing.assert_allclose(pair["losses"], losses, rtol=1e-4)
    np.testing.assert_allclose(pair["weights"], one["0.weight"], rtol=1e-3, atol=1e-5)

    # every process gets every snapshot, with the same complete average and the same loss
    assert [step for step, *_ in snapshots] == [5, 12] and pair["snapshots"][0] == pair["snapshots"][1]
    assert [step for step, *_ in pair["snapshots"][0]] == [5, 12]
    np.testing.assert_allclose([loss for _, loss, _ in pair["snapshots"][0]], [s[1] for s in snapshots], rtol=1e-4)
    np.testing.assert_allclose(pair["snapshots"][0][-1][2], one["0.weight"], rtol=1e-3, atol=1e-5)

    with pytest.raises(KeyboardInterrupt):  # one process starts ...
        interrupted(tmp_path / "changed", 8)
    later = launched(tmp_path / "changed")  # ... and two continue
    np.testing.assert_allclose(later["losses"], losses, rtol=1e-4)
    np.testing.assert_allclose(later["weights"], one["0.weight"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp", "deepspeed"])
def test_plugins_train_like_one_process_and_each_continues_the_other(tmp_path, config) -> None:
    """Accelerate's plugins over gloo: checkpoints are complete, so each can continue from the other's."""
    if config == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install '.[deepspeed]')")
    one = fit(tmp_path / "one")
    losses = saved_losses(tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "changed", 8)
    for name, micro_batch in (("parts", 3), ("changed", 8)):
        pair = launched(tmp_path / name, config, micro_batch, "plugin_loop.py")
        assert pair["kind"] == config.upper()
        np.testing.assert_allclose(pair["losses"], losses, rtol=1e-4)
        np.testing.assert_allclose(pair["weights"], one["0.weight"], rtol=1e-3, atol=1e-5)
        for file in ("net", "shift", "net_average", "shift_average", "optimizer"):
            expected, result = (
                load_file(tmp_path / run / "checkpoints" / "00000012" / f"{file}.safetensors") for run in ("one", name)
            )
            assert result.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(result[key], value, rtol=1e-3, atol=1e-5)

    longer = replace(OPTIONS, steps=15)
    expected, result = (fit(tmp_path / name, longer) for name in ("one", "parts"))  # one process continues from two
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=1e-3, atol=1e-5)


def interrupted(directory: Path, step: int) -> None:
    """`fit`, interrupted in the loss of a step."""
    calls = [0]
    forward = nn.Tanh.forward

    def stop(self, value):
        calls[0] += 1
        if calls[0] == step:
            raise KeyboardInterrupt
        return forward(self, value)

    nn.Tanh.forward = stop
    try:
        fit(directory)
    finally:
        nn.Tanh.forward = forward


# ---------------------------------------------------------------- the hub


def test_pushing_a_pipeline_uploads_it_or_reports_the_reason(tmp_path, monkeypatch) -> None:
    from train import pretrain as command

    calls = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append(("create", name, exist_ok))

        def upload_folder(self, folder_path, repo_id):
            calls.append(("upload", folder_path, repo_id))
            if repo_id == "owner/closed":
                raise OSError("403 Forbidden\nfor this token")

    monkeypatch.setattr(command, "HfApi", Hub)
    command.push(tmp_path, "owner/name")
    assert calls == [("create", "owner/name", True), ("upload", tmp_path, "owner/name")]
    with pytest.raises(UserError, match=r"owner/closed.*403") as error:
        command.push(tmp_path, "owner/closed")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- measures of a training


def test_training_flops_are_three_forward_passes() -> None:
    network = new_transformer(TRANSFORMER, CHANNELS, 4, 8, seed=0)
    tokens, width = 16, 16
    counted = training_flops(network, torch.zeros(1, CHANNELS, 4, 4), torch.zeros(1, 6, 8))
    # a block's large products: self-attention's 4 projections, cross-attention's 2 of the image, a 4-fold MLP
    block = 2 * tokens * width * width * (4 + 2 + 8)
    assert 3 * 2 * block < counted < 3 * 2 * 3 * block
    assert peak_flops(torch.device("cpu"), torch.float32, 256, 0.05) > 1e8


def test_snapshots_are_evenly_spaced_or_at_intervals_of_images() -> None:
    options = LoopOptions(steps=100, batch_size=32, learning_rate=1e-3)
    assert snapshot_steps(config("train.snapshots=4"), options) == [25, 50, 75, 100]
    assert snapshot_steps(config("train.snapshot_every_images=960"), options) == [30, 60, 90, 100]
    assert snapshot_steps(config("train.snapshot_every_images=1"), options) == list(range(1, 101))
    assert snapshot_steps(config("train.snapshots=0"), options) == [100]


def test_a_sweep_has_its_own_tracking_group_and_a_single_run_has_none(monkeypatch) -> None:
    monkeypatch.setattr(tracking.HydraConfig, "initialized", lambda: True)
    for mode, expected in ((RunMode.RUN, False), (RunMode.MULTIRUN, True)):
        monkeypatch.setattr(tracking.HydraConfig, "get", lambda mode=mode: DictConfig({"mode": mode}))
        monkeypatch.setattr(sys, "argv", ["train/pretrain.py", "-m", "ratio=0.5,0.85"])
        group = tracking._sweep()
        assert (group is not None) == expected
        assert tracking._sweep() == group  # every run of the sweep computes it by itself
    monkeypatch.setattr(sys, "argv", ["train/pretrain.py", "-m", "ratio=0.5,0.9"])
    assert tracking._sweep() != group and group.startswith("sweep-")


def test_the_summary_of_a_curve_has_its_area_and_the_reached_targets() -> None:
    assert area_under_curve([0, 1, 3], [4, 2, 2]) == pytest.approx((3 + 4) / 3)
    assert area_under_curve([5], [2]) == 2
    assert first_reached([10, 20, 30], [8, 4, 2], 6) == 15
    assert first_reached([10, 20, 30], [8, 4, 2], 1) is None
    assert first_reached([10, 20], [8, 4], 9) == 10
    assert first_reached([10, 20], [0.2, 0.6], 0.5, lower_is_better=False) == pytest.approx(17.5)
    lines = [
        {
            "step": 10,
            "images_seen": 320,
            "seconds": 5.0,
            "loss": 1.0,
            "balanced_kid_x1000_e": 300,
            "balanced_recall_e": 0.0,
        },
        {
            "step": 20,
            "images_seen": 640,
            "seconds": 9.0,
            "loss": 0.5,
            "balanced_kid_x1000_e": 100,
            "balanced_recall_e": 0.4,
        },
    ]
    result = summarise(lines, {"balanced_kid_x1000_e": 200, "balanced_recall_e": 0.9})
    assert result["area_under_curve"]["balanced_kid_x1000_e"] == 200
    assert result["reached"]["balanced_kid_x1000_e"] == {"target": 200, "step": 15, "images_seen": 480, "seconds": 7}
    assert result["reached"]["balanced_recall_e"]["step"] is None
    assert summarise(lines, {"balanced_fid": 5})["reached"]["balanced_fid"]["images_seen"] is None


@pytest.mark.parametrize(
    ("part", "options"),
    [
        (Views, {"symmetries": 9}),
        (Views, {"symmetries": 0}),
        (Views, {"crop": 16, "crops": 0}),
        (MetadataField, {"low": 1, "high": 1}),
        (MetadataField, {"low": 0, "high": 10, "log": True}),
    ],
)
def test_invalid_views_and_metadata_fields_are_refused(part, options) -> None:
    with pytest.raises(UserError):
        part(**options)
