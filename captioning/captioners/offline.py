"""A captioner that needs no download: it makes sentences from measurements of the pixels or from a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from captioning.captioners.captioner import ImageMetadata, Undescribed, scene_words
from captioning.captioners.cover import COLOURS, is_empty, is_flat, land_cover, shrunk
from captioning.captioners.layout import ROUGH, SMOOTH, Layout, Part, layout
from captioning.captioners.wording import (
    LINES,
    POSITIONS,
    STRIPS,
    Noun,
    fraction_of,
    listed,
    noun,
    number,
    pick,
    scene_phrase,
    sentences,
    verb,
)
from runtime.errors import UserError

#: Largest number of words of a short caption.
SHORT = 13
#: Largest number of patches that a caption counts; more patches are called scattered.
COUNTED = 6
NO_DATA = Undescribed("no data")
ONE_COLOUR = Undescribed("one flat colour")


@dataclass(frozen=True)
class OfflineCaptioner:
    """Captioner that names the scene and the kinds of ground with their fractions, places, shapes and texture.

    The kinds are the classes of a mask or groups of colours: a caption says "green vegetation", not "a park". An image
    without data (98 % black) is `Undescribed` even if its scene is known, because its pixels do not show the scene. An
    image of a single flat colour is `Undescribed` unless it has a scene or a mask, as for open water.

    Args:
        name: the source of its captions.
        batch_size: images per call.
        plans: a key of `PLANS` for each attempt; later attempts start again with the first one.
    Raises:
        UserError: there are no plans, or a plan is unknown.
    """

    name: str = "offline"
    batch_size: int = 64
    plans: Sequence[str] = ("short", "layout", "long", "objects")

    def __post_init__(self) -> None:
        object.__setattr__(self, "plans", tuple(self.plans))
        if unknown := [str(plan) for plan in self.plans if plan not in PLANS] or ["(none)"] * (not self.plans):
            raise UserError(f"captioner.plans={', '.join(unknown)}: give a list of {', '.join(PLANS)}")

    @property
    def attempts(self) -> int:
        return len(self.plans)

    def __call__(
        self, images: np.ndarray, metadata: Sequence[ImageMetadata], attempt: int, seeds: Sequence[int]
    ) -> list[str | Undescribed]:
        plan = self.plans[attempt % len(self.plans)]
        return [
            describe(image, known, plan, np.random.default_rng((attempt, seed)))
            for image, known, seed in zip(images, metadata, seeds, strict=True)
        ]


def describe(image: np.ndarray, metadata: ImageMetadata, plan: str, rng: np.random.Generator) -> str | Undescribed:
    """A caption of a uint8 image [H, W, 3], after a plan of `PLANS`; the generator picks among equal wordings."""
    image = shrunk(image)
    if is_empty(image):
        return NO_DATA
    scene = scene_words(metadata.scene)
    cover = land_cover(image, metadata.mask, metadata.classes)
    if not scene and not cover.by_mask and is_flat(image):
        return ONE_COLOUR
    measured = layout(cover)
    return compose(measured, scene, plan, rng) if measured.parts else NO_DATA


def compose(measured: Layout, scene: str, plan: str, rng: np.random.Generator) -> str:
    """One to six sentences about a layout.

    Args:
        measured: layout with at least one part.
        scene: words of the scene (`scene_words`), "" for none.
        plan: key of `PLANS`.
        rng: generator that picks among equal wordings.
    """
    return sentences(PLANS[plan](_View(measured, scene, rng)))


# ---------------------------------------------------------------------------------------------------------------- plans


class _View:
    """A layout with chosen words, from which the plans make sentences."""

    def __init__(self, measured: Layout, scene: str, rng: np.random.Generator, colours: bool = True) -> None:
        self.measured, self.rng, self.words = measured, rng, scene
        self.scene = scene_phrase(scene) if scene else ""
        self.items: list[tuple[Part, Noun]] = []
        for part in measured.parts:
            called = noun(part, measured, scene, rng, colours=colours)
            if part.strip or part.shape or called.of not in {other.of for _, other in self.items}:
                self.items.append((part, called))

    def pick(self, *variants: str) -> str:
        return pick(variants, self.rng)

    def place(self, part: Part) -> str:
        return pick(POSITIONS[part.place], self.rng)

    def noun_of(self, name: str) -> Noun | None:
        return next((called for part, called in self.items if part.name == name), None)


def _short(view: _View) -> list[str]:
    """A text of about 8 to 12 words: the scene, then as much about the two largest parts as fits."""
    chosen = view.items[:1] + [item for item in view.items[1:] if _differ(view.items[0][0], item[0])][:1]
    phrases = [(called.text, POSITIONS[part.place][0]) for part, called in chosen]
    if view.scene:
        opening = view.pick("{}", "an aerial view of {}", "{} seen from above").format(view.scene)
        openings = [f"{opening} with ", f"{view.scene} with "]
    else:
        openings = [view.pick("", "an aerial view of ", "from above, "), ""]
    forms = [first + " and ".join(message) for message in _phrases(phrases) for first in openings]
    fitting = [form for form in forms if len(form.split()) <= SHORT]
    return [(fitting or forms[-1:])[0]]


def _differ(first: Part, second: Part) -> bool:
    """Whether two kinds differ by more than the shade of one colour, such as two greens."""
    return first.name.split()[-1] != second.name.split()[-1] or not {first.name, second.name} <= set(COLOURS)


def _phrases(phrases: list[tuple[str, str]]) -> list[list[str]]:
    """Ways to say one or two nouns with their positions, the fullest first."""
    whole = [f"{text} {where}" for text, where in phrases]
    if len(phrases) < 2:
        return [whole]
    (first, where), (second, other) = phrases
    if where == other:
        return [[first, whole[1]], whole[:1], [first]]
    return [whole, [whole[0], second], [first, whole[1]], whole[:1], [first, second], [first]]


def _layout(view: _View) -> list[str]:
    """Sentences about which kinds cover which part of the image, then the scene."""
    (part, called), *others = view.items[:3]
    result = [f"{other.text} {view.place(smaller)}" for smaller, other in others]
    fraction = _covers(view, part, called)
    if result and view.rng.integers(2):
        (second, other), rest = others[0], result[1:]
        text = f"{fraction}; {other.text} {verb(other, 'lie')} {view.place(second)}"
        text += f", with {rest[0]}" if rest else ""
    else:
        text = fraction + (f", with {listed(result)}" if result else "" if view.scene else f", {_texture(view)}")
    ending = view.pick("the view shows {}", "the image shows {}", "it is an aerial view of {}")
    return [text, ending.format(view.scene)] if view.scene else [text]


def _covers(view: _View, part: Part, called: Noun) -> str:
    """A clause such as "blue water covers about half of the image on the left"."""
    covers = verb(called, view.pick("cover", "fill", "take")) + " "
    covers = covers.replace("takes ", "takes up ").replace("take ", "take up ")
    where = "" if part.place in ("whole", "spread") else " " + view.place(part)
    return f"{called.text} {covers}{fraction_of(part.fraction)}{where}"


def _long(view: _View) -> list[str]:
    """Layout, neighbours, counts and texture."""
    part, called = view.items[0]
    opening = f"{view.pick('an aerial view of', 'a view from above of')} {view.scene}: " if view.scene else (
        view.pick("in this aerial view, ", "seen from above, "))  # fmt: skip
    texts = [opening + _covers(view, part, called)]
    rest = view.items[1:4]
    if rest:
        clauses = [
            f"{other.text} {verb(other, view.pick('lie', 'appear'))} {view.place(small)}" for small, other in rest
        ]
        texts.append(listed(clauses))
    texts += _relations(view)[:2] + _counts(view)[:2]
    texture = view.pick("the picture is {}", "the texture is {}").format(_texture(view, alone=True))
    if view.measured.lines:
        texture += f", and {pick(LINES[view.measured.lines], view.rng)}"
    return [*texts, texture]


def _relations(view: _View) -> list[str]:
    """Sentences about what surrounds, borders or crosses what."""
    result, given = [], set()
    for part, called in view.items[:4]:
        around, beside = view.noun_of(part.inside), view.noun_of(part.beside)
        if around and around is not called:
            result.append(f"{called.text} {verb(called, 'is')} surrounded by {around.text}")
            given.add(frozenset((part.name, part.inside)))
        elif beside and beside is not called and frozenset((part.name, part.beside)) not in given:
            given.add(frozenset((part.name, part.beside)))
            stem = view.pick("border", "meet", "adjoin")
            result.append(f"{called.text} {verb(called, stem)} {beside.text}")
        if part.strip:
            result.insert(0, f"{_strip(part, called)} {view.pick('runs', 'stretches')} {STRIPS[part.strip]}")
    return result


def _strip(part: Part, called: Noun) -> str:
    return f"a {'wide' if part.largest > 0.2 else 'narrow'} strip of {called.of}"


def _counts(view: _View) -> list[str]:
    """Sentences about numbers and shapes."""
    result = []
    for part, called in view.items[:4]:
        if part.shape:
            start = f"the largest patch of {called.of}" if part.patches > 1 else f"the patch of {called.of}"
            result.append(f"{start} is {part.shape}")
        elif 2 <= part.patches <= COUNTED:
            result.append(f"there are {number(part.patches)} patches of {called.of}")
    if spots := _spots(view):
        result.insert(0, f"{spots} {view.pick('stand out', 'can be seen')}")
    return result


def _spots(view: _View, colours: bool = True) -> str:
    if not view.measured.spots:
        return ""
    bright = "small bright" if colours else "small"
    place = pick(POSITIONS[view.measured.spots_place], view.rng)
    place = "" if view.measured.spots_place == "scattered" else f" {place}"
    return f"{number(view.measured.spots)} {bright} {view.pick('objects', 'spots', 'structures')}{place}"


def _texture(view: _View, alone: bool = False) -> str:
    slope = view.measured.slope
    if slope < SMOOTH:
        words = view.pick("smooth", "smooth and even")
    elif slope < ROUGH:
        words = view.pick("fine-grained", "finely grained")
    else:
        words = view.pick("full of small details", "busy with many edges", "rough and detailed")
    return words if alone else f"and the picture is {words}"


def _objects(view: _View) -> list[str]:
    """Shapes, strips and counted things, without colours."""
    plain = _View(view.measured, view.words, view.rng, colours=False)
    things = [_thing(plain, part, called) for part, called in plain.items]
    spots = _spots(plain, colours=False)
    things = [*things[:2], spots] if spots else things[:3]
    opening = f"{plain.scene} with " if plain.scene else plain.pick("seen from above: ", "the view from above shows ")
    return [opening + listed(things)]


def _thing(view: _View, part: Part, called: Noun) -> str:
    if part.strip:
        return f"{_strip(part, called)} running {STRIPS[part.strip]}"
    if part.shape and part.patches == 1:
        return f"a {part.shape} patch of {called.of} {view.place(part)}"
    if 2 <= part.patches <= COUNTED and part.fraction < 0.4:
        return f"{number(part.patches)} patches of {called.of}"
    return f"{called.text} {view.place(part)}"


#: Sentence plans by name.
PLANS: dict[str, Callable[[_View], list[str]]] = {
    "short": _short,
    "layout": _layout,
    "long": _long,
    "objects": _objects,
}
