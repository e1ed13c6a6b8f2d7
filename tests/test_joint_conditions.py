"""Several conditions with one ControlNet each: a disabled condition has no effect, in training and in drawing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, MultiControlNetModel, StableDiffusionControlNetPipeline
from omegaconf import DictConfig
from PIL import Image
from skimage.feature import canny
from tiny_networks import CHANNELS, SIZE, pictures, tiny_autoencoder, tiny_text_encoder, tiny_unet
from tiny_task import CLASSES, task_config, tiny_foundation

from downstream.command import run_task
from downstream.conditional import Parts, weights_digest
from downstream.controlnet import load_controlnet, new_controlnet, one_hot, steered_loss, steered_pipeline
from downstream.corpora import corpus_of, held_out_images
from downstream.degradation import low_resolution
from downstream.edges import Canny, edge_agreement, edges
from downstream.fine_tuning import Examples, fine_tune, steered_batches
from downstream.interpolation import enlarge
from downstream.measured_task import OUTPUTS, TaskJudges, draw_outputs, load_pipeline, output_metrics
from downstream.registry import TASKS, chain_tasks, suitable_names
from downstream.task import Task
from eval.generate import starting_noise
from runtime.artefacts import read_json
from runtime.errors import UserError
from runtime.notices import notice
from train.objective import Objective

NAMES = ("mask", "edges", "low resolution")
COMBINATIONS = {
    "all": (1, 1, 1), "without mask": (0, 1, 1), "without edges": (1, 0, 1), "without low resolution": (1, 1, 0),
    "mask alone": (1, 0, 0), "edges alone": (0, 1, 0), "low resolution alone": (0, 0, 1), "none": (0, 0, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts(tiny_unet(), tiny_autoencoder(), *tiny_text_encoder())


@pytest.fixture(scope="module")
def nets(parts: Parts) -> MultiControlNetModel:
    """Three ControlNets with non-zero output, as after training."""
    made = new_controlnet(parts, 2, 3, 3, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in made.parameters():
            if not weight.any():
                weight.normal_(std=0.2, generator=generator)
    return made.eval()


def random_batch(size: int = 4) -> tuple[torch.Tensor, ...]:
    """Latents, text, noise, times, and conditions of 2, 3 and 3 channels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator)

    conditions = (normal(count, SIZE, SIZE) for count in (2, 3, 3))
    return normal(CHANNELS, 2, 2), normal(8, 8), normal(CHANNELS, 2, 2), torch.linspace(0.1, 0.9, size), *conditions


# ---------------------------------------------------------------- several ControlNets


def test_residuals_are_summed_and_multiplied_by_the_scales_image_by_image(
    parts: Parts, nets: MultiControlNetModel
) -> None:
    """The result equals calling each network separately for one image at a time, without the networks of scale 0."""
    objective, (latents, text, noise, time, *conditions) = Objective(), random_batch()
    scales = torch.tensor([[1.0, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0]])
    noisy, timesteps, target, _ = objective.noisy(latents, noise, time)
    losses = []
    with torch.no_grad():
        result = steered_loss(nets, parts.unet, objective, latents, text, noise, time, *conditions, scales=scales)
        for row in range(4):
            one, inputs = slice(row, row + 1), {}
            on = [index for index in range(3) if scales[row, index]]
            message = [
                nets.nets[index](noisy[one], timesteps[one], text[one], conditions[index][one], return_dict=False)
                for index in on
            ]
            if on:
                downs = [down for down, _ in message]
                inputs["mid_block_additional_residual"] = sum(middle for _, middle in message)
                inputs["down_block_additional_residuals"] = [sum(of) for of in zip(*downs, strict=True)]
            predicted = parts.unet(noisy[one], timesteps[one], text[one], **inputs).sample
            losses.append((predicted - target[one]).square().mean())
    torch.testing.assert_close(result, torch.stack(losses).mean())
    assert len({round(float(loss), 5) for loss in losses}) == 4


