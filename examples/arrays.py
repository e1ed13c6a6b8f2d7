"""Example for arrays: embeddings of any model, and optionally images and labels. Needs only the core package."""

from __future__ import annotations

import numpy as np

from prune.methods.semdedup import SemDeDup
from rsprune import RSPrune, images_represented, local_entropy, select_from_arrays


def main() -> None:
    # example data in place of yours: 600 images of three scenes, the first much more frequent, and their embeddings
    random = np.random.default_rng(0)
    scene = random.choice(3, size=600, p=[0.8, 0.15, 0.05])
    embeddings = random.standard_normal((3, 64))[scene] + 0.4 * random.standard_normal((600, 64))
    contrast = random.integers(1, 120, size=600)[:, None, None, None]
    images = (128 + contrast * random.uniform(-1, 1, size=(600, 32, 32, 3))).astype(np.uint8)

    bits = np.array([local_entropy(image) for image in images])
    known, names = (
        embeddings[::10],
        np.array(["sea", "field", "town"])[scene[::10]],
    )  # a labelled sample, if there is one
    selection = RSPrune(ratio=0.85, seed=0).select(embeddings, entropy=bits, reference=known, labels=names)
    print(f"kept {len(selection.kept)} of {len(images)}")
    for reason, count in zip(*np.unique(selection.reason.astype(str), return_counts=True), strict=True):
        print(f"  {reason}: {count}")
    print(f"of each scene {np.bincount(scene, minlength=3)}, kept {np.bincount(scene[selection.kept], minlength=3)}")

    # number of images that each kept one represents: sampling weights that restore the mixture of the corpus
    everything = np.ones(len(images), dtype=bool)
    weights = images_represented(embeddings, everything, selection.kept, np.random.default_rng(0))
    print(f"weights of the kept sum to {weights.sum():.0f}")

    # any other method takes the same arrays
    rival = select_from_arrays(SemDeDup(), embeddings, ratio=0.85)
    print(f"SemDeDup agrees on {len(np.intersect1d(rival.kept, selection.kept))} images")


if __name__ == "__main__":
    main()
