"""What a pipeline draws: images of held-out captions against the held-out images, and sheets to look at."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from omegaconf import DictConfig
from PIL import Image

from corpus.captions import words
from corpus.index import Corpus
from encoders.embedding import embed
from eval.generate import generate
from eval.held_out import HeldOut
from eval.metrics import compare_features
from report.figures import contact_sheet
from train.components import TextParts, load_encoder
from train.metadata import MetadataEncoder, prompt_embeddings
from train.text_encoder import clip_score, recognise_scenes

#: Captions of a scene whose mean embedding stands for it when images are classified.
SCENE_CAPTIONS = 64


#: Images by the scene that they are of, then by the one that CLIP sees in them.
Confusion = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Measured:
    """Generated images uint8 [N, R, R, 3], their features float32 [N, D] and their distances to the held-out ones.

    `scenes` has what CLIP sees in the images of each scene; None where that cannot be told.
    """

    images: np.ndarray
    features: np.ndarray
    metrics: dict[str, float]
    scenes: Confusion | None


def measure(cfg: DictConfig, pipeline: DiffusionPipeline, text: TextParts, held: HeldOut, count: int) -> Measured:
    """Generate from the captions of the first `count` held-out images and compare with them."""
    prompts = held.captions[:count]
    images = generate(
        pipeline,
        prompts,
        steps=cfg.eval.steps,
        guidance_scale=cfg.eval.guidance_scale,
        seed=cfg.eval.seed,
        label=f"generate {held.name}",
    )
    encoder = load_encoder(cfg)
    features = embed(encoder, images)
    metrics = compare_features(features, held.features[:count], encoder.name)
    if text.clip is not None:
        score = clip_score(text.clip, text.tokenizer, images, prompts, text.clip_pixels)
        metrics[f"clip_{cfg.text_encoder.score_name}"] = float(score.mean())
    scenes = scene_confusion(text, held, images)
    if scenes is not None:
        metrics[f"scene_accuracy_{cfg.text_encoder.score_name}"] = scene_accuracy(scenes)
    return Measured(images, features, metrics, scenes)


def scene_accuracy(scenes: Confusion) -> float:
    """Share of the images in which CLIP sees the scene that they are of."""
    right = sum(seen.get(scene, 0) for scene, seen in scenes.items())
    return right / sum(sum(seen.values()) for seen in scenes.values())


def scene_confusion(text: TextParts, held: HeldOut, images: np.ndarray) -> Confusion | None:
    """What CLIP sees in images of the held-out captions, among the scenes of the set; None where there is but one.

    Images of no known scene are left out.
    """
    if text.clip is None:
        return None
    scenes = held.corpus.manifest["scene"].to_numpy(dtype=str)
    captions = held.corpus.manifest["caption"].to_numpy(dtype=str)
    known = [name for name in sorted(set(scenes[held.corpus.readable])) if name]
    if len(known) < 2:
        return None
    described = {
        name: sorted({f"a satellite image of {words(name)}", *captions[scenes == name][:SCENE_CAPTIONS]})
        for name in known
    }
    asked = scenes[held.rows[: len(images)]]
    if not (asked != "").any():
        return None
    seen = recognise_scenes(text.clip, text.tokenizer, images[asked != ""], described, text.clip_pixels)
    counts = collections.Counter(zip(asked[asked != ""].tolist(), seen.tolist(), strict=True))
    confusion: Confusion = {}
    for (scene, found), count in sorted(counts.items()):
        confusion.setdefault(scene, {})[found] = count
    return confusion


def sample_sheet(cfg: DictConfig, pipeline: DiffusionPipeline, corpus: Corpus, path: Path) -> tuple[Path, list[str]]:
    """Eight samples of the most common caption of each scene, one row a scene, the same noise at every step.

    Returns the picture and the rows' captions.
    """
    manifest = corpus.manifest[corpus.manifest["caption"] != ""]
    prompts = manifest.groupby("scene")["caption"].agg(lambda column: column.value_counts().index[0])
    rows = list(prompts.iloc[:10]) or [""]
    prompts = [prompt for prompt in rows for _ in range(8)]
    images = generate(
        pipeline,
        prompts,
        steps=cfg.eval.steps,
        guidance_scale=cfg.eval.guidance_scale,
        seed=cfg.eval.seed + 1,
        label="sample sheet",
    )
    labels = [prompt.removeprefix("a satellite image of ") for prompt in prompts]
    save_picture(contact_sheet(images, 8, labels), path)
    return path, rows


#: Places of a sheet of "same prompt, different place": name, longitude, latitude in degrees.
PLACES = (
    ("Amazon", -62.0, -4.0),
    ("Sahara", 12.0, 24.0),
    ("Siberia", 100.0, 62.0),
    ("Greenland", -42.0, 73.0),
    ("central Europe", 12.0, 50.0),
    ("Australia", 134.0, -25.0),
    ("Pacific", -150.0, 0.0),
    ("Antarctica", 60.0, -78.0),
)


def place_sheet(cfg: DictConfig, pipeline: DiffusionPipeline, encoder: MetadataEncoder, path: Path) -> Path:
    """The empty prompt at eight places, a column each, with the same noise in a row."""
    count = 4
    noise_of = [row for row in range(count) for _ in PLACES]
    places = [place for _ in range(count) for place in PLACES]
    facts = {"lon": [place[1] for place in places], "lat": [place[2] for place in places]}
    embeddings = prompt_embeddings(pipeline, encoder, [""] * len(places), facts)
    images = generate(
        pipeline,
        [""] * len(places),
        steps=cfg.eval.steps,
        guidance_scale=1.0,
        seed=cfg.eval.seed + 2,
        label="places",
        noise_of=noise_of,
        **embeddings,
    )
    save_picture(contact_sheet(images, len(PLACES), [place[0] for place in places]), path)
    return path


def save_picture(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
