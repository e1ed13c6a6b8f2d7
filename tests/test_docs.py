"""The examples of docs/corpora.md, run exactly as written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from field_inputs import make_inputs
from hydra import compose, initialize_config_dir
from PIL import Image

from runtime.application import CONFIGS
from runtime.artefacts import read_json
from train.networks import new_network, predict
from train.utilisation import training_flops


def checkout(repository: Path, folder: Path) -> dict[str, str]:
    """The repository's files in a folder, and an environment for running its commands there."""
    listed = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("the repository is no git checkout: which files to copy is not known")
    for name in listed.stdout.splitlines():
        if (repository / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, folder / name)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths), "WANDB_MODE": "disabled",
    }  # fmt: skip


#: Sections of docs/corpora.md about the user's kind of data, and the kind of corpus of each.
SECTIONS = {
    "A folder of tiles without labels": "folder",
    "Class folders": "folder",
    "A folder of NAIP tiles": "folder",
    "Sentinel-2 SAFE": "geotiff",
    "Landsat": "geotiff",
    "BigEarthNet patches": "folder",
    "img2dataset shards": "webdataset",
    "A hub data set / Parquet": "huggingface",
    "GeoTIFF scenes": "geotiff",
    "torchgeo": "torchgeo",
    "Masks from QGIS": "folder",
    "Captions": "folder",
}


def sections(text: str) -> dict[str, list[tuple[str, str]]]:
    """The blocks of every section, by its heading, with their languages."""
    parts = re.split(r"^##? (.+)\n", text, flags=re.M)
    result = {}
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        result[heading] = re.findall(r"^```(\w*)\n(.*?)^```", body, re.M | re.S)
    return result


def test_every_section_begins_with_the_doctor(repository: Path) -> None:
    result = sections((repository / "docs" / "corpora.md").read_text())
    assert list(result)[1 : len(SECTIONS) + 1] == list(SECTIONS)
    for heading, kind in SECTIONS.items():
        first = result[heading][0][1].splitlines()
        assert first[0].startswith(f"python scripts/doctor.py corpus={kind} "), heading
        assert all(line.startswith(("python ", "    ")) for line in first), heading


@pytest.mark.slow
def test_the_examples_run_as_written(repository: Path, tmp_path: Path) -> None:
    environment = checkout(repository, tmp_path)
    make_inputs(tmp_path)
    result = sections((repository / "docs" / "corpora.md").read_text())
    examples = [text for blocks in result.values() for kind, text in blocks if kind == "sh"]
    assert len(examples) == len(SECTIONS) - 1 + 2  # without torchgeo's; "Out, and in again" has two
    for text in examples:
        shell = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, text + done.stderr[-2000:]
        assert "quarantine 0 of" in done.stdout or "doctor" not in text, text + done.stdout
    selections = list((tmp_path / "runs" / "selection").glob("*/selection.parquet"))
    assert len(selections) == "\n".join(examples).count("prune/run.py")
    assert all(pd.read_parquet(path)["kept"].any() for path in selections)
    for path in selections:
        corpus = tmp_path / "runs" / "corpus" / read_json(path.with_name("stage.json"))["inputs"]["corpus"]
        if read_json(corpus / "corpus.json")["name"] == "geotiff":  # its tiles have locations
            assert "Locations of" in path.with_name("report.html").read_text()
            break
    else:
        pytest.fail("no example prunes a scene")


@pytest.mark.slow
def test_the_first_example_runs_as_written(repository: Path, tmp_path: Path) -> None:
    """README.md: an unlabelled folder is generated, pruned and exported."""
    environment = checkout(repository, tmp_path)
    text = (repository / "README.md").read_text(encoding="utf-8")
    first = [re.search(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)[1] for kind in ("python", "sh")]
    for shell in ([sys.executable, "-c", first[0]], ["bash", "-euo", "pipefail", "-c", first[1]]):
        done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "no labels: 12 clusters of the corpus (strata) are used as scenes" in done.stderr
    assert len(list((tmp_path / "best" / "images").rglob("*.png"))) == 150
    [report] = (tmp_path / "runs" / "selection").glob("*/report.html")
    assert "150 of 1,000 images kept" in report.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_worked_example_runs_as_written(repository: Path, tmp_path: Path) -> None:
    """docs/worked_example.md: an archive is generated, checked, pruned, exported and read back."""
    environment = checkout(repository, tmp_path)
    text = (repository / "docs" / "worked_example.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(python|sh)\n(.*?)^```", text, re.M | re.S)
    assert [kind for kind, _ in blocks] == ["python", "sh", "sh", "sh", "sh", "python"]
    for kind, block in blocks:
        shell = [sys.executable, "-c", block] if kind == "python" else ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, block + done.stderr[-2000:]
    scene, weight, *side = done.stdout.strip().splitlines()[-1].split(maxsplit=2)
    assert scene in ("plain", "delta", "coast") and float(weight) >= 1 and side == ["(64, 64)"]
    cards = [(tmp_path / name / "DATA_CARD.md").read_text(encoding="utf-8") for name in ("subset", "subset-shards")]
    for card in cards:
        assert "| plain " in card and "CC-BY-4.0" in card and str(tmp_path) not in card
    table = pd.read_parquet(next((tmp_path / "runs" / "selection").glob("*/selection.parquet")))
    kept = len(table) - round(0.7 * len(table))
    assert f"# Data card: {kept} of {len(table)} images of geotiff" in cards[0]
    assert len(list((tmp_path / "subset" / "images").rglob("*.png"))) == kept == table["kept"].sum()


