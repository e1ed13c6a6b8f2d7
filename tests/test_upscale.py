"""Super-resolution of image files of any size: formats, folders, GeoTIFFs with gaps, bad input, a real pipeline."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionInstructPix2PixPipeline
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from tiny_networks import CHANNELS, pictures, tiny_autoencoder, tiny_text_encoder, tiny_unet
from tiny_task import task_config, tiny_foundation

from downstream import any_size, command
from downstream.any_size import TileOptions, Translation, filled, grid_of, jobs_of, translate, upscaled
from downstream.command import run_or_fine_tuned
from downstream.degradation import reduce
from downstream.drawing import load_restorer
from downstream.imagery import Picture, Strip, open_image, regrouped, with_gaps, written_beside
from downstream.interpolation import enlarge
from downstream.restoration import Restoration
from downstream.shipping import ship_task, shipped_network
from downstream.tiling import ground_noise
from runtime.application import CONFIGS
from runtime.artefacts import write_json
from runtime.errors import UserError
from runtime.notices import notice
from scripts.upscale import main
from train.shipped import shipped_folder

TRANSFORM = from_origin(500_000, 4_650_000, 20, 20) * rasterio.Affine.rotation(10)


class Repeat:
    """A restorer that repeats pixels, and counts its tiles."""

    latent_shape = (4, 2, 2)

    def __init__(self, side: int = 16, factor: int = 2):
        self.side, self.factor, self.tiles = side, factor, 0
        self.latent_shape = (4, side // 8, side // 8)

    def __call__(self, low: np.ndarray, noise: np.ndarray) -> np.ndarray:
        self.tiles += len(low)
        return low.repeat(self.factor, axis=1).repeat(self.factor, axis=2)


@pytest.fixture(autouse=True)
def notices_again() -> None:
    """Reset the notices, which are printed once per process, for every test."""
    notice.cache_clear()


def build(folder: Path) -> Path:
    """A tiny random super-resolution run of factor 2."""
    text_encoder, tokenizer = tiny_text_encoder()
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=tiny_autoencoder(scaling_factor=1.0), text_encoder=text_encoder, tokenizer=tokenizer,
        unet=tiny_unet(condition_channels=CHANNELS), safety_checker=None, feature_extractor=None,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    write_json(folder / "stage.json", {"stage": "super_resolution", "inputs": {"condition": {"factor": 2}}})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("run"))


def test_a_shipped_network_draws_nearly_the_same_image_as_its_run(run: Path, tmp_path: Path) -> None:
    summary = {"task": "super_resolution", "training_images": 16, "parameters": 5, "steps": 4, "seconds": 1.0,
               "images": 8, "split": "test", "metrics": {"psnr": 20.5, "ssim": None},
               "foundation": "/home/me/run"}  # fmt: skip
    write_json(run / "summary.json", summary)
    (run / "samples").mkdir(exist_ok=True)
    np.save(run / "samples" / "inputs.npy", np.zeros((3, 8, 8, 3), np.uint8))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config")
    ship_task(cfg, run, tmp_path / "shipped", ["a satellite image of desert"])
    texts = [path.read_text() for path in (tmp_path / "shipped").rglob("*") if path.suffix in (".json", ".md")]
    assert not any("/home/me" in text or str(run) in text for text in texts)
    assert "| psnr | 20.5 |" in (tmp_path / "shipped" / "README.md").read_text()
    assert np.load(tmp_path / "shipped" / "samples" / "inputs.npy").shape == (1, 8, 8, 3)
    Image.fromarray(colours(20, 10)).save(tmp_path / "a.png")
    upscale(tmp_path / "a.png", tmp_path / "run.png", run)
    upscale(tmp_path / "a.png", tmp_path / "shipped.png", tmp_path / "shipped")
    drawn, expected = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("shipped", "run"))
    assert drawn.shape == (20 * 2, 10 * 2, 3) or drawn.shape == (10 * 2, 20 * 2, 3)
    assert abs(drawn - expected).mean() < 1, "16 bits change little"


def upscale(source: Path, target: Path, run: Path, *overrides: str) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", ["upscale.steps=2", "upscale.batch_size=5", *overrides])
    cfg["in"], cfg.out, cfg.run = str(source), str(target), str(run)
    main(cfg)


def repeated(source: Path, target: Path, restorer: Repeat | None = None) -> Repeat:
    """Run the command's steps with a restorer that repeats pixels; returns the restorer."""
    restorer = restorer or Repeat()
    options = TileOptions(0.25, 4, 0)
    translation = Translation(
        opened=open_image, grid=lambda image: grid_of(image, restorer, options.overlap),
        drawn=lambda image, advance: upscaled(image, restorer, options, advance=advance), factor=restorer.factor,
        label="repeat",
    )  # fmt: skip
    translate(jobs_of(source, target, "in", lambda path: path.suffix), target, translation)
    return restorer


