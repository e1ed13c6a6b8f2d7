"""Layout of the kinds of ground in an image: their positions, fractions, neighbours and texture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from captioning.captioners.cover import Cover

#: Smallest fractions of the image for a kind and for a patch of a kind.
LEAST_FRACTION = 0.04
LEAST_FRACTION_OF_MASK = 0.01
LEAST_PATCH = 0.01
#: Limits, in pixels and as a fraction of the image, for small bright objects.
SPOT_PIXELS = 9
SPOT_FRACTION = 0.02
#: Mean change of lightness per pixel below which a surface is smooth, and from which it is rough.
SMOOTH, ROUGH = 1.0, 2.6
_CELLS = 8  # number of rows and columns of cells in the search for lines
_AXES = (("left", "column", "right"), ("upper", "row", "lower"))


@dataclass(frozen=True)
class Part:
    """All ground of one kind.

    Attributes:
        name: name of the kind.
        fraction: fraction of the image, 0 to 1.
        place: "whole", "spread", "scattered", "edges", "centre", "left", "left edge", "upper right",
            "upper right corner", "row" (across the middle), "column", "mainly left", ...
        patches: number of patches of notable size.
        largest: fraction of the image that the largest patch covers.
        light: mean lightness (CIELAB L*).
        slope: mean change of lightness per pixel, without the outline of the part.
        strip: direction of the largest patch if it is long and narrow: "left right", "upper lower",
            "upper left lower right" or "lower left upper right"; "" otherwise.
        shape: "round", "rectangular" or "", shape of the largest patch if it does not touch the image's border.
        inside: name of the kind that surrounds the part, "" for none.
        beside: name of the kind with the longest common border, "" for none.
    """

    name: str
    fraction: float
    place: str
    patches: int = 1
    largest: float = 0.0
    light: float = 50.0
    slope: float = 0.0
    strip: str = ""
    shape: str = ""
    inside: str = ""
    beside: str = ""


@dataclass(frozen=True)
class Layout:
    """The layout of an image.

    Attributes:
        parts: the parts, the largest first; at least one, unless no pixel has a kind.
        spots: number of small bright objects, and their place.
        slope: mean change of lightness per pixel (CIELAB L*).
        lines: direction of lines in the whole image: "left right", "upper lower", "diagonal", "grid" (two directions at
            right angles), or "".
        by_mask: whether the names of the parts are words of the classes of a mask.
    """

    parts: tuple[Part, ...]
    spots: int = 0
    spots_place: str = ""
    slope: float = 0.0
    lines: str = ""
    by_mask: bool = False


def layout(cover: Cover) -> Layout:
    """Compute the layout: parts by size with positions and neighbours, small bright objects, and lines."""
    counts = np.bincount(cover.kinds.ravel(), minlength=256)[: len(cover.names)]
    fractions = counts / cover.kinds.size
    least = LEAST_FRACTION_OF_MASK if cover.by_mask else LEAST_FRACTION
    numbers = [int(number) for number in np.argsort(-fractions, kind="stable") if fractions[number] >= least]
    numbers = numbers or [int(fractions.argmax())] * bool(counts.any())
    borders = _borders(cover.kinds, len(cover.names))
    parts = tuple(_with_neighbours(_part(cover, number), number, borders, cover.names) for number in numbers)
    spots, place = (0, "") if cover.by_mask else _spots(cover)
    return Layout(parts, spots, place, float(cover.slope.mean()), _lines(cover.gradient), cover.by_mask)


def place(where: np.ndarray, fraction: float | None = None) -> str:
    """The place of the true pixels of bool [h, w], in the words of `Part.place`.

    On each axis the pixels have a position if their standard deviation is below 0.2 of the image's side (half of an
    image has 0.144, the whole image 0.289). The centroid determines the position.
    """
    fraction = float(where.mean()) if fraction is None else fraction
    if fraction >= 0.85:
        return "whole"
    centres, spreads = zip(*(_centre_and_spread(where.sum(axis)) for axis in (0, 1)), strict=True)
    set_on = [spread < 0.2 for spread in spreads]
    steps = [(centre > 0.4) + (centre > 0.6) for centre in centres]
    across, down = (_AXES[axis][steps[axis]] for axis in (0, 1))
    if all(set_on):
        return _cell(across, down, [min(centre, 1 - centre) for centre in centres])
    for axis, name in enumerate((across, down)):
        if set_on[axis]:
            at_edge = min(centres[axis], 1 - centres[axis]) < 0.2 and spreads[axis] < 0.11
            return f"{name} edge" if at_edge and steps[axis] != 1 else name
    off = [abs(centre - 0.5) for centre in centres]
    if max(off) > 0.1:
        return "mainly " + (across if off[0] >= off[1] else down)
    if _is_ring(where):
        return "edges"
    return "spread" if fraction >= 0.3 else "scattered"


def _cell(across: str, down: str, margins: list[float]) -> str:
    if (across, down) == ("column", "row"):
        return "centre"
    if across == "column" or down == "row":
        return down if across == "column" else across
    return f"{down} {across}" + (" corner" if max(margins) < 0.22 else "")


def _centre_and_spread(weights: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of positions along a side, as fractions of it, from the weights of its pixels."""
    positions = (np.arange(len(weights)) + 0.5) / len(weights)
    total = weights.sum()
    centre = float((weights * positions).sum() / total)
    return centre, float(np.sqrt(max(0.0, (weights * (positions - centre) ** 2).sum() / total)))


