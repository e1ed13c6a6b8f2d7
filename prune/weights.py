"""Weights of kept images: the number of images of the corpus that each kept image represents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from prune.clusters import CHUNK, Clustering, Points, mean_embedding, members_of
from runtime.errors import UserError
from runtime.progress import progress

#: Largest number of multiplications for an exhaustive search; above it, an inverted file on fewer dimensions is used.
EXACT = 5e11
#: Principal components and probed lists of the inverted file, and number of images that its lists are fitted to.
COMPONENTS, PROBES, SAMPLE = 64, 8, 50_000
#: Up to `MANY_KEPT` kept images, the number of lists grows with the square root of the number of images. Above it, each
#: list has `LIST_IMAGES` images, and the lists themselves are found by a second inverted file, so that the cost of one
#: look-up no longer grows.
MANY_KEPT, LIST_IMAGES = 250_000, 250
#: Number of images that the centre of one of these lists is computed from, and images that are looked up together.
LIST_SAMPLE, TOGETHER = 32, 16 * CHUNK
Projection = Callable[[np.ndarray], np.ndarray]


def images_represented(
    embeddings: np.ndarray, readable: np.ndarray, kept: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Weight of each kept image: the number of readable images whose nearest kept image it is.

    The nearest image is the one of the highest cosine of centred embeddings; a kept image represents itself. With
    these weights the subset has the distribution of the corpus, as far as the embeddings describe it (docs/method.md,
    section 3).

    Args:
        embeddings: float [N, D], usually a memory map, read in parts.
        readable: bool [N].
        kept: int64 [K], ascending rows of readable images.
        generator: draws the images that the inverted file is fitted to, if one is needed.
    Returns:
        float32 [N], 0 where an image is not kept; the sum is the number of readable images.
    Raises:
        UserError: shapes disagree, or `kept` does not hold ascending rows of readable images.
    """
    _check(embeddings, readable, kept)
    weights = np.zeros(len(embeddings), dtype=np.float32)
    if len(kept) == 0:
        return weights
    rows = np.flatnonzero(readable)
    points = Points(embeddings, mean_embedding(embeddings, rows))
    index, project = _index(points, kept, len(rows), generator)
    owner = np.empty(len(rows), dtype=np.int64)
    for start in progress(range(0, len(rows), TOGETHER), "weights", unit="chunk"):
        part = rows[start : start + TOGETHER]
        owner[start : start + len(part)] = _nearest(index, _projected(points, part, project))
    position = np.full(len(embeddings), -1, dtype=np.int64)
    position[kept] = np.arange(len(kept))
    own = position[rows]
    owner = np.where(own >= 0, own, owner)  # a kept image represents itself, even if another kept image is equal to it
    weights[kept] = np.bincount(owner, minlength=len(kept))
    return weights


def _check(embeddings: np.ndarray, readable: np.ndarray, kept: np.ndarray) -> None:
    """Check the arguments of `images_represented`."""
    readable, kept = np.asarray(readable), np.asarray(kept)
    if embeddings.ndim != 2 or readable.shape != (len(embeddings),) or readable.dtype != bool:
        raise UserError(
            f"readable must be bool [N] for embeddings [N, D], not {readable.dtype} {readable.shape} for "
            f"{embeddings.shape}"
        )
    if kept.ndim != 1 or not (np.issubdtype(kept.dtype, np.integer) or len(kept) == 0):
        raise UserError(
            f"kept must be the rows of the kept images, int64 [K], not {kept.dtype} {kept.shape}: give "
            "selection.kept, or np.flatnonzero of a mask"
        )
    if len(kept) and (kept[0] < 0 or kept[-1] >= len(readable) or (np.diff(kept) <= 0).any()):
        raise UserError(f"kept must be ascending rows from 0 to {len(readable) - 1}: sort them and remove repetitions")
    if len(kept) and not readable[kept].all():
        raise UserError("kept has rows of unreadable images: remove them")


def effective_size(weights: np.ndarray) -> float:
    """Effective sample size (sum w)^2 / sum w^2 (Kish 1965): equally weighted images of the same variance; 0: none."""
    total = float(weights.sum(dtype=np.float64))
    return total**2 / float((weights.astype(np.float64) ** 2).sum()) if total else 0.0


