"""A stage stores its code's version; its directory records the commit, packages and config of the build."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from corpus.index import index_corpus, indexes_of
from corpus.sources.folder import ImageFolder
from prune.entropy import LocalEntropy
from prune.features import corpus_entropy
from runtime.artefacts import COMPLETE, class_name, plain, provenance, read_json, stage, stage_fingerprint, write_json
from runtime.provenance import command, commit, resolved
from runtime.versions import ROOT, SOURCES, STAGES, Stage, code_hash, modules_of, outdated, sources, versions_of
from scripts.export import WITH_ORIGINALS

GIT = shutil.which("git")
CODE = '"""Doc."""\n\ndef f(x: int) -> int:\n    """Doc."""\n    return x + 1\n'


def raised(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Simulates a change of a stage's code that changes its results."""
    old = STAGES[name]
    monkeypatch.setitem(STAGES, name, Stage(old.version + 1, old.modules, old.after))


# ---------------------------------------------------------------- versions and code


def test_every_stage_has_unchanged_code_since_its_version_was_stored() -> None:
    assert outdated(read_json(SOURCES)) == []


def test_every_stage_is_in_the_table_with_the_module_that_builds_it() -> None:
    calls = {}
    for path in ROOT.glob("*/**/*.py"):
        if path.relative_to(ROOT).parts[0] in ("tests", "runtime") or path.is_relative_to(ROOT / ".venv"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "stage":
                code = next((key.value for key in node.keywords if key.arg == "code"), node.args[1])
                calls[code.value] = path
    assert set(calls) == set(STAGES)
    assert [name for name, path in calls.items() if path not in modules_of(name).values()] == []


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (CODE.replace("Doc.", "Another text."), True),
        (CODE.replace("x + 1", "(x  +  1)  # why"), True),
        (CODE.replace("x + 1", "x + 2"), False),
        (CODE.replace("x + 1", "x - 1"), False),
        (CODE.replace("x: int", "y: int"), False),
        (CODE + "\nprint('Doc.')\n", False),
    ],
)
def test_code_hash_ignores_comments_formatting_and_docstrings(changed: str, same: bool) -> None:
    assert (code_hash(changed) == code_hash(CODE)) == same


def test_changed_code_is_reported_until_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "encoders").mkdir()
    (tmp_path / "encoders" / "net.py").write_text(CODE)
    monkeypatch.setattr("runtime.versions.STAGES", {"embedding": Stage(version=1, modules=("encoders",))})
    stored = sources(tmp_path)
    assert outdated(stored, tmp_path) == []
    (tmp_path / "encoders" / "net.py").write_text(CODE.replace("1", "2"))
    (line,) = outdated(stored, tmp_path)
    assert line == (
        "code of stage embedding changed (encoders/net.py): raise its version in runtime/versions.py if "
        "existing results change, then run `python scripts/stage_sources.py`"
    )
    monkeypatch.setattr("runtime.versions.STAGES", {"embedding": Stage(version=2, modules=("encoders",))})
    assert outdated(stored, tmp_path)[0].startswith("version of stage embedding is 2, but 1 in stage_sources.json")
    stored = sources(tmp_path)
    assert outdated(stored, tmp_path) == []
    (tmp_path / "encoders" / "new.py").write_text(CODE)
    assert "(encoders/new.py)" in outdated(stored, tmp_path)[0]


def test_a_stage_without_a_version_raises_a_lookup_error(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"'unheard' is not in runtime/versions\.py"):
        stage(tmp_path, "unheard", {}, lambda directory: None)
    assert list(tmp_path.iterdir()) == []


def test_a_raised_version_rebuilds_its_stage_and_dependent_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("entropy", "embedding", "selection", "subset", "corpus", "held_out")
    before = {name: stage_fingerprint(name, {"seed": 1}) for name in names}
    first = stage(tmp_path, "entropy", {"seed": 1}, lambda directory: None)
    raised(monkeypatch, "entropy")
    after = {name: stage_fingerprint(name, {"seed": 1}) for name in names}
    assert {name for name in names if before[name] != after[name]} == {"entropy", "selection"}
    assert stage(tmp_path, "entropy", {"seed": 1}, lambda directory: None) != first
    expected = {name: STAGES[name].version for name in ("selection", "embedding", "entropy")}
    assert versions_of("selection") == expected and expected["entropy"] == 2


