"""Detection of exchanged captions, and benefit of cleaning them. `make pair-cleaning`; docs/method.md, section 8."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from captioning.detection import detection, fraction_error, worst_first
from captioning.dual_encoder import DualEncoder, FittedEncoder, Reduction, fit_dual_encoder
from captioning.loop import CAPTIONS, Loops, clean_captions, material_of
from captioning.scorers import Material
from captioning.swaps import Swaps, swapped_corpus
from corpus.index import Corpus
from encoders.embedding import Encoder
from eval.held_out import HeldOut
from eval.measuring import encoders_of, evaluation_sets, scene_captions
from prune.captioned import FOLDS, loops_of
from prune.features import corpus_embeddings, scan_corpus
from prune.selection import select
from report.results import append_result, result_row
from report.tables import publish
from runtime.application import changed_config, run
from runtime.artefacts import fingerprint, read_json
from runtime.errors import UserError
from train.foundation import pretrain
from train.measured_run import MEASURED

#: Trainings by name: the pruning method and the changes of the configuration.
ARMS = {
    "raw": ("full", ["captioning.captions=given"]),
    "clip_score": ("clip_score", ["captioning.captions=given", "captioning.describe=none"]),
    "cleaned": ("dldc", ["captioning.captions=given", "captioning.describe=none", "ratio=null"]),
    "repaired": ("full", ["captioning.captions=best"]),
    "clean": ("full", ["captioning.captions=given", "captioning.swapped.fraction=0"]),
}
DETECTION, TRAINING, QUALITY = "pair_detection", "pair_training", "caption_quality"


def main(cfg: DictConfig) -> None:
    unknown = sorted(set(cfg.pair_cleaning.arms) - set(ARMS))
    if unknown:
        raise UserError(f"pair_cleaning.arms={unknown} are unknown: give some of {', '.join(ARMS)}")
    results = Path(cfg.results) / cfg.profile.name / "pair_cleaning"
    for seed in cfg.profile.seeds:
        if cfg.pair_cleaning.detection:
            detect(changed_config(f"seed={seed}", f"captioning.seed={seed}"), results)
        for arm in cfg.pair_cleaning.arms:
            train_arm(cfg, arm, int(seed), results)
    if cfg.pair_cleaning.captions:
        compare_captions(cfg, results)
    made = {
        DETECTION: cfg.pair_cleaning.detection,
        TRAINING: cfg.pair_cleaning.arms,
        QUALITY: cfg.pair_cleaning.captions,
    }
    for name in (name for name, requested in made.items() if requested):
        publish(results, name)


def labelled_corpus(cfg: DictConfig) -> Corpus:
    """The training corpus.

    Raises:
        UserError: it has no scenes or no captions.
    """
    corpus = scan_corpus(instantiate(cfg.corpus.train), cfg.runs, instantiate(cfg.entropy), instantiate(cfg.encoder))
    readable = corpus.manifest[corpus.readable]
    if (readable["scene"] == "").all() or (readable["caption"] == "").all():
        raise UserError(
            f"corpus {corpus.name} has no scenes or no captions: give a folder of images per scene, with captions.jsonl"
        )
    return corpus


def material(cfg: DictConfig, corpus: Corpus, loops: Loops) -> Material:
    """The inputs of the scorers, with the corpus's own scenes."""
    features = corpus_embeddings(corpus, instantiate(cfg.encoder), cfg.runs)
    scenes = corpus.manifest["scene"].to_numpy(dtype=object)
    return material_of(corpus, features, fingerprint(encoder=cfg.encoder), scenes, True, FOLDS, loops.seed)


# ---------------------------------------------------------------- detection


