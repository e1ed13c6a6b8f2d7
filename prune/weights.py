"""How many images of the corpus each kept image stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from prune.clusters import CHUNK, Points, mean_embedding
from runtime.progress import progress

#: Multiplications up to which every kept image is looked at; above, an inverted file on fewer dimensions finds one.
EXACT = 5e11
#: Principal components and probed lists of the inverted file, and the images that its lists are fitted to.
COMPONENTS, PROBES, SAMPLE = 64, 8, 50_000
Projection = Callable[[np.ndarray], np.ndarray]


def images_represented(
    embeddings: np.ndarray, readable: np.ndarray, kept: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Weights of the kept images: how many readable images have each of them as their nearest kept one.

    Nearest by cosine of centred embeddings; a kept image represents itself. With these weights the subset has the
    corpus's distribution, as far as the embeddings tell (docs/method.md, section 3).

    Args:
        embeddings: float [N, D], usually a memory map, read in parts.
        readable: bool [N].
        kept: int64 [K], ascending, readable.
        generator: of the images that the inverted file is fitted to, where one is needed.
    Returns:
        float32 [N], 0 where an image is not kept; its sum is the number of readable images.
    """
    weights = np.zeros(len(embeddings), dtype=np.float32)
    if len(kept) == 0:
        return weights
    rows = np.flatnonzero(readable)
    points = Points(embeddings, mean_embedding(embeddings, rows))
    index, project = _index(points, kept, len(rows), generator)
    owner = np.empty(len(rows), dtype=np.int64)
    for start in progress(range(0, len(rows), CHUNK), "weights", unit="chunk"):
        part = rows[start : start + CHUNK]
        owner[start : start + len(part)] = _nearest(index, project(points[part]))
    position = np.full(len(embeddings), -1, dtype=np.int64)
    position[kept] = np.arange(len(kept))
    own = position[rows]
    owner = np.where(own >= 0, own, owner)  # of two equal images that are kept, each represents itself
    weights[kept] = np.bincount(owner, minlength=len(kept))
    return weights


def effective_size(weights: np.ndarray) -> float:
    """Images that count alike with the same variance (Kish 1965): (sum w)^2 / sum w^2; 0 where there are none."""
    total = float(weights.sum(dtype=np.float64))
    return total**2 / float((weights.astype(np.float64) ** 2).sum()) if total else 0.0


def _index(
    points: Points, kept: np.ndarray, images: int, generator: np.random.Generator
) -> tuple[faiss.Index, Projection]:
    """A faiss index of the kept images, and what brings vectors to its dimensions."""
    dimensions = points.embeddings.shape[1]
    if float(images) * len(kept) * dimensions <= EXACT:
        index: Any = faiss.IndexFlatIP(dimensions)
        _add(index, points, kept, lambda vectors: vectors)
        return index, lambda vectors: vectors
    sample = np.sort(generator.permutation(kept)[:SAMPLE])
    basis = _principal_components(points[sample], min(COMPONENTS, dimensions))
    project = lambda vectors: np.ascontiguousarray(vectors @ basis)  # noqa: E731
    lists = max(1, round(2 * len(kept) ** 0.5))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(basis.shape[1]), basis.shape[1], lists)
    index.cp.min_points_per_centroid = 1
    index.cp.niter = 10
    index.train(project(points[sample]))
    index.nprobe = PROBES
    _add(index, points, kept, project)
    return index, project


def _nearest(index: Any, vectors: np.ndarray) -> np.ndarray:
    """Position of the nearest kept image, int64 [n]; where all probed lists are empty, all lists are."""
    found = index.search(vectors, 1)[1][:, 0]
    if len(missed := np.flatnonzero(found < 0)):
        everywhere = faiss.SearchParametersIVF(nprobe=index.nlist)  # type: ignore[call-arg]
        found[missed] = index.search(vectors[missed], 1, params=everywhere)[1][:, 0]
    return found


def _add(index: faiss.Index, points: Points, kept: np.ndarray, project: Projection) -> None:
    for start in range(0, len(kept), CHUNK):
        index.add(project(points[kept[start : start + CHUNK]]))


def _principal_components(vectors: np.ndarray, count: int) -> np.ndarray:
    """float32 [D, count], orthonormal, of vectors that are centred already."""
    _, basis = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors.astype(np.float64))
    return np.ascontiguousarray(basis[:, ::-1][:, :count], dtype=np.float32)
