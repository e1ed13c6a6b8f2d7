"""Published systems for comparison: loaded from random networks of their architecture, drawn, measured and refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_networks import CHANNELS, SIZE, UNET, pictures, tiny_autoencoder, tiny_text_encoder, tiny_unet
from tiny_run import tiny_config

from eval import measure as command
from eval.generate import generate
from eval.held_out import HeldOut
from eval.measuring import IMAGES, Sampling, draw_images
from eval.measuring_any import PEER, distinct_sets, measure_any
from eval.models import Model
from eval.peers import parts
from eval.peers.crs_diff import CRSDiff
from eval.peers.diffusionsat import FIELDS, DiffusionSat, metadata_of, network_of, scaled
from eval.peers.georssd import GeoRSSD
from eval.peers.labels import LabelledPipeline
from eval.peers.parts import place_of, weights_of
from eval.peers.peer import Peer, PeerModel
from eval.peers.rsdiff import RSDiff
from eval.peers.text2earth import Text2Earth, level_of
from runtime.application import CONFIGS, run
from runtime.artefacts import read_json
from runtime.errors import UserError
from train.networks import text_to_image_pipeline

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("crs_diff", "diffusionsat", "georssd", "rsdiff", "text2earth")
NUMBERS = [500.0, 250.0, 120.0, 0.0, 300.0, 700.0, 90.0]
OPTIONS = {"steps": 2, "guidance_scale": 1.5, "seed": 7, "label": "draw"}
PLACE = {
    "id": "a",
    "scene": "BareLand",
    "lon": 10.0,
    "lat": 50.0,
    "ground_sampling_distance": 1.0,
    "date": "2018-05-04",
}


def write_json(path: Path, metadata: dict) -> None:
    path.write_text(json.dumps(metadata), encoding="utf-8")


def edited(path: Path, **changes: object) -> None:
    write_json(path, {**read_json(path), **changes})


def satellite_weights(seed: int = 4) -> dict[str, torch.Tensor]:
    """The weights of a tiny SatUNet, with the names of its files."""
    torch.manual_seed(seed)
    state = dict(tiny_unet().state_dict())
    for index in range(len(FIELDS)):
        for layer, width in ((1, 8), (2, 32)):
            state[f"metadata_embedding.{index}.linear_{layer}.weight"] = torch.randn(32, width) / math.sqrt(width)
            state[f"metadata_embedding.{index}.linear_{layer}.bias"] = torch.randn(32)
    return state


def write_pipeline(folder: Path, name: str) -> Path:
    """A tiny random version of a peer's published files."""
    torch.manual_seed(0)
    pipeline = text_to_image_pipeline(tiny_autoencoder(), *tiny_text_encoder(), tiny_unet(), DDIMScheduler())
    pipeline.save_pretrained(folder)
    unet, index = folder / "unet", read_json(folder / "model_index.json")
    if name == "diffusionsat":
        index |= {"_class_name": "DiffusionSatPipeline", "unet": ["diffusionsat", "SatUNet"]}
        edited(unet / "config.json", _class_name="SatUNet", use_metadata=True, num_metadata=7)
        save_file(satellite_weights(), unet / "diffusion_pytorch_model.safetensors")
    if name == "text2earth":
        index["_class_name"] = "Text2EarthDiffusionPipeline"
        torch.manual_seed(5)
        options = {**UNET, "sample_size": 4, "in_channels": CHANNELS, "out_channels": CHANNELS}
        network = UNet2DConditionModel(**options, cross_attention_dim=8, class_embed_type="timestep")
        network.class_embedding.linear_2.weight.data *= 30  # or a level would hardly have an effect after two steps
        network.save_pretrained(unet)
    write_json(folder / "model_index.json", index)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("peers")
    return {name: write_pipeline(place / name, name) for name in ("diffusionsat", "georssd", "text2earth")}


PEERS = {
    "diffusionsat": DiffusionSat("diffusionsat", SIZE, scheduler="DDIMScheduler"),
    "georssd": GeoRSSD("georssd", SIZE),
    "text2earth": Text2Earth("text2earth", SIZE, scheduler="EulerDiscreteScheduler"),
    "crs_diff": CRSDiff("crs_diff", SIZE),
    "rsdiff": RSDiff("rsdiff", SIZE),
}


def table(*changes: dict) -> pd.DataFrame:
    return pd.DataFrame([{**PLACE, **change} for change in changes])


