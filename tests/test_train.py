"""Training parts: PCA start, tokenizer, objective, and a loop that resumes bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from torch import nn

from encoders.pixels import to_tensor, to_uint8
from eval.pairs import peak_signal_noise_ratio
from runtime.artefacts import read_json
from runtime.errors import UserError
from train.autoencoder import start_from_pca
from train.latents import PatchPCA, encode, symmetric
from train.loop import LoopOptions, train_loop
from train.networks import diffusion_loss
from train.objective import Objective
from train.text_encoder import clip_tokenizer, contrastive_loss


def smooth_images(count: int) -> torch.Tensor:
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(noise, size=32, mode="bicubic").clamp(-1, 1)


def test_pca_is_the_best_linear_code_of_its_size():
    images = smooth_images(64)
    small, large = (PatchPCA.fit(images, components) for components in (4, 192))
    torch.testing.assert_close(large.decode(large.encode(images)), images, rtol=0, atol=1e-4)
    patches = images.unflatten(2, (4, 8)).unflatten(4, (4, 8)).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192).double()
    singular = torch.linalg.svdvals(patches - patches.mean(0))
    error = (small.decode(small.encode(images)) - images).double().square().sum()
    assert float(error) == pytest.approx(float(singular[4:].square().sum()), rel=1e-4)
    assert float(small.encode(images).square().mean()) == pytest.approx(1, rel=1e-4)


def test_autoencoder_starts_as_pca_exactly():
    images = smooth_images(32)
    pca = PatchPCA.fit(images, 16)
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(64,) * 4,
        decoder_block_out_channels=(64,) * 4,
        latent_channels=16,
        num_encoder_blocks=(0, 1, 1, 2),
        num_decoder_blocks=(1, 1, 1, 1),
        scaling_factor=8.0,
    )
    start_from_pca(autoencoder, pca)
    with torch.no_grad():
        torch.testing.assert_close(encode(autoencoder, images), pca.encode(images), rtol=0, atol=1e-4)


def test_conversion_to_tensors_and_back_keeps_images_unchanged():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_tensor(images)), images)
    assert peak_signal_noise_ratio(np.full((1, 2, 2, 3), 10), np.full((1, 2, 2, 3), 20)) == pytest.approx(
        28.1308, abs=1e-3
    )


def test_the_eight_symmetries_are_different():
    image = torch.arange(12.0).reshape(1, 3, 2, 2)
    seen = {tuple(symmetric(image, index).flatten().tolist()) for index in range(8)}
    assert len(seen) == 8


def test_the_tokenizer_equals_that_of_clip():
    import open_clip  # takes seconds, and only this test needs it

    text = "A satellite image of dry steppe, naïve 3x — coast's edge"
    expected = [token for token in open_clip.get_tokenizer("ViT-B-32")(text)[0].tolist() if token]
    assert clip_tokenizer(77)(text).input_ids == expected


def test_contrastive_loss_treats_equal_captions_as_positives():
    eye = torch.eye(3)
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    texts = eye[[0, 0, 2]]
    low = contrastive_loss(eye[[0, 0, 2]], texts, same, torch.tensor(50.0))
    high = contrastive_loss(eye[[2, 1, 0]], texts, same, torch.tensor(50.0))
    assert low < 0.7 < high  # the minimum: log 2 for the pair with the same caption, weighted by two thirds


class Constant(nn.Module):
    """Predicts a given velocity."""

    def __init__(self, velocity: torch.Tensor) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor):
        return type("Output", (), {"sample": self.velocity})


def test_flow_loss_is_zero_for_the_true_velocity_and_the_sampler_follows_it():
    latents, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    network = Constant(noise - latents)
    text = torch.zeros(2, 1, 8)
    flow = Objective()
    assert float(diffusion_loss(network, flow, latents, text, noise, torch.rand(2))) == 0
    assert float(diffusion_loss(network, flow, latents + 1, text, noise, torch.rand(2))) == pytest.approx(1, rel=1e-4)
    scheduler = flow.scheduler()
    scheduler.set_timesteps(8)
    sample = noise.clone()
    for step in scheduler.timesteps:
        sample = scheduler.step(noise - latents, step, sample).prev_sample
    torch.testing.assert_close(sample, latents, rtol=0, atol=0.02)


def test_noise_times_and_caption_dropout_have_the_configured_distributions():
    objective = Objective(time_mean=0.3, time_std=0.8, caption_dropout=0.25)
    noise, time, dropped = objective.draw(np.random.default_rng(0), (4096, 2, 2, 2))
    assert float(noise.mean()) == pytest.approx(0, abs=0.03) and float(noise.std()) == pytest.approx(1, abs=0.02)
    logit = torch.logit(time.double())
    assert float(logit.mean()) == pytest.approx(0.3, abs=0.01) and float(logit.std()) == pytest.approx(0.8, abs=0.01)
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)


OPTIONS = LoopOptions(steps=12, batch_size=4, learning_rate=1e-2, warmup=2, ema_halflife=8, checkpoint_every=3, seed=5)


def fit(directory, stop_at: int | None = None, options: LoopOptions = OPTIONS) -> tuple[dict, list]:
    """Train a small network on noise; `stop_at` raises inside that step's loss, like a kill."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    calls, seen = [0], []

    def draw(random, rows):
        return (torch.from_numpy(random.standard_normal((4, 6), dtype=np.float32))[rows],)

    def loss(modules, batch):
        calls[0] += 1
        if calls[0] == stop_at:
            raise KeyboardInterrupt
        return (modules["net"](batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    def on_snapshot(step, mean_loss, seconds, modules):
        seen.append((step, mean_loss))

    accelerator = Accelerator(cpu=True)
    best = train_loop(
        accelerator,
        {"net": module},
        draw,
        loss,
        options,
        directory,
        label="t",
        snapshots=[6, 12],
        on_snapshot=on_snapshot,
    )
    return {key: value.clone() for key, value in best["net"].state_dict().items()}, seen


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole, snapshots = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_at=9)
    resumed, later = fit(tmp_path / "cut")
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)
    assert later[-1] == snapshots[-1]
    assert [step for step, _ in snapshots] == [6, 12]