def colours(height: int = 45, width: int = 37, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def twice(values: np.ndarray) -> np.ndarray:
    return values.repeat(2, axis=0).repeat(2, axis=1)


def geotiff(path: Path, values: np.ndarray, mask: np.ndarray | None = None, **profile: object) -> Path:
    """Write [H, W, C] with a georeference."""
    height, width, count = values.shape
    where = {"crs": "EPSG:32633", "transform": TRANSFORM, **profile}
    shape = {"height": height, "width": width, "count": count, "dtype": values.dtype}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", **shape, **where) as raster,
    ):
        raster.write(np.moveaxis(values, -1, 0))
        if mask is not None:
            raster.write_mask(mask)
    return path


def read(path: Path) -> tuple[np.ndarray, np.ndarray, rasterio.io.DatasetReader]:
    """Colours, the mask of pixels with data in all bands, and the closed raster."""
    with rasterio.open(path) as raster:
        return np.moveaxis(raster.read(), 0, -1), (raster.read_masks() > 0).all(axis=0), raster


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- the command with a real pipeline


def test_the_command_draws_a_tile_like_the_pipeline_and_depends_on_the_seed(run: Path, tmp_path: Path, capsys) -> None:
    picture = pictures(1, size=37)[0][:, :30]
    Image.fromarray(picture).save(tmp_path / "a.png")
    plain = [f"downstream.super_resolution.{option}" for option in ("dial=1.0", "residual=false", "consistency=0")]
    plain.append("downstream.super_resolution.target=image")
    upscale(tmp_path / "a.png", tmp_path / "b.png", run, "seed=3", *plain)
    assert capsys.readouterr().out == f"upscaled: {tmp_path / 'b.png'}\n"
    assert names(tmp_path) == ["a.png", "b.png"]
    drawn = np.asarray(Image.open(tmp_path / "b.png"))
    assert drawn.shape == (74, 60, 3) and drawn.std() > 0

    options = Restoration(1, 1, 1, residual=False, consistency=0, kind="area", relative=False)
    pipeline = load_restorer(run, "run", steps=2, factor=4, options=options).pipeline
    low = picture[:8, :8]  # of the first tile; no other tile overlaps its upper left corner
    expected = pipeline(
        prompt="", image=Image.fromarray(enlarge(low[None], 2, "bicubic")[0]), num_inference_steps=2,
        guidance_scale=1.0, latents=torch.from_numpy(ground_noise(3, 0, 0, 2, 2, CHANNELS)[None]), output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(drawn[:8, :8].astype(int) - (expected * 255).round()[:8, :8]).max() <= 1
    upscale(tmp_path / "a.png", tmp_path / "c.png", run, "seed=3", *plain)
    upscale(tmp_path / "a.png", tmp_path / "d.png", run, "seed=4", *plain)
    assert (np.asarray(Image.open(tmp_path / "c.png")) == drawn).all()
    assert (np.asarray(Image.open(tmp_path / "d.png")) != drawn).any()


def test_the_whole_output_reduces_to_its_input(run: Path, tmp_path: Path) -> None:
    """This also holds across the borders of tiles, where blending alone is not consistent with the input."""
    picture = pictures(1, size=40)[0][:, :34] // 2 + 64
    Image.fromarray(picture).save(tmp_path / "a.png")
    errors = []
    for name, rounds in (("loose", 0), ("bent", 3)):
        upscale(tmp_path / "a.png", tmp_path / f"{name}.png", run, f"downstream.super_resolution.consistency={rounds}")
        drawn = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(np.float32)
        errors.append(np.abs(reduce(drawn[None], 2, "area")[0] - picture).max())
    assert errors[0] > 2
    assert errors[1] <= 0.5  # rounding alone


def test_a_geotiff_with_gaps_is_enlarged_independently_of_its_no_data_value(run: Path, tmp_path: Path) -> None:
    """The values of pixels without data have no effect on pixels with data."""
    valid = np.ones((45, 37), bool)
    valid[20:, :12] = valid[5, 30] = False
    drawn = []
    for number, nothing in enumerate((7, 250)):
        values = np.where(valid[..., None], colours(seed=1), np.uint8(nothing))
        source = geotiff(tmp_path / f"{number}.tif", values, nodata=nothing)
        upscale(source, tmp_path / f"{number}_large.tif", run)
        values, with_data, raster = read(tmp_path / f"{number}_large.tif")
        assert raster.crs == "EPSG:32633" and raster.nodata == nothing and raster.count == 3
        assert raster.transform.almost_equals(TRANSFORM * rasterio.Affine.scale(0.5))
        assert (with_data == twice(valid)).all()
        assert (values[~with_data] == nothing).all()
        drawn.append(values)
    same = np.abs(drawn[0].astype(int) - drawn[1])[twice(valid)]
    assert same.max() <= 1  # only a level equal to the no-data value is changed


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".tif", ".webp", ".jpg"])
@pytest.mark.parametrize("shape", [(45, 37), (1, 1), (3, 300), (300, 2)])
def test_pictures_of_any_format_and_shape_are_enlarged(suffix: str, shape: tuple[int, int], tmp_path: Path) -> None:
    picture = (colours(*shape) // 8 + 100).astype(np.uint8)
    source = tmp_path / f"a{suffix}"
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 95}}.get(suffix, {})
    Image.fromarray(picture).save(source, **options)
    repeated(source, tmp_path / f"deeper/b{suffix}")
    assert names(tmp_path) == [f"a{suffix}", f"deeper/b{suffix}"]
    with Image.open(tmp_path / f"deeper/b{suffix}") as image:
        assert image.format == Image.registered_extensions()[suffix.lower()]
        result = np.asarray(image)
    expected = twice(np.asarray(Image.open(source)))
    assert result.shape == expected.shape
    assert np.abs(result.astype(int) - expected).mean() < (3 if suffix == ".jpg" else 1e-9)


