"""Sample sheets of a model in training: one row per scene, and the same prompt at several locations."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from corpus.index import Corpus
from eval.generate import generate
from eval.measuring import Sampling
from report.figures import contact_sheet
from train.metadata import MetadataEncoder, prompt_embeddings

#: Locations for the sheet of one prompt at several locations: name, longitude and latitude in degrees.
LOCATIONS = (
    ("Amazon", -62.0, -4.0),
    ("Sahara", 12.0, 24.0),
    ("Siberia", 100.0, 62.0),
    ("Greenland", -42.0, 73.0),
    ("central Europe", 12.0, 50.0),
    ("Australia", 134.0, -25.0),
    ("Pacific", -150.0, 0.0),
    ("Antarctica", 60.0, -78.0),
)
COLUMNS = 8


def sample_sheet(pipeline: DiffusionPipeline, corpus: Corpus, sampling: Sampling, path: Path) -> tuple[Path, list[str]]:
    """Draw eight samples of each scene's most common caption, one row per scene, with the same noise at every step.

    Returns the image file and the captions of the rows.
    """
    manifest = corpus.manifest[corpus.manifest["caption"] != ""]
    prompts = manifest.groupby("scene")["caption"].agg(lambda column: column.value_counts().index[0])
    rows = list(prompts.iloc[:10]) or [""]
    prompts = [prompt for prompt in rows for _ in range(COLUMNS)]
    images = generate(
        pipeline,
        prompts,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        seed=sampling.seed + 1,
        label="sample sheet",
    )
    labels = [short_caption(prompt) for prompt in prompts]
    save_picture(contact_sheet(images, COLUMNS, labels), path)
    return path, rows


def location_sheet(pipeline: DiffusionPipeline, encoder: MetadataEncoder, sampling: Sampling, path: Path) -> Path:
    """Draw the empty prompt at eight locations, one column each; the noise is the same within a row."""
    count = 4
    noise_of = [row for row in range(count) for _ in LOCATIONS]
    locations = [place for _ in range(count) for place in LOCATIONS]
    metadata = {"lon": [place[1] for place in locations], "lat": [place[2] for place in locations]}
    embeddings = prompt_embeddings(pipeline, encoder, [""] * len(locations), metadata)
    images = generate(
        pipeline,
        [""] * len(locations),
        steps=sampling.steps,
        guidance_scale=1.0,
        seed=sampling.seed + 2,
        label="locations",
        noise_of=noise_of,
        **embeddings,
    )
    save_picture(contact_sheet(images, len(LOCATIONS), [place[0] for place in locations]), path)
    return path


def short_caption(caption: str) -> str:
    """A caption without the prefix that all captions share."""
    return caption.removeprefix("a satellite image of ")


def save_picture(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