@cache
def load(peer: Peer, folder: Path):
    """Load a peer once, because reading the tokenizer takes longer than drawing."""
    peer.check(folder)
    return peer.load(folder)


def drawn(peer: Peer, folder: Path, rows: pd.DataFrame, numbers=None, loaded=None) -> np.ndarray:
    captions = ["bare land by a road"] * len(rows)
    numbers = np.arange(len(rows)) if numbers is None else np.array(numbers, dtype=np.int64)
    return peer.draw(loaded or load(peer, folder), captions, rows, numbers, SIZE, **OPTIONS)


# ---------------------------------------------------------------- metadata of a row


def test_numbers_are_scaled_as_in_the_notebook_of_diffusionsat() -> None:
    """`metadata` of the first cell of notebooks/single-image.ipynb: an amusement park in Brisbane in 2017."""
    row = {"lon": 153.316728, "lat": -27.862002, "ground_sampling_distance": 0.4114541, "date": "2017-02-11T01:00:00Z"}
    expected = [925.8798, 345.2111, 411.4541, 0.0, 308.3333, 166.6667, 354.8387]
    assert scaled(metadata_of(row, 512, 512)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"date": "2017-02-11"}, [2017, 2, 11]),
        ({"year": 2017, "month": 2, "day": 11, "date": "2020-01-01"}, [2017, 2, 11]),
        ({"year": "2016", "day_of_year": 61}, [2016, 3, 1]),
        ({"year": 2017, "day_of_year": 60}, [2017, 3, 1]),
        ({"year": 2017}, [2017, math.nan, math.nan]),
        ({"date": "no day"}, [math.nan] * 3),
        ({"date": math.nan, "year": None}, [math.nan] * 3),
        ({}, [math.nan] * 3),
    ],
)
def test_the_date_is_read_from_year_month_day_or_date_columns(row: dict, expected: list[float]) -> None:
    metadata = metadata_of(row, 64, 64)
    np.testing.assert_equal([metadata[name] for name in ("year", "month", "day")], expected)


def test_metres_per_pixel_are_scaled_to_the_drawn_side() -> None:
    peer = PEERS["diffusionsat"]
    at_64, at_128 = (peer.extra({"ground_sampling_distance": 2.0}, side)["labels"][2] for side in (64, 128))
    assert (at_64, at_128) == (2.0 * 64 / SIZE * 1000, 2.0 * 128 / SIZE * 1000)
    assert peer.extra({}, 64)["labels"] == [0] * 7  # as in its training for dropped numbers
    assert peer.extra({"ground_sampling_distance": "far", "lon": None, "cloud_fraction": 0.25}, 64)["labels"] == [
        0, 0, 0, 250, 0, 0, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("distance", "level"),
    [(128, 10), (64, 11), (2, 16), (1, 17), (0.5, 18), (0.01, 18), (5000, 10), (1.3, 17), (1.5, 16), (math.nan, 0)],
)
def test_text2earth_levels_follow_the_ground_sampling_distance(distance: float, level: int) -> None:
    """README.md of Text2Earth: resolution = 2^(17 - level), 10 to 18."""
    assert level_of(distance) == level
    peer = Text2Earth("text2earth", 256)
    assert peer.extra({"ground_sampling_distance": distance}, 256) == {"labels": level}
    assert peer.extra({}, 256) == {"labels": 0}


def test_the_prompt_is_the_caption_in_a_template() -> None:
    assert PEERS["georssd"].prompt("a road", PLACE) == "a road"
    peer = GeoRSSD("georssd", SIZE, template="an image of {scene}: {caption}")
    assert peer.prompt("a road", PLACE) == "an image of bare land: a road"
    assert peer.prompt("a {brace}", {}) == "an image of : a {brace}"


# ---------------------------------------------------------------- networks


def embedded(weights: dict[str, torch.Tensor], numbers: list[float]) -> np.ndarray:
    """Sum of the MLPs of sinusoidal features, by hand: cosines before sines, x W1 + b1, SiLU, W2 + b2."""
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    result = np.zeros(32)
    for index, number in enumerate(numbers):
        features = np.concatenate([np.cos(number * frequencies), np.sin(number * frequencies)])
        one, two = (
            [weights[f"metadata_embedding.{index}.linear_{layer}.{part}"].numpy() for part in ("weight", "bias")]
            for layer in (1, 2)
        )
        hidden = one[0] @ features + one[1]
        result += two[0] @ (hidden / (1 + np.exp(-hidden))) + two[1]
    return result


