"""The `paper` profile offline; its downloads are replaced by small random networks of the same classes."""

from __future__ import annotations

import hashlib
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from cleanfid import fid
from cleanfid.resize import build_resizer
from diffusers import AutoencoderKL, DiffusionPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from encoders.hub import TransformersEncoder
from encoders.inception import INCEPTION_FILE, InceptionV3
from encoders.pixels import to_tensor
from eval.convergence import CONVERGENCE
from eval.generate import generate
from eval.measuring import compare, encoders_of, evaluation_sets
from prune.selection import select
from runtime.artefacts import plain, read_json
from runtime.errors import UserError
from train.components import load_autoencoder, load_text_parts
from train.foundation import pretrain, run_directory
from train.latents import encode
from train.networks import diffusion_loss, new_unet, text_to_image_pipeline
from train.objective import Objective
from train.text_encoder import clip_tokenizer, encode_prompts

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
GROUPS = [
    next(iter(entry))
    for entry in yaml.safe_load((CONFIGS / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    if isinstance(entry, dict) and not next(iter(entry)).startswith("override")
]
CHOICES = [f"{group}={file.stem}" for group in GROUPS for file in sorted((CONFIGS / group).glob("*.yaml"))]
SMALL_UNET = [
    "model.unet.block_out_channels=[32,32,32,32]", "model.unet.layers_per_block=1",
    "model.unet.attention_head_dim=4", "model.unet.norm_num_groups=8",
]  # fmt: skip
CLIP_SIDE, DINO_SIDE = 32, 28


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def pictures(count: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """Folders vae, clip and dino: small random replacements of the hub's files."""
    folder = tmp_path_factory.mktemp("networks")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4,
        ).save_pretrained(folder / "vae")  # fmt: skip
        shared = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {**shared, "vocab_size": 49408, "max_position_embeddings": 16, "bos_token_id": 49406,
                "eos_token_id": 49407, "pad_token_id": 49407}  # fmt: skip
        vision = {**shared, "image_size": CLIP_SIDE, "patch_size": 16}
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(
            folder / "clip"
        )
        clip_tokenizer(16).save_pretrained(folder / "clip")
        CLIPImageProcessor().save_pretrained(folder / "clip")
        Dinov2Model(Dinov2Config(**shared, image_size=56, patch_size=14)).save_pretrained(folder / "dino")
        BitImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]).save_pretrained(
            folder / "dino"
        )
    return folder


def small_paper(networks: Path, *overrides: str) -> DictConfig:
    """The profile with all paths set to small networks."""
    return config(
        "profile=paper", f"autoencoder.path={networks}/vae", f"text_encoder.path={networks}/clip",
        f"encoder.path={networks}/dino", f"encoder.input_size={DINO_SIDE}", *SMALL_UNET, *overrides,
    )  # fmt: skip


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("choice", CHOICES)
def test_every_configuration_choice_composes(choice: str) -> None:
    cfg = config(choice)
    OmegaConf.resolve(cfg)
    assert plain(cfg)


def test_the_paper_profile_sets_its_networks_and_resolutions() -> None:
    cfg = config("profile=paper", "corpus.root=DIR")
    assert cfg.profile.name == "paper"
    assert cfg.autoencoder.class_name == "AutoencoderKL" and cfg.text_encoder.kind == "pretrained"
    assert cfg.encoder._target_ == "encoders.hub.TransformersEncoder"
    assert cfg.evaluation_encoder._target_ == "encoders.inception.InceptionV3"
    assert cfg.corpus.train.resolution == cfg.corpus.val.resolution == cfg.corpus.test.resolution == 256
    assert cfg.reference.source.hub == "timm/resisc45" and cfg.reference.source.resolution == 256
    for network in (cfg.encoder, cfg.autoencoder, cfg.text_encoder):
        assert re.fullmatch("[0-9a-f]{40}", network.revision)
    without = config("profile=paper", "encoder@evaluation_encoder=efficientnet_lite0")
    assert plain(without.evaluation_encoder) == plain(config().encoder)


def test_the_evaluation_encoder_comes_before_the_selection_encoder() -> None:
    cfg = config("encoder.input_size=96")
    first, second = encoders_of(cfg)
    assert first == instantiate(cfg.evaluation_encoder) and second == instantiate(cfg.encoder)
    assert first.name != second.name
    assert len(encoders_of(config("encoder@evaluation_encoder=efficientnet_lite0"))) == 1


def test_unet_has_the_size_of_stable_diffusion() -> None:
    with torch.device("meta"):
        unet = new_unet(plain(config("profile=paper").model.unet), 4, 32, 768, seed=0)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964


