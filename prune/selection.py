"""The pruning stage: it makes a selection directory from an indexed corpus and a pruning method."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from corpus.index import Corpus, index_corpus
from corpus.quarantine import QUARANTINE, quarantined, reason_counts
from encoders.efficientnet import EfficientNetLite0
from prune import captioned
from prune.entropy import LocalEntropy
from prune.features import corpus_embeddings, corpus_entropy, scan_corpus
from prune.leaks import announce_leaks, leak_grids, leaks
from prune.library import budget_of, refuse_not_finite
from prune.likeness import PairRule
from prune.pool import Method, Pool, Selection, checked
from prune.scenes import corpus_strata
from prune.weights import effective_size, images_represented
from report.pairs_report import PAIRS_LINK, PAIRS_PAGE, write_pairs_report
from report.prune_report import REPORT_PAGE, write_prune_report
from runtime.artefacts import COMPLETE, is_main_process, plain, read_json, stage, write_json
from runtime.cost import Clock, stage_cost
from runtime.errors import UserError
from runtime.tracking import track

#: Sources of the scenes of a selection: a labelled reference set, or strata of the corpus itself.
REFERENCE, CORPUS = "reference", "corpus"


def method_name() -> str:
    """Name of the chosen method, as in configs/prune."""
    return HydraConfig.get().runtime.choices.prune


def reference_rows(corpus: Corpus, per_scene: int, generator: np.random.Generator) -> np.ndarray:
    """Rows of up to `per_scene` random labelled and readable images of each scene; int64, ascending."""
    labels = corpus.manifest["scene"].to_numpy(dtype=object)
    usable = corpus.readable & (labels != "")
    if not usable.any():
        raise UserError(
            f"the reference set {corpus.name} has no labels: give one with one sub-folder per class (reference=…), or "
            "take reference=none, which makes strata from the corpus itself"
        )
    groups = [np.flatnonzero(usable & (labels == name)) for name in sorted(set(labels[usable]))]
    return np.sort(np.concatenate([generator.permutation(group)[:per_scene] for group in groups]))


def scene_source(cfg: DictConfig, corpus: Corpus, method: Method) -> str | None:
    """The result of `reference_kind`, or None if the method uses no scenes."""
    return reference_kind(cfg, corpus) if getattr(method, "uses_reference", False) else None


def reference_kind(cfg: DictConfig, corpus: Corpus) -> str:
    """`CORPUS` if no reference set is named, or if it is the unlabelled corpus itself; otherwise `REFERENCE`."""
    if cfg.reference.source is None:
        return CORPUS
    labelled = corpus.readable & (corpus.manifest["scene"] != "").to_numpy()
    itself = plain(cfg.reference.source) == plain(cfg.corpus.train)
    return CORPUS if itself and not labelled.any() else REFERENCE


def select(cfg: DictConfig, name: str) -> tuple[Path, Corpus]:
    """Run the pruning stage of method `name`, or find it done; returns the selection's directory and the corpus."""
    method, measure = captioned.method_of(cfg), instantiate(cfg.entropy)
    ratio = ratio_of(cfg, method, name)  # an invalid ratio is refused before anything is computed
    clock, started = Clock(), time.time()
    encoder = instantiate(cfg.encoder)
    with clock("scan"):
        corpus = scan_corpus(instantiate(cfg.corpus.train), cfg.runs, measure, encoder)
    if ratio is not None and budget_of(len(corpus), ratio) == 0:
        raise UserError(
            f"ratio={ratio} removes all {len(corpus)} images of corpus {corpus.name}: give a lower ratio, or a larger "
            "corpus"
        )
    corpus, pairs = _with_captions(cfg, captioned.given_captions(cfg, corpus), method, measure, encoder, clock)
    scenes = scene_source(cfg, corpus, method)
    inputs = _inputs(cfg, corpus, method, ratio, scenes, pairs)

    def build(directory: Path) -> None:
        pool = corpus_pool(cfg, corpus, measure, encoder, clock)
        if scenes is not None:
            with clock("reference"):
                pool = with_reference(cfg, pool, scenes, encoder)
        if pairs is not None:
            pool = replace(pool, pair_scores=pairs.scores(corpus))
        with clock("selection"):
            budget = method.estimated_budget(pool) if ratio is None else budget_of(len(pool), ratio)
            selection = method.select(pool, budget, np.random.default_rng([cfg.seed, 2]))
            selection = checked(selection, pool, budget, name)
        with clock("weights"):
            generator = np.random.default_rng([cfg.seed, 5])
            weights = images_represented(pool.embeddings, pool.readable, selection.kept, generator)
        table = selection_table(pool, selection, weights)
        summary = summarise(table, corpus, selection, name, ratio, cfg.seed, clock.seconds)
        summary["cost"] = cost_by_stage(clock, corpus)
        summary["source"] = dict(corpus.metadata)
        with clock("leaks"):
            summary["leaks"] = leaks_of(cfg, corpus)
        summary["strata"] = scenes and {"source": scenes, "count": len(set(pool.reference_labels.tolist()))}
        if (corpus.directory / COMPLETE).stat().st_mtime < started:  # scanned by an earlier run: time unknown
            summary["images_per_second"] = None
        if pairs is not None:
            summary["captions"] = read_json(pairs.directory / "summary.json")
            write_pairs_report(directory / PAIRS_PAGE, pairs.directory, selection.kept, corpus.images, name)
        write_selection(directory, table, summary, corpus, pool.embeddings)
        with track(cfg, "prune", name) as tracker:
            tracker.summary({key: value for key, value in summary.items() if not isinstance(value, dict)})
            tracker.table("scenes", _scene_frame(summary["true_scenes"]))

    directory = stage(cfg.runs, "selection", inputs, build)
    result = read_json(directory / "summary.json").get("leaks")
    if result and is_main_process():
        announce_leaks(result, corpus.name)
    if scenes == CORPUS:
        _tell_of_strata(read_json(directory / "summary.json")["strata"]["count"])
    return directory, corpus


