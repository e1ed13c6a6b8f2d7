"""The whole chain: prune -> pretrain -> downstream -> evaluate -> tables and report. `make reproduce` runs this."""

from __future__ import annotations

import collections
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from downstream.conditional import held_out_part
from downstream.semantic_synthesis import semantic_synthesis
from downstream.super_resolution import bicubic_baseline, super_resolution
from eval.metrics import kernel_distance_difference
from eval.reference_rows import against_itself, halves, real_train
from prune.features import corpus_embeddings, scan_corpus
from prune.selection import select
from report.results_report import rebuild
from report.tables import append_result
from runtime.application import run
from runtime.artefacts import is_main_process, read_json, stage, write_json
from runtime.errors import UserError
from runtime.tracking import track
from scripts.cells import result_row, subset, with_method
from train.components import load_autoencoder, load_encoder
from train.foundation import CONVERGENCE, GENERATED, held_out, pretrain
from encoders.pixels import to_tensor, to_uint8
from train.latents import decode, encode, fit_pca

#: What every other method is compared with, image by image.
BASELINE = "random"


def floors(cfg: DictConfig) -> Path:
    """Measure what no method can beat; cached."""
    encoder = load_encoder(cfg)
    corpus = scan_corpus(instantiate(cfg.corpus.train), cfg.runs, instantiate(cfg.entropy), instantiate(cfg.encoder))
    # the downstream tables compare fewer images, and a Fréchet distance depends on how many: floors of their own
    sets = {**held_out(cfg), "": held_out_part(cfg)}
    autoencoder, key = load_autoencoder(cfg)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    embeddings = corpus_embeddings(corpus, encoder, cfg.runs)
    channels = autoencoder.config.latent_channels

    def build(directory: Path) -> None:
        pca = fit_pca(corpus, channels, cfg.seed)
        autoencoder.to(device)
        generator = torch.Generator(device).manual_seed(cfg.seed)  # a KL autoencoder samples its latents
        rebuilt: dict[str, dict[str, np.ndarray]] = {"reconstruction": {}, f"pca{channels}": {}}
        with torch.inference_mode():
            for name, held in sets.items():
                batches = [to_tensor(held.images[start : start + 100]) for start in range(0, len(held.rows), 100)]
                rebuilt["reconstruction"][name] = np.concatenate(
                    [to_uint8(decode(autoencoder, encode(autoencoder, x.to(device), generator))) for x in batches]
                )
                rebuilt[f"pca{channels}"][name] = np.concatenate(
                    [to_uint8(pca.decode(pca.encode(batch))) for batch in batches]
                )
        rows = {
            "real_train": real_train(sets, corpus, embeddings, encoder, cfg.seed),
            "halves": halves(sets, encoder),
            **{name: against_itself(sets, images, encoder) for name, images in rebuilt.items()},
        }
        write_json(directory / "floors.json", rows)
        balanced = slice(0, 12)
        np.save(directory / "truth.npy", sets["balanced"].images[balanced])
        for name, images in rebuilt.items():
            np.save(directory / f"{name.rstrip('0123456789')}.npy", images["balanced"][balanced])

    inputs = {
        "corpus": corpus.fingerprint,
        "held_out": sets["balanced"].corpus.fingerprint,
        "encoder": cfg.eval.encoder,
        "autoencoder": key,
        "images": [len(held.rows) for held in sets.values()],
        "seed": cfg.seed,
    }
    return stage(cfg.runs, "floors", inputs, build)


def differences(cfg: DictConfig, foundations: dict[str, Path], method: str) -> dict[str, float]:
    """Paired difference of a method's KID to that of the `BASELINE`, on both held-out sets; none for the baseline."""
    if method == BASELINE or BASELINE not in foundations:
        return {}
    metrics = {}
    for name, held in held_out(cfg).items():
        mine, other = (np.load(foundations[who] / GENERATED / f"{name}.npy") for who in (method, BASELINE))
        key = f"{name}_kid_x1000_minus_{BASELINE}"
        values = kernel_distance_difference(mine, other, held.features)
        metrics |= dict(zip((key, f"{key}_low", f"{key}_high"), values, strict=True))
    return metrics