def test_the_metadata_embedding_is_added_to_the_time_embedding(folders: dict[str, Path]) -> None:
    """Compared with diffusers' U-Net with a class embedding that passes its input through."""
    weights = satellite_weights()
    config = read_json(folders["diffusionsat"] / "unet" / "config.json")
    network = network_of(config, weights)
    options = {**UNET, "sample_size": 4, "in_channels": CHANNELS, "out_channels": CHANNELS, "cross_attention_dim": 8}
    plain = UNet2DConditionModel(**options, class_embed_type="identity").eval()
    plain.load_state_dict({key: value for key, value in weights.items() if not key.startswith("metadata")})
    torch.manual_seed(0)
    latents, text, time = torch.randn(1, CHANNELS, 4, 4), torch.randn(1, 8, 8), torch.tensor([300])
    given = torch.tensor(embedded(weights, NUMBERS), dtype=torch.float32)[None]
    with torch.no_grad():
        expected = plain(latents, time, text, class_labels=given).sample
        result = network(latents, time, text, class_labels=torch.tensor([NUMBERS])).sample
        other = network(latents, time, text, class_labels=torch.zeros(1, 7)).sample
    torch.testing.assert_close(result, expected, atol=2e-4, rtol=2e-4)
    assert (result - other).abs().max() > 0.01


def test_the_unconditional_half_of_guidance_gets_zero_labels(folders: dict[str, Path]) -> None:
    seen = []
    pipeline = load(PEERS["text2earth"], folders["text2earth"])
    hook = pipeline.unet.class_embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for scale, halves in ((1.5, 2), (1.0, 1)):
        seen.clear()
        generate(pipeline, ["a", "b"], steps=2, guidance_scale=scale, seed=0, labels=[16, 10])
        assert len(seen) == 2 and len(seen[0]) == 2 * halves
        expected = pipeline.unet.time_proj(torch.tensor([0, 0, 16, 10][4 - 2 * halves :]))
        torch.testing.assert_close(seen[0], expected)
    hook.remove()
    assert not pipeline.unet._forward_pre_hooks
    with pytest.raises(TypeError, match="labels"):
        pipeline(["a"])


@pytest.mark.parametrize("name", ["diffusionsat", "georssd", "text2earth"])
def test_saved_peers_draw_images_of_the_requested_side(folders: dict[str, Path], name: str) -> None:
    peer, rows = PEERS[name], table({}, {}, {})
    images = drawn(peer, folders[name], rows)
    assert images.dtype == np.uint8 and images.shape == (3, SIZE, SIZE, 3)
    assert (images[0] != images[1]).any()
    alone = drawn(peer, folders[name], rows, numbers=[2])  # the noise depends only on the number
    np.testing.assert_allclose(alone[0].astype(float), images[2], atol=1)
    assert drawn(peer, folders[name], rows, numbers=[]).shape == (0, SIZE, SIZE, 3)
    larger, loaded = replace(peer, resolution=2 * SIZE), load(peer, folders[name])
    assert drawn(larger, folders[name], rows[:1], loaded=loaded).shape == (1, 2 * SIZE, 2 * SIZE, 3)


@pytest.mark.parametrize(
    ("name", "change", "matters"),
    [
        ("diffusionsat", {"lon": -120.0}, True),
        ("diffusionsat", {"date": "2018-11-04"}, True),
        ("diffusionsat", {"ground_sampling_distance": 0.3}, True),
        ("diffusionsat", {"cloud_fraction": 0.9}, True),
        ("diffusionsat", {"scene": "road", "elevation": 5.0}, False),
        ("text2earth", {"ground_sampling_distance": 64.0}, True),
        ("text2earth", {"ground_sampling_distance": 1.05}, False),  # the same level
        ("text2earth", {"lon": -120.0}, False),
        ("georssd", {"lon": -120.0, "ground_sampling_distance": 64.0}, False),
    ],
)
def test_only_metadata_that_a_peer_uses_changes_its_image(
    folders: dict[str, Path], name: str, change: dict, matters: bool
) -> None:
    images = [drawn(PEERS[name], folders[name], table(row)) for row in ({}, change)]
    assert (images[0] != images[1]).any() == matters