def detect(cfg: DictConfig, results: Path) -> None:
    """Write one row for every fraction, both kinds of exchange and every method."""
    corpus, loops = labelled_corpus(cfg), replace(loops_of(cfg), describe="none")
    fractions = [float(fraction) for fraction in cfg.pair_cleaning.fractions]
    kinds = {"another scene": {}, "another scene, uneven": {"uneven": True}, "the same scene": {"within_scene": True}}
    for name, options in kinds.items():
        for fraction in fractions if options else [0.0, *fractions]:
            started = time.perf_counter()
            noisy, swapped = swapped_corpus(corpus, Swaps(fraction, seed=int(cfg.seed), **options))
            directory = clean_captions(material(cfg, noisy, loops), loops, cfg.runs)
            kind = f"{fraction:g} of {name}"
            for method, metrics in detected(directory, swapped, loops.most_mismatch, int(cfg.seed)).items():
                row = result_row(cfg, DETECTION, method, None, metrics, directory, swapped=kind)
                append_result(results / "results.jsonl", row)
            print(f"{kind}, seed {cfg.seed}: {time.perf_counter() - started:.1f} s", flush=True)


def detected(directory: Path, swapped: np.ndarray, most_mismatch: float, seed: int) -> dict[str, dict]:
    """Metrics by method. The other methods cannot determine how much to remove, so they get the true fraction."""
    table = pd.read_parquet(directory / CAPTIONS)
    truth = swapped[table["image"].to_numpy()]
    names, scene = np.unique(table["scene"].astype(str), return_inverse=True)
    mismatch, fit = table["mismatch"].to_numpy(), table["fit"].to_numpy()
    cosine = table[[name for name in table if name.startswith("cosine_")]].mean(axis=1).to_numpy()
    orders = {
        "dldc": worst_first(mismatch, fit, most_mismatch),
        "clip_score": np.argsort(cosine, kind="stable"),
        "random": np.random.default_rng([seed, 650]).permutation(len(table)),
    }
    result = read_json(directory / "summary.json")["scenes"]
    fractions = np.array([result[name]["mismatched_fraction"] for name in names])
    known = np.full(len(names), truth.mean())
    removed = {"dldc": int((mismatch > most_mismatch).sum())}
    return {
        name: {
            **detection(truth, order, removed.get(name, int(truth.sum()))),
            "scene_fraction_error": fraction_error(truth, scene, fractions if name == "dldc" else known),
        }
        for name, order in orders.items()
    }


# ---------------------------------------------------------------- benefit


def arm_config(cfg: DictConfig, arm: str, seed: int) -> tuple[DictConfig, str]:
    """The configuration of a training, and its method."""
    method, changes = ARMS[arm]
    fraction = float(cfg.pair_cleaning.train_fraction)
    common = [f"seed={seed}", f"captioning.seed={seed}", f"captioning.swapped.seed={seed}"]
    common.append(f"captioning.swapped.fraction={fraction}")
    chosen = changed_config(*common, f"prune={method}", *changes)
    if arm == "clip_score":  # as many pairs as cleaning keeps
        cleaned, name = arm_config(cfg, "cleaned", seed)
        kept = read_json(select(cleaned, name)[0] / "summary.json")
        ratio = 1 - kept["kept"] / kept["images"]
        chosen = changed_config(*common, f"prune={method}", *changes, f"ratio={ratio}")
    return chosen, method


def train_arm(cfg: DictConfig, arm: str, seed: int, results: Path) -> None:
    """Train, measure with the judges of all arms, and add a row."""
    chosen, method = arm_config(cfg, arm, seed)
    directory = pretrain(chosen, method)
    measured = {name: Path(path) for name, path in read_json(directory / MEASURED).items()}
    metrics = dict(read_json(directory / "summary.json")["metrics"])
    corpus, sets = labelled_corpus(chosen), evaluation_sets(chosen)
    for encoder in encoders_of(chosen):
        judge = fitted_judge(corpus, encoder, chosen.runs)
        for name, held in sets.items():
            metrics |= {
                f"{name}_{key}": value for key, value in judged(judge, measured[name], encoder, held, corpus).items()
            }
    row = result_row(chosen, TRAINING, method, None, metrics, directory, pairs=arm)
    append_result(results / "results.jsonl", row)
    print(f"{arm}, seed {seed}: {directory}", flush=True)


Judge = tuple[Reduction, FittedEncoder]


