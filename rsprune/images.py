"""Images in and embeddings out, for those who have neither arrays nor an encoder yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsprune.installed import needs

#: Modules and classes of the encoders whose weights packages ship.
_ENCODERS = {
    "efficientnet_lite0": ("encoders.efficientnet", "EfficientNetLite0"),
    "efficientnet_lite2": ("encoders.efficientnet_lite2", "EfficientNetLite2"),
}


@dataclass(frozen=True)
class FolderImages:
    """Images of a folder, in the order of their ids.

    Attributes:
        ids: str [N], each file's path below the folder.
        images: uint8 [N, S, S, 3]; zeros where unreadable.
        readable: bool [N].
        scene: str [N], the class folder; "" where there is none.
        caption: str [N]; "" where there is none.
    """

    ids: np.ndarray
    images: np.ndarray
    readable: np.ndarray
    scene: np.ndarray
    caption: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def read_folder(folder: str | Path, *, side: int = 64, limit: int | None = None) -> FolderImages:
    """All images of a folder at any depth, as `corpus=folder` of the commands reads them; in memory, by this process.

    Needs the extra `images`; GeoTIFFs need `geo` as well.

    Args:
        folder: of images; class folders and captions are found as docs/corpora.md says.
        side: S in pixels; images are cropped to their central square and resized.
        limit: at most so many, evenly spread (None: all).
    Raises:
        UserError: there is no such folder, it has no images, or the extra is missing.
    """
    with needs("images", "read_folder"):
        from corpus.masks import Sample
        from corpus.sources.folder import ImageFolder

    source = ImageFolder(root=str(folder), split="all", resolution=side, limit=limit)
    manifest = source.manifest()
    images = np.zeros((len(manifest), side, side, 3), np.uint8)
    readable = np.zeros(len(manifest), dtype=bool)
    for row, read in enumerate(source.reader(np.arange(len(manifest)))()):
        if not isinstance(read, str):  # else the reason why there is none
            images[row] = read.image if isinstance(read, Sample) else read
            readable[row] = True
    columns = (manifest[name].to_numpy(dtype=object) for name in ("id", "scene", "caption"))
    ids, scene, caption = columns
    return FolderImages(ids, images, readable, scene, caption)


def embed_images(images: np.ndarray, encoder: str = "efficientnet_lite0", *, batch_size: int = 64) -> np.ndarray:
    """Embeddings of images by a frozen network whose weights a package ships, float32 [N, 1280].

    Needs the extra `encoders`, which has PyTorch; embeddings of any other model do as well.

    Args:
        images: uint8 [N, H, W, 3], N images of one size.
        encoder: "efficientnet_lite0" or "efficientnet_lite2", trained on ImageNet.
        batch_size: images a forward pass.
    Raises:
        UserError: there is no such encoder, the images are none, or the extra is missing.
    """
    from importlib import import_module

    from runtime.errors import UserError

    if encoder not in _ENCODERS:
        raise UserError(f"encoder={encoder} is unknown: take {' or '.join(_ENCODERS)}, or embed with a model of yours")
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"images must be uint8 of shape [images, height, width, 3], not {images.dtype} {images.shape}")
    module, name = _ENCODERS[encoder]
    with needs("encoders", "embed_images"):
        from encoders.embedding import embed

        network = getattr(import_module(module), name)()
        return embed(network, images, batch_size=batch_size, label=encoder)
