"""Drawing from a foundation model: seeds, metadata, both kinds of pipeline, the command, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import Mock

import gradio_client
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tiny_networks import CHANNELS, SIZE, tiny_autoencoder, tiny_text_encoder, tiny_unet

from downstream.any_size import TileOptions, agreeing, synthesized, upscaled, whole
from downstream.drawing import load_restorer, load_synthesizer
from downstream.imagery import Picture
from downstream.restoration import Restoration
from downstream.tasks.semantic_synthesis import guidance_of
from eval.generate import starting_noise
from report.figures import GAP
from runtime.artefacts import read_json, write_json
from runtime.errors import UserError
from scripts.sample import hydra_arguments, main
from train.metadata import FOLDER, MetadataField, new_encoder
from train.sampler import load_pipeline, load_sampler

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 8  # width of the tiny text encoder
SETTINGS = {"seed": 3, "steps": 2, "guidance_scale": 1.5}
PALETTE = {"ocean": [10, 30, 80], "desert": [160, 130, 100], "ice": [250, 250, 250]}


def build(folder: Path, kind: type[DiffusionPipeline], fields: Sequence[str] = ()) -> Path:
    """A tiny random pipeline in `folder/pipeline`, with a metadata encoder if there are fields; returns `folder`."""
    text_encoder, tokenizer = tiny_text_encoder()
    autoencoder = tiny_autoencoder(scaling_factor=1.0)
    with torch.no_grad():  # images of a random decoder hardly differ
        autoencoder.decoder.layers[-1].weight.mul_(20)
    parts = {
        "vae": autoencoder,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }
    if kind is PixArtAlphaPipeline:
        torch.manual_seed(5)
        network = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=1,
            cross_attention_dim=16, caption_channels=WIDTH, sample_size=SIZE // 8, patch_size=1,
            use_additional_conditions=False,
        )  # fmt: skip
        pipeline = PixArtAlphaPipeline(transformer=network.eval(), **parts)
    else:
        network = tiny_unet(condition_channels=CHANNELS if kind is StableDiffusionInstructPix2PixPipeline else 0)
        with torch.no_grad():  # so that the effects of text and metadata are visible
            for name, weights in network.named_parameters():
                if "attn2" in name:
                    weights.mul_(8)
        pipeline = kind(
            unet=network, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder / "pipeline")
    if fields:
        encoder = new_encoder({name: MetadataField(-180, 180) for name in fields}, WIDTH, seed=0)
        encoder.save(folder / "pipeline" / FOLDER)
    return folder


def config(*overrides: str) -> DictConfig:
    """The configuration of a command with these options."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain"), StableDiffusionPipeline)


@pytest.fixture(scope="module")
def placed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("placed"), StableDiffusionPipeline, ("lon", "lat"))


@pytest.fixture(scope="module")
def transformer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("transformer"), PixArtAlphaPipeline)


