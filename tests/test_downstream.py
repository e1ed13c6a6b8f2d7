"""Downstream tasks: the widened network, the saved pipeline's conventions, operators, palette, stages, commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from omegaconf import DictConfig
from PIL import Image
from tiny_networks import CHANNELS, SIZE, pictures, tiny_autoencoder, tiny_text_encoder, tiny_unet
from tiny_task import CLASSES, task_config, tiny_foundation

import downstream.tasks
from corpus.index import Corpus
from downstream import fine_tuning, measured_task, registry
from downstream.command import run_task
from downstream.conditional import (
    Parts,
    conditional_pipeline,
    conditioned_network,
    encode_condition,
    for_raw_condition,
    load_parts,
    resolve_foundation,
    weights_digest,
    widen,
)
from downstream.corpora import corpus_of, held_out_images, training_rows
from downstream.degradation import low_resolution
from downstream.fine_tuning import fine_tune, loop_options
from downstream.interpolation import enlarge
from downstream.measured_task import (
    METRICS_FILE,
    OUTPUTS,
    TaskJudges,
    measure_baselines,
    output_metrics,
    real_segmentation_metrics,
)
from downstream.registry import TASKS, chain_tasks, suitable_tasks
from downstream.tasks.semantic_synthesis import NO_CLASS, natural_palette, spread_colours
from eval.generate import generate, starting_noise
from eval.measuring import encoders_of
from eval.metrics import METRICS
from runtime.artefacts import COMPLETE, read_json
from runtime.errors import UserError
from train.measured_run import MEASURED
from train.objective import Objective
from train.text_encoder import encode_prompts


def evaluation_encoder(cfg: DictConfig) -> str:
    """Name of the encoder whose distances are published."""
    return encoders_of(cfg)[0].name


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


def test_weights_digest_changes_with_one_weight(parts: Parts) -> None:
    changed = widen(parts.unet, 0)
    assert weights_digest(changed) == weights_digest(parts.unet)
    with torch.no_grad():
        changed.conv_out.bias[0] += 1e-6
    assert weights_digest(changed) != weights_digest(parts.unet)


# ---------------------------------------------------------------- the pipeline


@pytest.fixture(scope="module")
def conditioned() -> UNet2DConditionModel:
    """A network that reacts to its condition, as after training on conditions of unit scale."""
    return tiny_unet(condition_channels=CHANNELS)


@pytest.fixture(scope="module")
def loaded(parts: Parts, conditioned: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pipeline")
    conditional_pipeline(parts, conditioned, Objective().scheduler()).save_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_saved_pipeline_gives_the_network_the_inputs_of_training(
    loaded, parts: Parts, conditioned: UNet2DConditionModel
) -> None:
    assert type(loaded) is StableDiffusionInstructPix2PixPipeline
    images = pictures(3)
    raw = encode_condition(parts.autoencoder, images)
    noise = starting_noise(range(3), (CHANNELS, 2, 2), seed=5)
    seen = []
    hook = loaded.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    result = loaded(
        prompt=["desert", "", "ocean"], image=[Image.fromarray(image) for image in images], latents=noise,
        num_inference_steps=5, guidance_scale=1.0, output_type="latent",
    ).images  # fmt: skip
    hook.remove()

    assert [tuple(batch.shape) for batch in seen] == [(3, 2 * CHANNELS, 2, 2)] * 5
    torch.testing.assert_close(seen[0][:, :CHANNELS], noise)
    for batch in seen:
        torch.testing.assert_close(batch[:, CHANNELS:], raw, rtol=0, atol=1e-6)

    # the same by hand, with the trained network: unit-scale conditions, times as in training
    prompts = encode_prompts(parts.text_encoder, parts.tokenizer, ["desert", "", "ocean"])
    scheduler = Objective().scheduler()
    scheduler.set_timesteps(5)
    latents = noise
    with torch.no_grad():
        for time in scheduler.timesteps:
            inputs = torch.cat([latents, raw * parts.autoencoder.config.scaling_factor], dim=1)
            latents = scheduler.step(conditioned(inputs, time, prompts).sample, time, latents).prev_sample
    torch.testing.assert_close(result, latents, rtol=1e-4, atol=1e-5)
    assert raw.std() > 0.05  # so that a wrong scale would be detected


def test_times_of_the_sampler_are_noise_fractions() -> None:
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
    with pytest.raises(UserError, match="factor=5 does not divide 64 x 64 px"):
        low_resolution(images, 5)


def test_bicubic_keeps_flat_pictures_and_size() -> None:
    flat = np.full((2, 16, 16, 3), 77, dtype=np.uint8)
    assert (enlarge(flat, 4, "bicubic") == np.full((2, 64, 64, 3), 77)).all()


def coloured_corpus(tmp_path: Path) -> Corpus:
    """Class 0 red on the left, class 1 nearly the same red on the right; class 2 never occurs. One unreadable row."""
    images = np.zeros((40, 16, 16, 3), dtype=np.uint8)
    images[:, :, :8], images[:, :, 8:] = (180, 30, 20), (184, 34, 24)
    images[0] = 0
    masks = np.zeros((40, 16, 16), dtype=np.uint8)
    masks[:, :, 8:] = 1
    manifest = pd.DataFrame({"scene": ["a"] * 30 + ["b"] * 10, "caption": "", "readable": [False] + [True] * 39})
    return Corpus("coloured", tmp_path, images, manifest, masks, ("left", "right", "nowhere"))


def test_palette_has_the_mean_colours_of_classes_moved_apart(tmp_path: Path) -> None:
    corpus = coloured_corpus(tmp_path)
    natural = natural_palette(corpus, seed=0, distance=0)
    grey = [128, 128, 128]  # colour of a class that never occurs, and of pixels without a class
    assert natural.tolist() == [[180, 30, 20], [184, 34, 24], grey, grey]
    apart = natural_palette(corpus, seed=0, distance=32).astype(float)
    assert np.linalg.norm(apart[0] - apart[1]) >= 31
    assert np.linalg.norm(apart[2] - apart[3]) >= 31
    for pair in (slice(2), slice(2, 4)):
        assert np.linalg.norm(apart[pair].mean(0) - natural[pair].mean(0)) < 2
    assert (natural_palette(corpus, seed=0, distance=32) == apart).all()


@pytest.mark.parametrize("count", [2, 8, 31])
def test_spread_colours_reach_their_distance(count: int) -> None:
    for start in (np.zeros((count, 3)), np.random.default_rng(count).uniform(0, 255, (count, 3))):
        result = spread_colours(start, 40)
        distances = np.linalg.norm(result[:, None] - result[None], axis=2)[~np.eye(count, dtype=bool)]
        assert distances.min() >= 40
        assert result.min() >= 0
        assert result.max() <= 255
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


# ---------------------------------------------------------------- the stages


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    """The smallest tasks on a folder of images with masks; their stages are shared by the tests below."""
    return task_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def foundation(cfg: DictConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_foundation(tmp_path_factory.mktemp("foundation"), cfg)


def changed(cfg: DictConfig, **values: object) -> DictConfig:
    """A copy with other values; `__` in keys stands for dots."""
    cfg = cfg.copy()
    for key, value in values.items():
        *path, last = key.split("__")
        node = cfg
        for part in path:
            node = node[part]
        node[last] = value
    return cfg


#: Metrics that need several outputs of one input.
OF_VARIANTS = ("spread", "diversity")


def full_names(cfg: DictConfig, metrics: tuple[str, ...]) -> set[str]:
    """Names of metrics that are measured without the weights of LPIPS."""
    result = set()
    for key in metrics:
        if key == "lpips":
            continue
        by_encoder = METRICS[key].by == "encoder"
        for name in [f"{key}_{encoder.name}" for encoder in encoders_of(cfg)] if by_encoder else [key]:
            result |= {name, f"{name}_low", f"{name}_high"} if key == "kid_x1000" else {name}
    return result


def test_all_tasks_are_found_and_configured(repository: Path) -> None:
    assert set(TASKS) == {"super_resolution", "semantic_synthesis", "joint_conditions"}
    assert set(chain_tasks()) == {"super_resolution", "semantic_synthesis"}
    folder = repository / "configs" / "downstream"
    lines = yaml.safe_load((folder / "default.yaml").read_text(encoding="utf-8"))["defaults"]
    assert {f"{name}@{name}" for name in TASKS} <= set(lines)
    assert {path.stem for path in folder.glob("*.yaml")} == {"default", *TASKS}


@pytest.mark.parametrize("name", sorted(chain_tasks()))
def test_a_task_trains_from_a_foundation_and_from_scratch(cfg: DictConfig, foundation: Path, name: str) -> None:
    task = TASKS[name](cfg)
    assert task.name == name
    cfg = changed(cfg, foundation=str(foundation))
    assert resolve_foundation(cfg) == (foundation, "rsprune")
    runs = {}
    for method, source in (("rsprune", foundation), ("scratch", None)):
        runs[method] = directory = fine_tune(cfg, task, source, method)
        assert directory.parent == Path(cfg.runs) / name
        summary = read_json(directory / "summary.json")
        assert (summary["task"], summary["method"], summary["images"], summary["steps"]) == (name, method, 8, 4)
        assert summary["foundation"] == (None if source is None else str(source))
        assert summary["parameters"] == read_json(runs["rsprune"] / "summary.json")["parameters"]
        assert set(summary["metrics"]) == full_names(cfg, task.metrics)
        undefined = {key for key, value in summary["metrics"].items() if value is None}
        assert undefined <= {"niqe"}  # 16 px are too few for it
        assert all(np.isfinite(value) for value in summary["metrics"].values() if value is not None)
        measured = Path(read_json(directory / MEASURED)["balanced"])
        assert read_json(measured / METRICS_FILE) == summary["metrics"]
        pipeline = DiffusionPipeline.from_pretrained(directory / "pipeline", use_safetensors=True)
        assert pipeline.unet.config.in_channels == 2 * CHANNELS
        inputs, outputs, truth = (np.load(directory / "samples" / f"{x}.npy") for x in ("inputs", "outputs", "truth"))
        assert outputs.shape == truth.shape == (8, SIZE, SIZE, 3)
        assert (truth == held_out_images(cfg).images).all() and len(inputs) == 8
        assert Image.open(directory / "samples" / "comparison.png").width > 8 * SIZE
        assert not (directory / "checkpoints").exists()
        assert fine_tune(cfg, task, source, method) == directory
    # a text-to-image run is a foundation, a fine-tuned run is not
    with pytest.raises(UserError, match="no pretraining run"):
        resolve_foundation(changed(cfg, foundation=str(runs["scratch"])))


def test_a_baseline_is_measured_like_a_network(cfg: DictConfig) -> None:
    task = TASKS["super_resolution"](cfg)
    result = read_json(measure_baselines(cfg, task)["bicubic"] / METRICS_FILE)
    summary = read_json(fine_tune(cfg, task, None, "scratch") / "summary.json")
    assert set(result) == set(summary["metrics"]) - set(OF_VARIANTS)
    assert result["psnr"] != summary["metrics"]["psnr"]

    held = held_out_images(cfg)
    outputs = enlarge(low_resolution(held.images, 4), 4, "bicubic")
    error = np.square(outputs.astype(float) - held.images).mean((1, 2, 3))
    assert result["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)))  # per image, then the mean
    assert result == output_metrics(task, outputs, held, TaskJudges.of(cfg, task))
    perfect = output_metrics(task, held.images, held, TaskJudges.of(cfg, task))
    assert perfect["ssim"] == pytest.approx(1) and perfect[f"fd_{evaluation_encoder(cfg)}"] < 1e-6


def test_masks_are_drawn_in_the_palette_and_evaluated_by_the_segmenter(cfg: DictConfig) -> None:
    task = TASKS["semantic_synthesis"](cfg)
    directory = fine_tune(cfg, task, None, "scratch")
    palette = read_json(directory / "palette.json")
    assert tuple(palette) == (*CLASSES, NO_CLASS)
    held = held_out_images(cfg)
    inputs = np.load(directory / "samples" / "inputs.npy")
    assert (inputs == np.array(list(palette.values()))[held.masks]).all()

    judges = TaskJudges.of(cfg, task)
    measured = Path(read_json(directory / MEASURED)["balanced"])
    drawn = read_json(measured / COMPLETE)["inputs"]["outputs"]
    outputs = np.load(Path(cfg.runs) / drawn / OUTPUTS)
    agreement = (judges.segmenter(outputs) == held.masks).mean()
    assert read_json(directory / "summary.json")["metrics"]["pixel_accuracy"] == pytest.approx(agreement)
    real = real_segmentation_metrics(cfg, held)
    assert set(real) == {"miou", "pixel_accuracy"}
    assert real["pixel_accuracy"] == pytest.approx((judges.segmenter(held.images) == held.masks).mean())
    assert TaskJudges.of(cfg, TASKS["super_resolution"](cfg)).segmenter is None


@pytest.mark.parametrize(
    "values",
    [
        {"eval__steps": 3},
        {"eval__seed": 5},
        {"evaluation_encoder__input_size": 48},
        {"downstream__steps": 3},
        {"downstream__images": 6},
        {"downstream__segmenter__most_rounds": 1},
    ],
    ids=lambda values: next(iter(values)),
)
def test_changed_measuring_options_do_not_train_again(
    cfg: DictConfig, foundation: Path, values: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = cfg.copy()
    cfg.evaluation_encoder = cfg.encoder.copy()
    task = TASKS["super_resolution"](cfg)
    before = fine_tune(cfg, task, foundation, "rsprune")
    summary = read_json(before / "summary.json")

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(fine_tuning, "train_loop", refuse)
    other = changed(cfg, **values)
    assert fine_tune(other, TASKS["super_resolution"](other), foundation, "rsprune") == before
    again = read_json(before / "summary.json")
    if next(iter(values)) in ("eval__seed", "downstream__steps", "downstream__images"):
        assert again["metrics"] != summary["metrics"]
    assert fine_tune(cfg, task, foundation, "rsprune") == before
    assert read_json(before / "summary.json") == summary
    with pytest.raises(AssertionError, match="trained again"):
        fine_tune(changed(cfg, downstream__loop__steps=5), task, foundation, "rsprune")


def test_only_scratch_gets_extra_steps(cfg: DictConfig) -> None:
    task = TASKS["super_resolution"](cfg)
    more = changed(cfg, downstream__extra_steps=3)
    directory = fine_tune(more, task, None, "scratch")
    assert directory != fine_tune(cfg, task, None, "scratch")
    summary = read_json(directory / "summary.json")
    assert (summary["steps"], summary["images_seen"]) == (7, 28)
    assert (loop_options(more, None).steps, loop_options(more, directory).steps) == (7, 4)


def test_a_new_task_needs_one_file_and_one_yaml(
    cfg: DictConfig,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The files of docs/add_a_task.md, exactly as written there."""
    text = (repository / "docs" / "add_a_task.md").read_text(encoding="utf-8")
    for name, content in re.findall(r"^```\w+\n# (\S+)\n(.*?)^```", text, re.M | re.S):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    folder = str(tmp_path / "downstream" / "tasks")
    monkeypatch.setattr(downstream.tasks, "__path__", [*downstream.tasks.__path__, folder])
    result = registry.find_tasks()
    monkeypatch.delitem(sys.modules, "downstream.tasks.colouring")
    assert set(result) == {*TASKS, "colouring"}
    monkeypatch.setitem(TASKS, "colouring", result["colouring"])
    cfg = task_config(
        Path(cfg.runs).parent, "foundation=scratch", f"hydra.searchpath=[file://{tmp_path}/configs]",
        "+downstream@downstream.colouring=colouring",
    )  # fmt: skip
    assert set(suitable_tasks(cfg)) == {*chain_tasks()} == {*TASKS} - {"joint_conditions"}
    run_task(cfg, "colouring")
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(":")[0] for line in lines]
    measured = [*sorted(f"feature_distance_{encoder.name}" for encoder in encoders_of(cfg)), "psnr"]
    assert names == [*(f"grey {name}" for name in measured), *measured, "seconds", "run"]
    directory = Path(lines[-1].removeprefix("run: "))
    assert directory.parent.name == "colouring"
    assert read_json(directory / "summary.json")["task"] == "colouring"
    grey = np.load(directory / "samples" / "inputs.npy")
    assert (grey == grey[..., :1]).all()


