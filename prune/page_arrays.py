"""Arrays for the page of a selection that a selection does not store: embedding map, neighbours, near-duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.decomposition import PCA

from prune.clusters import CHUNK, Points, mean_embedding
from prune.neighbour_index import paired_cosines
from prune.neighbours import nearest_neighbours
from report.embedding_map import fit_map
from runtime.artefacts import stage
from runtime.progress import progress

ARRAYS = "page.safetensors"
#: Number of principal components in which candidate neighbours are searched, and number of candidates per requested
#: neighbour that are then compared in all dimensions.
COMPONENTS, CANDIDATES = 64, 4
#: Number of images that the components and the map are fitted to; number of rows compared in all dimensions at once.
SAMPLE, ROWS = 20_000, 2048


@dataclass(frozen=True)
class PageArrays:
    """Arrays with one row per image, in corpus order.

    Attributes:
        plane: float32 [N, 2], position in the embedding map; NaN where unreadable.
        neighbours: int32 [N, k], nearest other images by cosine of centred embeddings, best first; -1: none.
        cosines: float32 [N, k], cosines to the neighbours; NaN where there is none.
        group: int32 [N], near-duplicate group, numbered in the order of first images; -1: in no group.
        nearest_kept: int32 [N], nearest other image that the selection keeps; -1: none.
        nearest_cosine: float32 [N], cosine to that image; NaN where there is none.
    """

    plane: np.ndarray
    neighbours: np.ndarray
    cosines: np.ndarray
    group: np.ndarray
    nearest_kept: np.ndarray
    nearest_cosine: np.ndarray


def page_arrays(
    selection: str,
    embeddings: np.ndarray,
    readable: np.ndarray,
    kept: np.ndarray,
    scenes: np.ndarray,
    neighbours: int,
    duplicate: float,
    runs: Path | str,
) -> PageArrays:
    """Run `computed` as a stage for the selection of the given name, or open its result."""
    inputs = {"selection": selection, "neighbours": neighbours, "duplicate": duplicate}

    def build(directory: Path) -> None:
        result = computed(embeddings, readable, kept, scenes, neighbours, duplicate)
        save_file({name: np.ascontiguousarray(values) for name, values in asdict(result).items()}, directory / ARRAYS)

    return PageArrays(**load_file(stage(runs, "page", inputs, build) / ARRAYS))


def computed(
    embeddings: np.ndarray,
    readable: np.ndarray,
    kept: np.ndarray,
    scenes: np.ndarray,
    neighbours: int,
    duplicate: float,
) -> PageArrays:
    """Compute all arrays that the page shows about the embeddings of a corpus.

    Candidate neighbours are searched in `COMPONENTS` principal components and then compared in all dimensions. So the
    cosines are exact, but a neighbour may be missed if there are more than `prune.neighbours.EXACT` images or
    `COMPONENTS` dimensions.

    Args:
        embeddings: float [N, D].
        readable, kept: bool [N].
        scenes: str [N].
        neighbours: number of neighbours of each image.
        duplicate: cosine from which two images belong to one near-duplicate group.
    """
    rows, count = np.flatnonzero(readable), len(embeddings)
    points = Points(embeddings, mean_embedding(embeddings, rows))
    low = _reduced(points, rows)
    result, cosines = _filled(count, neighbours)
    candidates = nearest_neighbours(low, neighbours if low.shape[1] == embeddings.shape[1] else CANDIDATES * neighbours)
    taken = min(neighbours, candidates[0].shape[1])
    result[rows, :taken], cosines[rows, :taken] = _compared(points, rows, rows, candidates[0], taken)
    group = np.full(count, -1, np.int32)
    group[rows] = groups_of(np.where(result >= 0, result, 0)[rows], cosines[rows], rows, duplicate)
    nearest, nearest_cosine = _filled(count, 1)
    chosen = np.flatnonzero(kept & readable)
    if len(chosen) > 1:
        others = _among(low, np.searchsorted(rows, chosen), rows, chosen)
        nearest[rows], nearest_cosine[rows] = _compared(points, rows, chosen, others, 1)
    plane = np.full((count, 2), np.nan, np.float32)
    plane[rows] = _plane(embeddings, rows, scenes)
    return PageArrays(plane, result, cosines, group, nearest[:, 0], nearest_cosine[:, 0])


def groups_of(neighbours: np.ndarray, cosines: np.ndarray, rows: np.ndarray, duplicate: float) -> np.ndarray:
    """Connected components of the pairs with a cosine of at least `duplicate`, int32 [n]; -1: in no group.

    Args:
        neighbours: int [n, k], rows of the corpus.
        cosines: float [n, k], cosines to the neighbours.
        rows: int [n], ascending, rows of the n images in the corpus.
        duplicate: cosine from which two images belong to one group.
    """
    count = len(rows)
    first, place = np.nonzero(cosines >= duplicate)  # false for NaN
    second = np.searchsorted(rows, neighbours[first, place])
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1] if count else np.empty(0, int)
    sizes = np.bincount(labels, minlength=1)
    numbers = np.full(len(sizes), -1)
    starts = np.unique(labels, return_index=True)[1]
    ordered = [label for label in labels[np.sort(starts)] if sizes[label] > 1]
    numbers[ordered] = np.arange(len(ordered))
    return numbers[labels].astype(np.int32) if count else np.empty(0, np.int32)


def _filled(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((count, width), -1, np.int32), np.full((count, width), np.nan, np.float32)


def _parts(rows: np.ndarray, size: int, label: str) -> Iterator[slice]:
    parts: Iterable[int] = progress(range(0, len(rows), size), label, unit="part")
    return (slice(start, start + size) for start in parts)


def _sample(rows: np.ndarray) -> np.ndarray:
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(int))] if len(rows) else rows


def _reduced(points: Points, rows: np.ndarray) -> np.ndarray:
    """Unit vectors of some rows in at most `COMPONENTS` dimensions, float32 [n, d]."""
    dimensions, sample = points.embeddings.shape[1], _sample(rows)
    width = min(COMPONENTS, dimensions)
    if dimensions <= COMPONENTS or len(sample) <= COMPONENTS:
        return points[rows]
    axes = PCA(width, svd_solver="covariance_eigh").fit(points[sample]).components_.T.astype(np.float32)
    low = np.empty((len(rows), width), np.float32)
    for part in _parts(rows, CHUNK, "principal components"):
        low[part] = points[rows[part]] @ axes
    return low / np.maximum(np.linalg.norm(low, axis=1, keepdims=True), 1e-12)


def _compared(
    points: Points, rows: np.ndarray, others: np.ndarray, candidates: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` candidates of the highest cosine in all dimensions: rows of the corpus int32, cosines float32.

    Args:
        rows: int [n], rows of the corpus.
        others: int, rows of the corpus that can be neighbours.
        candidates: int [n, c], positions in `others`; -1: none.
    """
    result, cosines = _filled(len(rows), count)
    for part in _parts(rows if count else rows[:0], ROWS, "neighbours"):
        nearest = candidates[part]
        vectors = points[others[nearest.clip(0).ravel()]].reshape(*nearest.shape, -1)
        cosine = np.where(nearest < 0, -np.inf, paired_cosines(points[rows[part]], vectors))
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
        cosine, nearest = (np.take_along_axis(values, order, axis=1) for values in (cosine, nearest))
        result[part] = np.where(nearest < 0, -1, others[nearest.clip(0)])
        cosines[part] = np.where(nearest < 0, np.nan, cosine)
    return result, cosines


