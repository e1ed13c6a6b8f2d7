"""A linear CLIP: maps of images and texts into one space in closed form, from features of a frozen image encoder.

The method is canonical correlation analysis (Hotelling 1936) with ridge penalties (Vinod 1976). The optimum is unique
and is found in seconds on a CPU. Mismatched pairs among the training pairs only reduce the cross-covariance, so the
model can learn from the pairs that it is to clean. docs/method.md, section 8, has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from captioning.pairs import UNSPACED
from runtime.errors import UserError

#: Rows that are multiplied at once.
CHUNK = 16_384
#: Pattern of the hashed tokens: a word, or a letter of a script without spaces.
WORD = rf"(?u)[{UNSPACED}]|[^\W{UNSPACED}]+"
#: A direction with less than this fraction of the covariance's trace is rounding noise.
EPSILON = 1e-6


@dataclass(frozen=True)
class DualEncoder:
    """Settings for fitting a linear CLIP.

    Args:
        dimensions: dimensions of the common space, which are the strongest canonical directions.
        image_ridge, text_ridge: penalties, as fractions of the mean variance of a direction.
        power: directions are weighted by their canonical correlation to this power.
        image_directions, text_directions: numbers of principal directions that features and texts are first reduced to.
        hashes: number of columns for hashed words and pairs of words.
        scene_scale: length of the one-hot code of an image's known scene, which is appended to its features of mean
            length 1; 0: no code.
        folds: number of folds of the images; the pairs of a fold are scored by the encoder fitted to the other folds.
        most_pairs: largest number of pairs that an encoder is fitted to; if there are more, they are drawn at random.
    """

    dimensions: int = 48
    image_ridge: float = 1.0
    text_ridge: float = 0.5
    power: float = 2.0
    image_directions: int = 512
    text_directions: int = 384
    hashes: int = 32_768
    scene_scale: float = 1.0
    folds: int = 5
    most_pairs: int = 50_000

    def __post_init__(self) -> None:
        if self.folds < 2 or self.dimensions < 1:
            raise UserError(
                f"captioning.scorers: options.folds={self.folds}, options.dimensions={self.dimensions}: give 2 folds "
                "or more and at least 1 dimension"
            )


@dataclass(frozen=True)
class FittedEncoder:
    """Two maps from reduced images and texts into the common space.

    Attributes:
        image_centre: float32 [R].
        image_map: float32 [R, D].
        text_centre: float32 [S].
        text_map: float32 [S, D].
    """

    image_centre: np.ndarray
    image_map: np.ndarray
    text_centre: np.ndarray
    text_map: np.ndarray

    def images(self, reduced: np.ndarray) -> np.ndarray:
        """Unit embeddings float32 [N, D] of reduced images [N, R]."""
        return _unit((reduced - self.image_centre) @ self.image_map)

    def texts(self, reduced: np.ndarray) -> np.ndarray:
        """Unit embeddings float32 [T, D] of reduced texts [T, S]; zeros for a text without known words."""
        known = reduced.any(axis=1, keepdims=True)
        return _unit(((reduced - self.text_centre) @ self.text_map) * known)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors to length 1, float32; a zero vector stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def hashed_words(texts: Sequence[str], hashes: int) -> sparse.csr_matrix:
    """Counts of words and of pairs of neighbouring words by their hash, float32 [T, H].

    In scripts without spaces, letters are counted instead of words.
    """
    vectorizer = HashingVectorizer(
        n_features=hashes, ngram_range=(1, 2), alternate_sign=False, norm=None, token_pattern=WORD,
        dtype=np.float32,
    )  # fmt: skip
    return vectorizer.transform(texts)


def weighted(counts: sparse.csr_matrix, inverse_frequency: np.ndarray) -> sparse.csr_matrix:
    """Unit rows of (1 + log count) times the inverse document frequency."""
    logs = counts.copy()
    logs.data = 1 + np.log(logs.data)
    return normalize(logs @ sparse.diags(inverse_frequency.astype(np.float32)))


def inverse_frequencies(counts: sparse.csr_matrix) -> np.ndarray:
    """log((1 + T) / (1 + T_h)) + 1 for each hash, float32 [H]: T is the number of texts, T_h of texts with the hash."""
    having = np.bincount(counts.indices, minlength=counts.shape[1])
    return (np.log((1 + counts.shape[0]) / (1 + having)) + 1).astype(np.float32)


@dataclass(frozen=True)
class Reduction:
    """Principal directions of images and of texts, computed separately, so that the pairing does not matter.

    Attributes:
        image_centre: float32 [F].
        image_basis: float32 [F, R], for features divided by their standard deviations.
        inverse_frequency: float32 [H].
        text_basis: float32 [H, S].
        length: mean squared length of the reduced features.
    """

    image_centre: np.ndarray
    image_basis: np.ndarray
    inverse_frequency: np.ndarray
    text_basis: np.ndarray
    length: float

    @classmethod
    def of(
        cls, options: DualEncoder, features: np.ndarray, texts: Sequence[str], generator: np.random.Generator
    ) -> Reduction:
        """Compute the reduction from features [N, F] and texts.

        Args:
            generator: generator for the randomised decomposition of the texts (Halko, Martinsson and Tropp 2011).
        """
        centre, basis = principal_directions(features, options.image_directions)
        counts = hashed_words(texts, options.hashes)
        frequencies = inverse_frequencies(counts)
        words = weighted(counts, frequencies)
        used = np.flatnonzero(np.bincount(words.indices, minlength=options.hashes) > 1)
        rank = max(1, min(options.text_directions, len(used) - 1, len(texts) - 1))
        text_basis = np.zeros((options.hashes, rank), np.float32)
        seed = int(generator.integers(2**31))
        if len(used):
            text_basis[used] = randomized_svd(words[:, used], rank, n_iter=2, random_state=seed)[2].T
        squares = ((np.asarray(features, np.float32) - centre) @ basis) ** 2
        return cls(centre, basis, frequencies, text_basis, float(squares.sum(1).mean()))

    def images(self, features: np.ndarray) -> np.ndarray:
        """Reduce features [N, F] to float32 [N, R]."""
        parts = [
            (np.asarray(features[start : start + CHUNK], np.float32) - self.image_centre) @ self.image_basis
            for start in range(0, len(features), CHUNK)
        ]
        return np.concatenate([np.empty((0, self.image_basis.shape[1]), np.float32), *parts])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Reduce texts to float32 [T, S]; zeros for a text without words."""
        words = hashed_words(texts, len(self.inverse_frequency))
        return np.asarray(weighted(words, self.inverse_frequency) @ self.text_basis, np.float32)