def fitted_judge(corpus: Corpus, encoder: Encoder, runs: Path | str) -> Judge:
    """A linear CLIP on an encoder's features, fitted to the training corpus with its true captions, for all arms."""
    options, generator = DualEncoder(scene_scale=0.0), np.random.default_rng(660)
    rows = np.flatnonzero(corpus.readable & (corpus.manifest["caption"] != "").to_numpy())
    features = corpus_embeddings(corpus, encoder, runs)[rows]
    texts = corpus.manifest["caption"].iloc[rows].tolist()
    reduction = Reduction.of(options, features, texts, generator)
    fitted = fit_dual_encoder(options, reduction.images(features), reduction.texts(texts), np.ones(len(rows)))
    return reduction, fitted


def judged(judge: Judge, measured: Path, encoder: Encoder, held: HeldOut, corpus: Corpus) -> dict[str, float]:
    """CLIP score and zero-shot scene accuracy of generated images by a fitted judge."""
    reduction, fitted = judge
    images = fitted.images(reduction.images(np.load(measured / f"{encoder.name}.npy")))

    def texts(lines: list[str]) -> np.ndarray:
        return fitted.texts(reduction.texts(lines))

    known = np.array([bool(caption) for caption in held.captions])
    cosines = (images * texts(list(held.captions))).sum(1)
    described: Mapping[str, list[str]] = scene_captions(corpus)
    names = sorted(described)
    centres = np.stack([texts(described[name]).mean(0) for name in names])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    seen = np.array(names)[(images @ centres.T).argmax(1)]
    labelled = np.isin(held.scenes, names)
    name = f"fitted_{encoder.name}"
    return {
        f"clip_{name}": float(100 * cosines[known].mean()),
        f"scene_accuracy_{name}": float((seen == held.scenes)[labelled].mean()),
    }


# ---------------------------------------------------------------- captions against captions


def compare_captions(cfg: DictConfig, results: Path) -> None:
    """Compare the given captions and the captioner's captions of the same images by the same scores; one row each."""
    corpus = labelled_corpus(cfg)
    loops = replace(loops_of(cfg), describe="all", rounds=1)
    directory = clean_captions(material(cfg, corpus, loops), loops, cfg.runs)
    table = pd.read_parquet(directory / CAPTIONS)
    both = set(table.loc[table["round"] == 0, "image"]) & set(table.loc[table["round"] > 0, "image"])
    table = table[table["image"].isin(both)]
    encoders = {encoder.name: encoder for encoder in encoders_of(cfg)}
    cosines = {name: _judge_cosines(cfg, corpus, encoder, table) for name, encoder in encoders.items()}
    for source, rows in table.groupby("source"):
        metrics = {
            "caption_mismatched": float((rows["mismatch"] > loops.most_mismatch).mean()),
            "caption_fit": float(rows["fit"].mean()),
            "caption_words": float(rows["caption"].str.split().str.len().mean()),
            "captions_different": rows["caption"].nunique() / len(rows),
            "caption_chosen": float(rows["chosen"].mean()),
            **{f"clip_fitted_{name}": float(values[rows.index].mean()) for name, values in cosines.items()},
        }
        row = result_row(cfg, QUALITY, None, None, metrics, directory, captions=str(source))
        append_result(results / "results.jsonl", row)


def _judge_cosines(cfg: DictConfig, corpus: Corpus, encoder: Encoder, table: pd.DataFrame) -> pd.Series:
    """100 times the cosine of every row's image and caption, out of fold, by a judge fitted to the given captions."""
    features = corpus_embeddings(corpus, encoder, cfg.runs)
    fold = np.random.default_rng(670).permutation(len(corpus)) % FOLDS
    options = DualEncoder(scene_scale=0.0)
    given = table[table["round"] == 0]
    reduction = Reduction.of(options, features[given["image"]], given["caption"].tolist(), np.random.default_rng(671))
    result = pd.Series(np.nan, index=table.index)
    for number in range(FOLDS):
        learned = given[fold[given["image"]] != number]
        images = reduction.images(features[learned["image"]])
        fitted = fit_dual_encoder(options, images, reduction.texts(learned["caption"].tolist()), np.ones(len(learned)))
        rows = table[fold[table["image"]] == number]
        cosines = fitted.images(reduction.images(features[rows["image"]])) * fitted.texts(
            reduction.texts(rows["caption"].tolist())
        )
        result[rows.index] = 100 * cosines.sum(1)
    return result


if __name__ == "__main__":
    run(main)