def test_a_partial_checkpoint_is_never_loaded(tmp_path):
    whole, _ = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_at=9)
    partial = tmp_path / "cut" / "checkpoints" / "00000009.partial"
    partial.mkdir()
    (partial / "net.safetensors").write_bytes(b"cut short")
    resumed, _ = fit(tmp_path / "cut")
    torch.testing.assert_close(resumed["0.weight"], whole["0.weight"], rtol=0, atol=0)
    assert len(list((tmp_path / "cut" / "checkpoints").iterdir())) == 1


def test_checkpoints_contain_only_safetensors_and_json(tmp_path):
    fit(tmp_path)
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert load_file(next(path for path in files if path.name == "net.safetensors"))["0.weight"].shape == (5, 6)


def test_the_weight_average_differs_from_the_weights_and_can_be_disabled(tmp_path):
    averaged, _ = fit(tmp_path / "a")
    plain, _ = fit(tmp_path / "b", options=replace(OPTIONS, ema_halflife=0))
    assert not torch.equal(averaged["0.weight"], plain["0.weight"])
    torch.testing.assert_close(
        load_file(next((tmp_path / "a").rglob("net.safetensors")))["0.weight"], plain["0.weight"]
    )


def test_the_error_about_divergence_names_the_step(tmp_path):
    module = nn.Linear(1, 1)

    def draw(random, rows):
        return (torch.ones(4, 1)[rows],)

    def loss(modules, batch):
        return modules["net"](batch[0]).sum() * float("nan")

    with pytest.raises(UserError, match="at step 1; there is no checkpoint yet"):
        train_loop(Accelerator(cpu=True), {"net": module}, draw, loss, OPTIONS, tmp_path, label="t")


def test_the_error_about_divergence_names_the_last_good_checkpoint(tmp_path):
    calls = []

    def draw(random, rows):
        return (torch.ones(4, 1)[rows],)

    def loss(modules, batch):
        calls.append(1)
        return modules["net"](batch[0]).sum() * (float("nan") if len(calls) == 8 else 1.0)

    options = replace(OPTIONS, checkpoint_every=3, keep_checkpoints=2)
    with pytest.raises(UserError, match=r"at step 8; the last good checkpoint is .*/00000006: lower"):
        train_loop(Accelerator(cpu=True), {"net": nn.Linear(1, 1)}, draw, loss, options, tmp_path, label="t")


def test_learning_rate_rises_and_falls():
    rates = [OPTIONS.rate(step) for step in range(12)]
    assert rates[0] == pytest.approx(5e-3) and max(rates) == 1e-2 and rates[-1] < 3e-3


# ---------------------------------------------------------------- started from a checkpoint of another training


def flat(**changes: object) -> LoopOptions:
    """Options with a learning rate that does not depend on the number of steps."""
    return replace(OPTIONS, decay=0.0, **changes)