def fit_dual_encoder(options: DualEncoder, images: np.ndarray, texts: np.ndarray, weights: np.ndarray) -> FittedEncoder:
    """Fit both maps to pairs.

    Args:
        images: float32 [P, R], from a `Reduction`.
        texts: float32 [P, S], from a `Reduction`.
        weights: float [P], weight of each pair, not negative, at least one positive.
    """
    fraction = (weights / weights.sum()).astype(np.float64)
    image_centre, text_centre = fraction @ images, fraction @ texts
    image_map, text_map = canonical_directions(images - image_centre, texts - text_centre, fraction, options)
    return FittedEncoder(*(value.astype(np.float32) for value in (image_centre, image_map, text_centre, text_map)))


def principal_directions(features: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean float32 [F] and strongest principal directions float32 [F, R] of standardised features [N, F]."""
    values = np.asarray(features, np.float32)
    centre = values.mean(0)
    deviation = values.std(0) + EPSILON
    scaled = (values - centre) / deviation
    _, vectors = np.linalg.eigh((scaled.T @ scaled).astype(np.float64))
    return centre, (vectors[:, ::-1][:, :most] / deviation[:, None]).astype(np.float32)


def canonical_directions(
    images: np.ndarray, texts: np.ndarray, fraction: np.ndarray, options: DualEncoder
) -> tuple[np.ndarray, np.ndarray]:
    """Maps float64 [R, D] and [S, D] of centred images and texts onto their canonical directions."""
    part = fraction[:, None].astype(np.float32)
    by_image = inverse_root((images.T @ (images * part)).astype(np.float64), options.image_ridge)
    by_text = inverse_root((texts.T @ (texts * part)).astype(np.float64), options.text_ridge)
    cross = (images.T @ (texts * part)).astype(np.float64)
    left, correlations, right = np.linalg.svd(by_image @ cross @ by_text, full_matrices=False)
    kept = slice(0, options.dimensions)
    scale = correlations[kept] ** (options.power / 2)
    return by_image @ left[:, kept] * scale, by_text @ right[kept].T * scale


def inverse_root(covariance: np.ndarray, ridge: float) -> np.ndarray:
    """(C + ridge · tr(C) / n · I)^(-1/2) of a covariance float64 [n, n]; zeros where nothing varies."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0)
    if not values.any():
        return np.zeros_like(covariance)
    return vectors / np.sqrt(values + ridge * values.mean() + EPSILON * values.max()) @ vectors.T
