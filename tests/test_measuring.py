"""Measuring as a separate stage: evaluators, cached images, new metrics without new images, folders, reference rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.spatial.distance import cdist
from tiny_networks import pictures, tiny_autoencoder, tiny_text_encoder, tiny_unet
from tiny_run import tiny_config

from eval import measuring
from eval.generate import generate, starting_noise
from eval.held_out import HeldOut
from eval.measuring import (
    IMAGES,
    Evaluators,
    Sampling,
    compare,
    draw_images,
    drawn_scenes,
    measure,
    measure_images,
    scene_captions,
    scene_confusion,
)
from eval.measuring_any import FEWEST_IMAGES, measure_any, sample_rows
from eval.memorisation import TrainingImages
from eval.metrics import METRICS, Metric
from eval.models import SNAPSHOT, Model, find_model, snapshots_of
from eval.reference_rows import Rebuild, reference_rows
from eval.subset_quality import subset_quality
from runtime.artefacts import read_json, write_json
from runtime.errors import UserError
from train.networks import text_to_image_pipeline
from train.objective import Objective


@dataclass(frozen=True)
class Moments:
    """An encoder: mean and deviation of the colours."""

    name: str = "moments"
    batch_size: int = 16
    dimensions: int = 6

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.concatenate([images.mean(axis=(1, 2)), images.std(axis=(1, 2))], axis=1).astype(np.float32)


class Made(SimpleNamespace):
    """The attributes of a corpus that the evaluation reads."""

    def __len__(self) -> int:
        return len(self.manifest)


def made_corpus(count: int = 60, seed: int = 0) -> Made:
    scenes = np.array(["ice", "sea"] * (count // 2), dtype=object)
    manifest = pd.DataFrame({"id": map(str, range(count)), "scene": scenes, "caption": [f"of {s}" for s in scenes]})
    readable = np.ones(count, dtype=bool)
    return Made(name="made", manifest=manifest, images=pictures(count, seed), readable=readable, fingerprint=f"f{seed}")


def made_held_out(corpus: Made, rows: np.ndarray, name: str = "balanced") -> HeldOut:
    features = {"moments": Moments()(corpus.images[rows])}
    return HeldOut(name, corpus, rows, features, corpus.manifest["caption"].iloc[rows].tolist())


class Clip:
    """A CLIP model that recognises ice in bright images."""

    name, fingerprint = "made", "clip"

    def scores(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
        return images.mean(axis=(1, 2, 3)).astype(np.float32)

    def recognise(self, images: np.ndarray, described: dict[str, list[str]]) -> np.ndarray:
        return np.where(images.mean(axis=(1, 2, 3)) > 128, "ice", "sea")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a pipeline and a snapshot with another network."""
    text_encoder, tokenizer = tiny_text_encoder()
    folder = tmp_path / "run"
    text_to_image_pipeline(
        tiny_autoencoder(), text_encoder, tokenizer, tiny_unet(), Objective().scheduler()
    ).save_pretrained(folder / "pipeline")
    other = tiny_unet()
    other.conv_out.bias.data += 1
    snapshot = folder / "snapshots" / "000000000320"
    other.save_pretrained(snapshot / "unet")
    write_json(snapshot / SNAPSHOT, {"step": 10, "images_seen": 320, "seconds": 1.0, "loss": 0.5})
    return folder


# ---------------------------------------------------------------- available metrics


def test_find_model_recognises_runs_pipelines_and_snapshots(run: Path, tmp_path: Path) -> None:
    (snapshot,) = snapshots_of(run)
    models = [find_model(place) for place in (run, run / "pipeline", snapshot)]
    assert models == [Model(run / "pipeline"), Model(run / "pipeline"), Model(run / "pipeline", snapshot)]
    assert models[0].key == models[1].key != models[2].key
    biases = [float(model.load().unet.conv_out.bias.detach().mean()) for model in (models[0], models[2])]
    assert biases[1] == pytest.approx(biases[0] + 1, abs=1e-5)
    (tmp_path / "images").mkdir()
    assert find_model(tmp_path / "images") is None
    for wrong in (tmp_path / "nothing", tmp_path / "file.txt"):
        with pytest.raises(UserError, match="is not a folder"):
            find_model(wrong)


