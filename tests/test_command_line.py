"""Paths on the command line need only the shell's quotes: every name through Hydra, in a run and in a sweep."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from runtime.application import CONFIGS
from runtime.command_line import is_path, is_sweep, quote_paths

NAMES = (
    *("year=2019/region=eu", "a,b", "Images (1)", "50%", "no #1", "plain", "it's", "[x]", "{y}", "a: b", "$HOME"),
    *("trailing ", " leading", "ünï cödé", "a:b", "~tilde", "~", "${runs}", "a${x", r"b\${runs}", '"double"'),
    *("'single'", "2019", "1e5", "true", "*", "[0-9]", r"a\b", "back\\", r"a\,b", "-dash", "x,[1],{a:b}", "new\nline"),
    *("tab\there", "@at", "a|b;c&d", "::", "???", "choice(a,b)", "null (copy)", "+plus", "'", '"', r"\'", "a,'b,c'"),
)


def read(arguments: list[str], key: str, sweep: bool = False) -> list[str]:
    """The values of a key in a command with these arguments, one per cell."""
    cells = [quote_paths(arguments, sweep)]
    if sweep:
        parsed = OverridesParser.create().parse_overrides(cells[0])
        (cells,) = BasicSweeper.split_arguments(parsed, None)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return [OmegaConf.select(compose("config", list(cell)), key) for cell in cells]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_existing_path_is_read_as_that_path(place: Path, name: str, sweep: bool) -> None:
    (place / name).mkdir(parents=True)
    for argument in (name, f"./{name}", f"{place}/{name}"):
        (result,) = read(["corpus=folder", f"corpus.root={argument}"], "corpus.train.root", sweep)
        assert Path(result).expanduser().samefile(place / name)
        (result,) = read([f"runs={argument}/new"], "runs", sweep)
        assert Path(result).expanduser().parent.samefile(place / name) and Path(result).name == "new"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_characters="\0/", codec="utf-8"), min_size=1, max_size=12), st.booleans())
def test_any_file_name_is_read_unchanged(tmp_path_factory: pytest.TempPathFactory, name: str, sweep: bool) -> None:
    if name in (".", ".."):
        return
    folder = tmp_path_factory.mktemp("any")
    try:
        (folder / name).touch()
    except OSError:  # for example too long in bytes
        return
    quoted = quote_paths([f"of={folder}/{name}"], sweep)
    (override,) = OverridesParser.create().parse_overrides(quoted)
    assert not override.is_sweep_override()
    again = f"of={override.get_value_element_as_str()}"  # as the sweeper passes it to a cell
    (override,) = OverridesParser.create().parse_overrides([again])
    assert OmegaConf.create({"of": override.value()}).of == f"{folder}/{name}"


@pytest.mark.parametrize(
    ("argument", "path"),
    [
        ("of=not there, yet", "not there, yet"),
        ("of=year=2019", "year=2019"),
        ("of='quoted'", "quoted"),
        ('of="quoted, twice"', "quoted, twice"),
        (r"of='it\'s'", "it's"),
        (r"of=a\,b\=c", "a,b=c"),
        ("of=null", None),
        ("of=NULL", None),
        ("of=", ""),
        ("of=${runs}/year=2019", "runs/year=2019"),
        ("+of=a,b", "a,b"),
    ],
)
def test_a_nonexistent_path_is_unquoted_and_resolved(argument: str, path: str | None) -> None:
    (line,) = quote_paths([argument])
    (override,) = OverridesParser.create().parse_overrides([line])
    assert OmegaConf.create({"runs": "runs", "of": override.value()}).of == path


def test_a_tilde_means_the_home_directory_unless_a_folder_has_that_name(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place / "home"))
    assert read(["runs=~/a,b"], "runs") == [f"{place}/home/a,b"]
    urls = read(["corpus=webdataset", "corpus.urls=~/{0..1}.tar::~/2.tar"], "corpus.train.urls")
    assert urls == [f"{place}/home/{{0..1}}.tar::{place}/home/2.tar"]
    (place / "~").mkdir()
    assert read(["runs=~/x"], "runs") == [f"{place}/~/x"]


@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize(
    ("words", "urls"),
    [
        (["d/{000..009}.tar"], "d/{000..009}.tar"),
        (['"d/{000..009}.tar"'], "d/{000..009}.tar"),
        (["d/{a,b}.tar::e,f/{0..1}.tar"], None),
        (["d/0.tar", "d/1.tar", "d/2.tar"], "d/0.tar::d/1.tar::d/2.tar"),  # a shell's expansion of d/{0..2}.tar
        (["pipe:aws s3 cp s3://b/k=1/{0..1}.tar -"], "pipe:aws s3 cp s3://b/k=1/{0..1}.tar -"),
    ],
)
def test_lists_of_shards_keep_their_braces_and_colons(words: list[str], urls: str | None, sweep: bool) -> None:
    result = read(["corpus=webdataset", *(f"corpus.urls={word}" for word in words)], "corpus.train.urls", sweep)
    if urls is None:
        urls, cells = words[0], ["d/{a,b}.tar::e", "f/{0..1}.tar"]
        assert result == (cells if sweep else [urls])
    else:
        assert result == [urls]


def test_commas_separate_sweep_values_unless_they_belong_to_an_existing_path(place: Path) -> None:
    (place / "a,b").mkdir()
    assert read(["runs=x=1,it's,[y]"], "runs", True) == ["x=1", "it's", "[y]"]
    assert read(["runs=a,b"], "runs", True) == ["a,b"]
    assert read(["runs=c,a,b,a,b/new"], "runs", True) == ["c", "a,b", "a,b/new"]
    assert read(["runs='q,r',\"s,t\",u"], "runs", True) == ["q,r", "s,t", "u"]
    assert read(["runs=choice(q,r)"], "runs", True) == ["q", "r"]
    assert read(["runs=a\\,c,null"], "runs", True) == ["a,c", None]


def test_all_other_arguments_are_unchanged() -> None:
    given = [
        "-m", "--config-dir=a,b", "ratio=0.5,0.8", "prune=random,rsprune", "corpus.classes=[a,b]", "prompt=[x,y]",
        "~metadata.fields.date", "+eval.targets.loss=0.1", "encoder@evaluation_encoder=inception", "seed=range(0,3)",
        "sample.locations=[{name:Amazon,lon:-60,lat:-3}]", "hydra.mode=MULTIRUN", "ablation.changes=['prune.x=1']",
    ]  # fmt: skip
    assert quote_paths(given, True) == quote_paths(given, False) == given


@pytest.mark.parametrize(
    ("arguments", "sweeps"),
    [(["ratio=0.5"], False), (["-m"], True), (["ratio=1,2", "--multirun"], True), (["hydra.mode=MULTIRUN"], True)],
)
def test_sweeps_are_distinguished_from_single_runs(arguments: list[str], sweeps: bool) -> None:
    assert is_sweep(arguments) == sweeps


def test_every_option_that_takes_a_path_is_recognised() -> None:
    """The keys with a folder or a file in the commands' documents and error messages."""
    known = (
        "runs", "results", "foundation", "selection", "of", "out", "corpus.root", "corpus.masks", "corpus.urls",
        "corpus.path", "corpus.val.root", "reference.root", "model.pretrained", "autoencoder.path", "encoder.path",
        "evaluation_encoder.folder", "text_encoder.path", "bench.root", "long_tail.root", "sample.out", "train.resume",
        "demo.super_resolution", "+out", "++corpus.root",
    )  # fmt: skip
    others = ("ratio", "corpus", "corpus.name", "prompt", "to", "push_to_hub", "corpus.classes", "train.loop.steps")
    assert [key for key in (*known, *others) if is_path(key)] == list(known)


def small_folder(root: Path) -> None:
    random = np.random.default_rng(0)
    for scene in ("sea", "field"):
        (root / scene).mkdir(parents=True)
        for index in range(6):
            Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(root / scene / f"{index}.png")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["year=2019/region=eu", "a,b", "Images (1)", "it's", "[x]", "{y}", "$HOME", "~t "])
def test_a_command_reads_and_writes_folders_with_unusual_names(place: Path, repository: Path, name: str) -> None:
    small_folder(place / name)
    options = [
        "corpus=folder", f"corpus.root={name}", "corpus.workers=0", "corpus.train.split=all",
        "corpus.train.resolution=16", "encoder.input_size=32", "reference=folder", f"reference.root={name}",
        "reference.per_scene=4", "prune=random", "ratio=0.5", "tracker=none", f"runs=out/{name}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(repository / "prune/run.py"), *options], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    directory = place / done.stdout.splitlines()[-1].removeprefix("selection: ")
    assert directory.parent == place / "out" / name / "selection"
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["images"], summary["kept"]) == (12, 6)