def test_a_folder_keeps_its_structure(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "a" / "b").mkdir(parents=True)
    Image.fromarray(colours(9, 12)).save(root / "x.png")
    Image.fromarray(colours(20, 8)).save(root / "a" / "y.jpg")
    geotiff(root / "a" / "b" / "z.TIF", colours(30, 11))
    (root / "notes.txt").write_text("no image")
    (tmp_path / "out").mkdir()  # an empty folder is accepted
    upscale(root, tmp_path / "out", run)
    assert names(tmp_path / "out") == ["a/b/z.TIF", "a/y.jpg", "x.png"]
    assert Image.open(tmp_path / "out" / "x.png").size == (24, 18)
    assert Image.open(tmp_path / "out" / "a" / "y.jpg").size == (16, 40)
    values, _, raster = read(tmp_path / "out" / "a" / "b" / "z.TIF")
    assert values.shape == (60, 22, 3) and raster.crs == "EPSG:32633"
    assert not (tmp_path / "out.partial").exists()


def test_a_rotated_picture_is_made_upright(tmp_path: Path) -> None:
    picture = colours(8, 12)
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    repeated(tmp_path / "a.png", tmp_path / "b.png")
    assert (np.asarray(Image.open(tmp_path / "b.png")) == twice(np.rot90(picture, -1))).all()