def test_a_models_key_depends_on_its_configuration_but_not_on_its_model_card(run: Path) -> None:
    before = Model(run / "pipeline").key
    (run / "pipeline" / "README.md").write_text("a card with figures", encoding="utf-8")
    assert Model(run / "pipeline").key == before
    config = run / "pipeline" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("linspace", "leading"), encoding="utf-8")
    assert Model(run / "pipeline").key != before


def test_a_pipeline_that_does_not_load_gives_a_one_line_error(run: Path) -> None:
    (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="does not load") as error:
        Model(run / "pipeline").load()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- drawing and measuring


def test_images_are_drawn_once_and_do_not_depend_on_the_batch(run: Path, tmp_path: Path, monkeypatch) -> None:
    held = made_held_out(made_corpus(), np.arange(12))
    model, sampling = Model(run / "pipeline"), Sampling(2, 1.5, 7)
    images = np.load(draw_images(model, held, sampling, tmp_path / "runs") / IMAGES)
    alone = generate(model.load(), held.captions[:3], steps=2, guidance_scale=1.5, seed=7, noise_of=[0, 1, 2])
    np.testing.assert_allclose(images[:3].astype(float), alone.astype(float), atol=1)
    monkeypatch.setattr(Model, "load", lambda self: pytest.fail("drawn again"))
    draw_images(model, held, sampling, tmp_path / "runs")


def test_a_new_metric_is_computed_on_cached_images(run: Path, tmp_path: Path, monkeypatch) -> None:
    held = made_held_out(made_corpus(), np.arange(20))
    judges = Evaluators((Moments(),), Clip(), {"ice": ["ice"], "sea": ["sea"]})
    drawn = draw_images(Model(run / "pipeline"), held, Sampling(1, 1.0, 7), tmp_path / "runs")
    before = read_json(measure_images(drawn, held, judges, tmp_path / "runs") / "metrics.json")
    assert {"fd_moments", "kid_x1000_moments", "precision_moments", "clip_made", "scene_accuracy_made"} <= set(before)
    monkeypatch.setattr(Model, "load", lambda self: pytest.fail("drawn again"))
    metric = Metric("shift", "lower", 1, ("features", "reference"), lambda x, y: float(abs(x - y).mean()), "encoder")
    monkeypatch.setitem(METRICS, "shift", metric)
    directory = measure_images(drawn, held, judges, tmp_path / "runs")
    after = read_json(directory / "metrics.json")
    features = np.load(directory / "moments.npy")
    assert after["shift_moments"] == pytest.approx(float(abs(features - held.features["moments"]).mean()), rel=1e-5)
    assert {name: after[name] for name in before} == before


def test_a_classifier_trained_on_generated_images_uses_the_scenes_of_their_captions() -> None:
    """Images without a caption are not used for training, and held-out images without scenes not for testing."""
    corpus = made_corpus()
    corpus.images[::2] //= 4  # the ice is dark, so its scene is visible in the mean colour
    held, judges = made_held_out(corpus, np.arange(30)), Evaluators((Moments(),))
    name = "classification_accuracy_moments"
    drawn = np.roll(corpus.images[:30], 2, axis=0)
    assert measure(drawn, held, judges).metrics[name] == 1
    assert measure(np.roll(drawn, 1, axis=0), held, judges).metrics[name] == 0
    half = replace(held, captions=[caption if row < 10 else "" for row, caption in enumerate(held.captions)])
    assert drawn_scenes(half).tolist() == ["ice", "sea"] * 5 + [""] * 20
    assert measure(drawn, replace(held, captions=[""] * 30), judges).metrics[name] is None
    assert name not in measure(drawn, held, judges, captioned=False).metrics
    corpus.manifest["scene"] = ""
    assert name not in measure(drawn, held, judges).metrics