@pytest.fixture(scope="module")
def translation_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image-conditioned run with a palette, in the format of a downstream task."""
    folder = build(tmp_path_factory.mktemp("translation"), StableDiffusionInstructPix2PixPipeline)
    write_json(folder / "palette.json", PALETTE)
    write_json(folder / "stage.json", {"inputs": {"condition": {"factor": 2}}})
    return folder


# ---------------------------------------------------------------- the sampler


@pytest.mark.parametrize("name", ["plain_run", "transformer_run"])
def test_images_depend_on_the_seed_but_not_on_the_number_of_images(name: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(name)
    sampler = load_sampler(run, batch_size=4)
    images = sampler.draw("a desert", 9, **SETTINGS)
    assert images.shape == (9, SIZE, SIZE, 3) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 9
    for count in (1, 4, 5):
        assert (sampler.draw("a desert", count, **SETTINGS) == images[:count]).all()
    again = load_sampler(run / "pipeline", batch_size=4)  # the pipeline's own folder is accepted too
    assert (again.draw("a desert", 9, **SETTINGS) == images).all()
    assert (sampler.draw("a desert", 9, **{**SETTINGS, "seed": 4}) != images).any()
    if name == "plain_run":
        assert (sampler.draw("ice", 9, **SETTINGS) != images).any()


def test_sampling_without_metadata_equals_the_plain_pipeline(plain_run: Path, placed_run: Path) -> None:
    sampler = load_sampler(placed_run, batch_size=3)
    assert list(sampler.fields) == ["lon", "lat"]
    pipeline = DiffusionPipeline.from_pretrained(plain_run / "pipeline", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=["a desert"] * 3, latents=starting_noise(range(3), (CHANNELS, 2, 2), 3), num_inference_steps=2,
        guidance_scale=1.5, output_type="np",
    ).images  # fmt: skip
    images = sampler.draw("a desert", 3, **SETTINGS)
    assert (images == (expected * 255).round().astype(np.uint8)).all()
    assert (sampler.draw("a desert", 3, **SETTINGS, metadata={}) == images).all()


def test_metadata_changes_the_image(placed_run: Path) -> None:
    sampler = load_sampler(placed_run, batch_size=3)
    locations = ({}, {"lon": -60}, {"lon": -60, "lat": -3}, {"lat": -3, "lon": 100})
    drawn = [sampler.draw("a desert", 5, **SETTINGS, metadata=location) for location in locations]
    assert len({images.tobytes() for images in drawn}) == len(locations)
    assert (sampler.draw("a desert", 2, **SETTINGS, metadata={"lat": "-3", "lon": -60.0}) == drawn[2][:2]).all()


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("plain_run", {"lon": 1}, "has no metadata_encoder"),
        ("transformer_run", {"lon": 1}, "has no metadata_encoder"),
        ("placed_run", {"lon": 1, "snow": 2}, "has no field snow: its fields are lon, lat"),
        ("placed_run", {"lon": "east"}, "metadata lon=east: give a number"),
        ("placed_run", {"lon": float("nan")}, "metadata lon=nan: give a number"),
        ("placed_run", {"lat": [1, 2]}, "give a number"),
    ],
)
def test_unknown_metadata_is_refused(name: str, metadata: dict, message: str, request: pytest.FixtureRequest) -> None:
    sampler = load_sampler(request.getfixturevalue(name))
    with pytest.raises(UserError, match=re.escape(message)):
        sampler.draw("a desert", 1, **SETTINGS, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty"), ({"count": 0}, "images=0"), ({"count": 1.0}, "images=1.0"),
        ({"seed": -1}, "seed=-1"), ({"seed": None}, "seed=None"), ({"steps": True}, "steps=True"),
        ({"guidance_scale": "strong"}, "guidance_scale=strong"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"), ({"guidance_scale": -1}, "guidance_scale=-1"),
    ],
)  # fmt: skip
def test_invalid_sampling_settings_are_refused(plain_run: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_sampler(plain_run).draw(**{"prompt": "a desert", "count": 1, **SETTINGS, **change})


def broken(run: Path, target: Path, change: str) -> Path:
    """A copy of a run with one fault."""
    shutil.copytree(run, target)
    pipeline = target / "pipeline"
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    if change == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif change == "pickled":
        weights.rename(weights.with_suffix(".bin"))
    elif change == "part":
        shutil.rmtree(pipeline / "vae")
    elif change == "index":
        (pipeline / "model_index.json").write_text("{")
    elif change == "code":
        metadata = read_json(pipeline / "model_index.json")
        write_json(pipeline / "model_index.json", {**metadata, "unet": ["evil", "Network"]})
    else:
        (pipeline / FOLDER / "config.json").write_text('{"width": 8, "fields": {"lon": {}}}')
    return target


@pytest.mark.parametrize("change", ["cut", "pickled", "part", "index", "code", "encoder"])
def test_broken_pipelines_give_a_one_line_error(placed_run: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(UserError, match="does not load: ") as error:
        load_sampler(broken(placed_run, tmp_path / change, change))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_missing_pipelines_and_those_of_other_classes_are_refused(
    translation_run: Path, plain_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is a StableDiffusionInstructPix2PixPipeline: give a StableDiffusionPipeline"):
        load_sampler(translation_run)
    with pytest.raises(UserError, match=r"demo\.x=.* is a StableDiffusionPipeline"):
        load_pipeline(plain_run, "demo.x", ("StableDiffusionInstructPix2PixPipeline",))
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="contains no pipeline"):
            load_sampler(folder)


# ---------------------------------------------------------------- the command

Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """scripts/sample.py as a command, in forks of a process that has already imported the libraries."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "forkserver.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment, text=True,
    )  # fmt: skip
    output = tmp_path_factory.mktemp("output")

    def run(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
        request = {
            "script": str(ROOT / "scripts" / "sample.py"), "arguments": arguments, "cwd": str(cwd),
            "environment": environment, "stdout": str(output / "stdout"), "stderr": str(output / "stderr"),
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(
            arguments, code, (output / "stdout").read_text(), (output / "stderr").read_text()
        )

    yield run
    server.stdin.close()
    server.wait()


def drawn(call: Command, cwd: Path, *arguments: str) -> Path:
    """The directory that the command prints after success."""
    done = call(cwd, "sample.steps=2", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    kind, _, directory = done.stdout.strip().splitlines()[-1].partition(": ")
    assert kind == "samples"
    assert not list(cwd.rglob("*.partial"))
    return cwd / directory


def pixels(folder: Path) -> np.ndarray:
    """The single images of a sample directory, uint8 [N, H, W, 3]."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))])


@pytest.mark.slow
def test_the_command_writes_images_a_sheet_and_metadata(call: Command, placed_run: Path, tmp_path: Path) -> None:
    given = (f"foundation={placed_run}", "prompt=a coast, desert (and it's) ocean", "seed=7")
    folder = drawn(call, tmp_path, *given, "images=3")
    assert folder.parent == tmp_path / "results" / "samples"
    images = pixels(folder)
    metadata = read_json(folder / "samples.json")
    assert (metadata["seed"], metadata["steps"], metadata["pipeline"]) == (7, 2, "StableDiffusionPipeline")
    assert [(image["file"], image["number"]) for image in metadata["images"]] == [(f"000{i}.png", i) for i in range(3)]
    assert {image["prompt"] for image in metadata["images"]} == {"a coast, desert (and it's) ocean"}
    assert images.shape == (3, SIZE, SIZE, 3)
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    for number, image in enumerate(images):
        left = GAP + number * (128 + GAP)
        assert (sheet[GAP : GAP + 128 : 8, left : left + 128 : 8] == image).all()

    again = drawn(call, tmp_path, *given, "images=3", "sample.out=elsewhere/samples")
    assert again == tmp_path / "elsewhere" / "samples"
    for path in folder.glob("*.png"):
        assert (again / path.name).read_bytes() == path.read_bytes()
    before = (folder / "samples.json").stat().st_mtime_ns
    assert drawn(call, tmp_path, *given, "images=3") == folder  # cached, not drawn again
    assert (folder / "samples.json").stat().st_mtime_ns == before
    fewer = drawn(call, tmp_path, *given, "images=1")
    assert fewer != folder and (pixels(fewer) == images[:1]).all()


@pytest.mark.slow
def test_every_location_and_prompt_gets_a_row_with_the_same_noise(
    call: Command, placed_run: Path, tmp_path: Path
) -> None:
    locations = "sample.locations=[{name:Amazon,lon:-60,lat:-3},{lon:10}]"
    folder = drawn(call, tmp_path, f"foundation={placed_run}", 'prompt=["a, b", ice]', "images=2", locations)
    listed = read_json(folder / "samples.json")["images"]
    assert [image["prompt"] for image in listed] == ["a, b"] * 4 + ["ice"] * 4
    assert [image["place"] for image in listed] == (["Amazon"] * 2 + ["lon 10"] * 2) * 2
    assert listed[0]["metadata"] == {"lon": -60, "lat": -3} and listed[2]["metadata"] == {"lon": 10}
    one = drawn(
        call, tmp_path, f"foundation={placed_run}", "prompt=ice", "images=1", "sample.metadata.lon=-60",
        "sample.metadata.lat=-3",
    )  # fmt: skip
    assert (pixels(one)[0] == pixels(folder)[4]).all()
    same = drawn(
        call, tmp_path, f"foundation={placed_run}", "prompt=ice", "images=1", "sample.metadata={lat:-3,lon:-60}"
    )
    assert (pixels(same) == pixels(one)).all()
    wide, high = Image.open(folder / "sheet.png").size
    assert wide > 2 * (128 + GAP) and high > 4 * (128 + GAP)


@pytest.mark.slow
def test_the_command_gives_one_line_errors(call: Command, plain_run: Path, tmp_path: Path) -> None:
    cases = [
        (["prompt=ice", f"foundation={tmp_path}"], "contains no pipeline"),
        ([f"foundation={plain_run}", "prompt="], "the prompt is empty"),
        ([f"foundation={plain_run}", "prompt=ice", "sample.metadata.lon=1"], "has no metadata_encoder"),
    ]
    for arguments, message in cases:
        done = call(tmp_path, *arguments)
        assert done.returncode == 2 and not done.stdout, (arguments, done.stderr)
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
        assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_interrupted_command_leaves_no_partial_samples(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config("prompt=ice", f"foundation={plain_run}", "images=2", "sample.steps=2", f"sample.out={tmp_path}/out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("scripts.sample.sheet_of", Mock(side_effect=KeyboardInterrupt))
        main(cfg)
    assert not list(tmp_path.iterdir())
    main(cfg)
    assert capsys.readouterr().out == f"samples: {tmp_path}/out\n"
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["0000.png", "0001.png", "samples.json", "sheet.png"]


def test_bad_options_are_refused_before_anything_is_drawn(
    plain_run: Path, placed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs.txt").write_text("keep")
    cases = [
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": ["ice", " "]}, "the prompt is empty"),
        ({"images": "none"}, "images=none: give a whole number"),
        ({"sample.batch_size": 0}, "batch_size=0"),
        ({"foundation": "scratch"}, "contains no pipeline"),
        ({"foundation": str(plain_run), "sample.locations": [{"lon": 1}]}, "has no metadata_encoder"),
        ({"sample.metadata": {"snow": 1}}, "has no field snow"),
        ({"sample.metadata": 7}, "sample.metadata=7: give a number for each field"),
        ({"sample.locations": ["Amazon"]}, "give a list of locations"),
        ({"sample.locations": [{"lon": 1}, {"name": "Amazon", "lon": "x"}]}, "metadata lon=x: give a number"),
        ({"sample.out": "full"}, "is not empty"),
    ]
    cfg = config("prompt=ice", f"foundation={placed_run}")
    for changes, message in cases:
        changed = cfg.copy()
        for key, value in changes.items():
            OmegaConf.update(changed, key, value)
        with pytest.raises(UserError, match=message) as error:
            main(changed)
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "theirs.txt"]


@pytest.mark.parametrize("text", ["a, b", "it's", "x\\", "x\\'y", "(a) {b} [c]: d = 'e' \"f\"", "é", "two\nlines"])
def test_any_prompt_is_passed_to_hydra_unchanged(text: str) -> None:
    (argument,) = hydra_arguments([f"prompt={text}"])
    assert OverridesParser.create().parse_override(argument).value() == text


def test_other_arguments_are_unchanged_and_metadata_fields_are_added() -> None:
    arguments = ["prompt=[a,b]", "prompt='a'", "prompt=", "prompt=null", "seed=1", "sample.metadata={lon:1}"]
    assert hydra_arguments(arguments) == arguments
    assert hydra_arguments(["-m", "prompt=a,b"]) == ["-m", "prompt=a,b"]
    assert hydra_arguments(["sample.metadata.lon=1"]) == ["++sample.metadata.lon=1"]


# ---------------------------------------------------------------- the page


def start_demo(cwd: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "demo.py"), *arguments], cwd=cwd, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(cwd / "gradio")}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def demo(placed_run: Path, translation_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running page with all its tabs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_demo(
        tmp_path_factory.mktemp("demo"), f"foundation={placed_run}", f"demo.port={port}", "sample.batch_size=4",
        f"demo.super_resolution={translation_run}", f"demo.semantic_synthesis={translation_run}",
    )  # fmt: skip
    try:
        line = server.stdout.readline()
        assert line == f"demo: http://127.0.0.1:{port}/\n", line + (server.stderr.read() if server.poll() else "")
        yield line.split()[1]
    finally:
        server.terminate()
        server.communicate(timeout=30)


@pytest.fixture(scope="module")
def client(demo: str, tmp_path_factory: pytest.TempPathFactory):
    """A client program for the page."""
    folder = str(tmp_path_factory.mktemp("downloads"))
    return gradio_client.Client(demo, verbose=False, download_files=folder, analytics_enabled=False)


@pytest.mark.slow
def test_the_page_is_served_and_loads_nothing_from_other_hosts(demo: str) -> None:
    with urllib.request.urlopen(demo, timeout=30) as answer:
        page = answer.read().decode()
    assert answer.status == 200 and '"title":"RS-Prune"' in page
    fetched = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(https?:[^"')\s>]+)""", page)
    assert [address for address in fetched if "127.0.0.1" not in address] == []


@pytest.mark.slow
def test_the_page_draws_the_same_images_as_the_sampler(client, placed_run: Path) -> None:
    sampler = load_sampler(placed_run, batch_size=4)
    for place, metadata in (((False, 5, 5), {}), ((True, -60, -3), {"lon": -60, "lat": -3})):
        gallery = client.predict("a desert", 2, 3, 2, 1.5, *place, api_name="/draw")
        images = np.stack([np.asarray(Image.open(item["image"]).convert("RGB")) for item in gallery])
        assert (images == sampler.draw("a desert", 2, **SETTINGS, metadata=metadata)).all()


@pytest.mark.slow
def test_the_page_shows_user_errors_in_one_line(client) -> None:
    with pytest.raises(Exception, match=r"^the prompt is empty: [^\n]*$"):
        client.predict(" ", 1, 0, 2, 1.5, False, 0, 0, api_name="/draw")
    with pytest.raises(Exception, match="no picture"):
        client.predict(None, 0, 2, 0.5, api_name="/enlarge")


@pytest.mark.slow
def test_the_page_enlarges_pictures_and_draws_from_masks(client, translation_run: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    file = gradio_client.handle_file(str(tmp_path / "picture.png"))
    options = Restoration(0.3, 1, 4, residual=True, consistency=3, kind="area", relative=True)
    restorer = load_restorer(translation_run, "run", steps=2, factor=4, options=options)
    bicubic, output = client.predict(file, 3, 2, 0.3, api_name="/enlarge")
    assert (
        np.asarray(Image.open(bicubic)) == Image.fromarray(picture).resize((80, 48), Image.Resampling.BICUBIC)
    ).all()
    expected = whole(upscaled(Picture(picture), restorer, TileOptions(0.25, 32, 3), **agreeing(restorer)))
    assert (np.asarray(Image.open(output).convert("RGB")) == expected).all()

    mask = {"background": file, "layers": [], "composite": file}
    used, output = client.predict(mask, "a desert", 3, 2, 30, api_name="/from_mask")
    colours = np.asarray(Image.open(used).convert("RGB")).tolist()
    known = list(PALETTE.values())
    classes = np.array([[known.index(colour) for colour in row] for row in colours], np.uint8)
    assert classes.shape == (18, 30)
    guidance = guidance_of(config())
    synthesizer = load_synthesizer(translation_run, "run", steps=2, prompt="a desert", guidance=guidance)
    expected = whole(synthesized(Picture(classes), synthesizer, TileOptions(0.5, 32, 3)))
    assert (np.asarray(Image.open(output).convert("RGB")) == expected).all()


@pytest.mark.slow
def test_the_page_renders_in_a_browser_without_a_network(demo: str, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=20000", "--dump-dom",
            demo,
        ],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    page = done.stdout
    assert re.search(r"<h1[^>]*>\s*RS-Prune\s*</h1>", page) and "<textarea" in page
    assert re.search(r"<button[^>]*>\s*(<!--.*?-->)?\s*Draw", page)
    for text in ("Prompt", "Use location", "Longitude", "Super-resolution", "Mask → image"):
        assert text in page, text


@pytest.mark.slow
def test_the_page_hides_unsupported_inputs_and_names_commands_for_missing_runs(
    plain_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.demo import page

    monkeypatch.setattr("scripts.demo.shipped_network", lambda *_: None)
    blocks = page(config(f"foundation={plain_run}"))
    props = [block.get("props", {}) for block in blocks.get_config_file()["components"]]
    labels, texts = {own.get("label") for own in props}, "".join(str(own.get("value")) for own in props)
    assert {"Prompt", "Images", "Seed", "Steps", "Guidance", "Text → image"} <= labels
    assert not {"Longitude", "Use location", "Bicubic", "Mask"} & labels and "no input for locations" in texts
    for name in ("super_resolution", "semantic_synthesis"):
        assert f"downstream/{name}.py" in texts and f"make demo {name.upper()}=DIR" in texts


@pytest.mark.slow
def test_the_demo_gives_errors_for_a_taken_port_and_unsuitable_options(
    plain_run: Path, translation_run: Path, tmp_path: Path
) -> None:
    from scripts.demo import main, page

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = start_demo(tmp_path, f"foundation={plain_run}", f"demo.port={port}")
        output, error = server.communicate(timeout=300)
    assert server.returncode == 2 and not output, error
    assert error.startswith("error: ") and len(error.splitlines()) == 1, error
    assert f"demo.port={port}: cannot listen there" in error

    bare = tmp_path / "bare"
    shutil.copytree(translation_run, bare)
    (bare / "palette.json").unlink()
    plain = f"foundation={plain_run}"
    for call, overrides, message in (
        (main, [plain, "demo.port=http"], "demo.port=http: give a whole number"),
        (page, [plain, f"demo.super_resolution={plain_run}"], "demo.super_resolution="),
        (page, [plain, f"demo.semantic_synthesis={bare}"], "has no palette.json"),
    ):
        with pytest.raises(UserError, match=message):
            call(config(*overrides))


def test_the_progress_bar_counts_network_calls() -> None:
    from scripts.demo import counted

    network, shown = torch.nn.Linear(2, 2), []
    with counted(network, 3, lambda step, unit: shown.append(step)):
        for _ in range(4):
            network(torch.zeros(1, 2))
    network(torch.zeros(1, 2))
    assert shown == [(0, 3), (1, 3), (2, 3), (3, 3), (3, 3)]


def test_the_page_accepts_pictures_and_masks_of_any_shape() -> None:
    from scripts.demo import painted_classes, reduced

    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    small = np.asarray(reduced(Image.fromarray(picture), 12))
    assert np.abs(small - picture.reshape(8, 4, 12, 4, 3).mean(axis=(1, 3))).max() <= 1
    assert (np.asarray(reduced(Image.fromarray(picture), 48)) == picture).all()

    palette = np.array(list(PALETTE.values()), dtype=np.uint8)
    classes = np.random.default_rng(1).integers(0, 3, (12, 16)).astype(np.uint8)
    painted = Image.fromarray(palette[classes])
    assert (painted_classes(painted, 16, palette) == classes).all()
    large = painted.resize((64, 48), Image.Resampling.NEAREST)
    assert (painted_classes(large, 16, palette) == classes).all()
    assert (painted_classes(painted, 64, palette) == classes.repeat(4, axis=0).repeat(4, axis=1)).all()
    assert (painted_classes(Image.fromarray(classes), 16, palette) == classes).all()
    bare = painted.convert("RGBA")
    bare.putalpha(0)
    assert (painted_classes(bare, 16, palette) == 0).all()
