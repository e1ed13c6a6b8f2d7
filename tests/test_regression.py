"""Super-resolution by regression: size, start at bicubic, batches, learning, and its stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from scipy.ndimage import gaussian_filter
from tiny_networks import SIZE, pictures
from tiny_task import task_config

from downstream import regression
from downstream.corpora import corpus_of, training_rows
from downstream.degradation import degrade
from downstream.interpolation import enlarge
from downstream.regression import (
    REGRESSION,
    load_regression,
    new_regression_network,
    paired_batches,
    pixel_loss,
    regression_outputs,
    train_regression,
)
from encoders.pixels import to_uint8
from runtime.artefacts import read_json
from runtime.errors import UserError
from train.loop import LoopOptions, train_loop

PARAMETERS = 12_000


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_a_network_has_about_as_many_weights_as_requested(factor: int) -> None:
    for requested in (PARAMETERS, 60_000, 400_000, 2_900_000):
        network = new_regression_network(requested, factor, seed=0)
        assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(requested, rel=0.1)
        assert network.shape["blocks"] <= 32
    assert network(torch.zeros(1, 3, 6, 5)).shape == (1, 3, 6 * factor, 5 * factor)


def test_factors_and_sizes_that_edsr_does_not_support_are_refused() -> None:
    for factor in (1, 5, 6):
        with pytest.raises(UserError, match=f"factor={factor}: the regression network enlarges by 2, 3, 4, 8"):
            new_regression_network(PARAMETERS, factor, seed=0)
    with pytest.raises(UserError, match="no regression network has about 3000 weights, the smallest has"):
        new_regression_network(3000, 4, seed=0)


@pytest.mark.parametrize("factor", [3, 4])
def test_an_untrained_network_equals_bicubic_interpolation_of_pil(factor: int) -> None:
    low = gaussian_filter(pictures(5), (0, 1, 1, 0))[:, :, :12]
    result = regression_outputs(new_regression_network(PARAMETERS, factor, seed=0), low)
    error = np.abs(result.astype(int) - enlarge(low, factor, "bicubic"))
    assert error.max() <= 1 and (error > 0).mean() < 0.3  # PIL rounds twice


def test_the_weights_depend_only_on_the_seed() -> None:
    state = torch.get_rng_state()
    first, same, other = (new_regression_network(PARAMETERS, 4, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["body.conv_first.weight"], other["body.conv_first.weight"])


def test_outputs_do_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    network, low = taught(steps=1), pictures(7)
    whole = regression_outputs(network, low)
    monkeypatch.setattr(regression, "BATCH", 3)
    error = np.abs(regression_outputs(network, low).astype(int) - whole)
    assert error.max() <= 1 and (error > 0).mean() < 0.01  # other order of sums, then rounding
    assert regression_outputs(network, low[:0]).shape == (0, 32, 32, 3)


# ---------------------------------------------------------------- training


def test_both_images_of_a_pair_get_the_same_of_eight_symmetries() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    draw = paired_batches(degrade(images, 2), images, 64)
    low, high = (to_uint8(tensor) for tensor in draw(np.random.default_rng(0), slice(64)))
    assert (degrade(high, 2) == low).all()
    views = {np.rot90(side, turn).tobytes() for side in (images[0], images[0, :, ::-1]) for turn in range(4)}
    assert {image.tobytes() for image in high} == views and len(views) == 8


def test_processes_together_draw_the_batch_of_a_single_process() -> None:
    images = pictures(5)
    draw = paired_batches(degrade(images, 2), images, 6)
    whole = draw(np.random.default_rng(3), slice(6))
    parts = [draw(np.random.default_rng(3), part) for part in (slice(0, 3), slice(3, 6))]
    for tensor, *of_parts in zip(whole, *parts, strict=True):
        assert torch.equal(tensor, torch.cat(of_parts))
    assert not all(torch.equal(*pair) for pair in zip(whole, draw(np.random.default_rng(4), slice(6)), strict=True))


def test_the_loss_is_the_mean_absolute_error() -> None:
    network, images = new_regression_network(PARAMETERS, 2, seed=0), pictures(4)
    batch = paired_batches(degrade(images, 2), images, 4)(np.random.default_rng(0), slice(4))
    size = (16, 16)
    enlarged = [
        np.stack([np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BICUBIC)) for c in low], axis=0)
        for low in batch[0].numpy()
    ]
    expected = np.abs(np.stack(enlarged) - batch[1].numpy()).mean()
    assert pixel_loss({REGRESSION: network}, batch).item() == pytest.approx(expected, rel=1e-4)


def blocks(count: int, seed: int) -> np.ndarray:
    """Images in which each 2 x 2 pixels have one colour, so their nearest-neighbour enlargement by 2 is perfect."""
    return enlarge(np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), 2, "nearest")


def taught(steps: int, folder: Path | None = None) -> torch.nn.Module:
    """A network trained to enlarge `blocks`; without a folder, a network with random last weights."""
    network = new_regression_network(PARAMETERS, 2, seed=0)
    if folder is None:
        torch.nn.init.normal_(network.body.conv_last.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        return network
    images = blocks(64, seed=1)
    options = LoopOptions(steps=steps, batch_size=8, learning_rate=3e-3, warmup=5, decay=0.5)
    batches = paired_batches(degrade(images, 2), images, 8)
    return train_loop(Accelerator(), {REGRESSION: network}, batches, pixel_loss, options, folder, label="")[REGRESSION]


def test_a_trained_network_has_a_lower_error_than_bicubic(tmp_path: Path) -> None:
    network, truth = taught(60, tmp_path), blocks(32, seed=2)
    low = degrade(truth, 2)
    errors = [
        np.abs(outputs.astype(float) - truth).mean()
        for outputs in (regression_outputs(network, low), enlarge(low, 2, "bicubic"))
    ]
    assert errors[0] < 0.6 * errors[1]


# ---------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    return task_config(
        tmp_path_factory.mktemp("regression"), "downstream.super_resolution.regression.learning_rate=0.01"
    )


def options_of(cfg: DictConfig) -> LoopOptions:
    return LoopOptions(**cfg.downstream.loop, seed=cfg.seed)


def test_the_stage_saves_a_network_and_is_cached(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def noted(accelerator, modules, draw, loss, options, *rest, **named):
        given.update(options=options, batch=draw(np.random.default_rng(0), slice(4)))
        given["trained"] = train_loop(accelerator, modules, draw, loss, options, *rest, **named)
        return given["trained"]

    monkeypatch.setattr(regression, "train_loop", noted)
    directory = train_regression(cfg, PARAMETERS, options_of(cfg))
    assert given["options"].learning_rate == 0.01
    assert (given["options"].steps, given["options"].batch_size) == (4, 4)
    metadata = read_json(directory / "training.json")
    assert metadata["method"] == "regression" and metadata["network"]["factor"] == 4
    assert (metadata["steps"], metadata["images_seen"], metadata["training_images"]) == (4, 16, 16)
    assert metadata["parameters"] == pytest.approx(PARAMETERS, rel=0.1) and metadata["loss"] > 0
    assert {path.name for path in directory.iterdir()} == {"regression.safetensors", "training.json", "stage.json"}

    corpus = corpus_of(cfg, "train")
    rows = training_rows(corpus, 16, cfg.seed)
    batch = [to_uint8(tensor) for tensor in given["batch"]]
    assert batch[1].shape == (4, SIZE, SIZE, 3) and (degrade(batch[1], 4) == batch[0]).all()
    low = degrade(corpus.images[rows], 4)
    result = regression_outputs(load_regression(directory), low)
    assert (result == regression_outputs(given["trained"][REGRESSION].eval(), low)).all()
    assert (result != enlarge(low, 4, "bicubic")).mean() > 0.3

    given.clear()
    assert train_regression(cfg, PARAMETERS, options_of(cfg)) == directory and not given


@pytest.mark.parametrize(
    "change",
    [
        {"downstream.super_resolution.degradation": "blind"},
        {"downstream.super_resolution.factor": 2},
        {"downstream.super_resolution.regression.learning_rate": 0.02},
        {"downstream.training_images": 8},
        {"seed": 1},
    ],
)
def test_training_options_change_the_fingerprint(cfg: DictConfig, change: dict[str, object]) -> None:
    directory, other = train_regression(cfg, PARAMETERS, options_of(cfg)), cfg.copy()
    for name, value in change.items():
        OmegaConf.update(other, name, value)
    result = train_regression(other, PARAMETERS, options_of(other))
    assert result != directory and (result / "regression.safetensors").is_file()


def test_evaluation_options_do_not_change_the_fingerprint(cfg: DictConfig) -> None:
    directory, other = train_regression(cfg, PARAMETERS, options_of(cfg)), cfg.copy()
    other.downstream.images, other.downstream.super_resolution.dial = 4, 1.0
    assert train_regression(other, PARAMETERS, options_of(other)) == directory