def test_nearest_training_is_measured_if_the_training_images_are_known(run: Path, tmp_path: Path) -> None:
    corpus, train = made_corpus(), made_corpus(40, seed=8)
    held, judges = made_held_out(corpus, np.arange(20)), Evaluators((Moments(),))
    kept = np.arange(0, 40, 2)
    features = {"moments": Moments()(train.images)}
    training = TrainingImages({"selection": "a"}, kept, features.__getitem__)
    drawn = draw_images(Model(run / "pipeline"), held, Sampling(1, 1.0, 7), tmp_path / "runs")
    without = measure_images(drawn, held, judges, tmp_path / "runs")
    assert "nearest_training_moments" not in read_json(without / "metrics.json")
    measured = measure_images(drawn, held, judges, tmp_path / "runs", training)
    made, real, seen = np.load(measured / "moments.npy"), held.features["moments"], features["moments"][kept]
    medians = [np.median(cdist(x - seen.mean(0), seen - seen.mean(0), "cosine").min(1)) for x in (made, real)]
    result = read_json(measured / "metrics.json")["nearest_training_moments"]
    assert result == pytest.approx(medians[0] / medians[1], rel=1e-3)
    other = replace(training, key={"selection": "b"}, rows=np.arange(1, 40, 2))
    assert measure_images(drawn, held, judges, tmp_path / "runs", other) != measured
    copies = measure(train.images[kept], made_held_out(corpus, np.arange(20)), judges, training=training).metrics
    assert copies["nearest_training_moments"] == pytest.approx(0, abs=1e-4)


def test_every_encoder_evaluates_images_and_clip_scores_need_captions() -> None:
    corpus = made_corpus()
    held = made_held_out(corpus, np.arange(30))
    other = replace(held, features={"moments": held.features["moments"], "twice": 2 * held.features["moments"]})
    result = compare({"moments": held.features["moments"], "twice": 2 * held.features["moments"]}, other)
    assert result["fd_moments"] == pytest.approx(0, abs=1e-3) and "fd_twice" in result
    judges = Evaluators((Moments(),), Clip(), {"ice": ["a"], "sea": ["b"]})
    assert "clip_made" not in measure(corpus.images[:30], held, judges, captioned=False).metrics
    assert "clip_made" in measure(corpus.images[:30], held, judges).metrics


def test_scenes_are_described_by_training_captions() -> None:
    corpus = made_corpus()
    described = scene_captions(corpus)
    assert described == {"ice": ["a satellite image of ice", "of ice"], "sea": ["a satellite image of sea", "of sea"]}
    corpus.manifest["scene"] = "ice"
    assert scene_captions(corpus) == {}


def test_scene_confusion_counts_recognised_scenes_per_requested_scene() -> None:
    """Images without a known scene are omitted, and a single scene cannot be confused."""
    corpus = made_corpus(6)
    corpus.manifest["scene"] = ["ice", "sea", "", "ice", "sea", "town"]
    held = made_held_out(corpus, np.arange(6))
    images = np.full((6, 4, 4, 3), 10, np.uint8)
    images[[0, 1]] = 200
    described = {"ice": ["a"], "sea": ["b"]}
    result = scene_confusion(Evaluators((), Clip(), described), held, images)
    assert result == {"ice": {"ice": 1, "sea": 1}, "sea": {"ice": 1, "sea": 1}}
    assert scene_confusion(Evaluators((), Clip(), {"ice": ["a"]}), held, images) is None
    assert scene_confusion(Evaluators((), None, described), held, images) is None