# ---------------------------------------------------------------- GeoTIFF


def test_the_no_data_value_is_kept_and_given_to_no_pixel_with_data(tmp_path: Path) -> None:
    values = colours(60, 40, seed=2)
    values[:30, :10] = 0
    values[50, 20] = (0, 9, 9)  # data, though one band holds the value
    assert (values == 0).all(axis=-1).sum() == 300
    repeated(geotiff(tmp_path / "a.tif", values, nodata=0), tmp_path / "b.tif")
    result, valid, raster = read(tmp_path / "b.tif")
    assert raster.nodata == 0 and (valid == ~twice((values == 0).all(axis=-1))).all()
    assert (result[valid] == np.maximum(twice(values)[valid], 1)).all()
    assert (result[100, 40] == (1, 9, 9)).all()


def test_a_no_data_mask_is_kept_as_a_mask(tmp_path: Path) -> None:
    values, mask = colours(60, 40), np.full((60, 40), 255, np.uint8)
    mask[10:20, 5:] = 0
    repeated(geotiff(tmp_path / "a.tif", values, mask), tmp_path / "b.tif")
    result, valid, raster = read(tmp_path / "b.tif")
    assert raster.nodata is None and (valid == (twice(mask) > 0)).all()
    assert (result[valid] == twice(values)[valid]).all() and (result[~valid] == 0).all()
    assert names(tmp_path) == ["a.tif", "b.tif"]  # the mask lies inside


def test_tiles_without_data_are_not_drawn(tmp_path: Path) -> None:
    values = colours(200, 200)
    values[40:] = 0
    everything = repeated(geotiff(tmp_path / "a.tif", values), tmp_path / "a2.tif")
    sparse = repeated(geotiff(tmp_path / "b.tif", values, nodata=0), tmp_path / "b2.tif")
    assert 0 < sparse.tiles < everything.tiles / 3
    nothing = repeated(geotiff(tmp_path / "c.tif", 0 * values, nodata=0), tmp_path / "c2.tif")
    assert nothing.tiles == 0 and not read(tmp_path / "c2.tif")[1].any()


def test_gaps_are_filled_with_the_nearest_data_before_drawing() -> None:
    values = colours(6, 7)
    valid = np.zeros((6, 7), bool)
    valid[2, 3] = valid[5, 6] = True
    result = filled(Strip(values, valid))
    assert (result[:3, :3] == values[2, 3]).all() and (result[5, 5:] == values[5, 6]).all()
    assert (filled(Strip(values, None)) == values).all() and (filled(Strip(values, ~valid & valid)) == 0).all()


def test_an_alpha_band_is_left_out_and_transparent_pixels_have_no_data(tmp_path: Path, capsys) -> None:
    values = np.dstack([colours(40, 30), np.full((40, 30), 255, np.uint8)])
    values[:10, :, 3] = 0
    path = geotiff(tmp_path / "a.tif", values, photometric="rgb", alpha="yes")
    with rasterio.open(path) as raster:
        assert raster.colorinterp[3] == ColorInterp.alpha
    repeated(path, tmp_path / "b.tif")
    result, valid, raster = read(tmp_path / "b.tif")
    assert raster.count == 3 and (valid == (twice(values[..., 3]) > 0)).all()
    assert (result[valid] == twice(values[..., :3])[valid]).all()
    Image.fromarray(values).save(tmp_path / "a.png")
    repeated(tmp_path / "a.png", tmp_path / "b.png")
    assert (np.asarray(Image.open(tmp_path / "b.png"))[20:] == twice(values[..., :3])[20:]).all()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "alpha" in line] == [
        f"{tmp_path}/a.tif: its alpha band is left out, transparent pixels have no data",
        f"{tmp_path}/a.png: its alpha band is left out",
    ]