@pytest.mark.slow
def test_the_torchgeo_example_runs_as_written(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchgeo", reason="torchgeo is the extra `geo`, which is not installed")
    environment = checkout(repository, tmp_path)
    random, members = np.random.default_rng(0), {"train": [], "val": [], "test": []}
    for scene in ("agricultural", "forest"):
        folder = tmp_path / "ucmerced" / "UCMerced_LandUse" / "Images" / scene
        folder.mkdir(parents=True)
        for number, split in enumerate(("train", "train", "train", "train", "val", "test")):
            name = f"{scene}{number:02d}.tif"
            Image.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / name)
            members[split].append(name)
    for split, names in members.items():
        (tmp_path / "ucmerced" / f"uc_merced-{split}.txt").write_text("\n".join(names) + "\n")
    [example] = re.findall(r"^```torchgeo\n(.*?)^```", (tmp_path / "docs" / "corpora.md").read_text(), re.M | re.S)
    shell = ["bash", "-euo", "pipefail", "-c", example]
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    selection = pd.read_parquet(tmp_path / done.stdout.strip().splitlines()[-1].split(": ")[1] / "selection.parquet")
    assert len(selection) == 8 and selection["kept"].sum() == 4


def test_the_estimates_follow_from_the_networks(repository: Path) -> None:
    """docs/training.md: counted parameters and operations, and speeds by its own formula."""
    text = (repository / "docs" / "training.md").read_text()
    rows = re.findall(
        r"^\| (\w+) \| (\d+) x (\d+) x \d+ \| ([\d.]+) \| ([\d.,]+) \| ([\d,]+) \| ([\d.]+) \|$", text, re.M
    )
    assert len(rows) == 5
    for name, channels, side, millions, gigaflops, speed, megabytes in rows:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            model = compose("config", [f"model={name}"]).model
        with torch.device("meta"):
            network = new_network(model, int(channels), int(side), 768, seed=0)
            flops = training_flops(
                network, torch.zeros(1, int(channels), int(side), int(side)), torch.zeros(1, 77, 768)
            )
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(float(millions), abs=0.05)
        assert flops / 1e9 == pytest.approx(float(gigaflops.replace(",", "")), abs=0.05)
        assert 8 * 0.4 * 989e12 / flops == pytest.approx(float(speed.replace(",", "")), rel=0.01)
        assert kept_for_backward(network, int(channels), int(side)) / 1e6 == pytest.approx(float(megabytes), rel=0.02)
    whole, parameters, activations = 17.2 + 1.7, float(rows[-1][3]), float(rows[-1][6])
    assert 20 * parameters / 1e3 == pytest.approx(17.2, abs=0.05) and 2 * parameters / 1e3 == pytest.approx(
        1.7, abs=0.05
    )
    assert "17.2 + 1.7 + 32 x 0.94 = 49 GB" in text and whole + 32 * activations / 1e3 == pytest.approx(49, abs=0.5)
    assert "79 GB" in text and whole + 2 * 32 * activations / 1e3 == pytest.approx(79, abs=0.5)


def kept_for_backward(network: torch.nn.Module, channels: int, side: int) -> float:
    """Bytes per image that autograd keeps besides weights, in bfloat16 with flash attention; nothing is computed."""
    network.train().to(torch.bfloat16)
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False)[0]

    images = 2
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)
        latents = torch.zeros(images, channels, side, side, dtype=torch.bfloat16)
        times, text = torch.zeros(images), torch.zeros(images, 77, 768, dtype=torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            predict(network, latents, times, text).square().mean()
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights) / images
