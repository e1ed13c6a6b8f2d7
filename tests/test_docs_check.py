"""The document checker: each kind of fault is found, with its line, and correct text is not reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.docs_check import (
    ROOT,
    Document,
    block_problems,
    documents,
    generated_problems,
    link_problems,
    prose_problems,
)


def problems(path: Path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    document = Document.read(path)
    return [problem for find in (link_problems, block_problems, prose_problems) for problem in find(document)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](gone.md)", "1: link to gone.md: no such file"),
        ("# One\n\n[a](#two)", "3: link to #two: no such heading"),
        ("[a](other.md#far-away)", "1: link to other.md#far-away: no such heading"),
        ("![a](images/gone.png)", "1: link to images/gone.png: no such file"),
        ("```python\nx = 1\ny = (\n```", "3: Python does not parse: '(' was never closed"),
        ("text\n\n```sh\nif true\n```", "4: the shell does not parse: "),
        ("```sh\nA=1 make nothing\n```", "2: make nothing: no such target"),
        ("text `make nothing X=1`", "1: make nothing: no such target"),
        ("```\ntrue\npython prune/gone.py\n```", "3: prune/gone.py: no such file"),
        ("```sh\ntrue && python prune/run.py \\\n  prune=nothing\n```", "2: prune/run.py: In 'config': Could not find"),
        ("`python prune/run.py prun=random`", "1: prune/run.py: Key 'prun' is not in struct"),
    ],
)
def test_each_kind_of_fault_is_found_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "other.md").write_text("# Near\n", encoding="utf-8")
    [result] = problems(tmp_path / "document.md", text)
    assert result.startswith(problem)


@pytest.mark.parametrize(
    "text",
    [
        "# The `first`: what, and why?\n\n[a](#the-first-what-and-why) [b](other.md#near) [c](https://example.org/x.md)",
        "```sh\necho '[not a link](gone.md)'\n# make nothing\n```",
        "`[a](gone.md)`",
        "# Twice\n\n# Twice\n\n[a](#twice-1)",
        "```python\nawaited = 1\n```\n\n```torchgeo\nif\n```",
        "```sh\npython prune/run.py corpus=folder corpus.root=DIR ratio=0.5 | tee a.log\nmake test\n```",
        "```sh\npython prune/run.py selection=$(sed -n 's/^x: //p' a.log)\n```",
        "`python train/pretrain.py -m prune=random,rsprune`, `python convert.py a=1`, `python prune/run.py [prune=x]`",
        "`python prune/run.py prune=mine` with `configs/prune/mine.yaml`",
    ],
)
def test_correct_text_is_not_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.md").write_text("# Near\n", encoding="utf-8")
    assert problems(tmp_path / "document.md", text) == []


def test_generated_tables_that_were_edited_are_found(tmp_path: Path) -> None:
    for name in ("README.md", "docs/results.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "results").symlink_to(ROOT / "results")
    assert list(generated_problems(tmp_path)) == []
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    at = readme.index("<!-- results -->") + 300
    (tmp_path / "README.md").write_text(readme[:at] + "9" + readme[at:], encoding="utf-8")
    [problem] = generated_problems(tmp_path)
    assert problem.startswith("README.md: its tables are not those of results/published")


def test_all_documents_are_checked() -> None:
    result = {document.path.relative_to(ROOT).as_posix() for document in documents(ROOT)}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/library.md", "docs/results.md"} <= result
