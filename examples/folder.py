"""Example for a folder of images: `python examples/folder.py [FOLDER]`. Extra `images`, or better `encoders`."""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from rsprune import RSPrune, embed_images, local_entropy, near_duplicate_fraction, read_folder, selection_table


def generated(folder: Path, count: int = 60) -> None:
    """Images of random blocks; every third one repeats the preceding one with a little noise."""
    random = np.random.default_rng(0)
    for number in range(count):
        if number % 3 < 2:
            blocks = random.integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
        pixels = np.kron(blocks, np.ones((8, 8, 1))) + random.normal(0, 4, size=(64, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.png")


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Images at 8 x 8 px as vectors, for use without PyTorch. They represent colours and layout, but no content."""
    small = images.reshape(len(images), 8, images.shape[1] // 8, 8, images.shape[2] // 8, 3).mean(axis=(2, 4))
    return small.reshape(len(images), -1).astype(np.float32)


def main(folder: Path) -> None:
    result = read_folder(folder, side=64)
    embeddings = embed_images(result.images) if find_spec("timm") else thumbnails(result.images)
    bits = np.array([local_entropy(image) for image in result.images])
    selection = RSPrune(ratio=0.5).select(embeddings, entropy=bits, readable=result.readable)
    before, after = (near_duplicate_fraction(images) for images in (result.images, result.images[selection.kept]))
    print(
        f"kept {len(selection.kept)} of {len(result)}; near-duplicates: {before:.2f} of them before, {after:.2f} after"
    )
    table = selection_table(selection, result.ids)
    table.to_csv(folder / "selection.csv", index=False)
    print(table.head(3).to_string(index=False))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            generated(Path(made))
            main(Path(made))