def test_indexes_and_scans_of_older_versions_are_not_reused(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, measured = tmp_path / "runs", []
    source = partial(ImageFolder, root=str(tiny_folder), resolution=16, split="all", workers=1)
    monkeypatch.setattr(LocalEntropy, "__call__", lambda self, image: measured.append(1) or 1.0)
    corpus_entropy(index_corpus(source(), runs), LocalEntropy(), runs)
    count = len(measured)
    (tiny_folder / "new.png").write_bytes((tiny_folder / "dry_river" / "a.png").read_bytes())
    grown = index_corpus(source(), runs)
    corpus_entropy(grown, LocalEntropy(), runs)
    assert len(measured) - count < 3, "what is known is taken over"
    raised(monkeypatch, "entropy")
    measured.clear()
    corpus_entropy(grown, LocalEntropy(), runs)
    assert len(measured) >= grown.readable.sum()
    assert len(list(indexes_of(plain(source()), runs))) == 2
    raised(monkeypatch, "corpus")
    assert list(indexes_of(plain(source()), runs)) == []


# ---------------------------------------------------------------- provenance of a stage


def test_a_stage_records_its_version_commit_packages_and_config(tmp_path: Path) -> None:
    assert read_json(stage(tmp_path, "bench", {"seed": 0}, lambda directory: None) / COMPLETE)["config"] is None
    with command(OmegaConf.create({"seed": 1, "twice": "${seed}"})):
        built = stage(tmp_path, "subset", {"seed": 1}, lambda directory: None)
    record = read_json(built / COMPLETE)
    assert record["stage"] == "subset" and record["fingerprint"] == built.name and record["inputs"] == {"seed": 1}
    assert record["version"] == versions_of("subset")["subset"]
    assert set(record["after"]) == {"embedding", "measured", "held_out"}
    assert record["config"] == {"seed": 1, "twice": 1}
    assert record["commit"] == commit()
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["torch"] == metadata.version("torch")
    assert provenance(built) == {"commit": record["commit"], "versions": record["versions"]}
    write_json(built / COMPLETE, {"stage": "subset"})
    assert provenance(built) == provenance(tmp_path) == {"commit": "unknown", "versions": {}}


def test_a_cached_stage_keeps_the_commit_of_its_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.provenance.commit", lambda: "first")
    stage(tmp_path, "bench", {}, lambda directory: monkeypatch.setattr("runtime.provenance.commit", lambda: "second"))
    assert provenance(stage(tmp_path, "bench", {}, lambda directory: None))["commit"] == "first"


def test_the_recorded_config_contains_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RS_PRUNE_TEST", "from the environment")
    cfg = OmegaConf.create(
        {
            "plain": "a",
            "copy": "${plain}",
            "hub_token": "hf_1",
            "nested": [{"api_key": "k", "max_tokens_per_text": 3, "password": None}],
            "asked": "${oc.env:RS_PRUNE_TEST}",
            "handed_on": "x/${asked}",
            "unset": "${oc.env:RS_PRUNE_UNSET,null}",
        }
    )
    noted = resolved(cfg)
    assert noted == {
        "plain": "a",
        "copy": "a",
        "nested": [{"max_tokens_per_text": 3}],
        "asked": "${oc.env:RS_PRUNE_TEST}",
        "handed_on": "x/${asked}",
        "unset": None,
    }
    cfg.broken = "${nowhere}"
    assert resolved(cfg)["broken"] == "${nowhere}"


@pytest.mark.skipif(GIT is None, reason="git is not installed")
def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        own = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-C", str(tmp_path)]
        return subprocess.run([GIT, *own, *words], capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "inside").mkdir()
    assert commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    git("tag", "v1")
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))
    commit.cache_clear()
    assert commit(tmp_path) == git("--git-dir", str(tmp_path / ".git"), "rev-parse", "HEAD")[:12]
    (tmp_path / "untracked.txt").write_text("1")
    commit.cache_clear()
    assert not commit(tmp_path).endswith("-dirty")
    (tmp_path / "code.py").write_text("2")
    assert not commit(tmp_path).endswith("-dirty"), "asked once a process"
    commit.cache_clear()
    assert commit(tmp_path).endswith("-dirty")
    assert commit(tmp_path / "inside") == "unknown"  # independent of a repository that contains it
    monkeypatch.setenv("PATH", "")
    commit.cache_clear()
    assert commit(tmp_path) == "unknown"
    commit.cache_clear()


# ---------------------------------------------------------------- classes in fingerprints


def test_classes_of_the_same_name_have_different_fingerprints(tmp_path: Path) -> None:
    for name in ("one", "other"):
        text = "from dataclasses import dataclass\n@dataclass\nclass Options:\n    rate: int = 1\n"
        (tmp_path / f"module_{name}.py").write_text(text)
    code = (
        "from runtime.artefacts import fingerprint; import module_one, module_other;"
        "print(fingerprint(x=module_one.Options()) != fingerprint(x=module_other.Options()))"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_a_class_has_the_same_name_in_a_program_and_when_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert class_name(ImageFolder) == "corpus.sources.folder.ImageFolder"
    assert WITH_ORIGINALS["corpus.sources.folder.ImageFolder"] is ImageFolder
    as_program = type("Phase", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / "train" / "autoencoder.py"), raising=False)
    assert class_name(as_program) == "train.autoencoder.Phase"
