"""Layout of the code: module names, import direction, pinned imports, no pickle, configurations that parse."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FACADE = "rsprune"
PACKAGES = (
    "runtime",
    "corpus",
    "encoders",
    "captioning",
    "prune",
    "train",
    "downstream",
    "eval",
    "report",
    "scripts",
    FACADE,
)
#: Packages that each package may import. `eval` measures any given images and imports no training code; `report`
#: reads results and imports no networks.
ALLOWED = {
    "runtime": {"runtime"},
    "corpus": {"runtime", "corpus"},
    "encoders": {"runtime", "corpus", "encoders"},
    "eval": {"runtime", "corpus", "encoders", "eval"},
    "report": {"runtime", "corpus", "eval", "report"},
    "captioning": {"runtime", "corpus", "encoders", "eval", "captioning"},
    "prune": {"runtime", "corpus", "encoders", "captioning", "eval", "prune", "report"},
    "train": {"runtime", "corpus", "encoders", "captioning", "prune", "train", "eval", "report"},
    "downstream": {"runtime", "corpus", "encoders", "captioning", "prune", "train", "downstream", "eval", "report"},
    "scripts": set(PACKAGES) - {FACADE},
    FACADE: {"runtime", "corpus", "encoders", "prune", "eval", FACADE},
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, at any depth, lazily or not."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}, line {node.lineno}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_entry_point(path: Path) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree_of(path).body)


def third_party() -> dict[str, set[str]]:
    """Top-level module names of all installed third-party distributions, with the distributions that contain them."""
    result = {name: set(owners) - {"rs-prune"} for name, owners in metadata.packages_distributions().items()}
    return {name: owners for name, owners in result.items() if owners}


def test_source_files_configurations_and_entry_points_are_found() -> None:
    assert len(FILES) > 20 and len(CONFIGS) > 5
    assert any(is_entry_point(path) for path in FILES)


def test_no_module_beside_an_entry_point_shadows_another() -> None:
    """`python prune/run.py` puts prune/ first on sys.path, so `prune/random.py` would replace `random` everywhere."""
    taken = set(sys.stdlib_module_names) | set(third_party()) | set(PACKAGES)
    folders = {path.parent for path in FILES if is_entry_point(path)}
    modules = [entry for folder in folders for entry in folder.iterdir() if entry.suffix == ".py" or entry.is_dir()]
    assert sorted(name_of(module) for module in modules if module.stem in taken) == []


def test_no_installed_distribution_has_a_package_name_of_this_project() -> None:
    assert sorted(set(third_party()) & set(PACKAGES)) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_import_only_the_allowed_packages(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    used = {name.split(".")[0] for name in imports_of(path)} & set(PACKAGES)
    assert used <= ALLOWED[package], f"{package} may import {sorted(ALLOWED[package])} only"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name != "scripts"], ids=name_of)
def test_no_module_imports_an_entry_point(path: Path) -> None:
    entry_points = {name_of(file).removesuffix(".py").replace("/", ".") for file in FILES if is_entry_point(file)}
    assert sorted(set(imports_of(path)) & entry_points) == []


def test_every_import_is_pinned() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+(\[\w+\])?==[A-Za-z0-9_.+]+", line)] == []
    pinned = {re.sub(r"[-_.]+", "-", re.split(r"==|\[", line)[0]).lower() for line in pins}
    optional = {line[3:].split("==")[0] for line in lines if line.startswith("#: ")}  # of extras that the set-up omits
    owners = third_party()
    missing = {}
    for path in (*FILES, *TESTS):
        for name in {name.split(".")[0] for name in imports_of(path)}:
            if (
                name in sys.stdlib_module_names
                or name in PACKAGES
                or name in optional
                or name in {test.stem for test in TESTS}
            ):
                continue
            held_by = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(name, set())}
            if held_by == {"opencv-python-headless"}:  # the set-up's choice without a display library
                held_by = {"opencv-python"}
            if not held_by & pinned:
                missing.setdefault(name, name_of(path))
    assert missing == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_uses_pickle(path: Path) -> None:
    modules = {name.split(".")[0] for name in imports_of(path)}
    assert not modules & {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        where = f"{name_of(path)}, line {node.lineno}"
        flags = {keyword.arg: keyword.value for keyword in node.keywords}
        for flag, safe in (("allow_pickle", False), ("weights_only", True)):
            if flag in flags:
                assert getattr(flags[flag], "value", None) is safe, f"{where}: {flag} must be {safe}"
        called = ast.unparse(node.func)
        assert called not in ("torch.save", "pd.read_pickle") and not called.endswith(".to_pickle"), where
        if called == "torch.load":
            assert "weights_only" in flags, f"{where}: say weights_only=True"
        weightless = ("AutoImageProcessor", "AutoProcessor", "AutoConfig", "CLIPTokenizer")
        if called.endswith(".from_pretrained") and called.split(".")[0] not in weightless:
            assert "use_safetensors" in flags, f"{where}: say use_safetensors=True"


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_configuration_parses(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content is None or isinstance(content, dict)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_configured_targets_exist(path: Path) -> None:
    targets = re.findall(r"_target_:\s*([\w.]+)", path.read_text(encoding="utf-8"))
    for target in targets:
        module, name = target.rsplit(".", 1)
        file = ROOT / Path(*module.split(".")).with_suffix(".py")
        if module.split(".")[0] in PACKAGES:
            assert file.is_file(), f"{target}: no such file"
            assert name in {getattr(node, "name", None) for node in tree_of(file).body}, f"{target}: no such name"


def test_editable_installation_finds_the_packages() -> None:
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file(), f"{package} has no __init__.py and is not installed"


def test_make_help_lists_every_command() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    documented = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    assert documented == set(phony.group(1).split())