def test_a_condition_that_is_switched_off_does_not_train_its_network(parts: Parts, nets: MultiControlNetModel) -> None:
    latents, text, noise, time, *conditions = random_batch()
    scales = torch.tensor([[1.0, 0, 1]]).repeat(4, 1)
    loss = steered_loss(nets, parts.unet, Objective(), latents, text, noise, time, *conditions, scales=scales)
    loss.backward()
    moved = [any(weight.grad is not None and weight.grad.any() for weight in net.parameters()) for net in nets.nets]
    nets.zero_grad(set_to_none=True)
    parts.unet.zero_grad(set_to_none=True)
    assert moved == [True, False, True]


def test_untrained_controlnets_do_not_steer_and_one_condition_gives_one_network(parts: Parts) -> None:
    several = new_controlnet(parts, 2, 3, seed=0)
    assert [net.config.conditioning_channels for net in several.nets] == [2, 3]
    assert type(new_controlnet(parts, 2, seed=0)) is ControlNetModel
    latents, text, noise, time, *conditions = random_batch()
    scales = torch.ones(4, 2)
    with torch.no_grad():
        inputs = (parts.unet, Objective(), latents, text, noise, time)
        steered = steered_loss(several, *inputs, *conditions[:2], scales=scales)
        alone = steered_loss(several, *inputs, *conditions[:2], scales=0 * scales)
    torch.testing.assert_close(steered, alone)


def test_encoders_keep_the_variance_of_their_conditions(parts: Parts) -> None:
    """Differences between conditions are not lost in the layers before the last one; the last one is zero."""
    several = new_controlnet(parts, 2, 3, 3, seed=0)
    for net, condition in zip(several.nets, random_batch(16)[4:], strict=True):
        encoder = net.controlnet_cond_embedding
        result = torch.nn.functional.silu(encoder.conv_in(condition))
        for layer in encoder.blocks:
            result = torch.nn.functional.silu(layer(result))
        assert result.std(0).mean() > 0.03 * condition.std(0).mean()
        assert not encoder.conv_out.weight.any()
    again = new_controlnet(parts, 2, 3, 3, seed=0)
    assert weights_digest(again) == weights_digest(several) != weights_digest(new_controlnet(parts, 2, 3, 3, seed=1))


@pytest.fixture(scope="module")
def loaded(parts: Parts, nets: MultiControlNetModel, tmp_path_factory: pytest.TempPathFactory) -> DiffusionPipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    steered_pipeline(parts, nets, Objective().scheduler()).save_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: DiffusionPipeline, images: list, scales: list[float], count: int) -> np.ndarray:
    return pipeline(
        ["ice"] * count, image=images, latents=starting_noise(range(count), (CHANNELS, 2, 2), 1),
        num_inference_steps=2, guidance_scale=1.0, controlnet_conditioning_scale=scales, output_type="np",
    ).images  # fmt: skip


def test_the_saved_pipeline_is_plain_diffusers_and_scale_0_disables_a_condition(loaded: DiffusionPipeline) -> None:
    assert type(loaded) is StableDiffusionControlNetPipeline
    assert type(loaded.controlnet) is MultiControlNetModel and len(loaded.controlnet.nets) == 3
    images = [condition[:2] for condition in random_batch()[4:]]
    whole = drawn(loaded, images, [1.0, 1.0, 1.0], 2)
    for index in range(3):
        changed = [image + 1 if at == index else image for at, image in enumerate(images)]
        scales = [float(at != index) for at in range(3)]
        without = drawn(loaded, images, scales, 2)
        assert (without != whole).any()
        assert (drawn(loaded, changed, scales, 2) == without).all()
        assert (drawn(loaded, changed, [1.0, 1.0, 1.0], 2) != whole).any()