def test_georssd_equals_the_plain_pipeline_of_its_folder(folders: dict[str, Path]) -> None:
    rows = table({}, {})
    result = drawn(PEERS["georssd"], folders["georssd"], rows)
    plain = Model(folders["georssd"]).load()
    expected = generate(plain, ["bare land by a road"] * 2, steps=2, guidance_scale=1.5, seed=7, size=SIZE)
    np.testing.assert_array_equal(result, expected)


def test_half_precision_weights_are_loaded_as_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("diffusionsat", "text2earth"):
        folder = shutil.copytree(folders[name], tmp_path / name)
        for path in folder.rglob("*.safetensors"):
            save_file({key: value.half() for key, value in load_file(path).items()}, path, {"format": "pt"})
        edited(folder / "text_encoder" / "config.json", dtype="float16")
        pipeline = load(PEERS[name], folder)
        networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        kinds = {value.dtype for network in networks for value in network.parameters()}
        assert kinds == {torch.float32}
        assert drawn(PEERS[name], folder, table({})).shape == (1, SIZE, SIZE, 3)


def test_the_sampler_is_the_configured_one_with_the_settings_of_the_folder(folders: dict[str, Path], tmp_path) -> None:
    folder = shutil.copytree(folders["georssd"], tmp_path / "x")
    edited(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", beta_start=0.002)
    own = GeoRSSD("georssd", SIZE).load(folder).scheduler
    other = GeoRSSD("georssd", SIZE, scheduler="EulerDiscreteScheduler").load(folder).scheduler
    assert isinstance(own, DDIMScheduler) and isinstance(other, EulerDiscreteScheduler)
    assert own.config.prediction_type == other.config.prediction_type == "v_prediction"
    assert own.config.beta_start == other.config.beta_start == 0.002


def test_the_unet_comes_from_the_folder_or_its_last_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["diffusionsat"], tmp_path / "x")
    for step in ("50000", "150000", "9000"):
        shutil.copytree(folder / "unet", folder / f"checkpoint-{step}" / "unet")
    last = folder / "checkpoint-150000" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(satellite_weights(seed=9), last)
    peer = PEERS["diffusionsat"]
    weight = "0.linear_1.weight"

    def loaded(peer: DiffusionSat) -> torch.Tensor:
        peer.check(folder)
        return peer.load(folder).unet.class_embedding.state_dict()[weight]

    own, other = (satellite_weights(seed)["metadata_embedding." + weight] for seed in (4, 9))
    torch.testing.assert_close(loaded(peer), own)
    shutil.rmtree(folder / "unet")
    torch.testing.assert_close(loaded(peer), other)
    torch.testing.assert_close(loaded(DiffusionSat("diffusionsat", SIZE, unet="checkpoint-9000/unet")), own)


# ---------------------------------------------------------------- refusals


def without(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path)


