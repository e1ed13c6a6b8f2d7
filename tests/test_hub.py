"""Networks and data by hub name, read by the real libraries over HTTP from a local replacement of the hub."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from hydra import compose, initialize_config_dir
from stand_in_hub import stand_in_hub
from test_paper_profile import DINO_SIDE, SMALL_UNET, networks  # noqa: F401
from test_sources import encoded, shard, texture
from tiny_networks import tiny_autoencoder, tiny_text_encoder, tiny_unet

from runtime.artefacts import read_json
from train.networks import text_to_image_pipeline

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SCENES = ("beach", "forest", "river")
REFERENCES = {
    "aid": "blanchon/AID",
    "ucmerced": "blanchon/UC_Merced",
    "eurosat": "blanchon/EuroSAT_RGB",
    "resisc45": "timm/resisc45",
    "rsscn7": "jonathan-roberts1/SATIN",
}


@dataclass(frozen=True)
class Hub:
    """The folder of its repositories, a function that runs Python with it, and the received requests."""

    folder: Path
    run: Callable[..., subprocess.CompletedProcess]
    requested: list[str]


def write_tiles(folder: Path, count: int, split: str = "train", first: int = 0) -> None:
    """A repository of one Parquet file, the hub's format of image data sets; equal `first` gives equal images."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(SCENES))})
    images = [{"bytes": encoded(texture(first + row)), "path": None} for row in range(count)]
    table = datasets.Dataset.from_dict({"image": images, "label": [row % 3 for row in range(count)]}, features=features)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory, networks: Path) -> Iterator[Hub]:  # noqa: F811
    """The repositories that the configs name, with small random content."""
    folder = tmp_path_factory.mktemp("hub")
    write_tiles(folder / "datasets/owner/tiles/data", 30)
    write_tiles(folder / "datasets/owner/tiles/data", 9, "test", first=1000)
    for name in REFERENCES.values():
        below = "RSSCN7" if name.endswith("SATIN") else "data"
        write_tiles(folder / "datasets" / name / below, 12)
    satin = "---\nconfigs:\n- config_name: RSSCN7\n  data_files: RSSCN7/*.parquet\n---\n"
    (folder / "datasets/jonathan-roberts1/SATIN/README.md").write_text(satin)
    for kind, name in (("vae", "stabilityai/sd-vae-ft-mse"), ("clip", "openai/clip-vit-large-patch14"),
                       ("dino", "facebook/dinov2-large")):  # fmt: skip
        shutil.copytree(networks / kind, folder / "models" / name)
    torch.manual_seed(0)
    pipeline = text_to_image_pipeline(tiny_autoencoder(), *tiny_text_encoder(), tiny_unet(), EulerDiscreteScheduler())
    pipeline.save_pretrained(folder / "models/owner/diffusion")
    with stand_in_hub(folder) as (environment, requested):

        def run(*arguments: object) -> subprocess.CompletedProcess:
            command = [sys.executable, *map(str, arguments)]
            paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **environment, "PYTHONPATH": paths}, capture_output=True,
                text=True, timeout=600,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-2000:]
            return done

        yield Hub(folder, run, requested)


def result(done: subprocess.CompletedProcess) -> Path:
    return Path(done.stdout.strip().splitlines()[-1].partition(": ")[2])