def test_a_task_that_needs_masks_is_left_out_for_a_corpus_without_masks(
    cfg: DictConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bare = task_config(Path(cfg.runs).parent, "corpus.masks=null", "corpus.classes=[]")
    assert set(suitable_tasks(bare)) == {"super_resolution"}
    assert "semantic_synthesis is left out: corpus folder has no masks in its split train" in capsys.readouterr().err


def test_a_killed_run_resumes_to_the_same_network(
    cfg: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS["super_resolution"](cfg)
    undisturbed = fine_tune(cfg, task, None, "scratch")
    again = changed(cfg, runs=str(tmp_path / "again"))

    class Killed(Exception):
        pass

    def kill_at_third(*args, **kwargs):
        kill_at_third.steps += 1
        if kill_at_third.steps == 3:
            raise Killed
        return loss(*args, **kwargs)

    kill_at_third.steps = 0
    loss = fine_tuning.diffusion_loss
    monkeypatch.setattr(fine_tuning, "diffusion_loss", kill_at_third)
    with pytest.raises(Killed):
        fine_tune(again, task, None, "scratch")
    # a failure after the training does not require a new training
    monkeypatch.setattr(measured_task, "_drawn", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        fine_tune(again, task, None, "scratch")
    assert kill_at_third.steps == 5
    monkeypatch.undo()
    resumed = fine_tune(again, task, None, "scratch")
    metrics = [read_json(directory / "summary.json")["metrics"] for directory in (undisturbed, resumed)]
    assert metrics[0] == metrics[1]


def test_a_factor_resolution_or_foundation_that_does_not_fit_is_refused(
    cfg: DictConfig, foundation: Path, parts: Parts
) -> None:
    task = TASKS["super_resolution"](cfg)
    with pytest.raises(UserError, match="factor=3 does not divide 16 x 16 px"):
        TASKS["super_resolution"](changed(cfg, downstream__super_resolution__factor=3))
    other = changed(cfg, corpus__test__resolution=24)
    with pytest.raises(UserError, match="16 px are trained on, but the held-out ones have 24 px"):
        fine_tune(other, task, foundation, "rsprune")
    with pytest.raises(UserError, match="trained on latents of side 2, those of this corpus have 4"):
        conditioned_network(cfg, parts, (CHANNELS, 4, 4), 8)
    with pytest.raises(UserError, match=r"give train\.objective\.prediction=flow"):
        load_parts(changed(cfg, train__objective__prediction="v_prediction"), foundation, corpus_of(cfg, "train"))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    cfg = DictConfig({"foundation": str(tmp_path)})
    with pytest.raises(UserError, match="no pretraining run"):
        resolve_foundation(cfg)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert resolve_foundation(cfg) == (tmp_path, tmp_path.name)
    with pytest.raises(UserError, match="does not load"):
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
    assert "Traceback" not in done.stderr
    assert [line.startswith("error: ") for line in done.stderr.splitlines()].count(True) == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")  # preceded by lines about the corpus
    assert done.stdout == ""