def pickled(path: Path) -> None:
    path.with_suffix(".bin").write_bytes(path.read_bytes())
    path.unlink()


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("georssd", lambda d: without(d / "model_index.json"), "has no model_index.json: give the folder of geor"),
        ("georssd", lambda d: edited(d / "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline: peer=ge"),
        ("text2earth", lambda d: edited(d / "model_index.json", _class_name=["x", "Other"]), "is a Other: peer=text"),
        ("georssd", lambda d: without(d / UNET_FILE), "unet has no weights: a .safetensors file is needed"),
        ("georssd", lambda d: without(d / "vae"), "vae has no weights"),
        ("georssd", lambda d: pickled(d / UNET_FILE), "is a pickle, which can run code when it is read"),
        ("diffusionsat", lambda d: pickled(d / UNET_FILE), "is a pickle, which can run code"),
        ("text2earth", lambda d: pickled(d / "text_encoder/model.safetensors"), "model.bin is a pickle"),
        ("georssd", lambda d: edited(d / "unet/config.json", _class_name="SatUNet"), "unet is a SatUNet: peer=georssd"),
        ("diffusionsat", lambda d: edited(d / "unet/config.json", _class_name="UNet"), "is a UNet: peer=diffusionsat"),
        ("diffusionsat", lambda d: edited(d / "unet/config.json", num_metadata=5), "takes 5 numbers: peer=diffusion"),
        ("diffusionsat", lambda d: edited(d / "unet/config.json", use_metadata=False), "takes 0 numbers"),
        ("diffusionsat", lambda d: without(d / "unet/config.json"), "unet has no config.json"),
        ("text2earth", lambda d: edited(d / "unet/config.json", class_embed_type=None), "no input for the resolution"),
        ("text2earth", lambda d: (d / "unet/config.json").write_text("{"), "config.json cannot be read"),
        ("text2earth", lambda d: (d / "unet/config.json").write_text("[]"), "config.json contains no JSON object"),
    ],
)  # fmt: skip
def test_unsuitable_peer_folders_are_refused_by_the_check(
    folders: dict[str, Path], tmp_path: Path, name: str, spoil, message: str
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "x")
    spoil(folder)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        PEERS[name].check(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("diffusionsat", lambda d: save_file({"a": torch.ones(1)}, d / UNET_FILE)),
        ("diffusionsat", lambda d: (d / UNET_FILE).write_bytes(b"broken")),
        ("georssd", lambda d: (d / UNET_FILE).write_bytes(b"broken")),
        ("georssd", lambda d: edited(d / "vae/config.json", _class_name="VQModel")),
        ("georssd", lambda d: without(d / "tokenizer")),
        ("text2earth", lambda d: without(d / "scheduler")),
        ("text2earth", lambda d: (d / "text_encoder/model.safetensors").write_bytes(b"broken")),
    ],
)
def test_broken_peer_files_give_a_one_line_error_when_loaded(
    folders: dict[str, Path], tmp_path: Path, name: str, spoil
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "x")
    spoil(folder)
    PEERS[name].check(folder)
    with pytest.raises(UserError, match=r"does not load|cannot be read") as error:
        PEERS[name].load(folder)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize("of", ["nowhere", "./owner/name", "a/b/c", "~/no/such"])
def test_a_peer_location_that_does_not_exist_is_refused(of: str) -> None:
    with pytest.raises(UserError, match="does not exist: give the folder"):
        place_of(of)


def test_a_hub_name_is_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        requested.append((name, allow_patterns))
        if name == "owner/none":
            raise OSError("no\nhub")
        return str(tmp_path)

    monkeypatch.setattr(parts, "snapshot_download", snapshot)
    assert place_of("owner/name") == tmp_path
    [(name, patterns)] = requested
    assert name == "owner/name" and set(patterns) == {"*.safetensors", "*.json", "*.txt"}
    with pytest.raises(UserError, match=r"it cannot be fetched as a hub name \(no hub\)"):
        place_of("owner/none")


def test_the_script_of_the_docs_converts_a_pickle(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["georssd"], tmp_path / "x")
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        state = load_file(folder / part / f"{name}.safetensors")
        torch.save(state, folder / part / f"{name.replace('model', 'pytorch_model') if name == 'model' else name}.bin")
        (folder / part / f"{name}.safetensors").unlink()
    with pytest.raises(UserError, match="is a pickle"):
        PEERS["georssd"].check(folder)
    [script] = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "comparison.md").read_text(), re.M | re.S)
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(
        drawn(PEERS["georssd"], folder, table({})), drawn(PEERS["georssd"], folders["georssd"], table({}))
    )


# ---------------------------------------------------------------- images of a system's own code


