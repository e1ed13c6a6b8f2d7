"""Options, seeds and arrays outside what is allowed: each is refused in one line, and none is used in silence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

import rsprune
from prune.methods.semdedup import SemDeDup
from rsprune import LocalEntropy, RSPrune, UserError, images_represented, local_entropy, select_from_arrays
from runtime.ranges import COUNTS, check_overrides
from train.loop import LoopOptions

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CHOICES = [OmegaConf.load(path) for path in (CONFIGS / "prune").glob("*.yaml")]
METHODS = sorted({choice._target_ for choice in CHOICES if "_target_" in choice})
OPTIONS = [
    (target, field.name)
    for target in [*METHODS, "prune.entropy.LocalEntropy"]
    for field in dataclasses.fields(get_class(target))
    if field.type.split(" ")[0] in ("int", "float") and field.name != "no_data"
]
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
EMBEDDINGS = np.random.default_rng(1).normal(size=(40, 8)).astype(np.float32)
READABLE = np.ones(40, dtype=bool)


def test_numeric_options_of_methods_are_found() -> None:
    assert len(OPTIONS) > 40


@pytest.mark.parametrize("value", [-1, "many", float("nan"), True])
@pytest.mark.parametrize(("target", "name"), OPTIONS)
def test_numeric_options_of_methods_refuse_invalid_numbers(target: str, name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"\.{name}={value}: give a") as error:
        get_class(target)(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("uniformity", 1.01), ("images_per_cluster", 0), ("max_clusters", 2.5), ("reference_duplicates", 2)],
)
def test_options_of_rsprune_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"prune.{name}={value}"):
        RSPrune(**{name: value})


def test_only_optional_options_accept_null() -> None:
    RSPrune(reference_duplicates=None, entropy_bits=None, clusters_per_scene=None)
    with pytest.raises(UserError, match=r"prune\.uniformity=None"):
        RSPrune(uniformity=None)


@pytest.mark.parametrize(
    "image",
    [
        np.stack([IMAGE] * 3), IMAGE.astype(np.uint16), IMAGE / 255, IMAGE[..., :1], np.dstack([IMAGE, IMAGE[..., :1]]),
        IMAGE[:0], IMAGE.transpose(2, 0, 1), IMAGE[..., 0].astype(np.uint16) * 200, np.stack([IMAGE[..., 0]] * 200),
    ],
    ids=["batch", "16 bit", "floats", "one channel", "four channels", "no pixels", "channels first", "16 bit grey",
         "grey batch"],
)  # fmt: skip
def test_local_entropy_refuses_invalid_images(image: np.ndarray) -> None:
    with pytest.raises(UserError, match="an image must be uint8"):
        local_entropy(image)
    with pytest.raises(UserError, match="an image must be uint8"):
        LocalEntropy(denoise=True)(image)


@pytest.mark.parametrize(
    ("readable", "kept", "words"),
    [
        (READABLE, np.arange(40) < 6, "np.flatnonzero"),
        (READABLE, np.array([5, 3]), "ascending"),
        (READABLE, np.array([3, 3]), "ascending"),
        (READABLE, np.array([-1, 3]), "from 0 to 39"),
        (READABLE, np.array([3, 40]), "from 0 to 39"),
        (READABLE[:3], np.array([1]), "readable must be bool"),
        (READABLE.astype(int), np.array([1]), "readable must be bool"),
        (np.arange(40) != 3, np.array([2, 3]), "unreadable"),
    ],
)
def test_images_represented_refuses_invalid_rows_of_kept_images(
    readable: np.ndarray, kept: np.ndarray, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        images_represented(EMBEDDINGS, readable, kept, np.random.default_rng(0))


@pytest.mark.parametrize("images", [IMAGE, np.stack([IMAGE / 255] * 2), np.stack([IMAGE[..., 0]] * 2)])
def test_perceptual_hashes_refuse_invalid_images(images: np.ndarray) -> None:
    for function in (rsprune.perceptual_hashes, rsprune.near_duplicate_fraction):
        with pytest.raises(UserError, match=r"images must be uint8 of shape \[images, height, width, 3\]"):
            function(images)


def test_select_from_arrays_refuses_invalid_methods() -> None:
    with pytest.raises(UserError, match=r"RSPrune\(ratio=0.5, seed=3\).select"):
        select_from_arrays(RSPrune(), EMBEDDINGS, ratio=0.5, seed=3)
    for method in (SemDeDup, "rsprune", None):
        with pytest.raises(UserError, match="is not a pruning method"):
            select_from_arrays(method, EMBEDDINGS, ratio=0.5)


def test_invalid_ratios_and_seeds_are_refused() -> None:
    for ratio in (1, -0.1, "0.5", None, True, float("nan"), 85):
        with pytest.raises(UserError, match="is not a number in"):
            select_from_arrays(SemDeDup(), EMBEDDINGS, ratio=ratio)
    for seed in (-1, 0.5, "0", None, True):
        with pytest.raises(UserError, match="give an integer from 0"):
            select_from_arrays(SemDeDup(), EMBEDDINGS, ratio=0.5, seed=seed)
        with pytest.raises(UserError, match="give an integer from 0"):
            RSPrune(seed=seed)
    one, other = (
        select_from_arrays(SemDeDup(), EMBEDDINGS, ratio=ratio, seed=seed)
        for ratio, seed in ((0.5, 1), (np.float32(0.5), np.int64(1)))
    )
    np.testing.assert_array_equal(one.kept, other.kept)


# ---------------------------------------------------------------- options on the command line


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.views.crops=many", "train.views.crops=many: give a number, for example 1"),
        ("train.flow_shift=-1", "train.flow_shift=-1: give a number from 0"),
        ("train.flow_shift=true", "train.flow_shift=True: give a number"),
        ("train.loop.compile=perhaps", "train.loop.compile=perhaps: give true or false"),
        ("eval.images=0", "eval.images=0: give an integer from 1"),
        ("eval.steps=2.5", "eval.steps=2.5: give an integer from 1"),
        ("downstream.variants=-2", "downstream.variants=-2: give a number from 0"),
        ("leaks=x", "leaks=x: give a number"),
        ("corpus.workers=-1", "corpus.workers=-1: give an integer from 0, or null"),
        ("corpus.train.limit=many", "corpus.train.limit=many: give an integer from 1, or null"),
    ],
)
def test_overrides_of_another_type_or_out_of_range_are_refused(override: str, words: str) -> None:
    cfg, defaults = config("corpus=folder", override), config("corpus=folder")
    with pytest.raises(UserError) as error:
        check_overrides(cfg, [override.partition("=")[0]], lambda: defaults)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    "override",
    [
        "train.objective.time_mean=-0.5", "train.objective.prediction=epsilon", "train.loop.micro_batch=4",
        "ratio=null",
        "eval.images=8", "train.loop.compile=true", "corpus.train.limit=null", "corpus.workers=0", "train.loop.steps=7",
    ],
)  # fmt: skip
def test_valid_overrides_are_accepted(override: str) -> None:
    cfg, defaults = config("corpus=folder", override), config("corpus=folder")
    check_overrides(cfg, [override.partition("=")[0]], lambda: defaults)


def test_defaults_are_not_composed_for_valid_overrides() -> None:
    def never() -> DictConfig:
        raise AssertionError

    check_overrides(config("eval.images=8", "ratio=0.5"), ["eval.images", "ratio"], never)


def test_count_options_exist_and_have_integer_defaults() -> None:
    cfg = config()
    assert all(isinstance(OmegaConf.select(cfg, key), int) for key in COUNTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch_size", 2.5), ("learning_rate", -0.001), ("decay", 1.5), ("micro_batch", 0), ("warmup", -1)],
)
def test_loop_options_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"loop\.{name}={value}: give a"):
        LoopOptions(**{"steps": 1, "batch_size": 1, "learning_rate": 1e-3, name: value})