def test_a_fourth_band_other_than_alpha_is_left_out_with_a_message(tmp_path: Path, capsys) -> None:
    values = np.dstack([colours(40, 30), colours(40, 30, seed=1)[..., 0]])
    repeated(geotiff(tmp_path / "a.tif", values, photometric="minisblack"), tmp_path / "b.tif")
    assert (read(tmp_path / "b.tif")[0] == twice(values[..., :3])).all()
    assert "bands 1, 2, 3 are taken as red, green, blue, the other one is left out" in capsys.readouterr().err


def test_deep_values_are_stretched_with_a_message(tmp_path: Path, capsys) -> None:
    values = np.random.default_rng(0).uniform(1000, 3000, (80, 60, 3)).astype(np.float32)
    values[:10] = -9999
    values[70:] = np.nan
    repeated(geotiff(tmp_path / "a.tif", values, nodata=-9999), tmp_path / "b.tif")
    result, valid, raster = read(tmp_path / "b.tif")
    assert raster.dtypes == ("uint8",) * 3 and raster.nodata == 0
    assert valid[20:140].all() and not valid[:20].any() and not valid[140:].any()
    data = values[10:70]
    low, high = np.percentile(data.reshape(-1, 3), (2, 98), axis=0)
    expected = np.clip((data - low) / (high - low) * 255, 1, 255)
    assert np.abs(result[20:140:2, ::2] - expected).max() < 8  # stretched by percentiles of a sample
    assert "float32" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["L", "1", "I;16", "tif"])
def test_grey_pictures_are_converted_with_a_message(kind: str, tmp_path: Path, capsys) -> None:
    grey = colours(20, 30)[..., 0]
    path = tmp_path / ("a.tif" if kind == "tif" else "a.png")
    if kind == "tif":
        geotiff(path, grey[..., None])
    elif kind == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 100).save(path)
    else:
        Image.fromarray(grey).convert(kind).save(path)
    repeated(path, tmp_path / "b.png")
    result = np.asarray(Image.open(tmp_path / "b.png"))
    assert result.shape == (40, 60, 3) and (result == result[..., :1]).all()
    if kind in ("L", "tif"):
        assert (result[..., 0] == twice(grey)).all()
    assert f"{path} is grey" in capsys.readouterr().err


def test_a_georeference_that_a_picture_cannot_store_is_reported(tmp_path: Path, capsys) -> None:
    repeated(geotiff(tmp_path / "a.tif", colours()), tmp_path / "b.png")
    assert "cannot store the georeference" in capsys.readouterr().err
    assert names(tmp_path) == ["a.tif", "b.png"]
    Image.fromarray(colours()).save(tmp_path / "plain.tif")
    repeated(tmp_path / "plain.tif", tmp_path / "c.png")
    assert "georeference" not in capsys.readouterr().err


def test_control_points_are_scaled(tmp_path: Path) -> None:
    points = [
        rasterio.control.GroundControlPoint(row, column, 10 + column / 100, 50 - row / 100)
        for row, column in ((0, 0), (0, 30), (40, 0), (40, 30))
    ]
    path = geotiff(tmp_path / "a.tif", colours(40, 30), transform=None, gcps=points, crs="EPSG:4326")
    repeated(path, tmp_path / "b.tif")
    result, crs = read_points(tmp_path / "b.tif")
    assert crs == "EPSG:4326"
    assert [(point.row, point.col) for point in result] == [(2 * point.row, 2 * point.col) for point in points]
    assert [(point.x, point.y) for point in result] == [(point.x, point.y) for point in points]


def read_points(path: Path) -> tuple[list, object]:
    with rasterio.open(path) as raster:
        return raster.gcps


# ---------------------------------------------------------------- bad input


