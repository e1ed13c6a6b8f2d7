"""Example for WebDataset shards: read, select by key, copy the kept samples unchanged. `pip install webdataset`.

For shards that do not fit in memory, or behind URLs, use the command `python prune/run.py corpus=webdataset`.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from rsprune import RSPrune, local_entropy, selection_table


def generated(pattern: str, count: int = 60) -> None:
    """Shards of 20 samples: key.png and key.txt."""
    random = np.random.default_rng(0)
    with wds.ShardWriter(pattern, maxcount=20, verbose=0) as sink:
        for number in range(count):
            buffer = io.BytesIO()
            pixels = np.kron(random.integers(0, 256, size=(4, 4, 3)), np.ones((8, 8, 1)))
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "png")
            sink.write({"__key__": f"{number:06d}", "png": buffer.getvalue(), "txt": f"image {number}"})


def main(folder: Path) -> None:
    generated(str(folder / "all-%06d.tar"))
    shards = [str(path) for path in sorted(folder.glob("all-*.tar"))]
    keys, images = [], []
    for sample in wds.WebDataset(shards, shardshuffle=False).decode("rgb8"):
        keys.append(sample["__key__"])
        images.append(sample["png"])
    # `embed_images(np.stack(images))` (the extra `encoders`) is more informative than these thumbnails
    embeddings = np.stack(images)[:, ::4, ::4].reshape(len(images), -1).astype(np.float32)
    bits = np.array([local_entropy(image) for image in images])
    table = selection_table(RSPrune(ratio=0.5).select(embeddings, entropy=bits), keys)

    kept = set(table["id"][table["kept"]])
    with wds.ShardWriter(str(folder / "kept-%06d.tar"), maxcount=20, verbose=0) as sink:
        for sample in wds.WebDataset(shards, shardshuffle=False):  # raw bytes: nothing is encoded a second time
            if sample["__key__"] in kept:
                sink.write({name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")})
    written = sum(
        1 for _ in wds.WebDataset([str(path) for path in sorted(folder.glob("kept-*.tar"))], shardshuffle=False)
    )
    print(f"kept {written} of {len(keys)} samples")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
