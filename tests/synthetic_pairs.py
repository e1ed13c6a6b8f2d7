"""A corpus in memory with captions that describe its features: scenes, and two objects per image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from captioning.dual_encoder import DualEncoder
from captioning.loop import material_of
from captioning.scorers import Material
from corpus.index import Corpus

SCENES = ("airport", "beach", "desert", "forest", "harbour", "meadow", "quarry", "square", "stadium", "viaduct")
THINGS = ("roads", "sheds", "ponds", "cars", "trees", "boats", "sand", "rocks", "tanks", "fences")
#: A configuration whose fit takes a tenth of a second.
SMALL = DualEncoder(dimensions=12, image_directions=32, text_directions=40, hashes=4096)
FOLDS = SMALL.folds


def corpus_of(captions: list, scenes: np.ndarray | list[str], directory: Path, side: int = 8) -> Corpus:
    """Images of coloured noise, all readable; a caption is a text or a list of texts."""
    count = len(captions)
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    lists = [list(one) if isinstance(one, (list, tuple)) else [one] for one in captions]
    manifest = pd.DataFrame(
        {
            "id": [f"{row:04d}.png" for row in range(count)], "scene": np.asarray(scenes, dtype=object),
            "caption": [texts[0] for texts in lists], "readable": True, "reason": "",
        }
    )  # fmt: skip
    if any(len(texts) > 1 for texts in lists):
        manifest["captions"] = pd.Series([texts if len(texts) > 1 else None for texts in lists], dtype=object)
    return Corpus("made", directory, images, manifest, None, ())


def world(count: int, seed: int = 0, noise: float = 0.3) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Features float32 [N, 32], captions that belong to them, and scenes str [N]."""
    random = np.random.default_rng(seed)
    scene = random.integers(len(SCENES), size=count)
    things = np.stack([random.permutation(len(THINGS))[:2] for _ in range(count)])
    known = np.concatenate([2 * np.eye(len(SCENES))[scene], np.eye(len(THINGS))[things].sum(1)], axis=1)
    mix = np.random.default_rng(99).standard_normal((known.shape[1], 32))
    features = known @ mix + noise * random.standard_normal((count, 32))
    captions = [
        f"{SCENES[one]} seen from above with {THINGS[first]} beside {THINGS[second]}"
        for one, (first, second) in zip(scene, things, strict=True)
    ]
    return features.astype(np.float32), captions, np.array(SCENES, dtype=object)[scene]


def swapped(captions: list[str], scenes: np.ndarray, fraction: float, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Captions with a fraction exchanged for those of other scenes, and the mask of these, bool [N]."""
    random = np.random.default_rng(seed)
    result, wrong = list(captions), np.zeros(len(captions), bool)
    for row in random.permutation(len(captions))[: round(fraction * len(captions))]:
        result[row] = captions[random.choice(np.flatnonzero(scenes != scenes[row]))]
        wrong[row] = True
    return result, wrong


def material(
    features: np.ndarray, captions: list, scenes: np.ndarray | list[str], directory: Path, *, seed: int = 0
) -> Material:
    corpus = corpus_of(captions, scenes, directory)
    labelled = bool((corpus.manifest["scene"] != "").any())
    return material_of(corpus, features, "features", np.asarray(scenes, dtype=object), labelled, FOLDS, seed)
