"""A two-dimensional map of embeddings for visual inspection."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.preprocessing import normalize

#: Number of principal components for the discriminant axes: with fewer images than dimensions, any classes would be
#: separable.
COMPONENTS = 50


@dataclass(frozen=True)
class PlaneMap:
    """A fitted map of embeddings into the plane; see `fit_map`.

    Attributes:
        mean: float32 [D], subtracted before rows are scaled to unit length.
        steps: fitted transformations, applied in order; none: all images are at the origin.
        centre, spread: float [2], mean and standard deviation of the images that the map was fitted to.
    """

    mean: np.ndarray
    steps: tuple[Any, ...]
    centre: np.ndarray
    spread: np.ndarray

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """Map embeddings float [n, D] to positions float32 [n, 2]."""
        if not self.steps or len(embeddings) == 0:
            return np.zeros((len(embeddings), 2), dtype=np.float32)
        flat = normalize(np.asarray(embeddings, dtype=np.float32) - self.mean)
        for step in self.steps:
            flat = step.transform(flat)
        return ((flat[:, :2] - self.centre) / self.spread).astype(np.float32)


def embedding_map(embeddings: np.ndarray, scenes: np.ndarray) -> np.ndarray:
    """Positions on the two axes that separate the scenes best, or on two principal axes for fewer than three scenes.

    The separating axes are those of a linear discriminant analysis.

    Args:
        embeddings: float [n, D].
        scenes: str [n].
    Returns:
        float32 [n, 2], each axis with unit variance.
    """
    return fit_map(embeddings, scenes)(embeddings)


def fit_map(embeddings: np.ndarray, scenes: np.ndarray) -> PlaneMap:
    """The map of `embedding_map`, which can then be applied to further images."""
    points = np.asarray(embeddings, dtype=np.float32)
    origin, unit = np.zeros(2, np.float32), np.ones(2, np.float32)
    mean = points.mean(axis=0) if len(points) else np.zeros(points.shape[1], np.float32)
    points = normalize(points - mean) if len(points) else points
    count = min(COMPONENTS, *points.shape)
    if count < 2 or np.ptp(points) == 0:
        return PlaneMap(mean, (), origin, unit)
    steps: list[Any] = [PCA(count, svd_solver="randomized", random_state=0).fit(points)]
    reduced = steps[0].transform(points)
    names, sizes = np.unique(scenes.astype(str), return_counts=True)
    if len(names) >= 3 and len(points) > len(names) + 2 and sizes.max() > 1 and np.ptp(reduced) > 0:
        fitted = LinearDiscriminantAnalysis(n_components=2, solver="eigen", shrinkage=0.1, priors=sizes / sizes.sum())
        with warnings.catch_warnings():  # a scene of one image has no covariance and adds none
            warnings.filterwarnings("ignore", message="Only one sample available")
            steps.append(fitted.fit(reduced, scenes.astype(str)))
        reduced = fitted.transform(reduced)
    centre = reduced[:, :2].mean(axis=0)
    spread = np.maximum((reduced[:, :2] - centre).std(axis=0), 1e-12)
    return PlaneMap(mean, tuple(steps), centre, spread)