def take_up(directory: Path, start: Path, options: LoopOptions, width: int = 5, **given: object) -> dict:
    """Like `fit`, but from a checkpoint; also returns the steps' learning rates and the snapshots' steps."""
    torch.manual_seed(1)  # other weights than those of `fit`
    module = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1))
    drawn, seen = [], []

    def draw(random, rows):
        drawn.append(random.standard_normal((4, 6), dtype=np.float32))
        return (torch.from_numpy(drawn[-1])[rows],)

    def loss(modules, batch):
        return (modules["net"](batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    best = train_loop(
        Accelerator(cpu=True), {"net": module}, draw, loss, options, directory, label="t", snapshots=[6, 12, 18],
        on_snapshot=lambda step, *_: seen.append(step), start=start, **given,
    )  # fmt: skip
    return {"weights": best["net"].state_dict(), "drawn": len(drawn), "seen": seen}


def test_a_continued_training_equals_one_with_more_steps(tmp_path):
    whole, _ = fit(tmp_path / "whole", options=flat(steps=18))
    fit(tmp_path / "short", options=flat(steps=12))
    longer = take_up(tmp_path / "long", tmp_path / "short" / "checkpoints" / "00000012", flat(steps=18))
    assert longer["drawn"] == 6 and longer["seen"] == [18]
    for key, value in whole.items():
        torch.testing.assert_close(longer["weights"][key], value, rtol=0, atol=0)
    metadata = read_json(tmp_path / "long" / "checkpoints" / "00000018" / "state.json")
    assert (metadata["step"], metadata["images"], len(metadata["losses"])) == (18, 72, 6)


def test_other_options_apply_from_the_checkpoint_on(tmp_path):
    fit(tmp_path / "short", options=flat(steps=12))
    start = tmp_path / "short" / "checkpoints" / "00000012"
    before = load_file(start / "net.safetensors")
    still = take_up(tmp_path / "still", start, flat(steps=13, learning_rate=0.0, ema_halflife=0.0))
    torch.testing.assert_close(still["weights"]["0.weight"], before["0.weight"], rtol=0, atol=0)
    rates = []
    options = replace(OPTIONS, steps=40, learning_rate=5e-3)
    log = lambda values, step: rates.append((step, values["learning_rate"]))  # noqa: E731
    take_up(tmp_path / "slow", start, options, log=log)
    assert rates == [(20, pytest.approx(options.rate(19))), (40, pytest.approx(options.rate(39)))]


def test_an_interrupted_continuation_resumes_from_its_own_checkpoint(tmp_path):
    fit(tmp_path / "short", options=flat(steps=12))
    start = tmp_path / "short" / "checkpoints" / "00000012"
    whole = take_up(tmp_path / "whole", start, flat(steps=18))
    take_up(tmp_path / "cut", start, flat(steps=15))
    again = take_up(tmp_path / "cut", start, flat(steps=18))
    assert again["drawn"] == 3
    torch.testing.assert_close(again["weights"]["0.weight"], whole["weights"]["0.weight"], rtol=0, atol=0)


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    fit(tmp_path / "short")
    start = tmp_path / "short" / "checkpoints" / "00000012"
    with pytest.raises(UserError, match=r"00000012 does not fit these networks \(.*size mismatch.*\): train with") as e:
        take_up(tmp_path / "wide", start, flat(steps=18), width=7)
    assert "\n" not in str(e.value) and not (tmp_path / "wide" / "checkpoints").exists()
    (start / "net.safetensors").rename(start / "other.safetensors")
    with pytest.raises(UserError, match=r"does not fit these networks \(it contains net_average, optimizer, other\)"):
        take_up(tmp_path / "named", start, flat(steps=18))


def test_the_error_about_divergence_names_the_option_to_continue(tmp_path):
    def take(checkpoint: Path) -> str:
        return f"train.resume={checkpoint.name}"

    def explode(modules, batch):
        return modules["net"](batch[0]).sum() * float("nan")

    def draw(random, rows):
        return (torch.ones(4, 6)[rows],)

    fit(tmp_path / "short", options=flat(steps=12))
    start = tmp_path / "short" / "checkpoints" / "00000012"
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    arguments = (Accelerator(cpu=True), {"net": module}, draw, explode, flat(steps=18), tmp_path / "bad")
    with pytest.raises(
        UserError, match=r"at step 13; continue from .* with the same command and train\.resume=00000012, or"
    ):
        train_loop(*arguments, label="t", start=start, take_up=take)