def _is_ring(where: np.ndarray) -> bool:
    height, width = where.shape
    middle = where[height // 4 : height - height // 4, width // 4 : width - width // 4]
    outside = (where.sum() - middle.sum()) / max(1, where.size - middle.size)
    return bool(outside > 0.5 and middle.mean() < outside / 3)


def _part(cover: Cover, number: int) -> Part:
    where = cover.kinds == number
    fraction = float(where.mean())
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(where.view(np.uint8), connectivity=8)
    areas = boxes[1:, cv2.CC_STAT_AREA]
    largest = 1 + int(areas.argmax())
    left, top, wide, high, area = (int(value) for value in boxes[largest])
    blob = labels[top : top + high, left : left + wide] == largest
    height, width = where.shape
    clear = left > 0 and top > 0 and left + wide < width and top + high < height
    inner = cv2.erode(where.view(np.uint8), np.ones((5, 5), np.uint8), borderValue=1).view(bool)
    inner = inner if inner.sum() >= 0.2 * where.sum() else where
    return Part(
        cover.names[number],
        fraction,
        place(where, fraction),
        patches=max(1, int((areas >= LEAST_PATCH * where.size).sum())),
        largest=area / where.size,
        light=float(cover.light[inner].mean()),
        slope=float(cover.slope[inner].mean()),
        strip=_strip(blob, min(height, width)),
        shape=_shape(blob) if clear and area >= 0.015 * where.size else "",
    )


def _strip(blob: np.ndarray, side: int) -> str:
    """Direction of a long and narrow blob, bool [h, w]; "" for other blobs or if shorter than 0.6 of the side."""
    moments = cv2.moments(blob.view(np.uint8), binaryImage=True)
    area = moments["m00"]
    xx, yy, xy = (moments[key] / area + offset for key, offset in (("mu20", 1 / 12), ("mu02", 1 / 12), ("mu11", 0)))
    middle, half = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    length, breadth = np.sqrt(12 * (middle + half)), np.sqrt(12 * max(1e-9, middle - half))
    if length < 0.6 * side or length < 4 * breadth or area < 0.5 * length * breadth:
        return ""
    angle = np.degrees(0.5 * np.arctan2(2 * xy, xx - yy))  # angle of the long axis, y points downwards
    if abs(angle) < 22.5:
        return "left right"
    if abs(angle) > 67.5:
        return "upper lower"
    return "upper left lower right" if angle > 0 else "lower left upper right"


def _shape(blob: np.ndarray) -> str:
    """ "round" if a blob with filled holes covers most of its circle, "rectangular" if most of its rectangle."""
    framed = np.pad(blob.view(np.uint8), 1)
    outlines, _ = cv2.findContours(framed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    outline = max(outlines, key=len)
    area = cv2.contourArea(outline)
    if area < 30:
        return ""
    _, radius = cv2.minEnclosingCircle(outline)
    _, (length, breadth), _ = cv2.minAreaRect(outline)
    if area > 0.8 * np.pi * radius**2:
        return "round"
    return "rectangular" if area > 0.87 * length * breadth else ""


def _borders(kinds: np.ndarray, count: int) -> np.ndarray:
    """Lengths in pixels of the borders between kinds, int64 [count, count + 1].

    The last column has the borders with the edge of the image and with pixels without a kind.
    """
    step = count + 1
    numbers = np.minimum(kinds, count).astype(np.intp)
    result = np.zeros(step * step, np.int64)
    for first, second in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        unlike = first != second
        result += np.bincount(first[unlike] * step + second[unlike], minlength=step * step)
    table = result.reshape(step, step)
    table = table + table.T
    for rim in (numbers[0], numbers[-1], numbers[:, 0], numbers[:, -1]):
        table[:, count] += np.bincount(rim, minlength=step)
    return table[:count]


def _with_neighbours(part: Part, number: int, borders: np.ndarray, names: tuple[str, ...]) -> Part:
    row = borders[number]
    neighbour = int(row[:-1].argmax())
    if row[neighbour] == 0:
        return part
    inside = row[-1] == 0 and row[neighbour] >= 0.85 * row.sum()
    return replace(part, beside=names[neighbour], inside=names[neighbour] if inside else "")


def _spots(cover: Cover) -> tuple[int, str]:
    """Number and place of small bright objects: white, or bright in an image without colour."""
    bright = np.isin(cover.single, [cover.names.index("white"), cover.names.index("bright grey")])
    if not bright.any():
        return 0, ""
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(bright.view(np.uint8), connectivity=4)
    areas = boxes[:, cv2.CC_STAT_AREA]
    extents = boxes[:, cv2.CC_STAT_WIDTH] * boxes[:, cv2.CC_STAT_HEIGHT]
    small = (areas >= SPOT_PIXELS) & (areas <= SPOT_FRACTION * bright.size) & (areas >= 0.45 * extents)
    small[0] = False
    count = int(small.sum())
    return (count, place(small[labels])) if count > 1 else (0, "")


def _lines(gradient: np.ndarray) -> str:
    """The direction of parallel lines in the whole image, from the structure tensor of 8 x 8 cells.

    A cell counts if it has edges. The mean of exp(2i angle) over the cells indicates one direction, and the mean of
    exp(4i angle) two directions at right angles. The length of a mean is 1 if all angles agree, and smaller if the
    edges in a cell disagree.
    """
    height, width = gradient.shape[:2]
    if min(height, width) < 2 * _CELLS:
        return ""
    dx, dy = gradient[..., 0], gradient[..., 1]
    energy = cv2.resize(dx * dx + dy * dy, (_CELLS, _CELLS), interpolation=cv2.INTER_AREA)
    strong = energy > 0.7
    if strong.mean() < 0.45:
        return ""
    squared = (dx + 1j * dy) ** 2  # length: energy; angle: twice that of the gradient
    double = _cells(squared)[strong] / energy[strong]
    fourfold = _cells(squared**2 / np.maximum(np.abs(squared), 1e-6))[strong] / energy[strong]
    mean = double.mean()
    if abs(mean) > 0.5:
        angle = np.degrees(np.angle(mean)) / 2  # of the gradient, across the lines
        return "upper lower" if abs(angle) < 22.5 else "left right" if abs(angle) > 67.5 else "diagonal"
    return "grid" if abs(fourfold.mean()) > 0.45 else ""


def _cells(field: np.ndarray) -> np.ndarray:
    """The means of a complex field [h, w] over the cells."""
    parts = [np.ascontiguousarray(part, np.float32) for part in (field.real, field.imag)]
    real, imaginary = (cv2.resize(part, (_CELLS, _CELLS), interpolation=cv2.INTER_AREA) for part in parts)
    return real + 1j * imaginary
