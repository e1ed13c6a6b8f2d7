"""Measuring of a model's directory or a folder of images that the user names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.index import Corpus, index_corpus
from corpus.sources.folder import ImageFolder
from encoders.clip_scores import ClipScorer, load_clip
from encoders.embedding import Encoder
from encoders.pixels import LOAD_ERRORS
from eval.held_out import HeldOut
from eval.measuring import (
    Evaluators,
    Sampling,
    encoders_of,
    evaluation_sets,
    measure,
    measure_model,
    metrics_of,
    scene_captions,
    with_set,
)
from eval.memorisation import TrainingImages
from eval.metrics import METRICS, SETS
from eval.models import find_model
from eval.peers.parts import place_of
from eval.peers.peer import Peer, PeerModel
from runtime.artefacts import COMPLETE, read_json, stage, stage_fingerprint, write_json
from runtime.errors import UserError
from runtime.notices import notice
from runtime.tracking import track

#: Smallest number of images that can be measured as a set.
FEWEST_IMAGES = 10
#: File in a run's directory with the settings of its training.
TRAINING = "training.json"
#: File in a run's directory with the location of its CLIP model for scores.
SCORER = "scorer.json"
#: File in the result's directory that records how the images of a peer were made.
PEER = "peer.json"


def measure_any(cfg: DictConfig) -> Path:
    """Compare `cfg.of` with both held-out sets of `eval.split`; returns the directory with metrics.json.

    Raises:
        UserError: there is nothing to measure, or too little of it.
    """
    if cfg.of is None:
        raise UserError(
            "nothing to measure: give of=DIR, a run, a snapshot, a diffusers pipeline or a folder of images"
        )
    if cfg.peer.name is not None:
        return measure_peer(cfg)
    source = Path(str(cfg.of)).expanduser()
    model = find_model(source)
    sets = evaluation_sets(cfg)
    if model is None:
        return measure_folder(cfg, source, sets)
    corpus = index_corpus(instantiate(cfg.corpus.train), cfg.runs)
    judges = Evaluators(encoders_of(cfg), find_scorer(cfg, source), scene_captions(corpus))
    training = find_training(source, corpus, judges.encoders, cfg.runs)
    return _result(cfg, source.name, measure_model(model, sets, judges, Sampling.of(cfg), cfg.runs, training))


def measure_peer(cfg: DictConfig) -> Path:
    """Compare a named system (`configs/peer`) with the held-out sets; the result directory has peer.json as well.

    Raises:
        UserError: `cfg.of` holds no such system.
    """
    peer: Peer = instantiate(cfg.peer)
    source = place_of(str(cfg.of))
    peer.check(source)
    sets = distinct_sets(evaluation_sets(cfg))
    model = PeerModel(peer, source, next(iter(sets.values())).corpus.resolution)
    notice(f"{peer.name} generates images of {peer.resolution} px; they are measured at the corpus's {model.side} px")
    corpus = index_corpus(instantiate(cfg.corpus.train), cfg.runs)
    judges = Evaluators(encoders_of(cfg), find_scorer(cfg, source), scene_captions(corpus))
    sampling = Sampling(peer.steps, peer.guidance_scale, int(cfg.eval.seed))
    measured = measure_model(model, sets, judges, sampling, cfg.runs)
    metadata = {**model.metadata, "images": {name: len(held) for name, held in sets.items()}}
    return _result(cfg, peer.name, measured, metadata)


def _result(
    cfg: DictConfig, name: str, measured: Mapping[str, Path], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write the result directory of `measure_any`.

    Args:
        measured: directories of `measure_model`, by set.
        metadata: content of peer.json.
    """

    def build(directory: Path) -> None:
        metrics = metrics_of(measured)
        write_json(directory / "metrics.json", metrics)
        if metadata is not None:
            write_json(directory / PEER, metadata)
        with track(cfg, "measure", name) as tracker:
            tracker.summary(metrics)

    inputs = {name: directory.name for name, directory in measured.items()}
    return stage(cfg.runs, "measure", inputs, build)


def distinct_sets(sets: Mapping[str, HeldOut]) -> dict[str, HeldOut]:
    """Both sets, or only the natural one if both have the same images, for example a whole split."""
    if len({tuple(sorted(held.rows)) for held in sets.values()}) > 1:
        return dict(sets)
    notice("both held-out sets contain the same images: only the natural set is generated and measured")
    return {SETS[-1]: sets[SETS[-1]]}


def kept_images(selection: Path, corpus: Corpus, embeddings: Callable[[str], np.ndarray]) -> TrainingImages:
    """The images of a corpus that a selection keeps.

    Args:
        selection: directory of the selection.
        embeddings: as in `TrainingImages`.
    """
    kept = pd.read_parquet(selection / "selection.parquet", columns=["kept"])["kept"].to_numpy()
    key = {"corpus": corpus.fingerprint, "selection": selection.name}
    return TrainingImages(key, np.flatnonzero(kept), embeddings)