@pytest.mark.parametrize(
    ("name", "kind"), [("cpu", "NO"), ("multi_gpu", "MULTI_GPU"), ("fsdp", "FSDP"), ("deepspeed", "DEEPSPEED")]
)
def test_launch_configurations_load(name: str, kind: str) -> None:
    launch = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert launch.distributed_type == kind
    assert launch.use_cpu == (name == "cpu")
    assert config("profile=paper").train.loop.batch_size % launch.num_processes == 0


# ---------------------------------------------------------------- the networks


def test_all_networks_train_and_the_saved_pipeline_draws_the_same_images(networks: Path, tmp_path: Path) -> None:
    cfg = small_paper(networks)
    autoencoder, _ = load_autoencoder(cfg)
    text = load_text_parts(cfg, None)
    images = pictures(2)
    latents = encode(autoencoder, to_tensor(images), torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 8, 8)
    prompts = encode_prompts(text.text_encoder, text.tokenizer, ["a harbour", ""])
    assert prompts.shape == (2, 16, 32)

    unet = new_unet(plain(cfg.model.unet), 4, 8, prompts.shape[-1], cfg.seed)
    objective = Objective(**cfg.train.objective)
    noise, times, _ = objective.draw(np.random.default_rng(0), latents.shape)
    loss = diffusion_loss(unet, objective, latents, prompts, noise, times)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in unet.parameters())

    pipeline = text_to_image_pipeline(
        autoencoder, text.text_encoder, text.tokenizer, unet, objective.scheduler(cfg.train.flow_shift)
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    drawn = [generate(one, ["a harbour", "a river"], steps=2, guidance_scale=2.0, seed=0) for one in (pipeline, loaded)]
    assert drawn[0].shape == (2, 64, 64, 3) and drawn[0].dtype == np.uint8
    np.testing.assert_array_equal(*drawn)


def test_text_encoder_and_scorer_load_the_same_clip_text_weights(networks: Path) -> None:
    text = load_text_parts(small_paper(networks), None)
    whole = {key.removeprefix("text_model."): value for key, value in text.scorer.model.text_model.state_dict().items()}
    half = {key.removeprefix("text_model."): value for key, value in text.text_encoder.state_dict().items()}
    assert whole.keys() == half.keys()
    for key, value in half.items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=0)


def test_clip_scores_equal_those_with_its_own_preprocessing(networks: Path) -> None:
    text = load_text_parts(small_paper(networks), None)
    images, captions = pictures(3, CLIP_SIDE), ["a harbour", "a river", "a harbour"]
    processor = CLIPImageProcessor.from_pretrained(networks / "clip", do_resize=False, do_center_crop=False)
    inputs = text.tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        output = text.scorer.model(
            input_ids=inputs.input_ids,
            pixel_values=processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values,
        )
        expected = 100 * cosine_similarity(output.image_embeds, output.text_embeds)
    score = text.scorer.scores(images, captions)
    np.testing.assert_allclose(score, expected, atol=1e-3)
    larger = text.scorer.scores(pictures(3), captions)
    assert larger.shape == (3,) and np.isfinite(larger).all()


def test_encoder_is_the_pooled_output_of_the_network(networks: Path) -> None:
    encoder = instantiate(small_paper(networks).encoder)
    assert encoder.name == "dinov2" and encoder.dimensions == 32
    images = pictures(3, DINO_SIDE)
    pixels = BitImageProcessor.from_pretrained(networks / "dino", do_resize=False, do_center_crop=False)(
        [Image.fromarray(image) for image in images], return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(networks / "dino").eval()(pixel_values=pixels).pooler_output
    result = encoder(images)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-4)
    assert encoder(pictures(2, 50)).shape == (2, 32)
    requested = to_tensor(images).requires_grad_(True)
    encoder.features(requested)[:, 0].sum().backward()
    assert requested.grad.abs().sum() > 0


def test_the_transformers_encoder_accepts_clip_networks(networks: Path) -> None:
    encoder = TransformersEncoder(name="remoteclip", path=str(networks / "clip"), input_size=CLIP_SIDE)
    assert encoder.dimensions == 24
    assert encoder(pictures(2)).shape == (2, 24)
    with pytest.raises(UserError, match=f"encoder.input_size={CLIP_SIDE}"):
        TransformersEncoder(name="remoteclip", path=str(networks / "clip"), input_size=224).network()