def test_noise_of_an_image_does_not_depend_on_the_others() -> None:
    shape = (4, 2, 2)
    assert starting_noise([2, 5], shape, 5).equal(starting_noise(range(8), shape, 5)[[2, 5]])
    assert not starting_noise([0], shape, 5).equal(starting_noise([0], shape, 6))


# ---------------------------------------------------------------- folders


@pytest.fixture
def cfg(tmp_path: Path):
    return tiny_config(
        tmp_path, "encoder@evaluation_encoder=efficientnet_lite0", "evaluation_encoder.input_size=32", "eval.images=12"
    )


def write_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index, image in enumerate(pictures(count, seed=5)):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return folder


def test_a_small_folder_is_compared_with_as_many_held_out_images(cfg, tmp_path: Path, capsys) -> None:
    cfg.of = str(write_folder(tmp_path / "many", 30))
    metrics = read_json(measure_any(cfg) / "metrics.json")
    assert {"balanced_fd_efficientnet_lite0", "natural_kid_x1000_efficientnet_lite0"} <= set(metrics)
    assert "eval.images" not in capsys.readouterr().err
    cfg.of = str(write_folder(tmp_path / "few", FEWEST_IMAGES))
    measure_any(cfg)
    assert f"{FEWEST_IMAGES} images are compared with {FEWEST_IMAGES} held-out images" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 1, 2, 3, FEWEST_IMAGES - 1])
def test_too_few_images_are_refused(cfg, tmp_path: Path, count: int) -> None:
    cfg.of = str(write_folder(tmp_path / "few", count))
    with pytest.raises(UserError, match=r"readable images|no images") as error:
        measure_any(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_too_few_held_out_images_are_refused(cfg, tmp_path: Path, images: int) -> None:
    cfg.of, cfg.eval.images = str(write_folder(tmp_path / "many", 30)), images
    with pytest.raises(UserError, match=rf"eval\.images={images} .* too few: give at least 4"):
        measure_any(cfg)


def test_a_broken_folder_is_refused(cfg, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    cfg.of = str(tmp_path / "broken")
    with pytest.raises(UserError) as caught:
        measure_any(cfg)
    assert "\n" not in str(caught.value)


def test_every_metric_of_a_few_kept_images_is_a_number_or_null(tmp_path: Path) -> None:
    """One to four images, and four equal ones: nothing is NaN, and undefined values are null."""
    corpus = made_corpus(60)
    held = made_held_out(made_corpus(40, seed=1), np.arange(40))
    features = Moments()(corpus.images)
    for rows in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 0, 0, 0]):
        result = subset_quality(
            np.array(rows), np.ones(len(rows)), {"balanced": held}, corpus, {"moments": features}, seed=0
        )
        write_json(tmp_path / "metrics.json", result)
        json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
        undefined = {name for name, value in result.items() if value is None}
        kids = {f"balanced_kid_x1000_moments{part}" for part in ("", "_low", "_high")}
        assert (kids <= undefined) == (len(rows) < 4) and ("balanced_precision_moments" in undefined) == (len(rows) < 4)


def test_json_files_store_null_for_nan_and_infinity(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"floor": -np.inf, "list": [np.float32("nan"), 1.5], "deep": {"x": float("inf")}})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "floor": None, "list": [None, 1.5], "deep": {"x": None},
    }  # fmt: skip


def test_images_without_captions_get_no_clip_score() -> None:
    held = made_held_out(made_corpus(40), np.arange(40))
    blank = replace(held, captions=[""] * 40)
    judges = Evaluators((Moments(),), Clip())
    assert "clip_made" in measure(held.images, held, judges).metrics
    assert "clip_made" not in measure(held.images, blank, judges).metrics


def test_sample_rows_are_spread_and_depend_on_the_seed() -> None:
    folder = Made(readable=np.ones(1000, dtype=bool), manifest=range(1000))
    rows = sample_rows(folder, 100, 0, Path("x"))
    assert len(set(rows)) == 100 and 400 < rows.mean() < 600
    assert rows.tolist() == sample_rows(folder, 100, 0, Path("x")).tolist()
    assert rows.tolist() != sample_rows(folder, 100, 1, Path("x")).tolist()