def find_training(source: Path, corpus: Corpus, encoders: Sequence[Encoder], runs: Path | str) -> TrainingImages | None:
    """The training images of a run or a snapshot, if its selection and the features of its corpus are in `runs`.

    The result is None for other pipelines and for a model that was trained on another corpus, because this function
    embeds nothing.
    """
    run = next((place for place in (source, *source.parents[:2]) if (place / TRAINING).is_file()), None)
    if run is None:
        return None
    selection = Path(runs) / "selection" / str(read_json(run / TRAINING)["selection"])
    files = {}
    for encoder in encoders:
        key = stage_fingerprint("embedding", {"corpus": corpus.fingerprint, "encoder": encoder})
        files[encoder.name] = Path(runs) / "embedding" / key / "embeddings.npy"
    if not all(path.is_file() for path in (selection / COMPLETE, *files.values())):
        return None
    if read_json(selection / COMPLETE)["inputs"]["corpus"] != corpus.fingerprint:
        return None
    return kept_images(selection, corpus, lambda name: np.load(files[name], mmap_mode="r"))


def find_scorer(cfg: DictConfig, source: Path) -> ClipScorer | None:
    """The CLIP model for scores: that of the run, or the configured one unless it must be trained first.

    If there is neither, the function prints one line and returns None.

    Raises:
        UserError: a model is named but does not exist.
    """
    for run in (source, source.parent, source.parent.parent):
        if (run / SCORER).is_file():
            metadata = read_json(run / SCORER)
            place = {key: _in_run(run, metadata[key]) for key in ("folder", "tokenizer")}
            return load_scorer(**place, name=metadata["name"], revision=metadata["revision"], plain=metadata["plain"])
    options = cfg.text_encoder
    if options.kind == "train":
        print(
            f"no CLIP score: {source} is not a run of this repository, and text_encoder={options.score_name} exists "
            "only inside a run: give text_encoder=clip_hub to score with a CLIP model from the hub",
            file=sys.stderr,
        )
        return None
    path, revision = str(options.path), options.get("revision")
    return load_scorer(path, path, options.score_name, revision=revision, plain=False)


def _in_run(run: Path, place: str) -> str:
    """Resolve a folder relative to the run; a hub name or another path is returned unchanged."""
    return str(run / place) if (run / place).is_dir() else place


def load_scorer(folder: str, tokenizer: str, name: str, *, revision: str | None, plain: bool) -> ClipScorer:
    """The same as `encoders.clip_scores.load_clip`, with a one-line error.

    Raises:
        UserError: the model cannot be loaded.
    """
    try:
        return load_clip(folder, tokenizer, name, revision=revision, plain=plain)
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"no CLIP model at {folder} ({reason}): give text_encoder.path, a folder or a hub name that can be reached"
        ) from error


def measure_folder(cfg: DictConfig, source: Path, sets: Mapping[str, HeldOut]) -> Path:
    """Compare a seeded random sample of N images of a folder with N images of each held-out set.

    Raises:
        UserError: there are fewer than `FEWEST_IMAGES`.
    """
    resolution = next(iter(sets.values())).corpus.resolution
    folder = index_corpus(ImageFolder(root=str(source), split="all", resolution=resolution), cfg.runs)
    judges = Evaluators(encoders_of(cfg))
    rows = sample_rows(folder, int(cfg.eval.images), int(cfg.eval.seed), source)
    sets = {name: held.first(len(rows)) for name, held in sets.items()}

    def build(directory: Path) -> None:
        images = folder.images[rows]
        metrics: dict[str, float | None] = {}
        for name, held in sets.items():
            metrics |= with_set(name, measure(images, held, judges, captioned=False).metrics)
        write_json(directory / "metrics.json", metrics)
        with track(cfg, "measure", source.name) as tracker:
            tracker.summary(metrics)

    inputs = {"images": [folder.fingerprint, rows.tolist()], "held_out": [held.key for held in sets.values()]}
    return stage(cfg.runs, "measure", inputs | {"judges": judges.key, "metrics": sorted(METRICS)}, build)


def sample_rows(folder: Corpus, images: int, seed: int, source: Path) -> np.ndarray:
    """At most `images` random readable rows, int64, ascending; random, because names may be in a meaningful order.

    Raises:
        UserError: there are fewer than `FEWEST_IMAGES`.
    """
    readable = np.flatnonzero(folder.readable)
    if len(readable) < FEWEST_IMAGES:
        raise UserError(
            f"of={source} has {len(readable)} readable images: give at least {FEWEST_IMAGES}, because the distances "
            "between sets need that many"
        )
    if len(readable) < images:
        biased = ", ".join(metric.name for metric in METRICS.values() if metric.biased)
        print(
            f"{len(readable)} images are compared with {len(readable)} held-out images (eval.images={images} were "
            f"requested): {biased} depend on this number, so compare them only with values for {len(readable)} images",
            file=sys.stderr,
        )
    return np.sort(np.random.default_rng([seed, 330]).permutation(readable)[:images])