def test_a_corpus_and_a_reference_are_read_by_hub_name(hub: Hub, tmp_path: Path) -> None:
    """Downloading and streaming give the same selection."""
    kept = {}
    for streaming in (False, True):
        hub.requested.clear()
        done = hub.run(
            "prune/run.py", "corpus=huggingface", "corpus.path=owner/tiles", f"corpus.streaming={streaming}",
            "corpus.train.resolution=32", "reference=ucmerced", "ratio=0.5", "encoder.input_size=32",
            f"runs={tmp_path / str(streaming)}", f"results={tmp_path}", "tracker=none",
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        fetched = [line for line in hub.requested if line.startswith("GET ") and line.endswith(".parquet")]
        assert any("/datasets/owner/tiles/resolve/" in line for line in fetched)
        assert any("/blanchon/UC_Merced/resolve/" in line for line in fetched) != streaming  # later from the cache
        table = pd.read_parquet(result(done) / "selection.parquet")
        assert len(table) == 29 and table["kept"].sum() == 15  # one of the 30 training images is val, by its hash
        kept[streaming] = table["id"][table["kept"]].tolist()
        assert set(table["scene"]) <= {*SCENES, "open"}
    assert kept[False] == kept[True]


def test_the_example_of_the_docs_runs_as_written(hub: Hub, tmp_path: Path) -> None:
    [example] = re.findall(r"^```hub\n(.*?)^```", (ROOT / "docs" / "corpora.md").read_text(), re.M | re.S)
    for line in example.replace("\\\n", " ").splitlines():
        own = (f"runs={tmp_path}", f"results={tmp_path}", f"doctor.picture={tmp_path}/doctor.png", "tracker=none")
        done = hub.run(*shlex.split(line)[1:], *own)
    assert pd.read_parquet(result(done) / "selection.parquet")["kept"].sum() == 15


def test_every_named_reference_comes_from_the_hub(hub: Hub) -> None:
    code = """
import sys
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
for name in sys.argv[2:]:
    with initialize_config_dir(sys.argv[1], version_base="1.3"):
        source = instantiate(compose("config", overrides=[f"reference={name}"]).reference.source)
    print(name, source.path, len(source.manifest()), *sorted(set(source.manifest()["scene"])))
"""
    lines = hub.run("-c", code, ROOT / "configs", *REFERENCES).stdout.splitlines()
    assert lines == [f"{name} {path} 12 {' '.join(SCENES)}" for name, path in REFERENCES.items()]


def test_shards_over_http_equal_those_on_disk(hub: Hub) -> None:
    code = """
import os, sys
import numpy as np
from corpus.sources.webdataset import WebDataset
for place in (sys.argv[1], os.environ["HF_ENDPOINT"] + "/datasets/owner/shards/resolve/main"):
    source = WebDataset(place + "/part-{0..1}.tar", resolution=32, workers=1)
    images = list(source.reader(np.arange(8))())
    print(source.manifest()["id"].tolist(), sum(int(image.sum()) for image in images))
"""
    folder = hub.folder / "datasets/owner/shards"
    folder.mkdir(parents=True)
    for number in range(2):
        members = [(f"forest/{number}{row}.png", encoded(texture(4 * number + row))) for row in range(4)]
        shard(folder / f"part-{number}.tar", members)
    local, remote = hub.run("-c", code, folder).stdout.splitlines()
    assert local == remote and local.count("forest/") == 8


def test_the_paper_profile_trains_with_networks_by_hub_name(hub: Hub, tmp_path: Path) -> None:
    """The names are those of the profile; the hub's files with these names are small and random."""
    done = hub.run(
        "train/pretrain.py", "profile=paper", "corpus=huggingface", "corpus.path=owner/tiles",
        "corpus.train.resolution=64", "corpus.test.resolution=64", "corpus.val_fraction=0.3",
        "reference=resisc45", "prune=rsprune", "ratio=0.5",
        f"encoder.input_size={DINO_SIDE}", "encoder@evaluation_encoder=efficientnet_lite0",
        "evaluation_encoder.input_size=32",
        "train.loop.steps=2", "train.loop.batch_size=4", "train.snapshots=1", "eval.images=9",
        "eval.convergence_images=4", "eval.steps=2", *SMALL_UNET,
        f"runs={tmp_path / 'runs'}", f"results={tmp_path}", "tracker=none",
    )  # fmt: skip
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("config", ["profile=paper"])
    for network in (cfg.autoencoder, cfg.text_encoder, cfg.encoder):
        weights = [line for line in hub.requested if f" /{network.path}/resolve/" in line and ".safetensors" in line]
        assert weights and all(f"/resolve/{network.revision}/" in line for line in weights)
    directory = result(done)
    assert np.isfinite(read_json(directory / "summary.json")["loss"])
    assert (directory / "pipeline" / "model_index.json").is_file()


def test_a_pretrained_pipeline_is_loaded_by_hub_name(hub: Hub, tmp_path: Path) -> None:
    done = hub.run(
        "train/pretrain.py", "profile=smoke", "model=lora", "model.pretrained=owner/diffusion", "prune=random",
        "train.objective.prediction=epsilon", "train.loop.steps=2", "text_encoder.train.steps=2",
        "train.snapshots=1", f"runs={tmp_path / 'runs'}", f"results={tmp_path}", "tracker=none",
    )  # fmt: skip
    assert any("GET /owner/diffusion/resolve/" in line and "unet" in line for line in hub.requested)
    assert (result(done) / "lora" / "pytorch_lora_weights.safetensors").is_file()
