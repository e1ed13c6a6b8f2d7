"""The examples of docs/add_a_*.md, exactly as written there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml

from captioning.captioners.captioner import ImageMetadata
from corpus.index import index_corpus
from eval.metrics import METRICS, Metric
from prune import select_from_arrays

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


def defined(page: str) -> dict[str, Any]:
    """The definitions in the first Python block of a page."""
    module = ModuleType("example_of_docs")
    sys.modules[module.__name__] = module  # dataclasses look up their module there
    try:
        exec(compile(blocks(page, "python")[0], page, "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module.__dict__


def test_the_example_method_keeps_its_budget_and_spreads_over_entropies() -> None:
    method = defined("add_a_method.md")["Strided"]()
    random = np.random.default_rng(0)
    entropy, readable = random.uniform(0, 8, 200), np.arange(200) % 10 != 0
    kept = select_from_arrays(
        method, random.normal(size=(200, 8)).astype(np.float32), ratio=0.85, entropy=entropy, readable=readable
    ).kept
    assert len(kept) == 30 == len(set(kept.tolist())) and readable[kept].all()
    assert abs(np.median(entropy[kept]) - np.median(entropy[readable])) < 0.5
    [config] = blocks("add_a_method.md", "yaml")
    assert yaml.safe_load(config) == {"_target_": "prune.methods.strided.Strided", "offset": 0.0}


def test_the_example_captioner_describes_each_image_and_differs_by_attempt() -> None:
    [config] = blocks("add_a_captioner.md", "yaml")
    options = yaml.safe_load(config)
    assert options.pop("_target_") == "captioning.captioners.brightness.Brightness"
    captioner = defined("add_a_captioner.md")["Brightness"](**options)
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 250)])
    metadata = [ImageMetadata("BaseballField"), ImageMetadata()]
    first, second = (captioner(images, metadata, attempt, [0, 0]) for attempt in (0, 1))
    assert first == ["a dark baseball field", "a bright land"] and set(first).isdisjoint(second)


def test_the_example_corpus_is_indexed(tmp_path: Path) -> None:
    source = defined("add_a_corpus.md")["Noise"](count=6, resolution=16)
    corpus = index_corpus(source, tmp_path)
    assert corpus.readable.all() and corpus.images.shape == (6, 16, 16, 3)
    assert corpus.manifest["id"].tolist() == [f"noise/{row}" for row in range(6)]
    [config] = blocks("add_a_corpus.md", "yaml")
    assert yaml.safe_load(config)["train"]["_target_"] == "corpus.sources.noise.Noise"


def test_the_example_metric_is_an_entry_of_the_table() -> None:
    [entry] = blocks("add_a_metric.md", "python")
    made = {"Metric": Metric}
    exec(entry, made)
    [(key, metric)] = made["METRICS"].items()
    assert key not in METRICS and metric.compute(np.full((2, 4, 4, 3), 7, np.uint8)) == 7
    text = (DOCS / "add_a_metric.md").read_text(encoding="utf-8")
    for field in Metric._fields:
        assert f"| `{field}` |" in text
