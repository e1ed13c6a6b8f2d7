"""Words for measurements: nouns for kinds of ground, phrases for positions, fractions and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from captioning.captioners.layout import ROUGH, SMOOTH, Layout, Part

#: Words of scenes with water, in which smooth dark surfaces are water; and of scenes with still water, in which smooth
#: green surfaces are water as well.
_WATERS = {
    "water", "river", "lake", "pond", "sea", "ocean", "port", "harbor", "harbour", "bay", "beach", "coast", "reservoir",
    "bridge", "marina", "lagoon", "island",
}  # fmt: skip
_STILL = {"lake", "pond", "sea", "ocean", "port", "harbor", "harbour", "reservoir", "marina", "lagoon"}
#: Words of scenes without buildings, in which grey rough surfaces are bare ground.
_WILDS = {
    "mountain", "desert", "forest", "beach", "island", "snow", "ice", "glacier", "wetland", "chaparral", "river",
    "meadow", "land", "bareland", "coast",
}  # fmt: skip
#: Words of scenes in which green surfaces are vegetation, even if they are smooth.
_PLANTED = {
    "forest", "woodland", "meadow", "farmland", "cropland", "grassland", "shrubland", "rangeland", "pasture", "crop",
    "vegetation", "wetland", "chaparral", "mountain", "orchard", "vineyard",
}  # fmt: skip
#: Mean change of lightness per pixel from which green surfaces are vegetation in any scene.
PLANTS = 1.3
#: Last words of scenes that take no article.
_MASS = {
    "land", "farmland", "grassland", "wetland", "woodland", "shrubland", "cropland", "bareland", "barren", "water",
    "snow", "ice", "sand", "parking", "vegetation", "terrain", "agriculture", "crop", "soil", "grass", "housing",
    "rangeland", "bare", "forestland", "greenland", "scrub", "pavement", "concrete", "asphalt", "rock", "ground",
}  # fmt: skip
_MANY = {"people", "sheep", "aircraft"}
#: Positions as adverbs; the first wording of each is the plainest.
POSITIONS: dict[str, tuple[str, ...]] = {
    "whole": ("across the whole image", "over the whole image", "across the whole view"),
    "spread": ("across the image", "throughout the image", "all over the image"),
    "scattered": ("in scattered patches", "scattered over the image", "here and there"),
    "edges": ("around the edges", "along the outside", "around the outside"),
    "centre": ("in the centre", "in the middle", "at the centre"),
    "row": ("across the middle", "in a band across the middle", "through the middle"),
    "column": ("down the middle", "in a band down the middle", "through the middle"),
    "upper": ("at the top", "in the upper part", "towards the top"),
    "lower": ("at the bottom", "in the lower part", "towards the bottom"),
    "upper edge": ("along the upper edge", "along the top"),
    "lower edge": ("along the lower edge", "along the bottom"),
    **{side: (f"on the {side}", f"on the {side} side", f"in the {side} part") for side in ("left", "right")},
    **{f"{side} edge": (f"along the {side} edge", f"along the {side} side") for side in ("left", "right")},
    **{f"mainly {side}": (f"mainly on the {side}", f"mostly on the {side} side") for side in ("left", "right")},
    "mainly upper": ("mainly at the top", "mostly in the upper part"),
    "mainly lower": ("mainly at the bottom", "mostly in the lower part"),
}
for _down in ("upper", "lower"):
    for _across in ("left", "right"):
        _name = f"{_down} {_across}"
        POSITIONS[_name] = (f"in the {_name}", f"at the {_name}", f"in the {_name} part")
        POSITIONS[f"{_name} corner"] = (f"in the {_name} corner", f"at the {_name} corner")
STRIPS = {
    "left right": "from left to right",
    "upper lower": "from top to bottom",
    "upper left lower right": "from the upper left to the lower right",
    "lower left upper right": "from the lower left to the upper right",
}
LINES = {
    "left right": ("parallel lines run from left to right", "horizontal lines run side by side"),
    "upper lower": ("parallel lines run from top to bottom", "vertical lines run side by side"),
    "diagonal": ("parallel lines run diagonally", "diagonal lines run side by side"),
    "grid": ("straight edges meet at right angles", "straight lines cross at right angles"),
}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
#: Words that distinguish the two greens if an image has both.
_SHADES = {
    "green vegetation": "light green vegetation",
    "green plants": "light green plants",
    "dense green vegetation": "dense dark green vegetation",
}
#: Words that plans without colours do not use.
COLOUR_WORDS = frozenset(
    (
        "green",
        "blue",
        "turquoise",
        "brown",
        "tan",
        "grey",
        "greyish",
        "mid-grey",
        "white",
        "red",
        "reddish",
        "dark",
        "bright",
    )
)


@dataclass(frozen=True)
class Noun:
    """A noun phrase.

    Attributes:
        text: the phrase with its article, as a subject.
        of: the form after "of", as in "patches of …".
        plural: whether it takes a plural verb ("cover", not "covers").
    """

    text: str
    of: str
    plural: bool


def noun(part: Part, measured: Layout, scene: str, rng: np.random.Generator, *, colours: bool) -> Noun:
    """Noun phrase for a part of a layout, by the class of a mask or by colour and texture.

    The generator picks among equal wordings.
    """
    if measured.by_mask:
        return _class_noun(part.name)
    variants = _variants(part, measured, set(scene.split()), colours)
    if colours and {"green", "dark green"} <= {other.name for other in measured.parts}:
        variants = [_SHADES.get(text, text) for text in variants]
    several = part.patches > 1 or part.place in ("scattered", "spread")
    return _as_noun(pick(variants, rng), several)


def _variants(part: Part, measured: Layout, scene: set[str], colours: bool) -> Sequence[str]:
    """Noun phrases for a kind of `COLOURS`. An article and "surface" mark a singular one, "s" at the end a plural."""
    smooth, built = part.slope < SMOOTH, measured.slope >= ROUGH and not scene & _WILDS
    if colour := _water(part, scene):
        return (f"{colour} water", f"open {colour} water") if colours else ("water", "open water")
    match part.name:
        case "turquoise" | "blue":
            return (f"{part.name} surfaces", f"{part.name} patches") if colours else ("coloured surfaces",)
        case "white" if smooth and part.largest >= 0.1:
            return ("a bright white surface", "a smooth white surface") if colours else ("a smooth bare surface",)
        case "white":
            return ("bright white surfaces", "white surfaces") if colours else ("pale surfaces", "hard surfaces")
        case "green" | "dark green":
            return _green(part, bool(scene & _PLANTED), colours)
        case "dark" if smooth:
            return ("a smooth dark surface",) if colours else ("a smooth surface",)
        case "dark":
            return ("dark surfaces", "dark patches") if colours else ("shadows",)
        case "grey":
            return _grey(part, built, bool(scene & _WILDS), colours)
        case "red":
            return _red(part, colours)
        case "bare" if part.slope >= ROUGH and built:
            return ("brown surfaces", "brown and tan surfaces") if colours else ("rough surfaces",)
        case "bare":
            return ("bare ground", "brown bare ground", "tan bare ground") if colours else ("bare ground", "open soil")
    shade = {"dark grey": "dark", "middle grey": "mid-grey", "bright grey": "bright"}[part.name]
    return (f"{shade} surfaces", f"{shade} areas") if colours else ("open ground",)


def _water(part: Part, scene: set[str]) -> str:
    """The colour of a part that looks like water, else "".

    Smooth blue or turquoise parts look like water. If the scene has water, smooth dark parts do as well. If it has
    still water, so do smooth parts that are dark green, or green with a shape or surrounded by other ground.
    """
    name, wet = part.name, bool(scene & _WATERS)
    if name in ("turquoise", "blue"):
        steepest = 1.5 if wet else 0.9 if part.largest >= 0.15 else 0.6
        return name if part.slope < steepest and part.largest >= 0.03 else ""
    if part.largest < 0.08 or part.slope >= (SMOOTH if part.light >= 30 else 1.5):
        return ""
    if name == "grey":
        return "grey" if wet and part.light < 40 else ""
    if name == "dark":
        return "dark" if wet else ""
    bounded = name == "dark green" or (name == "green" and bool(part.shape or part.inside))
    return name if bounded and scene & _STILL else ""


def _green(part: Part, planted: bool, colours: bool) -> Sequence[str]:
    name = part.name
    if planted or part.slope >= PLANTS:
        if not colours:
            return ("vegetation",) if name == "green" else ("dense vegetation", "vegetation")
        return (f"{name} vegetation", "dense green vegetation" if name == "dark green" else "green plants")
    if part.slope < SMOOTH:
        return (f"a smooth {name} surface", f"an even {name} surface") if colours else ("a smooth open surface",)
    return (f"{name} surfaces",) if colours else ("open surfaces",)


def _grey(part: Part, built: bool, wild: bool, colours: bool) -> Sequence[str]:
    if wild:
        return ("grey ground", "grey bare ground") if colours else ("bare ground",)
    if built and part.slope >= ROUGH:
        return ("grey built-up surfaces", "dense grey built-up surfaces") if colours else ("built-up surfaces",)
    if built:
        return ("grey paved surfaces", "grey surfaces") if colours else ("paved surfaces", "hard surfaces")
    if part.slope < SMOOTH:
        return ("a smooth grey surface", "an even grey surface") if colours else ("a smooth open surface",)
    return ("grey surfaces", "greyish surfaces") if colours else ("open surfaces",)


def _red(part: Part, colours: bool) -> Sequence[str]:
    if part.largest >= 0.15 and part.slope < ROUGH:
        return ("reddish bare ground", "reddish ground") if colours else ("bare ground", "open soil")
    if part.patches >= 4 and part.slope > 2:
        return ("red roofs", "reddish roofs") if colours else ("roofs", "tiled roofs")
    return ("reddish surfaces", "red surfaces") if colours else ("coloured surfaces",)


def _as_noun(text: str, several: bool) -> Noun:
    if result := re.fullmatch(r"an? (.* surface)", text):
        return Noun(f"{result[1]}s" if several else text, result[1], several)
    return Noun(text, text, text.endswith("s"))


def _class_noun(name: str) -> Noun:
    last = name.split()[-1]
    if last in _MASS:
        return Noun(name, name, False)
    if _is_plural(last):
        return Noun(name, name, True)
    return Noun(f"{name} areas", f"{name} area", True)


def scene_phrase(scene: str) -> str:
    """A scene's words with their article: "an airport", "storage tanks", "a residential area"."""
    words = scene.split()
    if words[-1] in _MASS or _is_plural(words[-1]):
        return scene
    if re.search(r"(?:ial|tural|ural|ban|lic)$", words[-1]):  # an adjective, as in "dense residential"
        scene += " area"
    return f"{article(scene)} {scene}"


