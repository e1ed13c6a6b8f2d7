"""Read a folder of images into arrays and embed images, for users who have neither arrays nor an encoder yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsprune.installed import needs

#: Module and class of each encoder that gets its weights from a Python package.
_ENCODERS = {
    "efficientnet_lite0": ("encoders.efficientnet", "EfficientNetLite0"),
    "efficientnet_lite2": ("encoders.efficientnet_lite2", "EfficientNetLite2"),
}


@dataclass(frozen=True)
class FolderImages:
    """The N images of a folder, sorted by id.

    Attributes:
        ids: str [N], path of each file relative to the folder.
        images: uint8 [N, S, S, 3]; zeros where the file is unreadable.
        readable: bool [N], whether the file could be decoded.
        scene: str [N], name of the class folder; "" where there is none.
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
    """Read all images of a folder, at any depth, into memory, in the same way as `corpus=folder` of the commands.

    The images are decoded in the calling process. The function needs the extra `images`; GeoTIFFs also need `geo`.

    Args:
        folder: directory of the images; class folders and captions are found as described in docs/corpora.md.
        side: S in pixels; each image is cropped to its central square and resized to S x S.
        limit: largest number of images to read, evenly spread over the folder; None: all.
    Raises:
        UserError: the folder does not exist, it has no images, or the extra is not installed.
    """
    with needs("images", "read_folder"):
        from corpus.masks import Sample
        from corpus.sources.folder import ImageFolder

    source = ImageFolder(root=str(folder), split="all", resolution=side, limit=limit)
    manifest = source.manifest()
    images = np.zeros((len(manifest), side, side, 3), np.uint8)
    readable = np.zeros(len(manifest), dtype=bool)
    for row, read in enumerate(source.reader(np.arange(len(manifest)))()):
        if not isinstance(read, str):  # a string is the reason why the image is unreadable
            images[row] = read.image if isinstance(read, Sample) else read
            readable[row] = True
    columns = (manifest[name].to_numpy(dtype=object) for name in ("id", "scene", "caption"))
    ids, scene, caption = columns
    return FolderImages(ids, images, readable, scene, caption)


def embed_images(images: np.ndarray, encoder: str = "efficientnet_lite0", *, batch_size: int = 64) -> np.ndarray:
    """Embed images with a frozen network whose weights come with a Python package; returns float32 [N, 1280].

    The function needs the extra `encoders`, which includes PyTorch. The pruning methods also accept the embeddings of
    any other model.

    Args:
        images: uint8 [N, H, W, 3], N images of one size.
        encoder: "efficientnet_lite0" or "efficientnet_lite2", both trained on ImageNet.
        batch_size: images per forward pass.
    Raises:
        UserError: the encoder is unknown, the array is not uint8 [N, H, W, 3], or the extra is not installed.
    """
    from importlib import import_module

    from runtime.errors import UserError
    from runtime.ranges import check_images

    if encoder not in _ENCODERS:
        raise UserError(f"encoder={encoder} is unknown: take {' or '.join(_ENCODERS)}, or embed with your own model")
    images = np.asarray(images)
    check_images(images)
    module, name = _ENCODERS[encoder]
    with needs("encoders", "embed_images"):
        from encoders.embedding import embed

        network = getattr(import_module(module), name)()
        return embed(network, images, batch_size=batch_size, label=encoder)
