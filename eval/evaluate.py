"""Metrics of any diffusers pipeline or image folder: `python eval/evaluate.py pipeline=DIR`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.index import index_corpus
from corpus.sources.folder import ImageFolder
from encoders.embedding import embed
from eval.generate import generate
from eval.held_out import HeldOut, held_out_sets
from eval.metrics import compare_features
from runtime.application import run
from runtime.artefacts import file_digest, fingerprint, read_json, stage, write_json
from runtime.errors import UserError
from runtime.tracking import track


def evaluate(cfg: DictConfig) -> Path:
    """Compare `cfg.pipeline` with both held-out sets; the result directory has metrics.json.

    Raises:
        UserError: there is neither a pipeline nor an image folder.
    """
    if cfg.pipeline is None:
        raise UserError("nothing to evaluate: give pipeline=DIR, a saved diffusers pipeline or a folder of images")
    source = Path(cfg.pipeline)
    if not source.is_dir():
        raise UserError(f"pipeline={source} is no directory: give a saved diffusers pipeline or a folder of images")
    encoder = instantiate(cfg.eval.encoder)
    test = index_corpus(instantiate(cfg.corpus.test), cfg.runs)
    sets = held_out_sets(test, encoder, cfg.eval.images, cfg.seed, cfg.runs)
    is_pipeline = (source / "model_index.json").is_file()
    if is_pipeline:
        key = fingerprint(files=[file_digest(path) for path in sorted(source.rglob("*.safetensors"))])
    else:
        folder = index_corpus(ImageFolder(root=str(source), resolution=test.resolution), cfg.runs)
        key = folder.fingerprint

    def build(directory: Path) -> None:
        with track(cfg, "evaluate", source.name) as tracker:
            metrics = {}
            for name, held in sets.items():
                if is_pipeline:
                    images = _draw(cfg, source, held)
                else:
                    images = folder.images[np.flatnonzero(folder.readable)][: len(held.rows)]
                features = embed(encoder, images)
                measured = compare_features(features, held.features[: len(features)], encoder.name)
                metrics |= {f"{name}_{key}": value for key, value in measured.items()}
            write_json(directory / "metrics.json", metrics)
            tracker.summary(metrics)

    inputs = {"source": key, "eval": cfg.eval, "held_out": test.fingerprint, "seed": cfg.seed}
    return stage(cfg.runs, "evaluate", inputs, build)


def _draw(cfg: DictConfig, source: Path, held: HeldOut) -> np.ndarray:
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise UserError(f"pipeline={source} does not load as a diffusers pipeline: {reason}") from error
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    return generate(
        pipeline,
        held.captions,
        steps=cfg.eval.steps,
        guidance_scale=cfg.eval.guidance_scale,
        seed=cfg.eval.seed,
        label=f"generate {held.name}",
    )


def main(cfg: DictConfig) -> None:
    directory = evaluate(cfg)
    print(json.dumps(read_json(directory / "metrics.json")))
    print(f"results: {directory}")


if __name__ == "__main__":
    run(main)
