"""Cells of the tables that several commands fill: a subset judged without training, its row, its tables."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from eval.quality import subset_quality
from eval.waste import ImageRows
from prune.features import corpus_embeddings
from prune.selection import select
from report.tables import build_tables, read_results, to_markdown, write_tables
from runtime.artefacts import fingerprint, stage, write_json
from train.components import load_encoder
from train.foundation import held_out

#: Images of the corpus that say which size of a JPEG is low.
CORPUS_SAMPLE = 20_000


def with_method(method: str, ratio: float | None = None, overrides: Sequence[str] = ()) -> DictConfig:
    """This run's config with another pruning method, another ratio if one is given, and further overrides."""
    chosen = [f"prune={method}"] if ratio is None else [f"prune={method}", f"ratio={ratio}"]
    return compose("config", overrides=[*HydraConfig.get().overrides.task, *chosen, *overrides])


def subset(cfg: DictConfig, method: str) -> Path:
    """Measure the selected images themselves; cached."""
    selection, corpus = select(cfg, method)
    encoder = load_encoder(cfg)
    sets = held_out(cfg)

    def build(directory: Path) -> None:
        rows = np.flatnonzero(pd.read_parquet(selection / "selection.parquet")["kept"].to_numpy())
        embeddings = corpus_embeddings(corpus, encoder, cfg.runs)
        readable = np.random.default_rng([cfg.seed, 320]).permutation(np.flatnonzero(corpus.readable))
        metrics = subset_quality(
            rows,
            sets,
            embeddings,
            encoder.name,
            images=ImageRows(corpus.images, rows),
            corpus_sample=ImageRows(corpus.images, np.sort(readable[:CORPUS_SAMPLE])),
            scenes=corpus.manifest["scene"].to_numpy(dtype=object),
            seed=cfg.seed,
        )
        write_json(directory / "metrics.json", metrics)

    inputs = {"version": 2, "selection": selection.name, "held_out": sets["balanced"].corpus.fingerprint}
    inputs |= {"images": cfg.eval.images, "encoder": cfg.eval.encoder, "seed": cfg.seed}
    return stage(cfg.runs, "subset", inputs, build)


def result_row(
    cfg: DictConfig,
    kind: str,
    method: str,
    ratio: float | None,
    metrics: Mapping[str, float],
    directory: Path,
    *,
    step: int = 0,
    **fields: str,
) -> dict:
    """A row of results.jsonl (the contract's fields, and further ones of an ablation)."""
    return {
        "stage": kind,
        "corpus": cfg.corpus.name,
        "prune": method,
        "ratio": ratio,
        "seed": int(cfg.seed),
        "step": step,
        **fields,
        "metrics": dict(metrics),
        "fingerprint": fingerprint(directory=directory.name, step=step, **fields),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def publish(results: Path, name: str) -> None:
    """Write the tables of `results/results.jsonl`, print the one of this name, and say where they are."""
    tables = build_tables(read_results(results / "results.jsonl"))
    write_tables(tables, results)
    print(to_markdown(name, tables[name]))
    print(f"results: {results}")