def _is_plural(word: str) -> bool:
    return word in _MANY or bool(re.search(r"[^suia]s$", word))


def article(text: str) -> str:
    """ "a" or "an", by the usual pronunciation of the first letters."""
    if re.match(r"(?:uni|use|usu|eu|one|ura)", text):
        return "a"
    return "an" if re.match(r"[aeiou8]|hour|honest", text) else "a"


def fraction_of(fraction: float) -> str:
    """A fraction of the image in words, rounded to the nearest fraction that has a name."""
    for least, words in (
        (0.93, "nearly all of the image"),
        (0.7, "most of the image"),
        (0.57, "more than half of the image"),
        (0.43, "about half of the image"),
        (0.29, "about a third of the image"),
        (0.2, "about a quarter of the image"),
    ):
        if fraction >= least:
            return words
    return "a small part of the image"


def number(count: int) -> str:
    """A number in words: exact up to six, with "about" above, "dozens of" from 25."""
    if count <= 6:
        return _NUMBERS[count]
    if count <= 12:
        return f"about {_NUMBERS[count]}"
    return "about fifteen" if count < 18 else "about twenty" if count < 25 else "dozens of"


def verb(subject: Noun, stem: str) -> str:
    """Present form of a regular verb, or of "is", for a subject."""
    if stem == "is":
        return "are" if subject.plural else "is"
    return stem if subject.plural else f"{stem}s"


def listed(items: Sequence[str]) -> str:
    """Join items as `a`, `a and b`, or `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def pick(variants: Sequence[str], rng: np.random.Generator) -> str:
    return variants[int(rng.integers(len(variants)))]


def sentences(texts: Iterable[str]) -> str:
    """Format texts as sentences, with an initial capital, a full stop and single spaces."""
    tidy = [" ".join(text.split()) for text in texts]
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in tidy)