def _among(low: np.ndarray, chosen: np.ndarray, rows: np.ndarray, own: np.ndarray) -> np.ndarray:
    """For each image the positions in `chosen` of the nearest chosen images except itself, int64 [n, c]; -1: none.

    Args:
        low: float32 [n, d], vectors of all images.
        chosen: int [K], positions in `low` of the images that can be neighbours.
        own: int [K], positions of the chosen images among `rows`.
    """
    index = faiss.IndexFlatIP(low.shape[1])
    index.add(np.ascontiguousarray(low[chosen]))
    width = min(CANDIDATES + 1, len(chosen))
    result = np.empty((len(low), width), np.int64)
    for part in _parts(rows, CHUNK, "nearest kept"):
        result[part] = index.search(low[part], width)[1]
    return np.where(own[result] == rows[:, None], -1, result)


def _plane(embeddings: np.ndarray, rows: np.ndarray, scenes: np.ndarray) -> np.ndarray:
    sample = _sample(rows)
    if len(sample) < 3:
        return np.zeros((len(rows), 2), np.float32)
    fitted = fit_map(np.asarray(embeddings[sample], dtype=np.float32), scenes[sample])
    parts = [fitted(np.asarray(embeddings[rows[part]])) for part in _parts(rows, CHUNK, "map of the embeddings")]
    return np.concatenate(parts)
