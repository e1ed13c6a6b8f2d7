"""The model card of a pretrained pipeline: training data, training, metrics, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from train.metadata import FOLDER


def model_card(cfg: DictConfig, summary: Mapping[str, Any], selection: Mapping[str, Any]) -> str:
    """The model card in Markdown, with the hub's metadata header.

    Args:
        summary: of the pretraining run.
        selection: summary of the run's selection.
    """
    return "\n".join(
        (_header(cfg, summary), _usage(cfg, summary), _data(cfg, summary, selection), _training(cfg, summary))
    )


def _header(cfg: DictConfig, summary: Mapping[str, Any]) -> str:
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [remote-sensing, latent-diffusion, rs-prune]
---

# Latent diffusion on {cfg.corpus.name}, {summary["method"]} at {summary["ratio"]:g} removed

Text-conditioned latent diffusion for remote-sensing images of {_side(cfg)} px, pretrained on a pruned corpus.
"""


def _usage(cfg: DictConfig, summary: Mapping[str, Any]) -> str:
    arguments = 'prompt="a satellite image of desert"'
    if summary["pipeline"] == "PixArtAlphaPipeline":
        arguments += ", max_sequence_length=pipeline.tokenizer.model_max_length, use_resolution_binning=False"
        arguments += ", clean_caption=False"
    metadata = ""
    if cfg.metadata.fields:
        given = "'sample.metadata={" + ",".join(f"{name}:NUMBER" for name in cfg.metadata.fields) + "}'"
        metadata = (
            f"\n## Metadata\n\nThe model also reads {', '.join(cfg.metadata.fields)}, encoded by `{FOLDER}/`. Plain "
            "diffusers, as above, samples without them. With them:\n\n```\npython scripts/sample.py "
            f'foundation=RUN prompt="a satellite image of desert" {given}\n```\n'
        )
    return f"""## Use

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH_OF_THIS_FOLDER")
image = pipeline({arguments},
                 num_inference_steps={cfg.eval.steps}, guidance_scale={cfg.eval.guidance_scale}).images[0]
```
{metadata}"""


def _data(cfg: DictConfig, summary: Mapping[str, Any], selection: Mapping[str, Any]) -> str:
    scenes = "\n".join(
        f"| {name or '(none)'} | {count['before']:,} | {count['after']:,} |"
        for name, count in selection["scenes"].items()
    )
    return f"""## Data

- corpus: {cfg.corpus.name}, {selection["images"]:,} images, of which {summary["images"]:,} were kept
- selection: `prune={summary["method"]} ratio={summary["ratio"]:g}`, seed {summary["seed"]}, `{summary["selection"]}`
- licence of the data: {cfg.corpus.get("licence") or "not stated (corpus.licence)"}

| scene | images | kept |
| --- | --- | --- |
{scenes}
"""


def _training(cfg: DictConfig, summary: Mapping[str, Any]) -> str:
    measured = {name: value for name, value in sorted(summary["metrics"].items()) if value is not None}
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in measured.items())
    return f"""## Training

- {summary["parameters"]:,} parameters, {summary["steps"]:,} steps of {cfg.train.loop.batch_size} images,
  {_resumed(summary)}{summary["seconds"]:.0f} s, {summary["training_flops_per_image"] / 1e9:.3g} GFLOP an image
- objective: {cfg.train.objective.prediction}; captions dropped: {cfg.train.objective.caption_dropout:.0%}; weights
  averaged with a half-life of {cfg.train.loop.ema_halflife:,} images; precision: {cfg.train.mixed_precision}

## Metrics

On {cfg.eval.images} held-out images of each set of the split {summary["split"]}, {cfg.eval.steps} steps, guidance
{cfg.eval.guidance_scale}:
`balanced_` draws every scene alike, `natural_` as the corpus is. `fd_NAME` is a Fréchet distance on that encoder's
features; `fid` is on InceptionV3's alone.

| metric | value |
| --- | --- |
{metrics}
"""


def _resumed(summary: Mapping[str, Any]) -> str:
    return f"the first {summary['resumed']['step']:,} of them in another run, " if "resumed" in summary else ""


def _side(cfg: DictConfig) -> int:
    return cfg.train.views.crop or cfg.corpus.train.resolution
