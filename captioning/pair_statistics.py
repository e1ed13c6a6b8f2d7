"""Four standardised cosines of an image and a caption, which compare the pair with shuffled captions and images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Number of images and captions that a pair is compared with, of other scenes and of its own scene.
SAMPLE = 256
#: Number of pairs that are computed at once.
BLOCK = 8192
#: Standard deviation of cosines below which all partners count as equal.
LEAST_DEVIATION = 1e-4
#: Columns of the statistics: the image with other captions and the caption with other images, of other scenes and of
#: the image's scene.
COLUMNS = ("image_among_other_scenes", "caption_among_other_scenes", "image_in_its_scene", "caption_in_its_scene")


@dataclass(frozen=True)
class PairStatistics:
    """Statistics of P pairs.

    Attributes:
        cosine: float32 [P], cosines of the pairs.
        observed: float32 [P, 4], `COLUMNS` of the pairs.
        same, other: float32 [P, 4], `COLUMNS` of the images of `partner` pairs with a caption of another image, of the
            same scene and of another scene; NaN if there is no such caption, and for pairs that are not partners.
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

    A cosine is standardised by the mean and standard deviation of the cosines of the same image with `SAMPLE` captions,
    and of the same caption with `SAMPLE` images, because a caption that fits all images says little about one image.

    Args:
        images: unit embeddings float [N, D]; a memory map is read in parts.
        texts: unit embeddings float [P, D] of the captions of the pairs, by the encoder of the pair's fold.
        image_of: int64 [P], row of each pair's image, ascending.
        fold: int64 [N], fold of the encoder that embedded each image; only images of one fold can be compared.
        scene: int64 [N].
        partner: bool [P], the pairs whose images and captions others are compared with. The statistics of these pairs
            do not depend on the other pairs.
        generator: draws the samples.
    """
    count = len(image_of)
    result = PairStatistics(np.zeros(count, np.float32), *(np.full((count, 4), np.nan, np.float32) for _ in range(3)))
    fold_of, scene_of = fold[image_of], scene[image_of]
    order = np.lexsort((scene_of, fold_of))
    seed = int(generator.integers(2**63))
    for part in np.split(order, np.flatnonzero(np.diff(fold_of[order])) + 1):
        groups = np.split(part, np.flatnonzero(np.diff(scene_of[part])) + 1)
        for group in groups if count else ():
            outside = np.sort(part[partner[part] & (scene_of[part] != scene_of[group[0]])])
            own = np.random.default_rng([seed, fold_of[group[0]], scene_of[group[0]]])
            _of_group(result, _Vectors(images, texts, image_of), group, group[partner[group]], outside, own)
    return result


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
    result: PairStatistics,
    vectors: _Vectors,
    group: np.ndarray,
    inside: np.ndarray,
    outside: np.ndarray,
    generator: np.random.Generator,
) -> None:
    """Fill in the pairs `group` of one scene and fold; possible partners are `inside` (same scene) and `outside`."""
    parts, image_of = {"same": inside, "other": outside}, vectors.image_of
    drawn = {name: np.full(len(group), -1) for name in parts}
    for name, part in parts.items():
        drawn[name][np.isin(group, inside)] = _drawn(inside, part, image_of, generator)
    samples = [part[np.sort(generator.permutation(len(part))[:SAMPLE])] for part in (outside, inside)]
    samples = [sample if len(sample) else samples[1 - place] for place, sample in enumerate(samples)]
    for start in range(0, len(group), BLOCK):
        rows = slice(start, start + BLOCK)
        pairs = group[rows]
        result.cosine[pairs], result.observed[pairs] = _columns(vectors, pairs, pairs, samples)
        for name, partners in drawn.items():
            usable = np.flatnonzero(partners[rows] >= 0)
            if len(usable):
                _, values = _columns(vectors, pairs[usable], partners[rows][usable], samples)
                getattr(result, name)[pairs[usable]] = values


def _drawn(group: np.ndarray, partners: np.ndarray, image_of: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random partner of another image for each pair, int64 [n]; -1 if there is none."""
    own = image_of[group]
    first, last = (np.searchsorted(image_of[partners], own, side) for side in ("left", "right"))
    others = len(partners) - (last - first)
    place = generator.integers(np.maximum(others, 1))
    place += np.where(place >= first, last - first, 0)  # skip partners of the same image
    return np.where(others > 0, np.append(partners, -1)[np.minimum(place, len(partners))], -1)


def _columns(
    vectors: _Vectors, pairs: np.ndarray, captions_of: np.ndarray, samples: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines [n] and `COLUMNS` [n, 4] of the images of `pairs` with the captions of `captions_of`.

    They are compared with the pairs of `samples`, except pairs of the same image and of the image that the caption is
    from.
    """
    own, captions = vectors.image(pairs), vectors.caption(captions_of)
    image_of = vectors.image_of
    cosine = (own * captions).sum(1)
    columns = []
    for sample in samples:
        foreign = np.all([image_of[sample][None] != image_of[side][:, None] for side in (pairs, captions_of)], axis=0)
        columns.append(_standardised(cosine, own @ vectors.caption(sample).T, foreign))
        columns.append(_standardised(cosine, captions @ vectors.image(sample).T, foreign))
    return cosine, np.stack(columns, axis=1)


def _standardised(cosine: np.ndarray, others: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """(cosine - mean) / standard deviation of the usable cosines in each row; 0 if there are fewer than two."""
    count = usable.sum(1)
    mean = (others * usable).sum(1) / np.maximum(count, 1)
    square = (others**2 * usable).sum(1) / np.maximum(count, 1)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    return np.where(
        (count > 1) & (deviation > LEAST_DEVIATION), (cosine - mean) / np.maximum(deviation, LEAST_DEVIATION), 0
    )
