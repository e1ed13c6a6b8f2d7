"""Nearest-neighbour index of embeddings: exact for up to `EXACT` vectors, approximate for more."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np

#: Largest number of vectors for which all are compared.
EXACT = 20_000
#: For more vectors: principal components, probed lists, and vectors that the components and lists are fitted to.
COMPONENTS, PROBES, SAMPLE = 64, 16, 100_000


def new_index(sample: np.ndarray, count: int) -> faiss.Index:
    """An empty index for `count` unit vectors.

    Up to `EXACT` vectors are stored in half precision, and all of them are compared. More vectors are reduced to
    `COMPONENTS` principal components and stored in half precision in 2 sqrt(count) lists; `PROBES` lists are searched.

    Args:
        sample: float32 [n, D], unit length, a sample of the vectors that will be added.
        count: number of vectors that will be added.
    """
    dimensions = sample.shape[1]
    if count <= EXACT:
        return faiss.IndexScalarQuantizer(dimensions, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    lists = min(round(2 * count**0.5), len(sample))
    index = faiss.index_factory(dimensions, f"PCA{min(COMPONENTS, dimensions)},IVF{lists},SQfp16", faiss.METRIC_L2)
    inverted = faiss.extract_index_ivf(index)
    inverted.cp.min_points_per_centroid, inverted.cp.niter, inverted.nprobe = 1, 10, PROBES
    index.train(np.ascontiguousarray(sample))
    return index


def nearest(index: faiss.Index, vectors: np.ndarray, count: int) -> np.ndarray:
    """Positions of the up to `count` nearest vectors of an index, int64 [n, count]; -1: none.

    The query vectors are float32 [n, D].
    """
    result = np.full((len(vectors), count), -1, dtype=np.int64)
    requested = min(count, index.ntotal)
    if requested and len(vectors):
        result[:, :requested] = index.search(np.ascontiguousarray(vectors, dtype=np.float32), requested)[1]
    return result


def paired_cosines(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Dot products of unit vectors [n, D] with [n, k, D], float32 [n, k]; no row depends on other rows."""
    return np.einsum("nd,nkd->nk", vectors, others)


def write_index(index: faiss.Index, path: Path) -> int:
    """Write an index in the format of faiss; returns the size of the file in bytes."""
    faiss.write_index(index, str(path))
    return path.stat().st_size


def read_index(path: Path) -> faiss.Index:
    return faiss.read_index(str(path))
