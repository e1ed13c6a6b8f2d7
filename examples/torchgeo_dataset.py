"""Example for a torchgeo data set: a `Subset` of the kept samples. Needs `pip install 'rs-prune[geo]'` with torch.

`python examples/torchgeo_dataset.py ROOT` reads EuroSAT100, which must be in ROOT.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from rsprune import RSPrune, embed_images, local_entropy


def as_rgb(sample: dict[str, Any], bands: tuple[int, int, int], top: float) -> np.ndarray:
    """The image of a sample, [C, H, W] of reflectances, as uint8 [H, W, 3].

    Args:
        bands: indices of red, green and blue.
        top: value that is mapped to 255.
    """
    channels = np.asarray(sample["image"], dtype=np.float32)[list(bands)]
    return (channels.transpose(1, 2, 0) / top * 255).clip(0, 255).astype(np.uint8)


def pruned(dataset: Any, ratio: float, bands: tuple[int, int, int], top: float) -> Subset:
    """The kept samples of a data set; all samples have an `image` of the same size."""
    images = np.stack([as_rgb(dataset[row], bands, top) for row in range(len(dataset))])
    bits = np.array([local_entropy(image) for image in images])
    selection = RSPrune(ratio=ratio).select(embed_images(images), entropy=bits)
    return Subset(dataset, selection.kept.tolist())


def main(root: str) -> None:
    from torchgeo.datasets import EuroSAT100

    dataset: Dataset = EuroSAT100(root, split="train", bands=EuroSAT100.rgb_bands)
    print(f"kept {len(pruned(dataset, 0.5, bands=(0, 1, 2), top=3000))} samples")


if __name__ == "__main__":
    main(sys.argv[1])
