"""Options, seeds and arrays outside what is allowed: each is refused in one line, and none is used in silence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

import rsprune
from prune.methods.semdedup import SemDeDup
from rsprune import LocalEntropy, RSPrune, UserError, images_represented, local_entropy, select_from_arrays

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


def test_there_are_options_to_check() -> None:
    assert len(OPTIONS) > 40


@pytest.mark.parametrize("value", [-1, "many", float("nan"), True])
@pytest.mark.parametrize(("target", "name"), OPTIONS)
def test_no_numeric_option_of_a_method_takes_what_is_no_such_number(target: str, name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"\.{name}={value}: give a") as error:
        get_class(target)(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("uniformity", 1.01), ("images_per_cluster", 0), ("max_clusters", 2.5), ("reference_duplicates", 2)],
)
def test_options_of_rsprune_have_an_upper_and_a_lower_end(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"prune.{name}={value}"):
        RSPrune(**{name: value})


def test_an_option_may_be_null_where_its_type_says_so() -> None:
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
def test_local_entropy_refuses_what_is_no_image(image: np.ndarray) -> None:
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
def test_weights_refuse_rows_that_are_not_kept_images(readable: np.ndarray, kept: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        images_represented(EMBEDDINGS, readable, kept, np.random.default_rng(0))


@pytest.mark.parametrize("images", [IMAGE, np.stack([IMAGE / 255] * 2), np.stack([IMAGE[..., 0]] * 2)])
def test_hashes_refuse_what_are_no_images(images: np.ndarray) -> None:
    for function in (rsprune.perceptual_hashes, rsprune.near_duplicate_fraction):
        with pytest.raises(UserError, match=r"images must be uint8 of shape \[images, height, width, 3\]"):
            function(images)


def test_select_from_arrays_refuses_what_is_no_method() -> None:
    with pytest.raises(UserError, match=r"RSPrune\(ratio=0.5, seed=3\).select"):
        select_from_arrays(RSPrune(), EMBEDDINGS, ratio=0.5, seed=3)
    for method in (SemDeDup, "rsprune", None):
        with pytest.raises(UserError, match="is not a pruning method"):
            select_from_arrays(method, EMBEDDINGS, ratio=0.5)


def test_ratios_and_seeds_are_checked() -> None:
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