def _inputs(
    cfg: DictConfig,
    corpus: Corpus,
    method: Method,
    ratio: float | None,
    scenes: str | None,
    pairs: captioned.CleanedPairs | None,
) -> dict[str, Any]:
    """Everything that a selection depends on, for its fingerprint."""
    inputs = {
        "corpus": corpus.fingerprint,
        "method": method,
        "ratio": ratio,
        "seed": cfg.seed,
        "entropy": cfg.entropy,
        "encoder": cfg.encoder,
    }
    if scenes is not None:
        inputs["reference"] = cfg.reference if scenes == REFERENCE else None
    if pairs is not None:
        inputs["captions"] = pairs.directory.name
    if pair_rule(cfg) != PairRule():  # the default keeps the fingerprints of selections made before this option existed
        inputs["pair_rule"] = pair_rule(cfg)
    return inputs


def _with_captions(
    cfg: DictConfig, corpus: Corpus, method: Method, measure: LocalEntropy, encoder: EfficientNetLite0, clock: Clock
) -> tuple[Corpus, captioned.CleanedPairs | None]:
    """The corpus with the captions to read, and the scored pairs if the method uses them."""
    scoring, reading = captioned.requested(cfg, method)
    if not scoring:
        return corpus, None
    pool, kind = corpus_pool(cfg, corpus, measure, encoder, clock), reference_kind(cfg, corpus)
    seeded = OmegaConf.merge(cfg, {"seed": cfg.captioning.seed})  # captions are the same for all training seeds
    with clock("captions"):
        pairs = captioned.cleaned(cfg, pool, corpus, lambda: with_reference(seeded, pool, kind, encoder))
    corpus = captioned.read_captions(cfg, corpus, pairs.directory) if reading else corpus
    return corpus, pairs if getattr(method, "uses_captions", False) else None


def ratio_of(cfg: DictConfig, method: Method, name: str) -> float | None:
    """The fraction of images to remove: 0 for a method that keeps everything, None if the method determines it.

    Raises:
        UserError: the ratio is out of range, or it is null and the method cannot determine it.
    """
    if getattr(method, "keeps_everything", False):
        return 0.0
    if cfg.ratio is None:
        if not hasattr(method, "estimated_budget"):
            raise UserError(f"ratio=null: prune={name} cannot tell how much to remove, give ratio=0.85 for example")
        return None
    budget_of(1, cfg.ratio)
    return float(cfg.ratio)


def leaks_of(cfg: DictConfig, corpus: Corpus) -> dict[str, Any] | None:
    """Leaks between the pruned split, val and test; None if `leaks` is 0 or all splits are pruned together.

    A split that is empty or has no images of its own is left out.
    """
    if not cfg.leaks or cfg.corpus.train.get("split", "train") != "train":
        return None
    held_out = {}
    for name in ("val", "test"):
        source = instantiate(cfg.corpus[name])
        if not source.manifest().empty:
            held_out[name] = source
    return leaks(corpus, held_out, int(cfg.leaks), cfg.runs, pair_rule(cfg))


def pair_rule(cfg: DictConfig) -> PairRule:
    """Which images of other dates and locations count as duplicates."""
    return PairRule(cfg.other_date, cfg.elsewhere)


@cache
def _tell_of_strata(count: int) -> None:
    """Print a notice about the strata, once per process, even if a sweep selects many times."""
    if is_main_process():
        print(
            f"no labels: {count} clusters of the corpus (strata) are used as scenes; give labelled images with "
            "reference=folder reference.root=DIR",
            file=sys.stderr,
            flush=True,
        )


def corpus_pool(
    cfg: DictConfig, corpus: Corpus, measure: LocalEntropy, encoder: EfficientNetLite0, clock: Clock
) -> Pool:
    """The pool of an indexed corpus, without a reference.

    Raises:
        UserError: an embedding is not finite.
    """
    with clock("entropy"):
        entropy = corpus_entropy(corpus, measure, cfg.runs)
    with clock("embedding"):
        embeddings = corpus_embeddings(corpus, encoder, cfg.runs)
    refuse_not_finite(embeddings, corpus.readable, f"the embeddings of corpus {corpus.name}")
    return Pool(
        ids=corpus.manifest["id"].to_numpy(),
        readable=corpus.readable,
        entropy=entropy,
        embeddings=embeddings,
        reference_embeddings=np.empty((0, embeddings.shape[1]), np.float32),
        reference_labels=np.empty(0, dtype=object),
        captions=corpus.manifest["caption"].to_numpy(),
    )


