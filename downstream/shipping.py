"""The shipped networks of tasks: the files that they keep from their run, and their model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from downstream.drawing import PALETTE
from runtime.artefacts import COMPLETE, read_json, write_json
from train.shipped import ship, shipped_folder

SAMPLES = Path("samples") / "inputs.npy"
#: Title and command for the model card of each task's network.
_COMMANDS = {
    "super_resolution": ("Super-resolution, {factor} times", "python scripts/upscale.py in=PATH out=PATH"),
    "semantic_synthesis": ("Images from masks", "python scripts/synthesize.py mask=PATH out=PATH"),
}


def ship_task(cfg: DictConfig, run: Path, target: Path, texts: Iterable[str]) -> None:
    """Write the network of a task's run like `train.shipped.ship`, with its conditions and one held-out input.

    Args:
        texts: the captions that the foundation and the task were trained on.
    """
    stage = read_json(run / COMPLETE)
    ship(run, target, texts, task_card(cfg, read_json(run / "summary.json"), stage["inputs"]["condition"]))
    write_json(target / COMPLETE, {"stage": stage["stage"], "inputs": {"condition": stage["inputs"]["condition"]}})
    if (run / PALETTE).is_file():
        write_json(target / PALETTE, read_json(run / PALETTE))
    (target / SAMPLES).parent.mkdir()
    np.save(target / SAMPLES, np.load(run / SAMPLES, allow_pickle=False)[:1])


def shipped_network(cfg: DictConfig, task: str) -> Path | None:
    """The folder of a task's shipped network; None if there is none, or if its enlargement factor differs."""
    folder = shipped_folder(task)
    if not (folder / "model_index.json").is_file():
        return None
    factor = read_json(folder / COMPLETE)["inputs"]["condition"].get("factor")
    return folder if factor in (None, cfg.downstream.super_resolution.factor) else None


def task_card(cfg: DictConfig, summary: Mapping[str, Any], condition: Mapping[str, Any]) -> str:
    """The model card in Markdown, with the hub's metadata header.

    Args:
        summary: content of the run's summary.json.
        condition: description of the task's condition, from the run's fingerprint.
    """
    title, command = _COMMANDS[summary["task"]]
    measured = {name: value for name, value in sorted(summary["metrics"].items()) if value is not None}
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in measured.items())
    return f"""---
library_name: diffusers
pipeline_tag: image-to-image
tags: [remote-sensing, latent-diffusion, rs-prune]
---

# {title.format(**condition)}, fine-tuned from the shipped foundation

## Use

```
{command}
python scripts/demo.py
```

It is a plain diffusers pipeline: `DiffusionPipeline.from_pretrained("PATH_OF_THIS_FOLDER")`.

## Training

- corpus: {cfg.corpus.name}, {summary["training_images"]:,} images of the split train
- licence of the data: {cfg.corpus.get("licence") or "not stated (corpus.licence)"}
- {summary["parameters"]:,} parameters, {summary["steps"]:,} steps of {cfg.downstream.loop.batch_size} images,
  {summary["seconds"]:,.0f} s

## Metrics

On {summary["images"]:,} held-out images of the split {summary["split"]}, {cfg.downstream.steps} solver steps.

| metric | value |
| --- | --- |
{metrics}
"""
