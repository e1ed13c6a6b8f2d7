"""Named reference sets: from a local folder, or from the hub."""

from __future__ import annotations

from pathlib import Path

from corpus.index import Source
from corpus.sources.folder import ImageFolder
from corpus.sources.huggingface import HuggingFace
from runtime.errors import UserError


def reference_set(name: str, hub: str, resolution: int, root: str | None = None, config: str | None = None) -> Source:
    """A scene-classification set whose sub-folders, or whose labels on the hub, are the scenes.

    Args:
        hub: its name on the hub; config: where the data set there has several.
        root: a local copy, as downloaded (Parquet) or with one sub-folder a class; it is taken where it is given.
        resolution: side of the images in pixels.
    Raises:
        UserError: no local copy given and the hub cannot be reached; says what to fetch and where to put it.
    """
    if root is not None:
        folder = Path(root).expanduser()
        if next(folder.rglob("*.parquet"), None) or (folder / "dataset_info.json").is_file():
            return HuggingFace(path=root, split="all", resolution=resolution, name=name)
        return ImageFolder(root=root, split="all", resolution=resolution, name=name)
    source = HuggingFace(path=hub, config=config, split="all", resolution=resolution, name=name)
    try:
        source.version  # noqa: B018  # loads it
    except UserError as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error.__cause__).__name__
        only = f" --include '{config}/*'" if config else ""
        raise UserError(
            f"reference={name} is not here and the hub's {hub} could not be loaded ({reason}): where there is a "
            f"network, run `hf download {hub} --repo-type dataset{only} --local-dir DIR`, and give reference.root=DIR; "
            "or give a folder of images with one sub-folder a class, or take reference=corpus, its own labels or strata"
        ) from error
    return source
