"""The measuring stages: draw images from a model once, and compute their metrics with all evaluating networks."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.captions import words
from corpus.index import Corpus, index_corpus
from encoders.clip_scores import ClipScorer
from encoders.embedding import Encoder, embed
from eval.held_out import HeldOut, held_out_sets
from eval.memorisation import TrainingImages
from eval.metrics import METRICS, compute
from eval.models import Model
from eval.pairs import Confusion
from eval.peers.peer import PeerModel
from eval.processes import first_process_decides, over_processes
from runtime.artefacts import fingerprint, is_main_process, read_json, stage, write_json

#: Number of captions of training images whose mean embedding represents a scene in zero-shot classification.
SCENE_CAPTIONS = 64
IMAGES = "images.npy"


@dataclass(frozen=True)
class Sampling:
    """How images are drawn from a text-to-image pipeline.

    Attributes:
        steps: solver steps.
        guidance_scale: scale of classifier-free guidance; 1 switches it off.
        seed: seed of the starting noise, the same for every model.
    """

    steps: int
    guidance_scale: float
    seed: int

    @classmethod
    def of(cls, cfg: DictConfig) -> Sampling:
        return cls(int(cfg.eval.steps), float(cfg.eval.guidance_scale), int(cfg.eval.seed))


@dataclass(frozen=True)
class Evaluators:
    """The frozen networks that compute metrics; they do not depend on the model that made the images.

    Attributes:
        encoders: the evaluation encoder first, then the encoder that pruning clusters with.
        clip: the CLIP model; None if there is none.
        described: captions of training images by scene; empty if there are fewer than two scenes.
    """

    encoders: tuple[Encoder, ...]
    clip: ClipScorer | None = None
    described: Mapping[str, Sequence[str]] | None = None

    @property
    def key(self) -> str:
        """Fingerprint of the networks and of the scenes' captions."""
        clip = self.clip and [self.clip.name, self.clip.fingerprint]
        return fingerprint(encoders=list(self.encoders), clip=clip, described=self.described or {})


def encoders_of(cfg: DictConfig) -> tuple[Encoder, ...]:
    """The evaluation encoder, the encoder of the selection if it is a different one, and those of `eval.encoders`."""
    configs = (cfg.evaluation_encoder, cfg.encoder, *cfg.eval.encoders.values())
    result = {encoder.name: encoder for encoder in map(instantiate, configs)}
    return tuple(result.values())


def scene_captions(corpus: Corpus) -> dict[str, list[str]]:
    """Captions of every scene of a training corpus, sorted; empty where it has fewer than two scenes."""
    scenes = corpus.manifest["scene"].to_numpy(dtype=str)
    captions = corpus.manifest["caption"].to_numpy(dtype=str)
    known = [name for name in sorted(set(scenes[corpus.readable])) if name]
    if len(known) < 2:
        return {}
    return {
        name: sorted({f"a satellite image of {words(name)}", *captions[scenes == name][:SCENE_CAPTIONS]} - {""})
        for name in known
    }


def evaluation_sets(cfg: DictConfig, split: str | None = None, *, images: int | None = None) -> dict[str, HeldOut]:
    """Both held-out sets of a split (default: `eval.split`) with the features of every evaluating encoder."""
    corpus = index_corpus(instantiate(cfg.corpus[split or cfg.eval.split]), cfg.runs)
    return held_out_sets(corpus, encoders_of(cfg), int(images or cfg.eval.images), int(cfg.eval.seed), cfg.runs)


def draw_images(model: Model | PeerModel, held: HeldOut, sampling: Sampling, runs: Path | str) -> Path:
    """Draw one image for every held-out caption; returns the stage's directory with `images.npy`, uint8 [N, H, W, 3].

    Image i starts from noise that depends on the seed and on i only. All processes of a launch take part.
    """
    metadata = held.corpus.manifest.iloc[held.rows]

    def build(directory: Path) -> None:
        loaded, options = model.load(), {**asdict(sampling), "label": f"generate {held.name}"}
        images = over_processes(lambda rows: model.draw(loaded, held.captions, metadata, rows, **options), len(held))
        if is_main_process():
            np.save(directory / IMAGES, images)

    inputs = {"model": model.key, "captions": held.captions, "sampling": sampling}
    inputs |= model.conditions(held.captions, metadata)
    return stage(runs, "generated", inputs, build, together=first_process_decides)


def measure_images(
    images: Path, held: HeldOut, judges: Evaluators, runs: Path | str, training: TrainingImages | None = None
) -> Path:
    """Metrics of the images of a stage, in which image i was drawn from held-out caption i; cached.

    Args:
        images: directory of a stage with `images.npy`, uint8 [N, H, W, 3].
        held: the held-out set.
        judges: the evaluating networks.
        runs: directory of the stages.
        training: training images of the model, if they are known.
    Returns:
        a directory with metrics.json (names without the name of the held-out set), confusion.json and the features of
        every encoder, `<encoder>.npy`.
    """
    inputs = {"images": f"{images.parent.name}/{images.name}", "held_out": held.key, "judges": judges.key}
    inputs["metrics"] = sorted(METRICS)  # a new metric is computed on existing images
    inputs |= {} if training is None else {"training": training.key}

    def build(directory: Path) -> None:
        pixels = np.load(images / IMAGES, mmap_mode="r")
        measured = measure(pixels, held, judges, training=training)
        if is_main_process():
            for name, features in measured.features.items():
                np.save(directory / f"{name}.npy", features)
            write_json(directory / "confusion.json", measured.confusion)
            write_json(directory / "metrics.json", measured.metrics)

    return stage(runs, "measured", inputs, build, together=first_process_decides)


