"""Corpora without labels: methods that need a reference ask for one, and strata of the corpus replace it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from tiny_networks import pictures
from tiny_run import NETWORK, tiny_overrides

from corpus.index import index_corpus
from prune import selection as stages
from prune.methods.rsprune import RSPrune
from prune.methods.scene_random import SceneRandom
from prune.pool import Pool
from prune.scenes import MOST_STRATA, assign_scenes, corpus_strata, fit_prototypes
from prune.selection import select
from runtime.application import CONFIGS
from runtime.artefacts import COMPLETE, read_json
from runtime.errors import UserError
from train.foundation import pretrain

METHODS = sorted(path.stem for path in (CONFIGS / "prune").glob("*.yaml"))
#: Methods that read the reference according to docs/method.md.
SCENIC = ("moderate", "rsprune", "rsprune_dldc", "scene_random")


def write_flat(folder: Path, count: int = 70) -> Path:
    """Tiles of three kinds without labels, most of them of the first."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number, image in enumerate(pictures(count, seed=1)):
        kind = (0, 0, 0, 1, 2)[number % 5]
        tinted = np.clip(image // (kind + 1) + random.integers(0, 9) + 60 * kind, 0, 255).astype(np.uint8)
        Image.fromarray(tinted).save(folder / f"tile_{number:03d}.png")
    return folder


def config(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(
            "config",
            [
                "corpus=folder", f"corpus.root={folder}", "corpus.train.resolution=16", "corpus.train.split=all",
                "corpus.workers=0", "encoder.input_size=32", "ratio=0.5", "tracker=none", f"runs={folder.parent}/runs",
                *overrides,
            ],
        )  # fmt: skip


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flat(tmp_path_factory.mktemp("flat") / "tiles")


@pytest.fixture(autouse=True)
def notices_again() -> None:
    """Reset the notices, which are printed once per process."""
    stages._tell_of_strata.cache_clear()


def pool_of(sizes: list[int], unreadable: int = 0, seed: int = 0) -> tuple[Pool, np.ndarray]:
    """Groups of images, far from each other, without a reference; and each image's group."""
    random = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    embeddings = (10 * np.eye(32)[group] + random.standard_normal((len(group), 32))).astype(np.float32)
    readable = np.ones(len(group), dtype=bool)
    readable[:unreadable] = False
    nothing = np.empty((0, 32), np.float32), np.empty(0, dtype=object)
    ids, entropy = np.arange(len(group)).astype(str), np.full(len(group), np.nan, np.float32)
    return Pool(ids, readable, entropy, embeddings, *nothing), group


# ---------------------------------------------------------------- strata


@pytest.mark.parametrize(("images", "strata"), [(1, 1), (2, 1), (8, 2), (70, 6), (300, 12), (5000, MOST_STRATA)])
def test_the_number_of_strata_is_as_documented(images: int, strata: int) -> None:
    pool, _ = pool_of([images])
    embeddings, names = corpus_strata(pool, np.random.default_rng(0))
    assert len(embeddings) == strata and names.tolist() == [f"stratum {number:02d}" for number in range(strata)]


def test_every_image_gets_a_stratum_and_no_stratum_mixes_groups() -> None:
    pool, group = pool_of([120, 20, 12, 10], unreadable=2)
    embeddings, names = corpus_strata(pool, np.random.default_rng(0))
    scene, _ = assign_scenes(pool.embeddings, fit_prototypes(embeddings, names, 8, 0.01, seed=0))
    assert (scene < len(names)).all()  # no image has an unknown scene
    assert all(len(set(group[scene == stratum])) == 1 for stratum in set(scene.tolist()))  # no stratum mixes groups


def test_strata_of_the_same_seed_are_identical() -> None:
    pool, _ = pool_of([60, 40])
    first, again = (corpus_strata(pool, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1].tolist() == again[1].tolist()
    other, _ = corpus_strata(pool, np.random.default_rng(4))
    assert not np.array_equal(first[0], other)


def test_equal_images_form_one_stratum_and_unreadable_images_none() -> None:
    pool, _ = pool_of([50])
    alike = replace(pool, embeddings=np.ones_like(pool.embeddings))
    assert len(corpus_strata(alike, np.random.default_rng(0))[1]) == 1
    closed = replace(pool, readable=~pool.readable)
    assert corpus_strata(closed, np.random.default_rng(0))[0].shape == (0, 32)


# ---------------------------------------------------------------- methods that need a reference


def test_methods_that_use_the_reference_declare_it() -> None:
    for name in METHODS:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            method = instantiate(compose("config", [f"prune={name}"]).prune, _convert_="all")
        assert bool(getattr(method, "uses_reference", False)) == (name in SCENIC), name
    assert not RSPrune(scenes=False).uses_reference and SceneRandom().uses_reference
    for path in (CONFIGS.parent / "prune" / "methods").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert ("reference_embeddings" in text) == ("uses_reference" in text), path.name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_prunes_an_unlabelled_folder(name: str, flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, corpus = select(config(flat, f"prune={name}"), name)
    summary = read_json(directory / "summary.json")
    assert len(corpus) == 70 and summary["kept"] == (70 if name == "full" else 35)
    assert (directory / "report.html").is_file()
    lines = [line for line in capsys.readouterr().err.splitlines() if "reference" in line]
    inputs = read_json(directory / COMPLETE)["inputs"]
    if name in SCENIC:
        assert summary["strata"] == {"source": "corpus", "count": 6}
        assert lines == [
            "no labels: 6 clusters of the corpus (strata) are used as scenes; give labelled images with "
            "reference=folder reference.root=DIR"
        ]
        assert "6, strata of the corpus" in (directory / "report.html").read_text()
    else:
        assert summary["strata"] is None and not lines and "reference" not in inputs


def test_rsprune_balances_its_strata_and_names_them(flat: Path) -> None:
    directory, _ = select(config(flat, "prune=rsprune"), "rsprune")
    table = pd.read_parquet(directory / "selection.parquet")
    assert set(table["scene"]) == {f"stratum {number:02d}" for number in range(6)}
    counts = table.groupby("scene")["kept"].agg(["size", "sum"])
    level = counts["sum"].max()
    assert (counts["sum"] >= np.minimum(level - 1, counts["size"] // 2)).all()


def test_no_reference_is_indexed_where_none_is_used(flat: Path, tmp_path: Path) -> None:
    """The reference may be a missing folder, an unlabelled folder or a set of a hub that cannot be reached."""
    for reference in (f"reference.root={tmp_path}/gone", f"reference.root={flat}"):
        for name in ("random", "kmeans_uniform"):
            directory, _ = select(config(flat, f"prune={name}", "reference=folder", reference), name)
            assert directory == select(config(flat, f"prune={name}"), name)[0]
    select(config(flat, "prune=random", "reference=resisc45"), "random")
    with pytest.raises(UserError, match="reference=none"):
        select(config(flat, "prune=rsprune", "reference=folder", f"reference.root={flat}"), "rsprune")


def test_own_labels_are_the_reference_unless_none_is_requested(flat: Path, tmp_path: Path, capsys) -> None:
    for number, image in enumerate(pictures(60, seed=3)):
        folder = tmp_path / "labelled" / ("bright", "dark")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image // (1 + number % 2)).save(folder / f"{number}.png")
    default, named, former = (
        select(config(tmp_path / "labelled", "prune=rsprune", *more), "rsprune")[0]
        for more in ([], ["reference=corpus"], ["reference=bluemarble"])
    )
    assert default == named == former
    assert read_json(default / "summary.json")["strata"] == {"source": "reference", "count": 2}
    assert "no labels" not in capsys.readouterr().err
    chosen, _ = select(config(tmp_path / "labelled", "prune=rsprune", "reference=none"), "rsprune")
    assert read_json(chosen / "summary.json")["strata"] == {"source": "corpus", "count": 5}
    assert "no labels: 5 clusters" in capsys.readouterr().err
    flat_default, flat_none = (
        select(config(flat, "prune=rsprune", *more), "rsprune")[0] for more in ([], ["reference=none"])
    )
    assert flat_default == flat_none  # the same selection, made once


def test_the_default_reference_of_blue_marble_is_unchanged(tmp_path: Path) -> None:
    """Blue Marble's default, its training tiles, has unchanged keys, so that finished selections stay valid."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", [])
    assert dict(cfg.reference) == {"source": cfg.corpus.train, "per_scene": 60}
    corpus = index_corpus(instantiate(cfg.corpus.train, limit=40), tmp_path)
    assert stages.scene_source(cfg, corpus, RSPrune()) == "reference"
    assert stages.scene_source(cfg, corpus, RSPrune(scenes=False)) is None


# ---------------------------------------------------------------- training and evaluation


def test_a_model_is_pretrained_on_an_unlabelled_folder(tmp_path: Path) -> None:
    overrides = tiny_overrides(tmp_path)
    flat = write_flat(tmp_path / "flat", 80)
    fractions = ["corpus.val_fraction=0.3", "corpus.test_fraction=0.3"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", [*overrides, *NETWORK, f"corpus.root={flat}", *fractions, "prune=rsprune"])
    summary = read_json(pretrain(cfg, "rsprune") / "summary.json")
    metrics = summary["metrics"]
    assert {"balanced_kid_x1000_efficientnet_lite2", "natural_fd_efficientnet_lite0"} <= set(metrics)
    assert not [name for name in metrics if re.search("clip|scene_accuracy", name)]  # these metrics need captions
    assert summary["scenes"] == {"real": None, "generated": None}


def test_too_few_held_out_images_are_reported_in_one_line(tmp_path: Path) -> None:
    overrides = tiny_overrides(tmp_path)
    flat = write_flat(tmp_path / "flat", 20)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", [*overrides, *NETWORK, f"corpus.root={flat}", "eval.images=48"])
    with pytest.raises(UserError, match=r"lower eval\.images .* or hold out more images") as caught:
        pretrain(cfg, "random")
    assert "\n" not in str(caught.value)
