"""Known damage to a set of images at growing strength, which a distance between image sets must detect.

Damage of pixels maps uint8 [N, H, W, 3] to the same shape. Damage of the mixture replaces images by other images of a
pool; it maps rows of the pool to rows. Strength 0 changes nothing. For equal generators, a stronger damage includes the
weaker one: the noise is the same field, scaled; the same images are replaced, and further ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from skimage.color import hsv2rgb, rgb2hsv

from encoders.embedding import Encoder, embed
from eval.distances import frechet_distance, kernel_distance
from runtime.errors import UserError

#: Cells along each side of an image in `shuffled`.
GRID = 8


def blurred(images: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Gaussian blur; strength is the standard deviation in pixels."""
    return _bytes(gaussian_filter(images.astype(np.float32), strength, axes=(1, 2))) if strength else images


def noisy(images: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Additive Gaussian noise, independent by pixel and channel; strength is the standard deviation in grey levels."""
    return _bytes(images + strength * generator.standard_normal(images.shape, dtype=np.float32))


def compressed(images: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """JPEG by PIL at quality 100 - strength, chroma subsampled 4:2:0."""
    if not strength:
        return images
    decoded = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=round(100 - strength), subsampling="4:2:0")
        decoded.append(np.asarray(Image.open(file)))
    return np.stack(decoded)


def recoloured(images: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Rotate the hue (HSV) by `strength` degrees."""
    hsv = rgb2hsv(images)
    hsv[..., 0] = (hsv[..., 0] + strength / 360) % 1
    return _bytes(255 * hsv2rgb(hsv))


def flattened(images: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Reduce contrast: move pixels towards the mean colour of their image by the fraction `strength`."""
    mean = images.mean(axis=(1, 2), keepdims=True)
    return _bytes(images + strength * (mean - images))


def shuffled(images: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Cells of a GRID x GRID grid change positions within their image; strength is the fraction of cells that move."""
    size = np.array(images.shape[1:3]) // GRID
    result = images.copy()
    for before, after in zip(images, result, strict=True):
        moved = generator.permutation(GRID * GRID)[: round(strength * GRID * GRID)]
        for source, target in zip(moved, np.roll(moved, 1), strict=True):
            (top, left), (row, column) = divmod(source, GRID) * size, divmod(target, GRID) * size
            cell = before[top : top + size[0], left : left + size[1]]
            after[row : row + size[0], column : column + size[1]] = cell
    return result


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Pool:
    """Images of several scenes, divided into two disjoint sets of the same size and the remaining images.

    Attributes:
        images: uint8 [M, H, W, 3].
        scenes: str [M].
        reference, clean: rows of the two sets, int64 [N]; all scenes are equally frequent.
        spare: rows of neither set, int64.
    """

    images: np.ndarray
    scenes: np.ndarray
    reference: np.ndarray
    clean: np.ndarray
    spare: np.ndarray


def deal(images: np.ndarray, scenes: np.ndarray, size: int, generator: np.random.Generator) -> Pool:
    """Draw two scene-balanced sets of `size` images each.

    Raises:
        UserError: a scene has too few images.
    """
    names = sorted(set(scenes.tolist()))
    each = -(-size // len(names))
    first, second, rest = [], [], []
    for name in names:
        rows = generator.permutation(np.flatnonzero(scenes == name))
        if len(rows) < 2 * each:
            raise UserError(f"scene {name} has {len(rows)} images, but {2 * each} are needed: lower damage.images")
        first, second, rest = [*first, rows[:each]], [*second, rows[each : 2 * each]], [*rest, rows[2 * each :]]
    # one of every scene in turn, so that the first `size` are balanced
    reference, clean = (np.stack(rows, axis=1).ravel()[:size] for rows in (first, second))
    return Pool(images, scenes, reference, clean, np.concatenate(rest))


def swapped(pool: Pool, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Rows of the clean set in which images of the most frequent scene replace a part of the others.

    The strength is the fraction of images of other scenes that are replaced.

    Raises:
        UserError: the most frequent scene has too few spare images.
    """
    names, counts = np.unique(pool.scenes[pool.spare], return_counts=True)
    intruder = names[counts.argmax()]
    positions = generator.permutation(np.flatnonzero(pool.scenes[pool.clean] != intruder))
    positions = positions[: round(strength * len(positions))]
    spare = generator.permutation(pool.spare[pool.scenes[pool.spare] == intruder])
    if len(spare) < len(positions):
        raise UserError(
            f"scene {intruder} has {len(spare)} spare images, but {len(positions)} are needed: lower damage.images"
        )
    rows = pool.clean.copy()
    rows[positions] = spare[: len(positions)]
    return rows


def fewer_modes(pool: Pool, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Rows of the clean set in which further images of the remaining scenes, in turn, replace those of lost scenes.

    The strength is the fraction of scenes that are lost, in random order; at least one remains. If a scene has no spare
    images left, its images are repeated.
    """
    names = generator.permutation(np.unique(pool.scenes))
    lost = min(round(strength * len(names)), len(names) - 1)
    decks = [generator.permutation(pool.spare[pool.scenes[pool.spare] == name]) for name in names][lost:]
    own = [pool.clean[pool.scenes[pool.clean] == name] for name in names][lost:]
    rows = pool.clean.copy()
    for turn, place in enumerate(np.flatnonzero(np.isin(pool.scenes[pool.clean], names[:lost]))):
        mode, count = turn % len(decks), turn // len(decks)
        choices = np.concatenate([decks[mode], own[mode]])
        rows[place] = choices[count % len(choices)]
    return rows


@dataclass(frozen=True)
class Damage:
    """One kind of damage.

    Attributes:
        unit: unit of the strength.
        strengths: ascending strengths, from hardly visible to obvious damage.
        pixels: (images, strength, generator) -> images, or None.
        mixture: (pool, strength, generator) -> rows of the pool in place of `pool.clean`, or None.
    """

    unit: str
    strengths: tuple[float, ...]
    pixels: Callable[[np.ndarray, float, np.random.Generator], np.ndarray] | None = None
    mixture: Callable[[Pool, float, np.random.Generator], np.ndarray] | None = None


DAMAGES: dict[str, Damage] = {
    "blur": Damage("σ, px", (0.4, 0.6, 0.9, 1.4, 2.0), pixels=blurred),
    "noise": Damage("σ, grey levels", (2, 4, 8, 16, 32), pixels=noisy),
    "jpeg": Damage("100 − quality", (5, 15, 30, 60, 90), pixels=compressed),
    "colour": Damage("hue, degrees", (3, 6, 12, 24, 48), pixels=recoloured),
    "contrast": Damage("fraction of contrast lost", (0.1, 0.2, 0.35, 0.5, 0.7), pixels=flattened),
    "shuffle": Damage("fraction of 8 × 8 cells moved", (0.05, 0.1, 0.25, 0.5, 1.0), pixels=shuffled),
    "swapped_scenes": Damage("fraction of images swapped", (0.1, 0.2, 0.35, 0.5, 0.8), mixture=swapped),
    "fewer_modes": Damage("fraction of scenes lost", (0.125, 0.25, 0.5, 0.75, 0.875), mixture=fewer_modes),
}


class PoolFeatures:
    """Features of the images of a pool; each image is embedded when it is first requested."""

    def __init__(self, encoder: Encoder, pool: Pool) -> None:
        self.encoder, self.pool = encoder, pool
        self._of_row: dict[int, np.ndarray] = {}

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Features float32 [N, D] of rows int64 [N]."""
        new = np.array(sorted(set(rows.tolist()) - self._of_row.keys()), dtype=np.int64)
        if len(new):
            features = embed(self.encoder, self.pool.images[new], batch_size=self.encoder.batch_size)
            self._of_row.update(zip(new.tolist(), features, strict=True))
        return np.stack([self._of_row[row] for row in rows.tolist()])


def damage_curve(features: PoolFeatures, name: str, strengths: Sequence[float], seed: int) -> pd.DataFrame:
    """Distances between the reference and the clean set, undamaged (strength 0) and at each strength.

    Args:
        features: features of the pool.
        name: key of `DAMAGES`.
        strengths: strengths above 0, ascending.
        seed: seed of the damage.
    Returns:
        a table with one row per strength, 0 first: strength, kid_x1000, kid_x1000_low, kid_x1000_high, fd.
    """
    damage, pool, encoder = DAMAGES[name], features.pool, features.encoder
    reference = features(pool.reference)
    rows = []
    for strength in (0.0, *strengths):
        generator = np.random.default_rng(seed)
        if not strength:
            result = features(pool.clean)
        elif damage.mixture is not None:
            result = features(damage.mixture(pool, strength, generator))
        else:
            images = damage.pixels(pool.images[pool.clean], strength, generator)
            result = embed(encoder, images, batch_size=encoder.batch_size, label=f"{encoder.name}, {name} {strength:g}")
        value, low, high = kernel_distance(result, reference)
        distances = {"kid_x1000": value, "kid_x1000_low": low, "kid_x1000_high": high}
        rows.append({"strength": strength, **distances, "fd": frechet_distance(result, reference)})
    return pd.DataFrame(rows)


def inversions(values: Sequence[float]) -> int:
    """Number of pairs of a sequence in which the later value is not larger than the earlier one."""
    return sum(later <= value for index, value in enumerate(values) for later in values[index + 1 :])


def verdict(curve: pd.DataFrame) -> dict[str, float]:
    """How well an encoder orders the strengths of one damage, and at which strength it detects the damage.

    Args:
        curve: the rows of `damage_curve`.
    Returns:
        `<metric>_spearman`, rank correlation of KID and Fréchet distance with the strength; `<metric>_inversions`,
        number of pairs in the wrong order; `beyond_intervals`, number of such pairs with disjoint KID intervals;
        `seen_at`, the first step (1, 2, ...) whose KID interval lies above the undamaged one, NaN if there is none.
    """
    result: dict[str, float] = {}
    for metric in ("kid_x1000", "fd"):
        result[f"{metric}_spearman"] = float(spearmanr(curve["strength"], curve[metric]).statistic)
        result[f"{metric}_inversions"] = inversions(curve[metric].tolist())
    low, high = curve["kid_x1000_low"].to_numpy(), curve["kid_x1000_high"].to_numpy()
    result["beyond_intervals"] = int(np.triu(low[:, None] > high[None], 1).sum())
    above = np.flatnonzero(low > high[0])
    return {**result, "seen_at": float(above[0]) if len(above) else float("nan")}


def kernel_alignment(features: np.ndarray, other: np.ndarray) -> float:
    """Debiased linear CKA of two encoders' features of the same images: 0 if unrelated, 1 if equal.

    The formula is from Kornblith et al. 2019, with the unbiased HSIC of Song et al. 2012 (equation 5), which does not
    grow with the number of dimensions.

    Args:
        features: float [N, D], N at least 4.
        other: float [N, E].
    """
    kernels = [np.asarray(x, dtype=np.float64) @ np.asarray(x, dtype=np.float64).T for x in (features, other)]
    for kernel in kernels:
        np.fill_diagonal(kernel, 0)

    def dependence(first: np.ndarray, second: np.ndarray) -> float:
        count = len(first)
        sums = first.sum() * second.sum() / ((count - 1) * (count - 2))
        return (first * second).sum() + sums - 2 * (first.sum(0) @ second.sum(0)) / (count - 2)

    one, two = kernels
    return float(dependence(one, two) / np.sqrt(dependence(one, one) * dependence(two, two)))