def _index(
    points: Points, kept: np.ndarray, images: int, generator: np.random.Generator
) -> tuple[faiss.Index, Projection]:
    """A faiss index of the kept images, and the projection of vectors to its dimensions."""
    dimensions = points.embeddings.shape[1]
    if float(images) * len(kept) * dimensions <= EXACT:
        index: Any = faiss.IndexFlatIP(dimensions)
        _add(index, points, kept, lambda vectors: vectors)
        return index, lambda vectors: vectors
    sample = np.sort(generator.permutation(kept)[:SAMPLE])
    basis = _principal_components(points[sample], min(COMPONENTS, dimensions))
    project = lambda vectors: np.ascontiguousarray(vectors @ basis)  # noqa: E731
    if len(kept) > MANY_KEPT:
        index = _two_levels(points, kept, project, generator)
    else:
        index = _inverted(basis.shape[1], max(1, round(2 * len(kept) ** 0.5)))
        index.train(project(points[sample]))
    index.nprobe = PROBES
    _add(index, points, kept, project)
    return index, project


def _inverted(dimensions: int, lists: int) -> faiss.IndexIVFFlat:
    """An untrained inverted file whose lists are found by comparison with every centre."""
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimensions), dimensions, lists)
    index.cp.min_points_per_centroid = 1
    index.cp.niter = 10
    return index


def _two_levels(
    points: Points, kept: np.ndarray, project: Projection, generator: np.random.Generator
) -> faiss.IndexIVFFlat:
    """An inverted file with `LIST_IMAGES` kept images per list; a second inverted file holds the centres of the lists.

    The centres are the means of hierarchical k-means, because one k-means with so many clusters would be quadratic.
    """
    lists = max(1, len(kept) // LIST_IMAGES)
    rows = np.sort(generator.choice(kept, min(len(kept), LIST_SAMPLE * lists), replace=False))
    sample = _projected(points, rows, project)
    flat = Points(sample, np.zeros(sample.shape[1], np.float32), spherical=False)
    labels, _ = Clustering(iterations=10)(flat, np.arange(len(sample)), lists, generator)
    centres = np.stack([sample[group].mean(axis=0) for group in members_of(labels, int(labels.max()) + 1)])
    coarse = _inverted(sample.shape[1], min(len(centres), round(2 * len(centres) ** 0.5)))
    coarse.train(centres)
    coarse.add(centres)
    coarse.nprobe = PROBES
    index = faiss.IndexIVFFlat(coarse, sample.shape[1], len(centres))
    index.train(centres)  # finds the centres in place and keeps them
    return index


def _nearest(index: Any, vectors: np.ndarray) -> np.ndarray:
    """Position of the nearest kept image, int64 [n]; if all probed lists are empty, all lists are searched.

    Vectors that belong to the same list are looked up in sequence, so that the list is read from memory once.
    """
    # faiss's type hints describe its C++ calls, not their Python wrappers
    inverted: Any = index
    parameters: Any = faiss.SearchParametersIVF
    if not isinstance(index, faiss.IndexIVF):
        return inverted.search(vectors, 1)[1][:, 0]
    distances, lists = index.quantizer.search(vectors, index.nprobe)
    order = np.argsort(lists[:, 0], kind="stable")
    result = np.empty(len(vectors), dtype=np.int64)
    result[order] = inverted.search_preassigned(vectors[order], 1, lists[order], distances[order])[1][:, 0]
    if len(missed := np.flatnonzero(result < 0)):
        options = {"nprobe": index.nlist}
        if isinstance(centres := faiss.downcast_index(index.quantizer), faiss.IndexIVF):
            options["quantizer_params"] = parameters(nprobe=centres.nlist)
        result[missed] = inverted.search(vectors[missed], 1, params=parameters(**options))[1][:, 0]
    return result


def _projected(points: Points, rows: np.ndarray, project: Projection) -> np.ndarray:
    """Projections of some rows by `project`, float32 [n, d]; the rows are read part by part."""
    return np.concatenate([project(points[rows[start : start + CHUNK]]) for start in range(0, len(rows), CHUNK)])


def _add(index: faiss.Index, points: Points, kept: np.ndarray, project: Projection) -> None:
    for start in range(0, len(kept), CHUNK):
        index.add(project(points[kept[start : start + CHUNK]]))


def _principal_components(vectors: np.ndarray, count: int) -> np.ndarray:
    """The first `count` principal components of centred vectors, float32 [D, count], orthonormal."""
    _, basis = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors.astype(np.float64))
    return np.ascontiguousarray(basis[:, ::-1][:, :count], dtype=np.float32)