def bad_inputs(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files and folders that the command refuses, and its messages."""
    (folder / "empty").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("no image")
    whole_png, grey_alpha = io.BytesIO(), Image.fromarray(colours(5, 5)).convert("LA")
    Image.fromarray(colours(200, 200)).save(whole_png, "PNG")
    (folder / "cut.png").write_bytes(whole_png.getvalue()[:5000])
    (folder / "text.png").write_text("no image")
    (folder / "zero.jpg").write_bytes(b"")
    grey_alpha.save(folder / "grey_alpha.png")
    geotiff(folder / "two.tif", colours(9, 9)[..., :2])
    geotiff(folder / "five.tif", np.dstack([colours(9, 9), colours(9, 9)[..., :2]]))
    damaged = geotiff(folder / "damaged.tif", colours(600, 600))
    damaged.write_bytes(damaged.read_bytes()[:300_000])
    (folder / "image.gif").write_bytes(b"GIF89a")
    mixed = folder / "mixed"
    mixed.mkdir()
    Image.fromarray(colours(8, 8)).save(mixed / "a.png")
    (mixed / "b.jpg").write_bytes(b"\xff\xd8\xff")
    return {
        "absent.png": (folder / "absent.png", "there is no such file or folder"),
        "empty": (folder / "empty", "holds no image"),
        "texts": (folder / "texts", "holds no image"),
        "cut": (folder / "cut.png", "is no image, or damaged"),
        "text": (folder / "text.png", "is no image, or damaged"),
        "zero": (folder / "zero.jpg", "is no image, or damaged"),
        "grey and alpha": (folder / "grey_alpha.png", "has 2 bands"),
        "two bands": (folder / "two.tif", "has 2 bands"),
        "five bands": (folder / "five.tif", "has 5 bands"),
        "damaged": (folder / "damaged.tif", "is no image, or damaged"),
        "suffix": (folder / "image.gif", "give a file that ends in .png"),
        "one of several": (mixed, "b.jpg is no image, or damaged"),
    }


def test_bad_input_gives_a_one_line_error_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for source, message in bad_inputs(tmp_path / "bad").values():
        target = tmp_path / "target" / ("out" if source.is_dir() else "out.png")
        with pytest.raises(UserError) as error:
            repeated(source, target)
        assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
        assert not (tmp_path / "target").exists()


def test_existing_files_are_kept(run: Path, tmp_path: Path) -> None:
    Image.fromarray(colours(8, 8)).save(tmp_path / "a.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "theirs.txt").write_text("theirs")
    (tmp_path / "theirs.png").write_text("theirs")
    for source, target in (
        (tmp_path / "a.png", tmp_path / "theirs.png"), (tmp_path / "a.png", tmp_path / "folder"),
        (tmp_path, folder), (tmp_path, tmp_path / "theirs.png"), (tmp_path / "a.png", tmp_path / "a.png"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"already exists and is not empty|give a file that ends in"):
            upscale(source, target, run)
    assert (folder / "theirs.txt").read_text() == (tmp_path / "theirs.png").read_text() == "theirs"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["upscale.overlap=1"], "overlap=1: give a fraction"), (["upscale.overlap=wide"], "overlap=wide"),
        (["upscale.batch_size=0"], "batch_size=0"), (["upscale.steps=0"], "steps=0"), (["seed=-1"], "seed=-1"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(overrides: list[str], message: str, run: Path, tmp_path: Path) -> None:
    Image.fromarray(colours(8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=message):
        upscale(tmp_path / "a.png", tmp_path / "b.png", run, *overrides)


def test_missing_options_and_other_runs_are_refused(run: Path, tmp_path: Path) -> None:
    Image.fromarray(colours(8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"in=… is missing: give in=PATH out=PATH"):
        jobs_of(None, "b.png", "in", str)
    with pytest.raises(UserError, match="out=… is missing"):
        jobs_of(tmp_path, None, "in", str)
    with pytest.raises(UserError, match=r"run=.* contains no pipeline"):
        upscale(tmp_path / "a.png", tmp_path / "b.png", tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "pipeline").symlink_to(run / "pipeline")
    write_json(other / "stage.json", {"stage": "semantic_synthesis", "inputs": {}})
    with pytest.raises(UserError, match="is a run of semantic_synthesis: give a run of super_resolution"):
        upscale(tmp_path / "a.png", tmp_path / "b.png", other)
    with pytest.raises(UserError, match="WEBP allows only 16383 px a side"):
        Image.fromarray(colours(1, 9000)).save(tmp_path / "wide.png")
        upscale(tmp_path / "wide.png", tmp_path / "b.webp", run)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_command_leaves_no_partial_file(error: type[BaseException], tmp_path: Path) -> None:
    class Stops(Repeat):
        def __call__(self, low: np.ndarray, noise: np.ndarray) -> np.ndarray:
            if self.tiles > 40:
                raise error
            return super().__call__(low, noise)

    root = tmp_path / "in"
    root.mkdir()
    for name in ("a.png", "b.png", "c.tif"):
        Image.fromarray(colours()).save(root / name)
    for source, target in ((root, "out"), (root / "a.png", "b.png"), (root / "c.tif", "c.tif")):
        with pytest.raises(error):
            repeated(source, tmp_path / target, Stops())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_unwritable_path_gives_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), written_beside(tmp_path / "file" / "a.png"):
        pass


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("heights", [[3, 5, 1], [20], [8, 8], [1] * 17, [30, 2]])
def test_rows_are_regrouped_into_strips_of_equal_height(heights: list[int]) -> None:
    values = colours(sum(heights), 4)
    valid = values[..., 0] > 100
    ends = np.cumsum(heights)[:-1]
    strips = [Strip(*part) for part in zip(np.split(values, ends), np.split(valid, ends), strict=True)]
    strips[0] = Strip(strips[0].values)
    valid[: heights[0]] = True
    result = list(regrouped(strips, 8))
    assert [len(strip.values) for strip in result[:-1]] == [8] * (len(result) - 1) and len(result[-1].values) <= 8
    assert (np.concatenate([strip.values for strip in result]) == values).all()
    flags = [np.ones(s.values.shape[:2], bool) if s.valid is None else s.valid for s in result]
    assert (np.concatenate(flags) == valid).all()


def test_pixels_with_data_never_get_the_no_data_value() -> None:
    values = np.array([[[0, 5, 255], [1, 2, 3]]], np.uint8)
    valid = np.array([[True, False]])
    assert with_gaps(Strip(values, valid), 0).tolist() == [[[1, 5, 255], [0, 0, 0]]]
    assert with_gaps(Strip(values, valid), 255).tolist() == [[[0, 5, 254], [255, 255, 255]]]
    assert with_gaps(Strip(values, valid), None).tolist() == [[[0, 5, 255], [0, 0, 0]]]
    assert with_gaps(Strip(values), None).tolist() == values.tolist()


def test_the_progress_bar_counts_all_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    def watched(items, label, **options):
        bars.append(real(items, label, **options))
        return bars[-1]

    real = any_size.progress
    monkeypatch.setattr(any_size, "progress", watched)
    values = colours(100, 60)
    values[30:60] = 0
    (tmp_path / "in").mkdir()
    geotiff(tmp_path / "in" / "a.tif", values, nodata=0)
    Image.fromarray(values).save(tmp_path / "in" / "b.png")
    restorer = repeated(tmp_path / "in", tmp_path / "out")
    assert [bar.desc.strip(": ") for bar in bars] == ["check", "repeat"]
    assert bars[1].n == bars[1].total == 2 * len(grid_of(Picture(values), restorer, 0.25)) > restorer.tiles


@pytest.mark.skipif(not shipped_folder("super_resolution").is_dir(), reason="this copy has no shipped network")
def test_without_a_run_the_shipped_network_is_used(tmp_path: Path, capsys) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", ["upscale.steps=2", f"runs={tmp_path}/runs"])
    Image.fromarray(colours(20, 10)).save(tmp_path / "a.png")
    cfg["in"], cfg.out = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    main(cfg)
    assert "using the shipped network" in capsys.readouterr().err
    assert Image.open(tmp_path / "b.png").size == (40, 80) and not (tmp_path / "runs").exists()
    other = OmegaConf.merge(cfg, {"downstream": {"super_resolution": {"factor": 2}}})
    assert shipped_network(other, "super_resolution") is None, "it enlarges by another factor"


def test_without_a_run_the_foundation_is_fine_tuned_once(tmp_path: Path, capsys, monkeypatch) -> None:
    cfg = task_config(tmp_path, "downstream.super_resolution.factor=2", "upscale.steps=2")
    foundation = tiny_foundation(tmp_path / "foundation", cfg)
    requested: list[object] = []
    real = command.resolve_foundation

    def resolve(given):
        requested.append(given.foundation)
        return real(OmegaConf.merge(given, {"foundation": str(foundation)}))

    monkeypatch.setattr(command, "resolve_foundation", resolve)
    Image.fromarray(colours(20, 10)).save(tmp_path / "a.png")
    cfg["in"], cfg.out = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    main(cfg)
    error = capsys.readouterr().err
    assert set(requested) == {"shipped"} and cfg.foundation is None
    assert "no run=DIR: foundation=shipped is fine-tuned and measured for super_resolution first, 4 steps" in error
    (run,) = (tmp_path / "runs" / "super_resolution").glob("*[!k]")
    assert f"s; run={run}" in error
    assert Image.open(tmp_path / "b.png").size == (20, 40)
    notice.cache_clear()
    assert run_or_fine_tuned(cfg, "super_resolution") == run
    assert "fine-tuned" not in capsys.readouterr().err
    cfg.run = "~/somewhere"
    assert run_or_fine_tuned(cfg, "super_resolution") == Path("~/somewhere").expanduser()


# ---------------------------------------------------------------- as a command


@pytest.mark.slow
def test_the_command_exits_with_code_2_on_bad_input(run: Path, tmp_path: Path) -> None:
    script = CONFIGS.parent / "scripts" / "upscale.py"
    (tmp_path / "a,b").mkdir()
    for arguments, code in ((["in=a,b", "out=c"], 2), (["in=d=e.png", "out=f=g.png", "upscale.steps=1"], 0)):
        Image.fromarray(colours(9, 9)).save(tmp_path / "d=e.png")
        done = subprocess.run(
            [sys.executable, str(script), *arguments, f"run={run}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "upscaled: f=g.png" and (tmp_path / "f=g.png").is_file()


MEMORY = """
import json, resource, sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_upscale import Repeat, repeated
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
repeated(Path(sys.argv[1]), Path(sys.argv[2]), Repeat(side=256, factor=1))
print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@pytest.mark.slow
def test_a_scene_of_ten_thousand_pixels_a_side_takes_bounded_memory(tmp_path: Path) -> None:
    side = 10_000
    profile = {"driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8", "tiled": True}
    with rasterio.open(tmp_path / "a.tif", "w", compress="deflate", crs="EPSG:32633", **profile) as raster:
        for top in range(0, side, 1000):
            rows = (np.arange(top, top + 1000) // 7 % 251).astype(np.uint8)[None, :, None]
            window = rasterio.windows.Window(0, top, side, 1000)
            raster.write(np.broadcast_to(rows, (3, 1000, side)), window=window)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "a.tif"), str(tmp_path / "b.tif")], cwd=CONFIGS.parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, peak = json.loads(done.stdout.splitlines()[-1])
    assert peak - before < 700_000, f"{before:,} KiB, then {peak:,} KiB"
    with rasterio.open(tmp_path / "a.tif") as first, rasterio.open(tmp_path / "b.tif") as second:
        for top in (0, 4321, side - 50):
            window = rasterio.windows.Window(0, top, side, 50)
            assert (first.read(window=window) == second.read(window=window)).all()