def test_clip_as_an_additional_evaluation_encoder_gives_clip_fid(networks: Path) -> None:
    """CLIP-FID: the Fréchet distance of CLIP's own image embeddings."""
    cfg = config(
        "+encoder@eval.encoders.clip=clip_l", f"eval.encoders.clip.path={networks}/clip",
        f"eval.encoders.clip.input_size={CLIP_SIDE}", "eval.encoders.clip.revision=null",
    )  # fmt: skip
    *others, encoder = encoders_of(cfg)
    assert [encoder.name for encoder in others] == [encoder.name for encoder in encoders_of(config())]
    published = config("encoder@evaluation_encoder=clip_l")
    assert (published.evaluation_encoder.path, published.evaluation_encoder.revision) == tuple(
        config("text_encoder=clip_hub").text_encoder[key] for key in ("path", "revision")
    )
    first, second = pictures(60, CLIP_SIDE), pictures(60, CLIP_SIDE) // 2
    model = CLIPModel.from_pretrained(networks / "clip", use_safetensors=True).eval()
    processor = CLIPImageProcessor.from_pretrained(networks / "clip", do_resize=False, do_center_crop=False)
    with torch.no_grad():
        embeddings = [
            model.get_image_features(**processor(list(images), return_tensors="pt")).pooler_output.double().numpy()
            for images in (first, second)
        ]
    result = [encoder(images) for images in (first, second)]
    np.testing.assert_allclose(result[0], embeddings[0], atol=1e-5)
    moments = [value for x in embeddings for value in (x.mean(0), np.cov(x.T))]
    held = SimpleNamespace(features={encoder.name: result[1]})
    distance = compare({encoder.name: result[0]}, held)["fd_clip_vit_l14"]
    assert distance == pytest.approx(float(fid.frechet_distance(*moments)), rel=1e-3)


