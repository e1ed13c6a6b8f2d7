"""How well an image and a caption belong together, beside what shuffled captions reach: four standardised cosines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Images and captions that a pair is compared with, of other scenes and of its own.
SAMPLE = 256
#: Pairs that are computed at once.
BLOCK = 8192
#: Standard deviations of cosines below which all partners are alike.
LEAST_DEVIATION = 1e-4
#: Columns of the statistics: the image with other captions and the caption with other images, of other scenes and of
#: the image's own.
COLUMNS = ("image_among_other_scenes", "caption_among_other_scenes", "image_in_its_scene", "caption_in_its_scene")


@dataclass(frozen=True)
class PairStatistics:
    """
    Attributes:
        cosine: float32 [P] of the pairs.
        observed: float32 [P, 4], `COLUMNS` of the pairs.
        same, other: float32 [P, 4] of the same images with a caption of another image of their scene, and of another
            scene; NaN where there is none.
    """

    cosine: np.ndarray
    observed: np.ndarray
    same: np.ndarray
    other: np.ndarray


def pair_statistics(
    images: np.ndarray,
    texts: np.ndarray,
    image_of: np.ndarray,
    fold: np.ndarray,
    scene: np.ndarray,
    partner: np.ndarray,
    generator: np.random.Generator,
) -> PairStatistics:
    """Statistics of all pairs, scene by scene in every fold; memory does not grow with the square of the pairs.

    A cosine is standardised by the mean and deviation of the cosines of the same image with `SAMPLE` captions, and of
    the same caption with `SAMPLE` images: a caption that fits everything says little about one image.

    Args:
        images: unit float [N, D]; a memory map is read in parts.
        texts: unit float [P, D], the pairs' captions, by the encoder of the pair's fold.
        image_of: int64 [P], row of each pair's image.
        fold: int64 [N], the encoder that each image was embedded by: only those of one fold can be compared.
        scene: int64 [N].
        partner: bool [P], the pairs whose images and captions others are compared with.
    """
    count = len(image_of)
    found = PairStatistics(np.zeros(count, np.float32), *(np.full((count, 4), np.nan, np.float32) for _ in range(3)))
    fold_of, scene_of = fold[image_of], scene[image_of]
    order = np.lexsort((scene_of, fold_of))
    for part in np.split(order, np.flatnonzero(np.diff(fold_of[order])) + 1):
        groups = np.split(part, np.flatnonzero(np.diff(scene_of[part])) + 1)
        for group in groups if count else ():
            outside = part[partner[part] & (scene_of[part] != scene_of[group[0]])]
            _of_group(found, _Vectors(images, texts, image_of), group, group[partner[group]], outside, generator)
    return found


@dataclass(frozen=True)
class _Vectors:
    """The arguments of `pair_statistics` of the same names."""

    images: np.ndarray
    texts: np.ndarray
    image_of: np.ndarray

    def image(self, pairs: np.ndarray) -> np.ndarray:
        return np.asarray(self.images[self.image_of[pairs]], np.float32)

    def caption(self, pairs: np.ndarray) -> np.ndarray:
        return np.asarray(self.texts[pairs], np.float32)


def _of_group(
    found: PairStatistics,
    vectors: _Vectors,
    group: np.ndarray,
    inside: np.ndarray,
    outside: np.ndarray,
    generator: np.random.Generator,
) -> None:
    """Fill in the pairs `group` of one scene in one fold; its possible partners are `inside`, others' `outside`."""
    drawn = {"same": _drawn(group, inside, generator), "other": _drawn(group, outside, generator)}
    samples = [part[np.sort(generator.permutation(len(part))[:SAMPLE])] for part in (outside, inside)]
    samples = [sample if len(sample) else samples[1 - place] for place, sample in enumerate(samples)]
    for start in range(0, len(group), BLOCK):
        rows = slice(start, start + BLOCK)
        pairs = group[rows]
        found.cosine[pairs], found.observed[pairs] = _columns(vectors, pairs, pairs, samples)
        for name, partners in drawn.items():
            usable = np.flatnonzero(partners[rows] >= 0)
            if len(usable):
                _, values = _columns(vectors, pairs[usable], partners[rows][usable], samples)
                getattr(found, name)[pairs[usable]] = values


def _drawn(group: np.ndarray, partners: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A partner for each pair, int64 [n]; -1 where there is none. `_columns` leaves out those of the same image."""
    if len(partners) == 0:
        return np.full(len(group), -1)
    return partners[generator.integers(len(partners), size=len(group))]


def _columns(
    vectors: _Vectors, pairs: np.ndarray, captions_of: np.ndarray, samples: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines [n] and `COLUMNS` [n, 4] of the images of `pairs` with the captions of `captions_of`.

    NaN where a caption of another pair is of the same image.
    """
    own, captions = vectors.image(pairs), vectors.caption(captions_of)
    image_of = vectors.image_of
    cosine = (own * captions).sum(1)
    columns = []
    for sample in samples:
        foreign = image_of[sample][None] != image_of[pairs][:, None]
        columns.append(_standardised(cosine, own @ vectors.caption(sample).T, foreign))
        foreign = foreign & (image_of[sample][None] != image_of[captions_of][:, None])
        columns.append(_standardised(cosine, captions @ vectors.image(sample).T, foreign))
    values = np.stack(columns, axis=1)
    values[(pairs != captions_of) & (image_of[pairs] == image_of[captions_of])] = np.nan
    return cosine, values


def _standardised(cosine: np.ndarray, others: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """(cosine - mean) / deviation of the usable cosines in each row; 0 where there are fewer than two."""
    count = usable.sum(1)
    mean = (others * usable).sum(1) / np.maximum(count, 1)
    square = (others**2 * usable).sum(1) / np.maximum(count, 1)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    return np.where(
        (count > 1) & (deviation > LEAST_DEVIATION), (cosine - mean) / np.maximum(deviation, LEAST_DEVIATION), 0
    )
