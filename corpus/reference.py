"""Named reference sets, read from a local folder or from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from corpus.index import Source
from corpus.sources.folder import ImageFolder
from corpus.sources.huggingface import HuggingFace
from runtime.errors import UserError


def reference_set(name: str, hub: str, resolution: int, root: str | None = None, config: str | None = None) -> Source:
    """A scene-classification data set; its sub-folders, or its labels on the hub, are the scenes.

    Args:
        name: name of the reference set.
        hub: name of the data set on the hub.
        resolution: side of the images in pixels.
        root: a local copy, as downloaded (Parquet) or with one sub-folder per class; if given, it is used.
        config: configuration of the data set on the hub, if it has several.
    Raises:
        UserError: no local copy is given and the hub cannot be reached; the message says what to download, and where
            to put it.
    """
    if root is not None:
        folder = Path(root).expanduser()
        if next(folder.rglob("*.parquet"), None) or (folder / "dataset_info.json").is_file():
            return HuggingFace(path=root, split="all", resolution=resolution, name=name)
        return ImageFolder(root=root, split="all", resolution=resolution, name=name)
    source = HuggingFace(path=hub, config=config, split="all", resolution=resolution, name=name)
    try:
        source.version  # noqa: B018  # loads the data set
    except UserError as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error.__cause__).__name__
        only = f" --include '{config}/*'" if config else ""
        raise UserError(
            f"reference={name} is not on this machine, and {hub} could not be loaded from the hub ({reason}): run "
            f"`hf download {hub} --repo-type dataset{only} --local-dir DIR` on a machine with network access and give "
            "reference.root=DIR; or give a folder of images with one sub-folder per class; or take reference=corpus, "
            "which uses the labels or strata of the corpus"
        ) from error
    return source