def write_images(folder: Path, names: list[str], captions: list[str] | None = None) -> np.ndarray:
    """Images with these file names; returns them in the order of the names given."""
    folder.mkdir(parents=True)
    images = pictures(len(names), seed=3, size=SIZE)
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / name)
    if captions is not None:
        (folder / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return images


def test_images_are_matched_to_captions_by_file_name(tmp_path: Path) -> None:
    images = write_images(tmp_path / "x", ["lake_7.png", "airport_1.png", "road.1.png"])
    rows = table({"id": "airport/airport_1.jpg"}, {"id": "lake/lake_7.jpg"}, {"id": "road.1.tif"})
    result = drawn(PEERS["crs_diff"], tmp_path / "x", rows)
    np.testing.assert_array_equal(result, images[[1, 0, 2]])
    np.testing.assert_array_equal(drawn(PEERS["crs_diff"], tmp_path / "x", rows, numbers=[2, 0]), images[[2, 1]])


def test_images_are_matched_to_captions_by_the_lines_of_captions_txt(tmp_path: Path) -> None:
    """In the layout of sample_grid.py of rsdiff: numbered files, a contact sheet, and equal captions side by side."""
    lines = ["a lake", "a road .", "a lake", "an airport"]
    images = write_images(
        tmp_path / "x", ["0000_a_lake.png", "0001_a_road.png", "0002_a_lake.png", "0003_b.png"], lines
    )
    Image.fromarray(images[0]).save(tmp_path / "x" / "_grid.png")
    peer, rows = PEERS["rsdiff"], table(*({"id": f"{n}.jpg"} for n in "abc"))
    peer.check(tmp_path / "x")
    loaded = peer.load(tmp_path / "x")
    captions = ["a lake", "a road . ", "a lake"]
    result = peer.draw(loaded, captions, rows, np.arange(3), SIZE, **OPTIONS)
    np.testing.assert_array_equal(result, images[[0, 1, 2]])
    last = peer.draw(loaded, captions, rows, np.array([2]), SIZE, **OPTIONS)
    np.testing.assert_array_equal(last, images[[2]])  # for every process that draws it
    with pytest.raises(
        UserError,
        match=r"has no image for the caption of b\.jpg: generate an image for every caption of the split with rs",
    ):
        peer.draw(loaded, ["a lake", "a hill", "a lake"], rows, np.arange(1), SIZE, **OPTIONS)
    with pytest.raises(UserError, match=r"for the caption of c\.jpg"):
        peer.draw(loaded, ["an airport", "a lake", "an airport"], rows, np.arange(1), SIZE, **OPTIONS)


@pytest.mark.parametrize("file", ["last.ckpt", "model.pt", "model.safetensors", "a.bin"])
@pytest.mark.parametrize(("name", "reason"), [("crs_diff", "local adapter"), ("rsdiff", "imagen-pytorch")])
def test_unsupported_weights_are_refused_with_an_alternative(tmp_path: Path, name: str, reason: str, file: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    for place in (tmp_path, tmp_path / file):
        with pytest.raises(UserError, match=rf"{file} is not read, because .*{reason}.*own code") as error:
            PEERS[name].check(place)
        assert "\n" not in str(error.value)


def test_folders_without_images_or_with_too_few_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no images: generate an image for every caption"):
        PEERS["rsdiff"].check(tmp_path)
    write_images(tmp_path / "x", ["a.png", "b.png"], ["one line"])
    with pytest.raises(UserError, match=r"captions.txt has 1 lines for 2 images"):
        PEERS["rsdiff"].check(tmp_path / "x")
    (tmp_path / "x" / "captions.txt").unlink()
    (tmp_path / "x" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(UserError, match=r"a.png cannot be read .*: generate it again"):
        drawn(PEERS["rsdiff"], tmp_path / "x", table({"id": "a.jpg"}))


# ---------------------------------------------------------------- measuring


def held_out(rows: pd.DataFrame, side: int = 8) -> HeldOut:
    corpus = SimpleNamespace(manifest=rows, fingerprint="f", resolution=side, images=pictures(len(rows), size=side))
    order = np.arange(len(rows))[::-1].copy()
    return HeldOut("natural", corpus, order, {}, [f"caption {number}" for number in order])


def test_images_are_drawn_with_the_metadata_of_their_row_and_resized(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = table(*({"lon": float(lon)} for lon in (-150, 0, 150)))
    held, peer, options = held_out(rows, SIZE), PEERS["diffusionsat"], {**OPTIONS, "label": ""}
    model = PeerModel(peer, folders["diffusionsat"], SIZE)
    images = np.load(draw_images(model, held, Sampling(2, 1.5, 7), tmp_path) / IMAGES)
    loaded = load(peer, model.folder)
    expected, wrong = (
        peer.draw(loaded, held.captions, rows.iloc[order], np.arange(3), SIZE, **options)
        for order in ([2, 1, 0], [0, 1, 2])
    )
    np.testing.assert_array_equal(images, expected)
    assert (images != wrong).any()
    small = replace(model, side=8).draw(loaded, held.captions, rows, np.arange(3), **options)
    assert small.shape == (3, 8, 8, 3) and small.dtype == np.uint8
    whole = peer.draw(loaded, held.captions, rows, np.arange(3), 8, **options)  # metres per pixel refer to 8 px
    assert np.abs(whole.reshape(3, 8, 2, 8, 2, 3).mean((2, 4)) - small).max() <= 1


def test_the_fingerprint_includes_exactly_the_inputs_of_an_image(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeerModel, "load", lambda self: None)
    monkeypatch.setattr(PeerModel, "draw", lambda self, *_, **__: np.zeros((2, 8, 8, 3), np.uint8))
    folder = shutil.copytree(folders["diffusionsat"], tmp_path / "x")
    rows, sampling = table({}, {"lon": 20.0}), Sampling(1, 1.0, 7)
    peer = PEERS["diffusionsat"]

    def place(rows: pd.DataFrame = rows, peer: Peer = peer, side: int = 8, sampling: Sampling = sampling) -> Path:
        return draw_images(PeerModel(peer, folder, side), held_out(rows, side), sampling, tmp_path / "runs")

    first = place()
    assert place(table({"elevation": 3.0}, {"lon": 20.0})) == first  # it gets no elevation
    assert place(peer=DiffusionSat("diffusionsat", SIZE, scheduler="DDIMScheduler", batch_size=1)) == first
    (folder / "README.md").write_text("a card")
    assert place() == first
    others = [
        place(table({"lon": 11.0}, {"lon": 20.0})),
        place(peer=DiffusionSat("diffusionsat", 2 * SIZE, scheduler="DDIMScheduler")),
        place(peer=DiffusionSat("diffusionsat", SIZE)),
        place(side=16),
        place(sampling=Sampling(2, 1.0, 7)),
    ]
    save_file(satellite_weights(seed=11), folder / UNET_FILE)
    assert len({first, *others, place()}) == len(others) + 2


def test_identical_held_out_sets_are_measured_once(capsys: pytest.CaptureFixture) -> None:
    one, same, other = (SimpleNamespace(rows=np.array(rows)) for rows in ([0, 1, 2], [2, 0, 1], [0, 1, 3]))
    assert distinct_sets({"balanced": one, "natural": same}) == {"natural": same}
    assert distinct_sets({"balanced": one, "natural": other}) == {"balanced": one, "natural": other}
    assert (
        "both held-out sets contain the same images: only the natural set is generated and measured"
        in capsys.readouterr().err
    )


def test_peers_are_measured_like_any_other_model(folders: dict[str, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    overrides = ("encoder@evaluation_encoder=efficientnet_lite0", "evaluation_encoder.input_size=32", "eval.images=8")
    sampling = ("peer=georssd", f"peer.resolution={SIZE}", "peer.steps=2", "peer.guidance_scale=1.5")
    cfg = tiny_config(tmp_path, *overrides, *sampling, f"of={folders['georssd']}")
    directory = measure_any(cfg)
    metrics = read_json(directory / "metrics.json")
    assert {"balanced_fd_efficientnet_lite0", "natural_kid_x1000_efficientnet_lite0"} <= set(metrics)
    assert {"natural_classification_accuracy_efficientnet_lite0", "natural_clip_vit_l14"} <= set(metrics)
    metadata = read_json(directory / PEER)
    assert (metadata["peer"], metadata["drawn_px"], metadata["measured_px"]) == ("georssd", SIZE, SIZE)
    assert (metadata["steps"], metadata["images"]) == (2, {"balanced": 8, "natural": 8})
    assert (
        f"georssd generates images of {SIZE} px; they are measured at the corpus's {SIZE} px" in capsys.readouterr().err
    )
    monkeypatch.setattr(GeoRSSD, "load", lambda *_: pytest.fail("drawn again"))
    assert measure_any(cfg) == directory
    # the same pipeline, measured without a name, gives the same images
    cfg.peer, cfg.eval.steps, cfg.eval.guidance_scale = {"name": None}, 2, 1.5
    same = read_json(measure_any(cfg) / "metrics.json")
    shared = [name for name in metrics if metrics[name] is not None]
    assert {name: same[name] for name in shared} == pytest.approx({name: metrics[name] for name in shared}, rel=1e-3)


def rsicd(folder: Path) -> Path:
    """The data set in its published form, Karpathy's splits and a flat folder, converted by the script of the docs."""
    entries = []
    (folder / "RSICD_images").mkdir(parents=True)
    for number, image in enumerate(pictures(40, seed=8, size=24)):
        name = f"{('airport', 'beach')[number % 2]}_{number}.jpg" if number < 36 else f"{number:05d}.jpg"
        Image.fromarray(image).save(folder / "RSICD_images" / name)
        sentences = [{"raw": f"{text} caption of {number}"} for text in ("first", "second", "third")]
        entries.append({"filename": name, "split": "test" if number >= 20 else "train", "sentences": sentences})
    write_json(folder / "dataset_rsicd.json", {"dataset": "rsicd", "images": entries})
    [script] = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "comparison.md").read_text(), re.M | re.S)
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, check=True)
    return folder / "rsicd"


def test_the_rsicd_protocol_uses_the_test_split_and_first_captions(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    seen = {}

    def spy(sets: dict[str, HeldOut]) -> dict[str, HeldOut]:
        seen.update(distinct_sets(sets))
        return seen

    monkeypatch.setattr("eval.measuring_any.distinct_sets", spy)
    tiny_config(tmp_path)  # writes a CLIP model
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", [
            "experiment=rsicd", f"corpus.root={rsicd(tmp_path / 'set')}", "eval.images=20", "corpus.workers=0",
            "corpus.train.resolution=16", "encoder@evaluation_encoder=efficientnet_lite0",
            "evaluation_encoder.input_size=32", "encoder.input_size=32", f"text_encoder.path={tmp_path}/clip",
            "peer=text2earth", f"peer.resolution={SIZE}",
            "peer.steps=1", f"of={folders['text2earth']}", f"runs={tmp_path}/runs", "tracker=none",
        ])  # fmt: skip
    metrics = read_json(measure_any(cfg) / "metrics.json")
    [(name, held)] = seen.items()
    numbers = sorted(int(caption.rpartition(" ")[2]) for caption in held.captions)
    assert name == "natural" and numbers == list(range(20, 40))
    assert all(caption.startswith("first ") for caption in held.captions)
    assert set(held.scenes) == {"airport", "beach", ""}
    requested = {
        "natural_fd_efficientnet_lite0",
        "natural_clip_vit_l14",
        "natural_classification_accuracy_efficientnet_lite0",
    }
    assert all(isinstance(metrics[name], float) for name in requested)


def test_the_rsicd_protocol_sets_split_resolution_and_networks() -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", ["experiment=rsicd", "corpus.root=DIR"])
    assert (cfg.eval.split, cfg.eval.images, cfg.corpus.test.resolution) == ("test", 1093, 256)
    assert (
        cfg.evaluation_encoder._target_ == "encoders.inception.InceptionV3" and cfg.text_encoder.score_name == "vit_l14"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_peer_config_instantiates_and_is_listed_in_the_documentation(name: str) -> None:
    files = {path.stem for path in (CONFIGS / "peer").glob("*.yaml")}
    assert files == {"none", *NAMES}
    peer = instantiate(OmegaConf.load(CONFIGS / "peer" / f"{name}.yaml"))
    assert isinstance(peer, Peer) and peer.name == name and peer.resolution % 8 == 0
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert f"peer={name} " in page and "not measured here" in page


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["peer=diffusionsat", "of=nowhere"],
            "error: of=nowhere does not exist: give the folder of the peer's",
        ),
        (["peer=crs_diff", "of=x"], "last.ckpt is not read, because its local adapter"),
        (["peer=georssd", "of=x"], "error: of=x has no model_index.json: give the folder of georssd's pipeline"),
        (["peer=georssd"], "error: nothing to measure: give of=DIR"),
        (["peer=none", "of=nowhere"], "error: of=nowhere is not a folder"),
    ],
)
def test_the_command_ends_with_a_one_line_error_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], line: str
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "last.ckpt").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["measure.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        run(command.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and line in error and len(error.splitlines()) == 1


def test_images_with_labels_do_not_depend_on_the_batch_size(folders: dict[str, Path]) -> None:
    """Images of one batch equal those of batches of one: every image gets its own label."""
    rows = table(*({"ground_sampling_distance": 2.0**power} for power in range(4)))
    images = drawn(PEERS["text2earth"], folders["text2earth"], rows)
    loaded = load(PEERS["text2earth"], folders["text2earth"])
    single = drawn(replace(PEERS["text2earth"], batch_size=1), folders["text2earth"], rows, loaded=loaded)
    np.testing.assert_allclose(single.astype(float), images, atol=1)
    assert isinstance(loaded, LabelledPipeline)
    assert weights_of(folders["text2earth"] / "unet").name == "diffusion_pytorch_model.safetensors"
