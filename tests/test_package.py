"""The package: ranges and pins agree, the core has few and fast imports, names are typed, examples run."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rsprune
from prune.clusters import Points
from rsprune.installed import needs
from runtime.errors import UserError
from runtime.provenance import versions

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
#: Packages that selection from arrays must not require.
HEAVY = (
    *("torch", "torchvision", "hydra", "omegaconf", "diffusers", "transformers", "timm", "wandb", "gradio", "datasets"),
    *("cv2", "simplejpeg", "rasterio", "ray", "fsspec", "loky", "matplotlib", "sklearn", "skimage"),
)


def ranges() -> Iterator[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    for line in (*PROJECT["project"]["dependencies"], *(line for lines in extras for line in lines)):
        if not line.startswith("rs-prune["):
            yield Requirement(line)


def pins() -> dict[str, str]:
    """Exact versions by canonical name, including those of extras that the set-up omits."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    result = [Requirement(line.removeprefix("#: ")) for line in lines if "==" in line]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in result}


def python(code: str, path: Path = ROOT) -> subprocess.CompletedProcess:
    """Run code in a directory, in which Python searches for modules before the repository."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=path, env=environment, capture_output=True, text=True, check=False
    )


# ---------------------------------------------------------------- dependencies


def test_every_pin_lies_in_its_range_and_every_range_has_a_pin() -> None:
    pinned = pins()
    requested = list(ranges())
    assert len(requested) > 40 and len(pinned) > 40
    assert [str(line) for line in requested if canonicalize_name(line.name) not in pinned] == []
    outside = [str(line) for line in requested if not line.specifier.contains(pinned[canonicalize_name(line.name)])]
    assert outside == []
    assert sorted(set(pinned) - {canonicalize_name(line.name) for line in requested}) == []


def test_version_ranges_have_both_bounds_and_the_core_does_not_need_torch() -> None:
    assert all({part.operator for part in line.specifier} == {">=", "<"} for line in ranges())
    core = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    assert len(core) < 15 and not core & {"torch", "hydra-core", "diffusers", "opencv-python"}


def test_the_extra_all_names_existing_extras() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    named = [Requirement(line).extras for lines in extras.values() for line in lines if line.startswith("rs-prune[")]
    assert set().union(*named) <= set(extras)
    assert {"train", "geo", "ray", "remote", "demo", "gpu", "all"} <= set(extras)


# ---------------------------------------------------------------- imports


def test_selecting_from_arrays_imports_no_heavy_package_in_less_than_2_seconds() -> None:
    done = python(
        "import json, sys, time; start = time.process_time()\n"
        "from rsprune import RSPrune, Selection, images_represented, local_entropy, near_duplicate_fraction\n"
        "from rsprune import select_from_arrays\n"
        "spent = time.process_time() - start\n"
        "import numpy as np; values = np.random.default_rng(0)\n"
        "images = values.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)\n"
        "bits = np.array([local_entropy(image) for image in images])\n"
        "chosen = RSPrune(ratio=0.5).select(values.standard_normal((60, 8)), entropy=bits)\n"
        "near_duplicate_fraction(images)\n"
        "print(json.dumps([spent, len(chosen.kept), sorted(sys.modules)]))"
    )
    seconds, kept, modules = json.loads(done.stdout)
    assert kept == 30
    assert [name for name in HEAVY if name in modules] == []
    assert seconds < 2  # 0.5 s on an idle core, but this core may be busy


def test_a_missing_extra_gives_a_one_line_error() -> None:
    hidden = "import sys; sys.modules['torch'] = None; sys.modules['cv2'] = None\n"
    call = "import numpy as np, rsprune\ntry: {}\nexcept rsprune.UserError as error: print(error)"
    for code, line in (
        (
            "rsprune.embed_images(np.zeros((1, 8, 8, 3), np.uint8))",
            "embed_images needs `torch`, .*'rs-prune\\[encoders\\]'",
        ),
        ("rsprune.read_folder('.')", "read_folder needs `cv2`, .*'rs-prune\\[images\\]'"),
    ):
        assert re.fullmatch(line, python(hidden + call.format(code)).stdout.strip())
    with pytest.raises(ModuleNotFoundError, match=r"prune\.nowhere"), needs("images", "this"):
        importlib.import_module("prune.nowhere")  # an error of the project is not a missing extra


def test_the_import_error_names_a_shadowing_package_of_another_project(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    ask = "from rsprune import RSPrune"
    assert python(ask, tmp_path).returncode == 0  # a folder without __init__.py does not hide the package
    (tmp_path / "eval" / "__init__.py").touch()
    line = python(ask, tmp_path).stderr.splitlines()[-1]
    assert line.startswith(f"ImportError: rsprune needs its own package `eval`, but Python finds {tmp_path / 'eval'}")
    (tmp_path / "eval" / "__init__.py").unlink()
    (tmp_path / "runtime.py").touch()
    assert f"finds {tmp_path / 'runtime.py'}" in python(ask, tmp_path).stderr.splitlines()[-1]


# ---------------------------------------------------------------- the API


def test_public_names_are_few_documented_and_typed() -> None:
    assert len(rsprune.__all__) < 20 and set(rsprune.__all__) == set(rsprune._HOME) == set(dir(rsprune))
    documented = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    for name in rsprune.__all__:
        result = getattr(rsprune, name)
        assert result.__doc__ and result.__doc__ != f"{name}()", name
        assert f"`{name}" in documented, f"{name} is not in docs/library.md"
        assert result.__annotations__ if not isinstance(result, type) else True, f"{name} has no types"
    for package in ("rsprune", "prune", "eval", "runtime"):
        assert (ROOT / package / "py.typed").is_file()
        assert PROJECT["tool"]["setuptools"]["package-data"][package] == ["py.typed"]


def test_lazy_names_equal_the_names_for_the_type_checker() -> None:
    tree = ast.parse((ROOT / "rsprune" / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == rsprune._HOME


def test_recorded_versions_and_change_log_name_the_package_version() -> None:
    assert versions()["rs-prune"] == PROJECT["project"]["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[?([\d.]+)", changes, re.M)[1] == PROJECT["project"]["version"]


# ---------------------------------------------------------------- points, equal to PyTorch's


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("width", [*range(1, 20), 100, 513, 768, 1280])
def test_points_equal_pytorch_bit_for_bit(dtype: type, width: int) -> None:
    """Published selections used `torch.norm`; they must be reproducible without torch."""
    generator = np.random.default_rng(width)
    embeddings = (generator.standard_normal((300, width)) * generator.choice([1e-3, 1, 30])).astype(dtype)
    centre = generator.standard_normal(width).astype(np.float32)
    embeddings[7] = 0
    embeddings[8] = centre.astype(dtype)
    vectors = torch.from_numpy(embeddings.copy()).float().sub_(torch.from_numpy(centre))
    points = Points(embeddings, centre, spherical=False)
    np.testing.assert_array_equal(points[:].view(np.int32), vectors.numpy().view(np.int32))
    vectors /= vectors.norm(dim=1, keepdim=True).clamp_min_(1e-12)
    points = replace(points, spherical=True)
    rows = np.array([5, 0, 8, 8])
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        np.testing.assert_array_equal(points[:].view(np.int32), vectors.numpy().view(np.int32))
        np.testing.assert_array_equal(points[rows], vectors.numpy()[rows])
    else:  # in this case torch itself sums in another order
        np.testing.assert_allclose(points[:], vectors.numpy(), rtol=1e-6, atol=1e-7)


def test_points_support_empty_rows_and_non_contiguous_arrays() -> None:
    values = np.random.default_rng(0).standard_normal((40, 24)).astype(np.float16)
    centre = np.zeros(12, np.float32)
    assert Points(values, np.zeros(24, np.float32))[np.empty(0, np.int64)].shape == (0, 24)
    np.testing.assert_array_equal(Points(values[:, ::2], centre)[:], Points(values[:, ::2].copy(), centre)[:])


# ---------------------------------------------------------------- tables and tags


@pytest.fixture
def selection() -> rsprune.Selection:
    values = np.random.default_rng(0)
    readable = np.arange(40) != 3
    return rsprune.RSPrune(ratio=0.5).select(
        values.standard_normal((40, 8)), entropy=values.random(40), readable=readable
    )


def test_a_selection_is_written_and_read_as_a_table_and_given_as_tags(
    selection: rsprune.Selection, tmp_path: Path
) -> None:
    ids = [f"a/{number}.png" for number in range(40)]
    table = rsprune.selection_table(selection, ids, weights=np.ones(40, np.float32))
    assert table["id"][table["kept"]].tolist() == [ids[row] for row in selection.kept]
    tags = rsprune.selection_tags(table)
    assert tags["a/3.png"] == ["rsprune:dropped", "rsprune:unreadable"]
    assert sum(given == ["rsprune:kept"] for given in tags.values()) == 20 and len(tags) == 40
    table.to_parquet(tmp_path / "selection.parquet")
    for place in (tmp_path, tmp_path / "selection.parquet"):
        pd.testing.assert_frame_equal(rsprune.read_selection(place), table)
    with pytest.raises(UserError, match="39 ids for 40 images"):
        rsprune.selection_table(selection, ids[1:])
    with pytest.raises(UserError, match=r"a/1\.png occurs twice"):
        rsprune.selection_table(selection, [ids[1], *ids[1:]])
    with pytest.raises(UserError, match="does not exist"):
        rsprune.read_selection(tmp_path / "nowhere")
    table[["id"]].to_parquet(tmp_path / "selection.parquet")
    with pytest.raises(UserError, match="no column kept, reason"):
        rsprune.read_selection(tmp_path)


def test_read_folder_returns_images_scenes_and_readability(tiny_folder: Path) -> None:
    result = rsprune.read_folder(tiny_folder, side=16)
    assert len(result) == 8 and result.readable.sum() == 7 and result.images.shape == (8, 16, 16, 3)
    assert set(result.scene) == {"BaseballField", "dry_river"}
    assert not result.images[~result.readable].any()
    assert (result.images[result.scene == "BaseballField"][:, 8, 8] == [20, 160, 40]).all()
    with pytest.raises(UserError, match="unknown: take efficientnet_lite0"):
        rsprune.embed_images(result.images, "resnet")
    with pytest.raises(UserError, match="images must be uint8"):
        rsprune.embed_images(result.images / 255)


# ---------------------------------------------------------------- examples


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their types there
    spec.loader.exec_module(module)
    return module


def test_examples_are_short_and_listed_in_the_documentation() -> None:
    documented = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    for name in EXAMPLES:
        text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) < 60, name
        assert f"examples/{name}.py" in documented, name


@pytest.mark.parametrize("name", ["arrays", "huggingface", "own_method"])
def test_example_runs(name: str, capsys: pytest.CaptureFixture) -> None:
    example(name).main()
    message = {
        "arrays": r"kept 90 of 600\n(.*\n)*of each scene \[465 101  34\].*\nweights of the kept sum to 600\n",
        "huggingface": r"all {'sea': 60, 'town': 20}\nkept {'sea': \d+, 'town': \d+}\n",
        "own_method": r"50 kept, \d+ of them by RS-Prune as well\n",
    }
    assert re.match(message[name], capsys.readouterr().out)


def test_example_of_a_folder_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("folder")
    module.generated(tmp_path)
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # as without the extra `encoders`
    module.main(tmp_path)
    before, after = map(float, re.findall(r"(\d\.\d\d) (?:of them before|after)", capsys.readouterr().out))
    assert before > after
    assert pd.read_csv(tmp_path / "selection.csv")["kept"].sum() == 30


def test_example_of_shards_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    example("webdataset_shards").main(tmp_path)
    assert capsys.readouterr().out == "kept 30 of 60 samples\n"
    assert len(list(tmp_path.glob("kept-*.tar"))) == 2


def test_example_of_torchgeo_prunes_samples_in_torchgeo_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchgeo's samples are dictionaries with an `image`; only the example's `main` needs torchgeo."""
    module = example("torchgeo_dataset")
    values = torch.rand((12, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 3000
    monkeypatch.setattr(module, "embed_images", lambda images: images.reshape(len(images), -1).astype(np.float32))
    subset = module.pruned([{"image": image, "label": 0} for image in values], 0.5, bands=(2, 1, 0), top=3000)
    assert len(subset) == 6 and subset[0]["image"].shape == (3, 32, 32)
    shown = module.as_rgb({"image": values[0]}, (2, 1, 0), 3000)
    np.testing.assert_array_equal(shown[..., 0], (values[0, 2].numpy() / 3000 * 255).astype(np.uint8))


def test_example_of_torchgeo_runs(tmp_path: Path) -> None:
    pytest.importorskip("torchgeo", reason="torchgeo is the extra `geo`, which is not installed")
    example("torchgeo_dataset")


class Samples:
    """A stand-in for FiftyOne's `Dataset`: `iter_samples(autosave=True)` of samples with `filepath` and `tags`."""

    def __init__(self, paths: list[str]) -> None:
        self.samples = [SimpleNamespace(filepath=path, tags=["mine", "rsprune:old"]) for path in paths]
        self.saved = False

    def iter_samples(self, autosave: bool = False) -> Iterator[SimpleNamespace]:
        yield from self.samples
        self.saved = autosave


def test_example_of_fiftyone_tags_samples(
    selection: rsprune.Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ids = [f"a/{number}.png" for number in range(40)]
    rsprune.selection_table(selection, ids).to_parquet(tmp_path / "selection.parquet")
    dataset = Samples([*(f"/data/tiles/{name}" for name in ids), "/data/tiles/b/1.png"])
    stand_in = ModuleType("fiftyone")
    stand_in.load_dataset = {"tiles": dataset}.__getitem__
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    example("fiftyone_tags").main("tiles", str(tmp_path))
    assert "40 samples of tiles tagged; the selection has 40 images" in capsys.readouterr().out
    assert dataset.saved
    kept = [row for row, sample in enumerate(dataset.samples) if "rsprune:kept" in sample.tags]
    assert kept == selection.kept.tolist()
    assert dataset.samples[3].tags == ["mine", "rsprune:dropped", "rsprune:unreadable"]
    assert dataset.samples[-1].tags == ["mine", "rsprune:old"]  # not an image of the selection: unchanged