def test_the_pipeline_gives_the_networks_the_inputs_of_training(loaded: DiffusionPipeline, tmp_path: Path) -> None:
    """For PIL images of edges and low resolution, the saved pipeline gives each network the same input as training."""
    cfg = task_config(tmp_path)
    task, corpus, rows = TASKS["joint_conditions"](cfg), corpus_of(cfg, "train"), np.arange(2)
    trained = [torch.from_numpy(control(corpus, rows)) for control in task.controls.values()]
    low = enlarge(low_resolution(corpus.images[rows], 8), 8, "bicubic")
    lines = [Image.fromarray(picture) for picture in edges(corpus.images[rows], Canny(1.5, 0.05, 0.1))]
    given = [list(of_one) for of_one in zip(trained[0], lines, map(Image.fromarray, low), strict=True)]
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        net.controlnet_cond_embedding.register_forward_pre_hook(
            lambda _, inputs, index=index: seen.update({index: inputs[0].clone()})
        )
        for index, net in enumerate(loaded.controlnet.nets)
    ]
    drawn(loaded, given, [1.0, 1.0, 1.0], 2)
    of_two = dict(seen)
    drawn(loaded, [trained[0][:1], *given[0][1:]], [1.0, 1.0, 1.0], 1)
    for hook in hooks:
        hook.remove()
    for index, condition in enumerate(trained):
        torch.testing.assert_close(of_two[index], condition, rtol=0, atol=1e-6)
        torch.testing.assert_close(seen[index], condition[:1], rtol=0, atol=1e-6)
    assert (trained[0].numpy() == one_hot(corpus.masks[rows], 2)).all()
    assert trained[1].any() and trained[1].unique().tolist() == [0, 1]


def test_batches_switch_each_condition_off_independently() -> None:
    random = np.random.default_rng(0)
    conditions = [random.random((50, channels, 4, 4), dtype=np.float32) for channels in (2, 3)]
    examples = Examples(
        np.arange(50, dtype=np.float32)[:, None, None, None],
        lambda numbers: tuple(condition[numbers] for condition in conditions),
        torch.arange(3.0)[:, None, None],
        np.arange(50) % 2,
    )
    size = 4000
    draw = steered_batches(examples, Objective(caption_dropout=0.25), size, 0.3)
    latents, text, _, _, first, second, scales = draw(np.random.default_rng(1), slice(0, size))
    numbers = latents.flatten().long().numpy()
    assert (first.numpy() == conditions[0][numbers]).all() and (second.numpy() == conditions[1][numbers]).all()
    assert set(scales.flatten().tolist()) == {0.0, 1.0}
    assert (1 - scales).mean(0).numpy() == pytest.approx(0.3, abs=0.03)
    assert np.corrcoef(scales.numpy().T)[0, 1] == pytest.approx(0, abs=0.05)
    empty = text.flatten() == 2
    assert empty.float().mean() == pytest.approx(0.25, abs=0.03)
    assert (text.flatten()[~empty].numpy() == (numbers % 2)[~empty.numpy()]).all()
    part = draw(np.random.default_rng(1), slice(1000, 3000))
    for whole, piece in zip(draw(np.random.default_rng(1), slice(0, size)), part, strict=True):
        assert torch.equal(whole[1000:3000], piece)


# ---------------------------------------------------------------- edges


def test_edges_are_at_the_borders_and_equal_those_of_scikit_image() -> None:
    halves = np.zeros((2, 32, 32, 3), np.uint8)
    halves[0, :, 16:] = (40, 200, 90)
    halves[1, 16:] = 255
    result = edges(halves, Canny(1.0, 0.05, 0.1))
    assert result.dtype == bool and result.shape == (2, 32, 32)
    columns, rows = np.flatnonzero(result[0].any(0)), np.flatnonzero(result[1].any(1))
    assert set(columns) <= {15, 16} and set(rows) <= {15, 16} and len(columns) and len(rows)
    picture = pictures(1, size=32)
    red, green, blue = (picture[0].astype(float) / 255).transpose(2, 0, 1)
    grey = (16 + 65.481 * red + 128.553 * green + 24.966 * blue) / 255  # ITU-R BT.601
    assert (edges(picture, Canny(1.0, 0.05, 0.1))[0] == canny(grey, 1.0, 0.05, 0.1)).all()
    assert not edges(np.full((1, 32, 32, 3), 90, np.uint8), Canny(1.0, 0.05, 0.1)).any()
    with pytest.raises(ValueError, match=r"0 < low=0.2 <= high=0.1"):
        Canny(1.0, 0.2, 0.1)


