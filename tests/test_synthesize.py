"""Images of any size from mask files: numbers, palettes, colours, folders, GeoTIFFs with gaps, bad input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import rasterio.shutil
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from rasterio.transform import from_origin
from test_upscale import build, names, notices_again, read  # noqa: F401

from corpus.masks import IGNORED
from downstream.any_size import TileOptions, synthesized, whole
from downstream.drawing import class_names, colour_numbers, load_synthesizer
from downstream.imagery import Picture, Unknown, classes_of, open_mask
from downstream.tasks.semantic_synthesis import NO_CLASS
from runtime.application import CONFIGS
from runtime.artefacts import write_json
from runtime.errors import UserError
from scripts.synthesize import main

PALETTE = {"ocean": [10, 30, 80], "desert": [160, 130, 100], "ice": [250, 250, 250]}
COLOURS = np.array(list(PALETTE.values()), np.uint8)
CLASSES = tuple(PALETTE)
TRANSFORM = from_origin(500_000, 4_650_000, 20, 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("run"))
    write_json(folder / "stage.json", {"stage": "semantic_synthesis", "inputs": {}})
    write_json(folder / "palette.json", {**PALETTE, NO_CLASS: [90, 90, 90]})
    return folder


def synthesize(source: Path, target: Path, run: Path, *overrides: str) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", ["synthesize.steps=2", *overrides])
    cfg.mask, cfg.out, cfg.run = str(source), str(target), str(run)
    main(cfg)


def classes(height: int = 35, width: int = 27, seed: int = 0) -> np.ndarray:
    """Blobs of classes 0 to 2, with pixels without a class."""
    cells = np.random.default_rng(seed).integers(0, 3, (-(-height // 5), -(-width // 5))).astype(np.uint8)
    result = cells.repeat(5, axis=0).repeat(5, axis=1)[:height, :width].copy()
    result[3:9, 4:7] = IGNORED
    return result


def geotiff(path: Path, values: np.ndarray, **profile: object) -> Path:
    """Write [H, W, C] with a georeference."""
    height, width, count = values.shape
    where = {"crs": "EPSG:32633", "transform": TRANSFORM, **profile}
    shape = {"height": height, "width": width, "count": count, "dtype": values.dtype}
    colormap = where.pop("colormap", None)
    with rasterio.open(path, "w", driver="GTiff", **shape, **where) as raster:
        raster.write(np.moveaxis(values, -1, 0))
        if colormap is not None:
            raster.write_colormap(1, colormap)
    return path


def seen(path: Path, palette: Mapping[str, list[int]] = PALETTE) -> np.ndarray:
    """The classes that the command reads from a mask file."""
    with open_mask(path, class_names(palette), colour_numbers(palette)) as mask:
        strips = [mask.rows(start, min(start + 7, mask.height)) for start in range(0, mask.height, 7)]
    return np.concatenate([strip.values for strip in strips])


# ---------------------------------------------------------------- the command with a real pipeline


def test_the_command_draws_an_image_of_the_masks_size(run: Path, tmp_path: Path, capsys) -> None:
    mask = classes()
    Image.fromarray(mask).save(tmp_path / "m.png")
    unguided = "downstream.semantic_synthesis.mask_guidance_scale=1.0"
    synthesize(tmp_path / "m.png", tmp_path / "a.png", run, "seed=5", "prompt=ice", unguided)
    assert capsys.readouterr().out == f"synthesized: {tmp_path / 'a.png'}\n"
    drawn = np.asarray(Image.open(tmp_path / "a.png"))
    assert drawn.shape == (*mask.shape, 3) and drawn.std() > 0
    model = load_synthesizer(run, "run", steps=2, prompt="ice")
    assert model.classes == CLASSES
    assert (drawn == whole(synthesized(Picture(mask), model, TileOptions(0.5, 32, 5)))).all()
    one = np.zeros((1, model.side, model.side), np.uint8)
    noise = np.random.default_rng(0).standard_normal((1, *model.latent_shape)).astype(np.float32)
    images = {value: model(one + np.uint8(value), noise).tobytes() for value in (0, 1, 2, IGNORED)}
    assert len(set(images.values())) == 4
    expected = model.pipeline(
        prompt="ice", image=Image.fromarray(np.full((16, 16, 3), COLOURS[1])), num_inference_steps=2,
        guidance_scale=1.0, latents=torch.from_numpy(noise), output_type="np",
    ).images  # fmt: skip
    assert images[1] == (expected * 255).round().astype(np.uint8).tobytes()


def test_a_folder_keeps_its_structure_and_pictures_become_png(run: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    Image.fromarray(classes()).save(tmp_path / "in" / "a.webp", lossless=True)
    geotiff(tmp_path / "in" / "deeper" / "b.tif", classes()[..., None])
    synthesize(tmp_path / "in", tmp_path / "out", run)
    assert names(tmp_path / "out") == ["a.png", "deeper/b.tif"]
    Image.fromarray(classes()).save(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match=r"a\.png and .*a\.webp would both become"):
        synthesize(tmp_path / "in", tmp_path / "again", run)


def test_a_geotiff_keeps_its_georeference_and_no_data_pixels(run: Path, tmp_path: Path) -> None:
    drawn = []
    for nothing in (77, 200):
        mask = classes(40, 30)
        valid = np.ones(mask.shape, bool)
        valid[25:, 8:] = False
        mask[~valid] = nothing
        synthesize(geotiff(tmp_path / f"{nothing}.tif", mask[..., None], nodata=nothing), tmp_path / "a.tif", run)
        values, with_data, raster = read(tmp_path / "a.tif")
        assert raster.crs == "EPSG:32633" and raster.transform == TRANSFORM
        assert (raster.width, raster.height, raster.count, raster.dtypes[0]) == (30, 40, 3, "uint8")
        assert raster.nodata == 0 and (with_data == valid).all()
        drawn.append(values)
        (tmp_path / "a.tif").unlink()
    assert (drawn[0] == drawn[1]).all()


# ---------------------------------------------------------------- kinds of masks


def test_numbers_palettes_and_colours_give_the_same_classes(tmp_path: Path) -> None:
    mask = classes()
    mask[mask == IGNORED] = 0
    indexed = Image.fromarray(mask, "P")
    indexed.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])  # arbitrary colours: the indices count
    shuffled = Image.fromarray((2 - mask).astype(np.uint8), "P")
    shuffled.putpalette(COLOURS[::-1].tobytes())  # known colours with any indices
    coloured = Image.fromarray(COLOURS[mask])
    clear = coloured.convert("RGBA")
    clear.putalpha(3)
    pictures = {
        "numbers.png": Image.fromarray(mask), "indexed.png": indexed, "shuffled.png": shuffled,
        "coloured.png": coloured, "clear.png": clear, "alike.png": Image.fromarray(np.dstack([mask] * 3)),
        "deep.png": Image.fromarray(mask.astype(np.uint16)), "coloured.webp": coloured,
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(tmp_path / name, lossless=True)
        assert (seen(tmp_path / name) == mask).all(), name
    colormap = {index: (*colour, 255) for index, colour in enumerate(COLOURS[::-1].tolist())}
    other = {index: (index, 9, 9, 255) for index in range(3)}
    for name, values, profile in (
        ("numbers", mask, {}), ("wide", mask.astype(np.int32), {}), ("real", mask.astype(np.float32), {}),
        ("coloured", COLOURS[mask], {"photometric": "rgb"}), ("four", np.dstack([COLOURS[mask], mask]), {}),
        ("shuffled", (2 - mask).astype(np.uint8), {"colormap": colormap}), ("indexed", mask, {"colormap": other}),
    ):  # fmt: skip
        values = values[..., None] if values.ndim == 2 else values
        assert (seen(geotiff(tmp_path / f"{name}.tif", values, **profile)) == mask).all(), name


def test_masks_of_1_2_and_4_bits_are_read(tmp_path: Path) -> None:
    mask = (classes() == 1).astype(np.uint8)
    Image.fromarray(mask * 255).convert("1").save(tmp_path / "a.png")
    assert (seen(tmp_path / "a.png") == mask).all()
    mask = classes() % 3
    for bits in (2, 4):
        target = tmp_path / f"{bits}.png"
        rasterio.shutil.copy(geotiff(tmp_path / "b.tif", mask[..., None]), target, driver="PNG", NBITS=bits)
        assert target.read_bytes()[24] == bits and (seen(target) == mask).all()


def test_pixels_without_a_class_have_a_label_and_a_colour(tmp_path: Path) -> None:
    mask = classes()
    assert (mask == IGNORED).any()
    Image.fromarray(mask).save(tmp_path / "a.png")
    assert (seen(tmp_path / "a.png") == mask).all()
    colours = np.vstack([COLOURS, [[90, 90, 90]]]).astype(np.uint8)
    Image.fromarray(colours[np.minimum(mask, 3)]).save(tmp_path / "b.png")
    assert (seen(tmp_path / "b.png", {**PALETTE, NO_CLASS: [90, 90, 90]}) == mask).all()


def test_raster_pixels_without_data_have_no_class(tmp_path: Path) -> None:
    mask = classes()
    mask[mask == IGNORED] = 0
    mask[10:, 5:9] = 99
    with open_mask(geotiff(tmp_path / "a.tif", mask[..., None], nodata=99), CLASSES, {}) as opened:
        strip = opened.rows(0, len(mask))
    assert (strip.valid == (mask != 99)).all()
    assert (strip.values == np.where(mask == 99, IGNORED, mask)).all()


@pytest.mark.parametrize(
    ("keys", "coloured", "expected"),
    [
        ([0, 2, 255], False, [0, 2, 255]),
        ([0x0A1E50, 0xFAFAFA], True, [0, 2]),
        ([0x000000, 0x010101, 0xFFFFFF], True, [0, 1, 255]),
        ([], False, []),
        ([], True, []),
        ([3, 7], False, "unknown labels 3, 7"),
        ([-1], False, "an unknown label -1"),
        ([0x0A1E50, 0x0A1E51], True, "an unknown colour #0a1e51"),
        ([0x030303], True, "an unknown label 3"),
        (list(range(3, 20)), False, "unknown labels 3, 4, 5, 6, 7, 8 and 11 more"),
    ],
)
def test_known_labels_and_colours_become_classes_and_others_are_refused(
    keys: list[int], coloured: bool, expected: list[int] | str
) -> None:
    given = (np.array(keys, np.int64), coloured, 3, colour_numbers(PALETTE))
    if isinstance(expected, str):
        with pytest.raises(Unknown, match=f"^{expected}$"):
            classes_of(*given)
    else:
        assert classes_of(*given).tolist() == expected


# ---------------------------------------------------------------- bad input


def test_bad_masks_give_a_one_line_error_and_no_file(run: Path, tmp_path: Path) -> None:
    mask = classes()
    wrong = mask.copy()
    wrong[0, :3] = (3, 9, 200)
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    (tmp_path / "empty").mkdir()
    Image.fromarray(wrong).save(tmp_path / "labels.png")
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(mask).convert("LA").save(tmp_path / "grey_alpha.png")
    (tmp_path / "text.png").write_text("no image")
    geotiff(tmp_path / "two.tif", np.dstack([mask, mask]))
    geotiff(tmp_path / "half.tif", mask[..., None].astype(np.float32) + 0.5)
    geotiff(tmp_path / "deep.tif", np.dstack([mask, mask, mask]).astype(np.uint16))
    geotiff(tmp_path / "many.tif", np.arange(90_000, dtype=np.int32).reshape(300, 300, 1))
    (tmp_path / "mixed").mkdir()
    Image.fromarray(mask).save(tmp_path / "mixed" / "a.png")
    Image.fromarray(wrong).save(tmp_path / "mixed" / "b.png")
    expected = {
        "labels.png": "has unknown labels 3, 9, 200: the model has 3 classes, 0 (ocean) to 2 (ice), 255 is unknown",
        "photo.png": "more: the model has 3 classes", "grey_alpha.png": "has 2 bands", "two.tif": "has 2 bands",
        "text.png": "is no image, or damaged", "half.tif": "has values that are no whole numbers",
        "deep.tif": "has colours deeper than 8 bits", "many.tif": "has more than 65,536 different values",
        "empty": "holds no image", "absent.png": "there is no such file", "mixed": "b.png has unknown labels 3, 9, 200",
    }  # fmt: skip
    before = names(tmp_path)
    model = load_synthesizer(run, "run", steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.synthesize.load_synthesizer", lambda *_, **__: model)
        for name, message in expected.items():
            target = tmp_path / ("out" if name in ("empty", "mixed") else "out.png")
            with pytest.raises(UserError) as error:
                synthesize(tmp_path / name, target, run)
            assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert names(tmp_path) == before and not (tmp_path / "out").exists()


def test_runs_without_colours_or_of_another_task_are_refused(run: Path, tmp_path: Path) -> None:
    Image.fromarray(classes()).save(tmp_path / "m.png")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match=r"run=.* has no palette\.json"):
        synthesize(tmp_path / "m.png", tmp_path / "a.png", other)
    write_json(other / "palette.json", PALETTE)
    write_json(other / "stage.json", {"stage": "super_resolution", "inputs": {}})
    (other / "pipeline").symlink_to(run / "pipeline")
    with pytest.raises(UserError, match="is a run of super_resolution: give a run of semantic_synthesis"):
        synthesize(tmp_path / "m.png", tmp_path / "a.png", other)
