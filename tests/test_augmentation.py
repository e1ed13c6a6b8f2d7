"""Generated images as training data: training data, drawing and choice of images, the complete grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tiny_networks import SIZE, pictures
from tiny_task import CLASSES, task_config, tiny_foundation

from corpus.index import Corpus
from corpus.masks import IGNORED
from downstream import augmentation as module
from downstream.augmentation import (
    IMAGES,
    MASKS,
    PRUNED,
    RANDOM,
    AugmentationOptions,
    Cell,
    Study,
    chosen,
    deal,
    drawn_pool,
    grid,
    images_of,
    measured_cell,
    rows_of_amount,
    run_colours,
    scene_weights,
    sources_of,
    trained_cell,
    turned,
)
from downstream.corpora import training_rows
from downstream.segmenter import WEIGHTS, LabelledImages, Segmenter, SegmenterOptions, labelled_batches
from encoders.pixels import to_tensor
from prune.entropy import local_entropy
from report.results import read_results
from report.tables import build_tables, to_markdown
from runtime.artefacts import read_json, write_json
from runtime.errors import UserError
from scripts.augmentation import compare
from train.latents import symmetric

TINY = (
    "augmentation.amounts=[100,25]", "augmentation.pool=8", "augmentation.steps=2", "augmentation.seeds=[3,4]",
)  # fmt: skip


def uneven_corpus(tmp_path: Path, counts: dict[str, int]) -> Corpus:
    """The given number of images per scene, the last one unreadable; every image has its own value."""
    scenes = [scene for scene, count in counts.items() for _ in range(count)]
    values = np.arange(len(scenes), dtype=np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (len(scenes), 4, 4, 3))
    readable = [True] * (len(scenes) - 1) + [False]
    manifest = pd.DataFrame({"scene": scenes, "readable": readable, "caption": ""})
    return Corpus("uneven", tmp_path, images, manifest, images[..., 0], tuple(map(str, values)))


# ---------------------------------------------------------------- training data


def test_amounts_are_nested_and_balanced_over_scenes(tmp_path: Path) -> None:
    corpus = uneven_corpus(tmp_path, {"common": 60, "rare": 20, "spoilt": 1})
    rows = training_rows(corpus, 40, seed=0)
    amounts = {percent: rows_of_amount(corpus, rows, percent, seed=1) for percent in (1, 5, 20, 50, 100)}
    assert [len(result) for result in amounts.values()] == [1, 2, 8, 20, 40]
    assert sorted(amounts[100]) == rows.tolist()
    for few, more in zip(list(amounts.values())[:-1], list(amounts.values())[1:], strict=True):
        assert set(few) < set(more)
    scenes = corpus.manifest["scene"].to_numpy()
    assert (scenes[amounts[20]] == "rare").sum() == 4
    assert (rows_of_amount(corpus, rows, 20, seed=1) == amounts[20]).all()
    assert (rows_of_amount(corpus, rows, 20, seed=2) != amounts[20]).any()


def test_all_scenes_have_the_same_total_weight(tmp_path: Path) -> None:
    corpus = uneven_corpus(tmp_path, {"a": 6, "b": 4, "c": 3})
    rows = np.array([0, 1, 2, 6, 10, 11])
    weights = scene_weights(corpus, rows)
    assert set(np.flatnonzero(weights)) == set(rows)
    expected = [1 / 9] * 3 + [1 / 3] + [1 / 6] * 2
    np.testing.assert_allclose(weights[rows], expected)


@pytest.mark.parametrize("size", [1, 7, 16, 100])
def test_masks_are_dealt_evenly_and_in_different_symmetries(size: int) -> None:
    weights = np.array([0.0, 0.3, 0.1, 0.0, 0.6, 0.0])
    rows, symmetries = deal(weights, size, np.random.default_rng(0))
    counts = np.bincount(rows, minlength=6)
    assert counts.sum() == size and (np.abs(counts - size * weights) < 1).all()
    for row in np.unique(rows):
        used = np.bincount(symmetries[rows == row], minlength=8)
        assert used.max() - used.min() <= 1
    again = deal(weights, size, np.random.default_rng(0))
    assert (again[0] == rows).all() and (again[1] == symmetries).all()
    starts = {int(deal(weights, 1, np.random.default_rng(seed))[1][0]) for seed in range(60)}
    assert starts == set(range(8))


def test_a_mask_is_transformed_like_its_image() -> None:
    masks = np.random.default_rng(0).integers(0, 5, (16, 6, 6), dtype=np.uint8)
    symmetries = np.tile(np.arange(8), 2)[::-1]
    result = turned(masks, symmetries)
    for mask, symmetry, one in zip(masks, symmetries, result, strict=True):
        image = symmetric(torch.from_numpy(mask)[None, None].expand(1, 3, -1, -1), int(symmetry))
        assert (image[0, 1].numpy() == one).all()
    assert len({turned(masks[:1], np.array([symmetry])).tobytes() for symmetry in range(8)}) == 8


def levels(first: int, count: int, weights: list[float]) -> LabelledImages:
    """Uniform images of levels first, first + 1 ...; each mask holds the level of its image."""
    values = np.arange(first, first + count, dtype=np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (count, 4, 4, 3))
    return LabelledImages(images, images[..., 0], np.array(weights))


@pytest.mark.parametrize(("fraction", "generated"), [(0.5, 16), (0.25, 8), (0.9, 29)])
def test_mixed_batches_keep_their_fraction(fraction: float, generated: int) -> None:
    real, drawn = levels(0, 3, [1, 0, 1]), levels(100, 4, [0, 1, 1, 0])
    sources = sources_of(real, drawn, 32, fraction)
    batches = labelled_batches(sources, np.random.default_rng(0))
    seen: set[int] = set()
    for _ in range(10):
        images, masks = next(batches)
        values = masks[:, 0, 0].numpy()
        assert ((values >= 100).sum(), len(values)) == (generated, 32)
        torch.testing.assert_close(images[:, 0], masks.float() / 127.5 - 1)
        seen |= set(values.tolist())
    assert seen == {0, 2, 101, 102}  # images of weight 0 are never drawn


def test_a_single_source_fills_its_batches() -> None:
    real, drawn = levels(0, 2, [1, 1]), levels(100, 2, [1, 1])
    assert sources_of(real, None, 8, 0.5) == [(real, 8)]
    assert sources_of(None, drawn, 8, 0.5) == [(drawn, 8)]
    assert (next(labelled_batches(sources_of(None, drawn, 8, 0.5), np.random.default_rng(0)))[1] >= 100).all()
    with pytest.raises(UserError, match="no place for real or for generated"):
        sources_of(real, drawn, 1, 0.5)


def test_one_source_gives_the_batches_of_the_segmenter() -> None:
    """The batches of a segmenter: images by cumulative probability, then one symmetry, from one random stream."""
    images = pictures(12)
    masks = (images.mean(3) > 128).astype(np.uint8)
    weights = np.random.default_rng(1).random(12)
    result = labelled_batches([(LabelledImages(images, masks, weights), 5)], np.random.default_rng(7))
    generator = np.random.default_rng(7)
    for _ in range(4):
        chances = np.cumsum(weights)
        rows = np.searchsorted(chances, generator.random(5) * chances[-1], side="right")
        symmetry = int(generator.integers(8))
        batch = next(result)
        assert torch.equal(batch[0], symmetric(to_tensor(images[rows]), symmetry))
        assert torch.equal(batch[1], symmetric(torch.from_numpy(masks[rows])[:, None].long(), symmetry)[:, 0])


# ---------------------------------------------------------------- options


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    """The smallest grid on a folder of images with masks, from an untrained foundation."""
    folder = tmp_path_factory.mktemp("tiny")
    cfg = task_config(folder, *TINY)
    cfg.foundation = str(tiny_foundation(folder / "foundation", cfg))
    return cfg


def changed(cfg: DictConfig, **options: object) -> DictConfig:
    result = cfg.copy()
    for key, value in options.items():
        OmegaConf.update(result, key.replace("__", "."), value)
    return result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation__steps": 0}, "steps=0: give at least 1"),
        ({"augmentation__amounts": [0, 5]}, "give percentages above 0"),
        ({"augmentation__amounts": []}, "give percentages above 0"),
        ({"augmentation__amounts": [101]}, "give percentages above 0"),
        ({"augmentation__seeds": []}, "at least one seed"),
        ({"augmentation__generated_fraction": 1.0}, "a fraction between 0 and 1"),
        ({"augmentation__ratio": 1.5}, "ratio=1.5 is not a number"),
        ({"augmentation__pool": 2, "augmentation__ratio": 0.9}, "keeps none of 2 images"),
        ({"augmentation__run": "nowhere"}, "augmentation.run=nowhere is no run of semantic synthesis"),
    ],
)
def test_invalid_options_are_reported_in_one_line(cfg: DictConfig, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        Study.of(changed(cfg, **options), cfg)
    assert "\n" not in str(raised.value)


def test_measuring_on_training_images_is_refused(cfg: DictConfig) -> None:
    same = cfg.copy()
    same.corpus.test = same.corpus.train.copy()
    with pytest.raises(UserError, match="split=test is the split that is trained on"):
        Study.of(same, cfg)


def test_the_grid_has_every_cell_once(cfg: DictConfig) -> None:
    options = AugmentationOptions.of(cfg)
    cells = grid(options)
    assert options.amounts == (25.0, 100.0)
    assert len(cells) == len(set(cells)) == 2 * (2 * 3 + 2)
    assert {cell.seed for cell in cells} == {3, 4}
    alone = [cell for cell in cells if not cell.real]
    assert {(cell.amount, cell.choice) for cell in alone} == {(100.0, RANDOM), (100.0, PRUNED)}
    default = AugmentationOptions.of(task_config(Path(cfg.corpus.train.root).parent))
    assert len(grid(default)) == 33  # (three amounts x three kinds + two with only generated images) x three seeds


# ---------------------------------------------------------------- drawing, choosing, training


@pytest.fixture(scope="module")
def study(cfg: DictConfig) -> Study:
    return Study.of(cfg, cfg)


def test_images_are_drawn_with_the_palette_of_the_run(study: Study, tmp_path: Path) -> None:
    palette = read_json(study.run / "palette.json")
    assert [*study.colours[: len(CLASSES)].tolist(), study.colours[IGNORED].tolist()] == list(palette.values())
    rows = study.rows[:5]
    assert (study.colours[study.corpus.masks[rows]] == study.task.condition(study.corpus, rows)).all()
    write_json(tmp_path / "palette.json", {"dark": [1, 2, 3], "bright": [4, 5, 6], "no class": [7, 8, 9]})
    assert run_colours(tmp_path, study.corpus)[[0, 1, IGNORED]].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    write_json(tmp_path / "palette.json", {"bright": [1, 2, 3], "dark": [4, 5, 6]})
    with pytest.raises(UserError, match="was trained on the classes bright, dark"):
        run_colours(tmp_path, study.corpus)


def test_images_are_drawn_only_from_masks_of_the_amount(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of_amount(study.corpus, study.rows, 25, seed=3)
    assert len(rows) == 4 and len(study.rows) == 16
    pool = drawn_pool(study, 25, 3)
    masks, images = np.load(pool / MASKS), np.load(pool / IMAGES)
    assert images.shape == (8, SIZE, SIZE, 3) and masks.shape == (8, SIZE, SIZE)
    allowed = {
        turned(study.corpus.masks[[row]], np.array([symmetry])).tobytes() for row in rows for symmetry in range(8)
    }
    assert {mask.tobytes() for mask in masks} <= allowed
    assert len({image.tobytes() for image in images}) == 8
    monkeypatch.setattr(module, "_pipeline", None)  # cached, not drawn again
    assert drawn_pool(study, 25, 3) == pool


def test_the_same_seed_draws_the_same_images_and_another_seed_a_new_pool(study: Study, tmp_path: Path) -> None:
    pool = drawn_pool(study, 25, 3)
    elsewhere = replace(study, cfg=changed(study.cfg, runs=str(tmp_path)))
    again = drawn_pool(elsewhere, 25, 3)
    assert again != pool and again.name == pool.name
    for file in (IMAGES, MASKS):
        assert (again / file).read_bytes() == (pool / file).read_bytes()
    assert drawn_pool(elsewhere, 25, 4).name != pool.name


def test_random_and_pruned_choices_have_the_same_number_of_images(study: Study) -> None:
    pool = drawn_pool(study, 100, 3)
    result = {choice: chosen(study, pool, choice, 3) for choice in (RANDOM, PRUNED)}
    for kept in result.values():
        assert len(kept) == len(set(kept)) == 4 and kept.min() >= 0 and kept.max() < 8
        assert (np.diff(kept) > 0).all()
    # a method receives the entropies of the drawn images
    pruning = OmegaConf.create({"prune": {"_target_": "prune.methods.entropy_only.EntropyOnly"}})
    kept = chosen(replace(study, pruning=pruning), pool, PRUNED, 3)
    bits = np.array([local_entropy(image) for image in np.load(pool / IMAGES)])
    assert bits[kept].min() >= np.delete(bits, kept).max()


def trained_on(study: Study, cell: Cell, monkeypatch: pytest.MonkeyPatch) -> list[tuple[LabelledImages, int]]:
    """The sources of the batches of a cell."""
    seen = []

    def noted(sources, generator):
        seen.extend(sources)
        return labelled_batches(sources, generator)

    with monkeypatch.context() as patch:
        patch.setattr(module, "labelled_batches", noted)
        trained_cell(study, cell)
    return seen


def drawable(source: LabelledImages) -> set[bytes]:
    return {source.images[row].tobytes() for row in np.flatnonzero(source.weights)}


def test_a_cell_trains_on_its_own_images_and_on_no_held_out_image(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = replace(study, cfg=changed(study.cfg, runs=str(tmp_path)))
    held_out = {image.tobytes() for image in study.held.images}
    pool = np.load(drawn_pool(study, 100, 3) / IMAGES)
    few = {study.corpus.images[row].tobytes() for row in rows_of_amount(study.corpus, study.rows, 25, 3)}
    everything = {image.tobytes() for image in study.corpus.images[study.rows]}

    [(real, count)] = trained_on(study, Cell(25, True, None, 3), monkeypatch)
    assert count == 4 and drawable(real) == few

    (real, first), (generated, second) = trained_on(study, Cell(100, True, PRUNED, 3), monkeypatch)
    assert (first, second) == (2, 2) and drawable(real) == everything
    kept = chosen(study, drawn_pool(study, 100, 3), PRUNED, 3)
    assert drawable(generated) == {image.tobytes() for image in pool[kept]}

    [(alone, count)] = trained_on(study, Cell(100, False, RANDOM, 3), monkeypatch)
    kept = chosen(study, drawn_pool(study, 100, 3), RANDOM, 3)
    assert count == 4 and drawable(alone) == {image.tobytes() for image in pool[kept]}
    assert not drawable(alone) & everything
    for source in (real, generated, alone):
        assert not drawable(source) & held_out


def test_the_same_seed_gives_bit_identical_weights(study: Study, tmp_path: Path) -> None:
    cell = Cell(25, True, RANDOM, 3)
    first = trained_cell(study, cell)
    again = trained_cell(replace(study, cfg=changed(study.cfg, runs=str(tmp_path))), cell)
    assert again.name == first.name and (again / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    other = trained_cell(study, replace(cell, seed=4))
    assert (other / WEIGHTS).read_bytes() != (first / WEIGHTS).read_bytes()


def test_measuring_uses_real_held_out_images_and_trains_nothing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(25, True, None, 3)
    metrics = read_json(measured_cell(study, cell) / "metrics.json")
    segmenter = Segmenter(trained_cell(study, cell), SegmenterOptions.of(study.cfg), len(CLASSES))
    right = segmenter(study.held.images) == study.held.masks
    assert metrics["pixel_accuracy"] == pytest.approx(right.mean())
    assert set(metrics) == {"miou", "pixel_accuracy"}
    monkeypatch.setattr(module, "train_for", None)
    fewer = replace(study, held=study.held.first(3))
    assert measured_cell(fewer, cell) != measured_cell(study, cell)


def test_the_whole_grid_writes_rows_and_a_table(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(study, tmp_path)
    shown = capsys.readouterr().out
    assert "16 of 16: 0 real, 4 generated (rsprune), seed 4: mIoU 0." in shown
    assert shown.strip().splitlines()[-1] == f"results: {tmp_path}"
    rows = read_results(tmp_path / "results.jsonl")
    assert len(rows) == len(grid(study.options))
    for cell, row in zip(grid(study.options), rows, strict=True):
        assert (row["stage"], row["seed"], row["prune"], row["step"]) == ("augmentation", cell.seed, cell.choice, 2)
        assert row["metrics"] == read_json(measured_cell(study, cell) / "metrics.json")
        images = images_of(study, cell)
        assert int(row["real images"]) == images["real_images"] == (round(16 * cell.amount / 100) if cell.real else 0)
        assert int(row["generated images"]) == images["generated_images"] == (4 if cell.choice else 0)

    table = build_tables(rows)["augmentation"]
    assert list(zip(table["real images"], table["prune"].fillna("real"), strict=True)) == [
        ("0", "random"), ("0", "rsprune"), ("4", "real"), ("4", "random"), ("4", "rsprune"),
        ("16", "real"), ("16", "random"), ("16", "rsprune"),
    ]  # fmt: skip
    result = pd.DataFrame([{**row, **row["metrics"]} for row in rows])
    of_real = result[(result["real images"] == "16") & result["prune"].isna()]["miou"]
    assert table["miou"][5] == pytest.approx(of_real.mean())
    assert table["miou_spread"][5] == pytest.approx(of_real.std()) and set(table["seeds"]) == {2}
    text = (tmp_path / "augmentation.md").read_text()
    assert text == to_markdown("augmentation", table) and "Mean over up to 2 seeds" in text
    bold = {line.split("|")[4].strip() for line in text.splitlines() if "**" in line}
    assert bold == {"0", "4", "16"}  # the best for every number of real images

    monkeypatch.setattr(module, "train_for", None)
    compare(study, tmp_path)  # nothing is computed again
    assert read_results(tmp_path / "results.jsonl") == rows