def test_edge_agreement_allows_one_pixel() -> None:
    truth = np.zeros((2, 20, 20), bool)
    truth[0, :, 5], truth[1, 12] = True, True
    assert edge_agreement(truth, truth) == 1
    assert edge_agreement(np.roll(truth, (1, 1), (1, 2)), truth) == 1
    assert edge_agreement(np.roll(truth, (2, 2), (1, 2)), truth) < 0.1
    half = truth.copy()
    half[1] = False
    assert edge_agreement(half, truth) == pytest.approx(2 / 3)  # precision 1, recall one half
    assert edge_agreement(truth, half) == pytest.approx(2 / 3)
    assert edge_agreement(~truth & False, truth) == edge_agreement(truth, ~truth & False) == 0
    assert np.isnan(edge_agreement(~truth & False, ~truth & False))


# ---------------------------------------------------------------- the task


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    return task_config(tmp_path_factory.mktemp("tiny"), "downstream.lengths=[2]")


@pytest.fixture(scope="module")
def foundation(cfg: DictConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_foundation(tmp_path_factory.mktemp("foundation"), cfg)


@pytest.fixture(scope="module")
def run(cfg: DictConfig, foundation: Path) -> Path:
    return fine_tune(cfg, TASKS["joint_conditions"](cfg), foundation, "rsprune")


def test_the_task_is_not_part_of_the_chain(cfg: DictConfig) -> None:
    assert set(TASKS) - set(chain_tasks()) == {"joint_conditions"}
    assert set(suitable_names(cfg)) == {"super_resolution", "semantic_synthesis"}


def test_a_task_with_several_conditions_lists_their_combinations() -> None:
    def task(*names: str) -> Task:
        controls: dict[str, Callable] = {name: lambda corpus, rows: rows for name in names}
        return Task("t", None, {}, False, (), inputs=lambda held: {}, controls=controls)

    result = task("mask", "edges", "low_resolution").combinations()
    assert {name: way.scales for name, way in result.items()} == COMBINATIONS
    result = task("edges", "low_resolution").combinations()
    assert list(result) == ["all", "edges alone", "low resolution alone", "none"]
    assert task("mask").combinations() == task().combinations() == {}


def test_a_run_trains_only_the_controlnets_and_measures_every_combination(
    cfg: DictConfig, foundation: Path, run: Path
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline", use_safetensors=True)
    assert type(pipeline.controlnet) is MultiControlNetModel
    before = DiffusionPipeline.from_pretrained(foundation / "pipeline", use_safetensors=True).unet
    assert weights_digest(pipeline.unet) == weights_digest(before)
    for net in pipeline.controlnet.nets:
        assert any(weight.abs().max() > 0 for weight in net.controlnet_mid_block.parameters())
    conditions = read_json(run / "conditions.json")
    assert list(conditions) == ["mask", "edges", "low_resolution"] and conditions["mask"]["classes"] == list(CLASSES)
    assert conditions["low_resolution"] == {"factor": 8}
    summary = read_json(run / "summary.json")
    assert list(summary["combinations"]) == list(COMBINATIONS)
    keys = {"psnr", "consistency", "edge_agreement", "miou", "pixel_accuracy"}
    assert all(keys <= set(metrics) for metrics in summary["combinations"].values())
    assert summary["combinations"]["all"] == summary["metrics"]
    assert len((run / "convergence.jsonl").read_text().splitlines()) == 2
    sheet = Image.open(run / "samples" / "comparison.png")
    assert sheet.height > (len(NAMES) + len(COMBINATIONS) + 1) * SIZE  # a row each, and the truth


def test_the_combination_none_draws_like_the_foundation(cfg: DictConfig, foundation: Path, run: Path) -> None:
    task, held = TASKS["joint_conditions"](cfg), held_out_images(cfg)
    none = np.load(draw_outputs(cfg, task.combinations()["none"], run, held) / OUTPUTS)
    pipeline = DiffusionPipeline.from_pretrained(foundation / "pipeline", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline(
        held.captions, latents=starting_noise(range(len(held)), (CHANNELS, 2, 2), int(cfg.eval.seed)), height=SIZE,
        width=SIZE, num_inference_steps=int(cfg.downstream.steps), guidance_scale=1.0, output_type="np",
    ).images  # fmt: skip
    assert np.abs(none.astype(int) - (own * 255).round()).max() <= 1
    judges = TaskJudges.of(cfg, task)
    result = output_metrics(task, none, held, judges)
    assert result == pytest.approx(read_json(run / "summary.json")["combinations"]["none"], nan_ok=True)
    perfect = output_metrics(task, held.images, held, judges)
    assert perfect["edge_agreement"] == 1 and perfect["psnr"] > 50 and perfect["consistency"] > 50


def test_a_snapshot_contains_all_networks(run: Path) -> None:
    [snapshot] = (run / "snapshots").iterdir()
    early, late = load_pipeline(run / "pipeline", snapshot), load_pipeline(run / "pipeline")
    assert len(early.controlnet.nets) == 3
    for one, other in zip(early.controlnet.nets, late.controlnet.nets, strict=True):
        assert weights_digest(one) != weights_digest(other)
    assert weights_digest(load_controlnet(snapshot / "controlnet")) == weights_digest(early.controlnet)


def test_the_command_prints_the_run_and_the_table(
    cfg: DictConfig, foundation: Path, run: Path, capsys: pytest.CaptureFixture
) -> None:
    chosen = cfg.copy()
    chosen.foundation = str(foundation)
    run_task(chosen, "joint_conditions")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"run: {run}"
    folder = Path(cfg.results) / "local" / "joint_conditions"
    assert f"results: {folder}" in lines
    table = pd.read_csv(folder / "joint_conditions.csv").set_index("conditions")
    assert set(table.index) == set(COMBINATIONS)
    summary = read_json(run / "summary.json")
    for name, metrics in summary["combinations"].items():
        assert table.loc[name, "psnr"] == pytest.approx(metrics["psnr"])
        assert table.loc[name, "edge_agreement"] == pytest.approx(metrics["edge_agreement"])


def test_a_corpus_without_masks_uses_edges_and_low_resolution(
    cfg: DictConfig, foundation: Path, capsys: pytest.CaptureFixture
) -> None:
    notice.cache_clear()
    bare = task_config(Path(cfg.runs).parent, "corpus.masks=null", "corpus.classes=[]")
    task = TASKS["joint_conditions"](bare)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("joint_conditions")]
    assert line == "joint_conditions: the condition mask is left out: corpus folder has no masks in its split train"
    assert list(task.controls) == ["edges", "low_resolution"]
    summary = read_json(fine_tune(bare, task, foundation, "rsprune") / "summary.json")
    assert list(summary["combinations"]) == ["all", "edges alone", "low resolution alone", "none"]
    assert "miou" not in summary["metrics"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("foundation=scratch", "steers a trained foundation, foundation=scratch has none"),
        ("downstream.joint_conditions.conditions=[mask,depth]", "names depth: choose from mask, edges"),
        ("downstream.joint_conditions.conditions=[mask]", "conditions=mask: give two or more different ones"),
        ("downstream.joint_conditions.conditions=[edges,edges]", "give two or more different ones"),
        ("downstream.joint_conditions.factor=3", "factor=3: give a divisor above 1 of the images' side, 16 px"),
        ("downstream.joint_conditions.dropout=1.0", "dropout=1.0: give at least 0 and less than 1"),
        ("downstream.joint_conditions.canny.low=0.5", r"canny: sigma=1.5 must be above 0, and 0 < low=0.5 <= high=0.1"),
    ],
)
def test_invalid_options_are_refused(cfg: DictConfig, option: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TASKS["joint_conditions"](task_config(Path(cfg.runs).parent, option))