def test_profile_prunes_with_one_encoder_and_measures_with_another(networks: Path, tmp_path: Path) -> None:
    """The complete pretraining stage of the profile on a small folder; only FID's network is replaced."""
    root = tmp_path / "images"
    for scene in ("Harbour", "River"):
        for split in ("train", "val", "test"):
            (root / split / scene).mkdir(parents=True)
            for index, image in enumerate(pictures(12, 64)):
                Image.fromarray(image // (2 if scene == "River" else 1)).save(root / split / scene / f"{index}.png")
    cfg = small_paper(
        networks, f"corpus.root={root}", "corpus.train.resolution=64", f"runs={tmp_path}/runs", "tracker=none",
        "encoder@evaluation_encoder=efficientnet_lite0", "evaluation_encoder.input_size=32", "prune=random",
        "ratio=0.5",
        "reference=bluemarble", "eval.images=12", "eval.convergence_images=8", "train.snapshots=1", "eval.steps=2",
        "train.mixed_precision=no", "train.loop.steps=2", "train.loop.batch_size=4", "train.loop.checkpoint_every=2",
    )  # fmt: skip
    selection, corpus = select(cfg, "random")
    assert read_json(selection / "summary.json")["kept"] == len(corpus) / 2 == 12
    widths = [np.load(file, mmap_mode="r").shape[1] for file in (tmp_path / "runs").glob("embedding/*/embeddings.npy")]
    assert widths == [32]
    assert evaluation_sets(cfg)["natural"].features["efficientnet_lite0"].shape == (12, 1280)
    directory = pretrain(cfg, "random")
    assert run_directory(cfg, "random") == directory
    metrics = read_json(directory / "summary.json")["metrics"]
    assert {"balanced_fd_efficientnet_lite0", "natural_kid_x1000_dinov2", "balanced_clip_vit_l14"} <= set(metrics)
    assert (directory / CONVERGENCE).is_file() and (directory / "pipeline" / "model_index.json").is_file()


# ---------------------------------------------------------------- FID's network


def test_only_the_inception_network_gives_fid(tmp_path: Path) -> None:
    encoder = instantiate(config("profile=paper", f"evaluation_encoder.folder={tmp_path}").evaluation_encoder)
    assert encoder.name == "inception" and encoder.dimensions == 2048
    features = np.random.default_rng(0).normal(size=(2, 20, 3))
    names = compare({encoder.name: features[0]}, SimpleNamespace(features={encoder.name: features[1]}))
    assert "fid" in names and not any(name.startswith("fd_") for name in {*names} - {"fd_infinity_inception"})
    assert "fid" not in compare({"dinov2": features[0]}, SimpleNamespace(features={"dinov2": features[1]}))
    with pytest.raises(UserError, match="reserved for the standard InceptionV3"):
        TransformersEncoder(name="inception", path="owner/name")
    with pytest.raises(TypeError):
        InceptionV3(name="inception_of_mine")


def test_inception_images_are_resized_by_clean_fid() -> None:
    images = pictures(2)
    resized = InceptionV3(download=False).resize(images)
    assert resized.shape == (2, 3, 299, 299) and resized.dtype == torch.float32
    expected = build_resizer("clean")(images[1])
    np.testing.assert_array_equal(resized[1].permute(1, 2, 0).numpy(), expected)


# ---------------------------------------------------------------- missing files


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_inception_network_gives_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("encoders.inception.urlopen", refuse)
    for download in (False, True):
        with pytest.raises(UserError) as error:
            InceptionV3(folder=str(tmp_path), download=download)(pictures(1))
        message = one_line(error)
        assert str(tmp_path / INCEPTION_FILE) in message and "encoder=efficientnet_lite0" in message
        assert ("no route" in message) == download
        assert isinstance(error.value.__cause__, URLError) == download
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_inception_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TorchScript network that would load, and a server's error page in place of the file."""
    other = torch.jit.trace(torch.nn.Identity(), torch.zeros(1))
    torch.jit.save(other, tmp_path / INCEPTION_FILE)
    digest = hashlib.sha256((tmp_path / INCEPTION_FILE).read_bytes()).hexdigest()
    with pytest.raises(UserError) as error:
        InceptionV3(folder=str(tmp_path))(pictures(1))
    assert "remove it" in one_line(error) and digest in one_line(error)
    (tmp_path / INCEPTION_FILE).unlink()
    monkeypatch.setattr("encoders.inception.urlopen", lambda *_, **__: io.BytesIO(b"<html>log in</html>"))
    with pytest.raises(UserError) as error:
        InceptionV3(folder=str(tmp_path))(pictures(1))
    assert "sent a different file" in one_line(error) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("load", "key", "way_out"),
    [
        (lambda cfg: load_autoencoder(cfg), "autoencoder.path", "autoencoder=bluemarble_f8c16"),
        (lambda cfg: load_text_parts(cfg, None), "text_encoder.path", "text_encoder=clip_local"),
        (lambda cfg: instantiate(cfg.encoder).dimensions, "encoder.path", "encoder=efficientnet_lite0"),
    ],
    ids=["autoencoder", "text_encoder", "encoder"],
)
@pytest.mark.parametrize("broken", [False, True])
def test_a_missing_or_broken_network_gives_a_one_line_error(
    load, key: str, way_out: str, broken: bool, tmp_path: Path
) -> None:
    path = tmp_path / "nowhere"
    if broken:
        path.mkdir()
        (path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load(config("profile=paper", f"{key}={path}"))
    message = one_line(error)
    assert f"{key}={path}" in message and way_out in message


def test_a_command_without_the_hub_ends_with_a_one_line_error(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "prune/run.py", "profile=paper", f"corpus.root={tiny_folder}", "tracker=none",
               "corpus.train.resolution=32", f"runs={tmp_path / 'runs'}"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if "it/s" not in line]
    assert done.returncode == 2 and done.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("error: no image encoder at encoder.path=facebook/dinov2-large")
    assert "encoder=efficientnet_lite0" in lines[0]


# ---------------------------------------------------------------- several processes

LAUNCHED = """
import os, sys
from pathlib import Path
from runtime.artefacts import COMPLETE, stage

together = None
if "together" in sys.argv:
    from omegaconf import OmegaConf
    from train.components import first_process_decides
    together = first_process_decides(OmegaConf.create({"seed": 0, "train": {"mixed_precision": "no"}}))

def build(directory):
    (directory / f"built_by_{os.environ['RANK']}").touch()
    with open(Path(sys.argv[1]) / "builders", "a") as file:
        file.write(os.environ["RANK"])
    if together:  # as in training: none goes on before all are there
        together(True)

final = stage(sys.argv[1], "bench", {"seed": 1}, build, together=together)
print(sorted(file.name for file in final.iterdir() if file.name != COMPLETE))
"""


def launched(folder: Path, ranks: tuple[str, ...], port: int, *words: str) -> list[subprocess.Popen]:
    """The processes of a launch, in the order of their start."""
    metadata = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(ranks))}
    command = [sys.executable, "-c", LAUNCHED, str(folder), *words]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **metadata, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]


def printed(processes: list[subprocess.Popen]) -> list[str]:
    try:
        return [process.communicate(timeout=300)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_one_process_of_a_launch_builds_a_stage_and_all_use_it(tmp_path: Path) -> None:
    outputs = printed(launched(tmp_path, ("1", "0"), 0))  # the first process arrives last
    assert outputs == ["['built_by_0']"] * 2
    assert [path.name.endswith(".partial") for path in (tmp_path / "bench").iterdir()] == [False]


@pytest.mark.slow
def test_two_concurrent_launches_build_a_common_stage_once(tmp_path: Path) -> None:
    """For any order of the processes of two launches; the second launch uses the directory that the first one built."""
    first, second = free_ports(2)
    processes = launched(tmp_path, ("1", "0"), first, "together") + launched(tmp_path, ("1", "0"), second, "together")
    assert printed(processes) == ["['built_by_0', 'built_by_1']"] * 4
    assert sorted((tmp_path / "builders").read_text()) == ["0", "1"]
    again = launched(tmp_path, ("0", "1"), first, "together")
    assert printed(again) == ["['built_by_0', 'built_by_1']"] * 2
    assert sorted((tmp_path / "builders").read_text()) == ["0", "1"]