def with_reference(cfg: DictConfig, pool: Pool, scenes: str, encoder: EfficientNetLite0) -> Pool:
    """The pool with a reference from the source `scenes`: a labelled set, or strata of the corpus itself.

    Raises:
        UserError: the reference set has no labels.
    """
    if scenes == CORPUS:
        embeddings, labels = corpus_strata(pool, np.random.default_rng([cfg.seed, 4]))
    else:
        reference = index_corpus(instantiate(cfg.reference.source), cfg.runs)
        rows = reference_rows(reference, cfg.reference.per_scene, np.random.default_rng([cfg.seed, 1]))
        embeddings = corpus_embeddings(reference, encoder, cfg.runs)[rows]
        labels = reference.manifest["scene"].to_numpy(dtype=object)[rows]
    return replace(pool, reference_embeddings=embeddings, reference_labels=labels)


def write_selection(
    directory: Path, table: pd.DataFrame, summary: dict[str, Any], corpus: Corpus, embeddings: np.ndarray
) -> None:
    """Write selection.parquet, the quarantine, summary.json and report.html into a directory."""
    table.to_parquet(directory / "selection.parquet", index=False)
    quarantined(corpus.manifest).to_parquet(directory / QUARANTINE, index=False)
    write_json(directory / "summary.json", summary)
    write_prune_report(
        directory / REPORT_PAGE,
        table,
        summary,
        corpus.images,
        np.random.default_rng([summary["seed"], 3]),
        embeddings=embeddings,
        locations=corpus.manifest if {"lon", "lat"} <= set(corpus.manifest) else None,
        links={PAIRS_LINK: PAIRS_PAGE} if (directory / PAIRS_PAGE).is_file() else None,
        leaks=leak_grids(summary.get("leaks"), directory.parent.parent),
    )


def selection_table(pool: Pool, selection: Selection, weights: np.ndarray) -> pd.DataFrame:
    """Table of a selection directory: one row per image, in corpus order; `weights` are those of `prune.weights`."""
    kept = np.zeros(len(pool), dtype=bool)
    kept[selection.kept] = True
    return pd.DataFrame(
        {
            "id": pool.ids,
            "kept": kept,
            "reason": pd.array(selection.reason, dtype="str"),
            "entropy": pool.entropy.astype(np.float32),
            "scene": pd.array(selection.scene, dtype="str"),
            "scene_similarity": selection.scene_similarity.astype(np.float32),
            "cluster": selection.cluster.astype(np.int32),
            "centroid_distance": selection.centroid_distance.astype(np.float32),
            "weight": weights,
        }
    )


def summarise(
    table: pd.DataFrame,
    corpus: Corpus,
    selection: Selection,
    name: str,
    ratio: float | None,
    seed: int,
    seconds: dict[str, float],
) -> dict:
    """Content of the summary.json of a selection directory."""
    true_scenes = corpus.manifest["scene"].where(corpus.readable, "unreadable")
    assigned = table["scene"].where(table["scene"] != "", true_scenes)
    packages = ("torch", "faiss-cpu", "numpy", "timm", "numba")
    return {
        "method": name,
        "ratio": 1 - float(table["kept"].mean()) if ratio is None else ratio,
        "images": len(table),
        "unreadable": int((~corpus.readable).sum()),
        "quarantined": reason_counts(quarantined(corpus.manifest)["reason"]),
        "kept": int(table["kept"].sum()),
        "seed": int(seed),
        "scenes": _before_after(assigned, table["kept"]),
        "true_scenes": _before_after(true_scenes, table["kept"]),
        "reasons": {str(key): int(value) for key, value in table["reason"].value_counts().items()},
        "weights": {
            "largest": float(table["weight"].max()),
            "effective_size": effective_size(table["weight"].to_numpy()),
        },
        "entropy_threshold": selection.diagnostics.get("entropy_threshold"),
        "diagnostics": plain(selection.diagnostics),
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "images_per_second": len(table) / max(sum(seconds.values()), 1e-9),
        "versions": {package: metadata.version(package) for package in packages},
    }


def cost_by_stage(clock: Clock, corpus: Corpus) -> dict[str, Any]:
    """Cost of each stage in this command; for `index`, which decodes and embeds, the cost when the index was built."""
    return {"index": stage_cost(corpus.directory), **{name: own for name, own in clock.cost.items() if name != "scan"}}


def _before_after(scenes: pd.Series, kept: pd.Series) -> dict[str, dict[str, int]]:
    before, after = scenes.value_counts(), scenes[kept.to_numpy()].value_counts()
    return {str(scene): {"before": int(count), "after": int(after.get(scene, 0))} for scene, count in before.items()}


def _scene_frame(scenes: dict[str, dict[str, int]]) -> pd.DataFrame:
    return pd.DataFrame([{"scene": scene, **counts} for scene, counts in scenes.items()])