@dataclass(frozen=True)
class Measured:
    """Metrics of a set of images, its features by encoder, and the scenes that CLIP recognises, by true scene."""

    metrics: dict[str, float | None]
    features: dict[str, np.ndarray]
    confusion: Confusion | None


def measure(
    images: np.ndarray,
    held: HeldOut,
    judges: Evaluators,
    *,
    captioned: bool = True,
    training: TrainingImages | None = None,
) -> Measured:
    """Compare uint8 [N, H, W, 3] with a held-out set of N images.

    Args:
        captioned: image i was drawn from held-out caption i, so CLIP metrics and classification accuracy are defined.
        training: training images of the model, if they are known.
    """
    features = {encoder.name: embed_rows(encoder, images) for encoder in judges.encoders}
    scenes = drawn_scenes(held)[: len(images)] if captioned else None
    metrics = compare(features, held, scenes=scenes, training=training)
    confusion = None
    if captioned:
        judged, confusion = judge_captions(images, held, judges)
        metrics |= judged
    return Measured(metrics, features, confusion)


def drawn_scenes(held: HeldOut) -> np.ndarray:
    """Scenes of images drawn from the held-out captions, str [N]; "" where there is no caption."""
    return np.where([bool(caption) for caption in held.captions], held.scenes, "")


def compare(
    features: Mapping[str, np.ndarray],
    held: HeldOut,
    *,
    scenes: np.ndarray | None = None,
    training: TrainingImages | None = None,
) -> dict[str, float | None]:
    """All metrics of features [N, D], given by encoder, against a held-out set.

    Args:
        features: features of the images by encoder.
        held: the held-out set.
        scenes: scenes of the images, str [N], "" where an image has none; None: unknown.
        training: training images of the model, if they are known.
    """
    labels: dict[str, np.ndarray] = {}
    if scenes is not None and (held.scenes != "").any():
        labels = {"scenes": scenes, "reference_scenes": held.scenes}
    metrics: dict[str, float | None] = {}
    for name, result in features.items():
        inputs = {"features": result, "reference": held.features[name], **labels}
        if training is not None:
            inputs |= {"training_embeddings": training.embeddings(name), "training_rows": training.rows}
        metrics |= compute(inputs, of={"encoder": name})
    return metrics


def judge_captions(
    images: np.ndarray, held: HeldOut, judges: Evaluators
) -> tuple[dict[str, float | None], Confusion | None]:
    """CLIP metrics of images drawn from the held-out captions, and the scenes that CLIP recognises in them.

    The result is empty without a CLIP model, or if no held-out image has a caption.
    """
    if judges.clip is None or not any(held.captions):
        return {}, None
    inputs = {"clip_scores": judges.clip.scores(images, held.captions)}
    confusion = scene_confusion(judges, held, images)
    inputs |= {} if confusion is None else {"confusion": confusion}
    return compute(inputs, of={"clip": judges.clip.name}), confusion


def embed_rows(encoder: Encoder, images: np.ndarray) -> np.ndarray:
    """Features float32 [N, D] of images, over all processes of a launch."""
    label = f"embed, {encoder.name}"
    return over_processes(
        lambda rows: embed(encoder, images[rows], batch_size=encoder.batch_size, label=label), len(images)
    )


def scene_confusion(judges: Evaluators, held: HeldOut, images: np.ndarray) -> Confusion | None:
    """Confusion of the scenes that CLIP recognises in images of the held-out captions, among the training scenes.

    The result is None without a CLIP model or with fewer than two scenes. Images of unknown scene are left out.
    """
    described = judges.described or {}
    scenes = held.scenes[: len(images)]
    known = np.isin(scenes, list(described))
    if judges.clip is None or len(described) < 2 or not known.any():
        return None
    seen = judges.clip.recognise(np.asarray(images[known]), described)
    counts = collections.Counter(zip(scenes[known].tolist(), seen.tolist(), strict=True))
    confusion: dict[str, dict[str, int]] = {}
    for (scene, result), count in sorted(counts.items()):
        confusion.setdefault(scene, {})[result] = count
    return confusion


def real_confusion(held: HeldOut, judges: Evaluators, runs: Path | str) -> Confusion | None:
    """Confusion of the scenes that CLIP recognises in the held-out images themselves; cached."""

    def build(directory: Path) -> None:
        write_json(directory / "confusion.json", scene_confusion(judges, held, held.images))

    inputs = {"held_out": held.key, "judges": judges.key}
    return read_json(stage(runs, "real_confusion", inputs, build) / "confusion.json")


def with_set(held_out: str, metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Metrics under their full names, with the name of the held-out set as a prefix."""
    return {f"{held_out}_{name}" if held_out else name: value for name, value in metrics.items()}


def measure_model(
    model: Model | PeerModel,
    sets: Mapping[str, HeldOut],
    judges: Evaluators,
    sampling: Sampling,
    runs: Path | str,
    training: TrainingImages | None = None,
) -> dict[str, Path]:
    """Draw images from a model for each held-out set and measure them; returns directories of `measure_images`."""
    return {
        name: measure_images(draw_images(model, held, sampling, runs), held, judges, runs, training)
        for name, held in sets.items()
    }


def metrics_of(directories: Mapping[str, Path]) -> dict[str, float | None]:
    """All metrics of `measure_model`'s directories by their full names."""
    result: dict[str, float | None] = {}
    for name, directory in directories.items():
        result |= with_set(name, read_json(directory / "metrics.json"))
    return result