def cells(cfg: DictConfig) -> Iterator[tuple[str, str, int, dict, Path]]:
    """Every cell of the tables as (stage, method, step, metrics, directory), computed or found done."""
    directory = floors(cfg)
    for name, metrics in read_json(directory / "floors.json").items():
        yield "floor", name, 0, metrics, directory
    foundations: dict[str, Path] = {}
    for method in cfg.profile.methods:
        chosen = with_method(method)
        directory = subset(chosen, method)
        yield "subset", method, 0, read_json(directory / "metrics.json"), directory
        foundations[method] = directory = pretrain(chosen, method)
        for line in pd.read_json(directory / CONVERGENCE, lines=True).to_dict("records"):
            # what depends on the number of images compared stays in convergence.jsonl: these points use fewer
            unbiased = {key: value for key, value in line.items() if not re.search("fd_|fid|precision|recall", key)}
            yield "convergence", method, int(unbiased.pop("step")), unbiased, directory
    for method, directory in foundations.items():
        summary = read_json(directory / "summary.json")
        metrics = summary["metrics"] | differences(cfg, foundations, method)
        yield "generation", method, summary["steps"], metrics, directory
    tasks = {"super_resolution": super_resolution, "semantic_synthesis": semantic_synthesis}
    if held_out(cfg)["balanced"].corpus.masks is None:
        del tasks["semantic_synthesis"]  # a folder has none, and the rest of the chain still stands
    for task, finetune in tasks.items():
        for method in [*cfg.profile.downstream, "scratch"]:
            directory = finetune(cfg, foundations.get(method), method)
            summary = read_json(directory / "summary.json")
            yield task, method, summary["steps"], summary["metrics"], directory
    yield "super_resolution", "bicubic", 0, bicubic_baseline(cfg), held_out(cfg)["balanced"].corpus.directory


def reproduce(cfg: DictConfig) -> Path:
    """Run the chain and write `results/<profile>/`."""
    missing = set(cfg.profile.downstream) - set(cfg.profile.methods)
    if missing:
        raise UserError(f"profile.downstream names {sorted(missing)}, which profile.methods does not train: add them")
    results = Path(cfg.results) / cfg.profile.name
    if not is_main_process():  # takes its part in the training; the first process writes
        collections.deque(cells(cfg), maxlen=0)
        return results
    results.mkdir(parents=True, exist_ok=True)
    path = results / "results.jsonl"
    partial = path.with_name("results.jsonl.partial")  # the earlier results stand until the new ones are whole
    partial.unlink(missing_ok=True)
    places: dict[str, str] = {}
    for kind, method, step, metrics, directory in cells(cfg):
        ratio = 0.0 if method == "full" else float(cfg.ratio) if method in cfg.profile.methods else None
        row = result_row(cfg, kind, method, ratio, metrics, directory, step=step)
        append_result(partial, row)
        places[f"{kind}/{method}"] = str(directory)
    for method in cfg.profile.methods:
        places[f"selection/{method}"] = str(select(with_method(method), method)[0])
    os.replace(partial, path)
    write_json(results / "runs.json", places)
    with track(cfg, "report", cfg.profile.name) as tracker:
        tables = rebuild(results)
        for name, table in tables.items():
            tracker.table(name, table.astype(str))
    return results


def main(cfg: DictConfig) -> None:
    start = time.perf_counter()
    results = reproduce(cfg)
    if not is_main_process():
        return
    print((results / "tables" / "generation.md").read_text())
    print(f"done in {time.perf_counter() - start:.0f} s; open {results}/report.html")
    print(f"results: {results}")


if __name__ == "__main__":
    run(main)