def test_a_folder_sorted_by_scene_has_the_same_distance_as_a_shuffled_one(cfg, tmp_path: Path) -> None:
    """The same images with names in order of scene and with random names: the same distance up to sampling."""
    bright, dark = pictures(60, seed=1), pictures(60, seed=2) // 4
    order = np.random.default_rng(0).permutation(120)
    result = []
    for name, numbers in (("sorted", np.arange(120)), ("flat", order)):
        (tmp_path / name).mkdir()
        for number, image in zip(numbers, [*bright, *dark], strict=True):
            Image.fromarray(image).save(tmp_path / name / f"{number:03d}.png")
        cfg.of = str(tmp_path / name)
        metrics = read_json(measure_any(cfg) / "metrics.json")
        parts = ("", "_low", "_high")
        result.append([metrics[f"natural_kid_x1000_efficientnet_lite0{part}"] for part in parts])
    assert result[0][1] <= result[1][0] <= result[0][2] and result[1][1] <= result[0][0] <= result[1][2]


# ---------------------------------------------------------------- reference rows


def test_reference_rows_measure_real_and_reconstructed_images(tmp_path: Path) -> None:
    """Each number is recomputed from the images; the row of a perfect autoencoder equals that of the real images."""
    corpus, test = made_corpus(80, seed=3), made_corpus(60, seed=4)
    held, further = made_held_out(test, np.arange(20)), made_held_out(test, np.arange(20, 40))
    rebuilds = {
        "reconstructed_train": Rebuild("same", lambda images: images),
        "pca": Rebuild("dark", lambda images: images // 2),
    }
    judges = Evaluators((Moments(),), Clip(), {"ice": ["a"], "sea": ["b"]})
    training = TrainingImages({"corpus": "all"}, np.arange(80), {"moments": Moments()(corpus.images)}.__getitem__)
    directory = reference_rows(
        {"balanced": held}, {"balanced": further}, corpus, judges, rebuilds, 0, tmp_path, training
    )
    rows = read_json(directory / "reference_rows.json")
    assert list(rows) == ["real_held_out", "real_train", "reconstructed_train", "pca"]
    expected = compare({"moments": Moments()(further.images)}, held)
    assert rows["real_held_out"]["balanced_fd_moments"] == pytest.approx(expected["fd_moments"])
    assert rows["real_held_out"]["balanced_clip_made"] == pytest.approx(float(further.images.mean()), rel=1e-4)
    names = [name for name in rows["real_train"] if "moments" in name]
    assert {name: rows["reconstructed_train"][name] for name in names} == {n: rows["real_train"][n] for n in names}
    real, dark = np.load(directory / "real_train.npy"), np.load(directory / "pca.npy")
    np.testing.assert_array_equal(dark, real // 2)
    assert rows["reconstructed_train"]["balanced_psnr"] > 50 > rows["pca"]["balanced_psnr"] > 5
    nearest = {name: row["balanced_nearest_training_moments"] for name, row in rows.items()}
    assert nearest["real_train"] == pytest.approx(0, abs=1e-4) and nearest["pca"] > 0.1 < nearest["real_held_out"]
    taught = compare({"moments": Moments()(further.images)}, held, scenes=np.array(["ice", "sea"] * 10))
    name = "classification_accuracy_moments"
    assert rows["real_held_out"][f"balanced_{name}"] == taught[name]
    assert set(rows) == {row for row, result in rows.items() if f"balanced_{name}" in result}
    shown = {image.tobytes() for image in corpus.images}
    assert all(image.tobytes() in shown for image in real), "images of the row are training images"
    assert measuring.with_set("", {"psnr": 1.0}) == {"psnr": 1.0}
