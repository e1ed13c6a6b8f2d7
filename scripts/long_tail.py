"""Make a long-tailed, redundant, noisy corpus from a labelled folder, and compare all methods on it.

`python scripts/long_tail.py long_tail.root=DIR` with one sub-folder per class in DIR (or DIR/images). The methods get
no labels; scenes come from a small labelled reference set of other images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image

from corpus.names import IMAGE_SUFFIXES
from corpus.sources.folder import ImageFolder
from eval.subsets import scene_entropy
from eval.waste import ImageRows, near_duplicate_fraction
from prune.features import corpus_embeddings, corpus_entropy, scan_corpus
from prune.library import select_from_arrays
from runtime.application import changed_config, run
from runtime.artefacts import stage, write_json
from runtime.errors import UserError
from runtime.progress import progress

NOISE = ("blank", "hazy", "no_data")


def class_counts(classes: int, images: int, exponent: float) -> np.ndarray:
    """Number of images of each class, by a power law of its rank: int64 [classes], descending, at least one each."""
    weights = np.arange(1, classes + 1) ** -float(exponent)
    return np.maximum(1, np.round(images * weights / weights.sum())).astype(np.int64)


def crops(image: np.ndarray, size: int, count: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """`count` random squares of side `size`; most of their area overlaps."""
    for _ in range(count):
        top, left = (int(generator.integers(0, length - size + 1)) for length in image.shape[:2])
        yield image[top : top + size, left : left + size]


def spoil(image: np.ndarray, kind: str, generator: np.random.Generator) -> np.ndarray:
    """A tile with almost no information: one colour, under haze, or mostly without data."""
    if kind == "blank":
        colour = generator.integers(20, 236, 3)
        return np.clip(colour + generator.normal(0, 1, image.shape), 0, 255).astype(np.uint8)
    if kind == "hazy":
        veil = generator.uniform(0.88, 0.97)
        return ((1 - veil) * image + veil * generator.integers(190, 230)).astype(np.uint8)
    fraction = generator.uniform(0.6, 0.95)
    spoiled = np.rot90(image, generator.integers(4)).copy()
    spoiled[: round(fraction * len(image))] = 0
    return spoiled


def files_by_class(options: DictConfig) -> dict[str, list[Path]]:
    """Image files by the name of their folder.

    Raises:
        UserError: there are fewer than two classes, or one has too few images.
    """
    if options.root is None:
        raise UserError("long_tail.root is not set: give a folder with one sub-folder per class")
    files: dict[str, list[Path]] = {}
    for path in sorted(Path(options.root).expanduser().rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            files.setdefault(path.parent.name, []).append(path)
    if len(files) < 2:
        raise UserError(f"long_tail.root={options.root} has fewer than two classes: give one sub-folder per class")
    for name, paths in files.items():
        if len(paths) <= options.reference:
            raise UserError(f"class {name} has only {len(paths)} images: lower long_tail.reference")
    return files


def build(cfg: DictConfig, files: dict[str, list[Path]], directory: Path) -> None:
    """Write `pool/` (flat, unlabelled), `reference/<class>/` and `truth.parquet`.

    The columns of truth.parquet are id, scene, kind and source, the photograph of a clean tile.
    """
    options, generator = cfg.long_tail, np.random.default_rng([cfg.seed, 400])
    names = [sorted(files)[index] for index in generator.permutation(len(files))]
    counts = class_counts(len(names), round(options.images * (1 - options.noise)), options.exponent)
    rows: list[tuple[str, str, str, str]] = []
    (directory / "pool").mkdir()

    def put(image: np.ndarray, scene: str, kind: str, source: str) -> None:
        name = f"{generator.integers(2**48):012x}.jpg"  # the order of names carries no information
        Image.fromarray(image).save(directory / "pool" / name, quality=95)
        rows.append((name, scene, kind, source))

    clean: list[Path] = []
    for name, count in zip(progress(names, "long tail", unit="class"), counts, strict=True):
        order = [files[name][index] for index in generator.permutation(len(files[name]))]
        known, rest = order[: options.reference], order[options.reference :]
        (directory / "reference" / name).mkdir(parents=True)
        for path in known:
            (directory / "reference" / name / path.name).write_bytes(path.read_bytes())
        requested, used = int(count), 0
        while requested:
            path = rest[used % len(rest)]
            image = np.asarray(Image.open(path).convert("RGB"))
            part = min(requested, options.crops)
            for crop in crops(image, min(options.size, *image.shape[:2]), part, generator):
                put(crop, name, "clean", f"{name}/{path.name}")
            requested, used = requested - part, used + 1
        clean += rest[:used]
    for index in range(round(options.images * options.noise)):
        image = np.asarray(Image.open(clean[generator.integers(len(clean))]).convert("RGB"))
        kind = NOISE[index % len(NOISE)]
        tile = next(crops(image, min(options.size, *image.shape[:2]), 1, generator))
        put(spoil(tile, kind, generator), "", kind, "")
    pd.DataFrame(rows, columns=["id", "scene", "kind", "source"]).to_parquet(directory / "truth.parquet", index=False)


def judge(kept: np.ndarray, images: np.ndarray, truth: pd.DataFrame) -> dict[str, float]:
    """Quality of a selection of the pool.

    Args:
        kept: int64 [K], rows of the pool.
        images: uint8 [N, R, R, 3].
        truth: N rows with scene, kind and source.
    Returns:
        noise_free: fraction of clean tiles, which were not spoilt.
        scene_entropy, scenes: evenness and number of the classes among them.
        same_source: fraction of the clean tiles for which another clean tile of the same photograph is kept; such tiles
            overlap.
        near_duplicates: fraction of tiles that have a near-duplicate by the perceptual hash.
    """
    chosen = truth.iloc[kept]
    clean = chosen[chosen["kind"] == "clean"]
    return {
        "noise_free": len(clean) / len(kept),
        "scene_entropy": scene_entropy(clean["scene"].to_numpy(dtype=object), len(set(truth["scene"]) - {""})),
        "scenes": clean["scene"].nunique(),
        "same_source": float(clean["source"].duplicated(keep=False).mean()) if len(clean) else 0.0,
        "near_duplicates": near_duplicate_fraction(ImageRows(images, kept)),
    }


def main(cfg: DictConfig) -> None:
    options = cfg.long_tail
    files = files_by_class(options)
    inputs = {"options": options, "seed": cfg.seed}
    made = stage(cfg.runs, "long_tail", inputs, lambda path: build(cfg, files, path))
    measure, encoder = instantiate(cfg.entropy), instantiate(cfg.encoder)
    pool, known = (
        scan_corpus(ImageFolder(root=str(made / name), resolution=options.size), cfg.runs, measure, encoder)
        for name in ("pool", "reference")
    )
    truth = pd.read_parquet(made / "truth.parquet").set_index("id").loc[pool.manifest["id"]]
    embeddings, reference = (corpus_embeddings(corpus, encoder, cfg.runs) for corpus in (pool, known))
    entropy = corpus_entropy(pool, measure, cfg.runs)
    rows = []
    for name in cfg.quality.methods:
        start = time.perf_counter()
        selection = select_from_arrays(
            instantiate(changed_config(f"prune={name}").prune, _convert_="all"),
            embeddings,
            ratio=0.0 if name == "full" else cfg.ratio,
            seed=cfg.seed,
            entropy=entropy,
            reference=reference,
            labels=known.manifest["scene"].to_numpy(dtype=object),
            readable=pool.readable,
        )
        seconds = time.perf_counter() - start
        kept = selection.kept
        rows.append({"prune": name, "kept": len(kept), **judge(kept, pool.images, truth), "seconds": seconds})
    write_results(cfg, len(pool), rows)


def write_results(cfg: DictConfig, images: int, rows: list[dict[str, Any]]) -> None:
    """Write the table as CSV and JSON, and print it with its path."""
    table = pd.DataFrame(rows)
    results = Path(cfg.results) / "long_tail"
    results.mkdir(parents=True, exist_ok=True)
    table.to_csv(results / "long_tail.csv", index=False)
    root = Path(cfg.long_tail.root).expanduser().resolve()
    metadata = {
        "corpus": root.parent.name if root.name == "images" else root.name,
        "images": images,
        "noise": cfg.long_tail.noise,
        "ratio": cfg.ratio,
        "methods": rows,
    }
    write_json(results / "long_tail.json", metadata)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"results: {results}")


if __name__ == "__main__":
    run(main)
