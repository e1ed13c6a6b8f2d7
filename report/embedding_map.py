"""Where images lie in the plane: a 2-D map of embeddings for people to look at."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.preprocessing import normalize

#: Principal components that the discriminant axes are sought in: with fewer images than dimensions all can be parted.
COMPONENTS = 50


def embedding_map(embeddings: np.ndarray, scenes: np.ndarray) -> np.ndarray:
    """Two axes that part the scenes best (linear discriminants), or the principal ones where there are under three.

    Args:
        embeddings: float [n, D]; scenes: str [n].
    Returns:
        float32 [n, 2], each axis with unit variance.
    """
    points = np.asarray(embeddings, dtype=np.float32)
    points = normalize(points - points.mean(axis=0)) if len(points) else points
    count = min(COMPONENTS, *points.shape)
    if count < 2 or np.ptp(points) == 0:
        return np.zeros((len(points), 2), dtype=np.float32)
    reduced = PCA(count, svd_solver="randomized", random_state=0).fit_transform(points)
    names, sizes = np.unique(scenes.astype(str), return_counts=True)
    if len(names) >= 3 and len(points) > len(names) + 2 and sizes.max() > 1 and np.ptp(reduced) > 0:
        fitted = LinearDiscriminantAnalysis(n_components=2, solver="eigen", shrinkage=0.1, priors=sizes / sizes.sum())
        reduced = fitted.fit_transform(reduced, scenes.astype(str))
    flat = reduced[:, :2] - reduced[:, :2].mean(axis=0)
    return (flat / np.maximum(flat.std(axis=0), 1e-12)).astype(np.float32)
