"""Example for a Hugging Face data set: `Dataset.select` with the kept rows. Needs `pip install datasets`."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from rsprune import RSPrune, local_entropy


def generated(count: int = 80) -> Dataset:
    """A replacement for `load_dataset(NAME, split="train")`: images of two classes, one of them plain."""
    random = np.random.default_rng(0)
    label = (np.arange(count) % 4 == 0).astype(int)
    blocks = random.integers(0, 256, size=(count, 8, 8, 3)) * label[:, None, None, None] + 100
    images = np.kron(blocks, np.ones((1, 4, 4, 1))).clip(0, 255) * random.uniform(0.6, 1, size=(count, 1, 1, 1))
    noisy = images.clip(8, 247) + random.integers(-8, 9, size=images.shape)
    features = Features({"image": Image(), "label": ClassLabel(names=["sea", "town"])})
    return Dataset.from_dict({"image": list(noisy.astype(np.uint8)), "label": label}, features=features)


def main() -> None:
    dataset = generated()
    images = np.stack([np.asarray(row["image"].convert("RGB").resize((32, 32))) for row in dataset])
    # `embed_images(images)` (the extra `encoders`) is more informative than these thumbnails
    embeddings = images[:, ::4, ::4].reshape(len(images), -1).astype(np.float32)
    bits = np.array([local_entropy(image) for image in images])
    selection = RSPrune(ratio=0.75).select(embeddings, entropy=bits)
    subset = dataset.select(selection.kept)  # columns, types and cached files are unchanged
    names = dataset.features["label"]
    for name, part in (("all", dataset), ("kept", subset)):
        counts = np.bincount(part["label"], minlength=2)
        print(name, {names.int2str(number): int(count) for number, count in enumerate(counts)})


if __name__ == "__main__":
    main()
