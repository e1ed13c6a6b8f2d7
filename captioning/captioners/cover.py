"""Land cover in an image: the kind of ground of each pixel, by its colour or by a mask."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from captioning.captioners.captioner import scene_words

#: Longest side in pixels of the copy on which an image is measured.
SIDE = 128
#: Value of a pixel without a kind in a map of kinds.
NONE = 255
#: Kinds by colour, in the order of their numbers. The last three are those of images without colour.
COLOURS = (
    "green", "dark green", "turquoise", "blue", "dark", "bare", "grey", "white", "red",
    "dark grey", "middle grey", "bright grey",
)  # fmt: skip
_GREEN, _DARK_GREEN, _TURQUOISE, _BLUE, _DARK, _BARE, _GREY, _WHITE, _RED, _LOW, _MIDDLE, _HIGH = range(len(COLOURS))
#: Names of mask classes that do not describe the ground.
_NAMELESS = {
    "", "background", "other", "others", "clutter", "unknown", "unlabeled", "unlabelled", "unclassified", "ignore",
    "ignored", "void", "none", "nodata", "no data", "invalid",
}  # fmt: skip
#: An image has no colour if 99 % of its pixels have at most this chroma in CIELAB.
_COLOURLESS = 3.0
_SMOOTHING = 1.2  # px, sigma
_MAJORITY = 5  # px, side of the window of the majority filter


@dataclass(frozen=True)
class Cover:
    """Kinds of ground on a small copy of an image, at most `SIDE` px wide and high.

    Attributes:
        kinds: uint8 [h, w], indices into `names`, after a majority filter; 255: none.
        single: uint8 [h, w], the same before the majority filter, for objects of a few pixels.
        names: names from `COLOURS`, or words of the classes of a mask.
        light: float32 [h, w], slightly smoothed lightness (CIELAB L*, 0 to 100).
        slope: float32 [h, w], change of lightness per pixel.
        gradient: float32 [h, w, 2], this change to the right and downwards.
        by_mask: whether the names come from a mask.
    """

    kinds: np.ndarray
    single: np.ndarray
    names: tuple[str, ...]
    light: np.ndarray
    slope: np.ndarray
    gradient: np.ndarray
    by_mask: bool = False


def shrunk(image: np.ndarray) -> np.ndarray:
    """A uint8 image [H, W, 3], reduced by area averages so that its longest side is at most `SIDE`."""
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    if scale >= 1:
        return image
    return cv2.resize(
        image, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA
    )


def is_empty(image: np.ndarray) -> bool:
    """Whether a uint8 image [H, W, 3] holds no data: 98 % of its pixels, or more, are black or nearly so (0 to 2)."""
    return bool(_is_black(image).mean() >= 0.98)


def is_flat(image: np.ndarray) -> bool:
    """Whether a uint8 image [H, W, 3] is of one colour: no channel varies by more than 4."""
    return all(int(channel.max()) - int(channel.min()) <= 4 for channel in cv2.split(image))


def _is_black(image: np.ndarray) -> np.ndarray:
    red, green, blue = cv2.split(image)
    return np.maximum(np.maximum(red, green), blue) <= 2


def land_cover(image: np.ndarray, mask: np.ndarray | None = None, classes: tuple[str, ...] = ()) -> Cover:
    """Kinds of ground in a uint8 image [H, W, 3].

    If the mask, uint8 [M, N] of any size, has classes with names, the kinds are these classes; otherwise they are
    groups of colours in CIELAB after a Gaussian filter of 1.2 px. Pixels without data (black, 0 to 2) have no kind.
    """
    small = shrunk(image)
    lab = cv2.cvtColor(np.ascontiguousarray(small, np.float32) / 255, cv2.COLOR_RGB2LAB)
    light = cv2.GaussianBlur(lab[..., 0], (0, 0), 1.0)
    gradient = np.stack([cv2.Sobel(light, cv2.CV_32F, *order, scale=1 / 8) for order in ((1, 0), (0, 1))], 2)
    slope = np.hypot(gradient[..., 0], gradient[..., 1])
    if mask is not None and (named := _of_mask(mask, classes, small.shape[1::-1])) is not None:
        kinds, names = named
        return Cover(kinds, kinds, names, light, slope, gradient, by_mask=True)
    single = by_colour(cv2.GaussianBlur(lab, (0, 0), _SMOOTHING))
    single[_is_black(small)] = NONE
    return Cover(_majority(single), single, COLOURS, light, slope, gradient)


def by_colour(lab: np.ndarray) -> np.ndarray:
    """Kinds of CIELAB pixels float32 [h, w, 3], as indices into `COLOURS`, uint8 [h, w].

    Ranges of hue angles in degrees: red 0 to 50; brown and yellow up to 98, or up to 112 if pale; green up to 185, or
    up to 160 if not dark (L* from 36); turquoise up to 225 (dark green if dark and dull); blue up to 310.
    """
    light, a, b = lab[..., 0], lab[..., 1], lab[..., 2]
    chroma = np.hypot(a, b)
    if (chroma > _COLOURLESS).mean() <= 0.01:
        return np.where(light < 33, _LOW, np.where(light < 66, _MIDDLE, _HIGH)).astype(np.uint8)
    hue = cv2.phase(a, b, angleInDegrees=True)
    kinds = np.full(light.shape, _GREY, np.uint8)
    yellowest = np.where((light > 62) & (chroma < 22), 112, 98)
    kinds[(hue < yellowest) & (chroma > 9)] = _BARE
    kinds[((hue < 50) | (hue >= 345)) & (chroma > 16)] = _RED
    green = (hue >= yellowest) & (hue < 185) & (chroma > np.clip(light / 5, 4.5, 11))
    kinds[green] = _GREEN
    kinds[green & (light < 36)] = _DARK_GREEN
    teal = (hue >= np.where(light < 36, 185, 160)) & (hue < 225) & (chroma > 9)
    kinds[teal] = _TURQUOISE
    kinds[teal & (light < 42) & (chroma < 16)] = _DARK_GREEN  # forests in haze
    kinds[(hue >= 225) & (hue < 310) & (chroma > 11)] = _BLUE
    kinds[(light < 20) & (chroma < 7)] = _DARK
    kinds[(light > 82) & (chroma < 14)] = _WHITE
    return kinds


def _of_mask(mask: np.ndarray, classes: tuple[str, ...], size: tuple[int, int]) -> tuple[np.ndarray, tuple] | None:
    """Kinds from a mask, resized to (width, height), and their names; None if no class with a name occurs."""
    names = tuple(scene_words(name) for name in classes[:NONE])
    table = np.full(256, NONE, np.uint8)
    for number, name in enumerate(names):
        if name not in _NAMELESS:
            table[number] = names.index(name)
    kinds = table[cv2.resize(np.ascontiguousarray(mask, np.uint8), size, interpolation=cv2.INTER_NEAREST)]
    return None if (kinds == NONE).all() else (kinds, names)


def _majority(kinds: np.ndarray) -> np.ndarray:
    """Majority filter: the most frequent kind in a square window around each pixel."""
    result = np.flatnonzero(np.bincount(kinds.ravel(), minlength=256))
    if len(result) == 1:
        return kinds
    window = (_MAJORITY, _MAJORITY)
    votes = [
        cv2.boxFilter((kinds == number).astype(np.uint8), cv2.CV_16U, window, normalize=False) for number in result
    ]
    return result.astype(np.uint8)[np.argmax(votes, axis=0)]
