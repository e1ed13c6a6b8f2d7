"""Captioners: the offline one on pictures with a known layout, and networks of `transformers`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from omegaconf import OmegaConf
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.draw import disk, line
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from captioning.captioners.captioner import ImageMetadata, Undescribed, scene_words
from captioning.captioners.cover import COLOURS, land_cover
from captioning.captioners.image_text_to_text import (
    NO_TEXT,
    ImageTextToText,
    SeededNoise,
    caption,
    prompt,
    without_prompt,
)
from captioning.captioners.layout import layout, place
from captioning.captioners.offline import PLANS, OfflineCaptioner
from captioning.captioners.wording import COLOUR_WORDS, POSITIONS, article, fraction_of, noun, number, scene_phrase
from runtime.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "captioner"
BLUE, GREEN, TAN, WHITE, GREY = (30, 70, 190), (90, 150, 70), (190, 150, 100), (250, 250, 250), (120, 120, 120)
PLAN = {name: position for position, name in enumerate(PLANS)}
NOTHING = ImageMetadata()


def picture(colour: tuple[int, int, int], size: int = 128, noise: float = 0.0) -> np.ndarray:
    """A picture of one colour, with noise of the given standard deviation."""
    image = np.tile(np.uint8(colour), (size, size, 1))
    if noise:
        image = (image + np.random.default_rng(0).normal(0, noise, image.shape)).clip(0, 255).astype(np.uint8)
    return image


def blocks(seed: int, cells: int = 4, size: int = 128) -> np.ndarray:
    """Rectangles of five colours, with a little noise."""
    rng = np.random.default_rng(seed)
    colours = np.uint8([BLUE, GREEN, TAN, WHITE, GREY])
    image = colours[rng.integers(len(colours), size=(cells, cells))].repeat(size // cells, 0).repeat(size // cells, 1)
    return (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


def described(image: np.ndarray, plan: str, metadata: ImageMetadata = NOTHING, seed: int = 0) -> str:
    [text] = OfflineCaptioner()(image[None], [metadata], PLAN[plan], [seed])
    assert isinstance(text, str), text
    return text


def every_wording(image: np.ndarray, plan: str, metadata: ImageMetadata = NOTHING, seeds: int = 12) -> set[str]:
    return {described(image, plan, metadata, seed).lower() for seed in range(seeds)}


def well_formed(text: str) -> None:
    assert text == " ".join(text.split()) and text.endswith(".") and text[0] == text[0].upper(), text
    assert not re.search(r" [,.;:]|[,;:][,.;:]|\.\.|, *$|\b(\w+) \1\b", text), text
    assert not re.search(r"surfaces (?:covers|fills|takes|lies|appears|borders|meets|adjoins|is)\b", text), text
    assert not re.search(r"(?:water|ground|surface) (?:cover|fill|take|lie|appear|border|meet|adjoin|are)\b", text), (
        text
    )
    assert not re.search(r"\ba [aeio]|\ban [^aeiou8]", text.lower()), text


# -------------------------------------------------------------------------------------- the offline one: positions


def halves() -> np.ndarray:
    image = picture(BLUE)
    image[:, 66:] = GREEN
    return image


def test_two_halves_are_named_with_their_sides_and_fractions() -> None:
    for text in every_wording(halves(), "layout"):
        assert re.search(r"blue water (covers|fills|takes up) about half of the image (on|in) the left", text), text
        assert re.search(r"green surface.* (on|in) the right", text), text
    for text in every_wording(halves().transpose(1, 0, 2), "layout"):
        assert re.search(r"blue water .* about half of the image (at|in|towards) the (top|upper)", text), text
    for text in every_wording(halves(), "short"):
        assert re.search(r"blue water on the left and an? (smooth|even) green surface( on the right)?\.$", text), text


_DOWN, _UP = "from the upper left to the lower right", "from the lower left to the upper right"
FLIPS = {
    1: {"left": "right", "right": "left", _DOWN: _UP, _UP: _DOWN},
    0: {"upper": "lower", "lower": "upper", "top": "bottom", "bottom": "top", _DOWN: _UP, _UP: _DOWN},
}
SYMMETRIC = "from left to right|from top to bottom|right angles"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("seed", range(25))
def test_a_mirrored_picture_is_described_by_mirrored_words(seed: int, axis: int) -> None:
    image, words = blocks(seed), FLIPS[axis]
    pattern = "|".join([SYMMETRIC, *sorted(words, key=len, reverse=True)])
    for plan in PLANS:
        swapped = re.sub(
            rf"\b(?:{pattern})\b", lambda result: words.get(result[0], result[0]), described(image, plan, seed=seed)
        )
        assert described(np.ascontiguousarray(np.flip(image, axis)), plan, seed=seed) == swapped


def test_a_pond_is_described_as_round_surrounded_and_central() -> None:
    image = picture(GREEN)
    image[disk((64, 64), 25)] = BLUE
    for text in every_wording(image, "long"):
        assert "blue water is surrounded by an" in text.replace("by a smooth", "by an even"), text
        assert re.search(r"the patch of (open )?blue water is round", text), text
        assert re.search(r"blue water (lies|appears) (in|at) the (centre|middle)", text), text
    for text in every_wording(image, "objects"):
        assert re.search(r"a round patch of (open )?water (in|at) the (centre|middle)", text), text
    image[:] = GREEN
    image[disk((23, 64), 25, shape=(128, 128))] = BLUE  # up to the image's edge; the part beyond is unknown
    assert not any("surrounded" in text or "round" in text for text in every_wording(image, "long"))
    image[:] = GREEN
    image[40:100, 30:80] = BLUE
    assert "rectangular patch of" in described(image, "objects")


@pytest.mark.parametrize("count", [2, 5, 9])
def test_small_white_squares_are_counted(count: int) -> None:
    image = picture(GREEN)
    for position in range(count):
        row, column = 20 + 35 * (position // 3), 20 + 35 * (position % 3)
        image[row : row + 8, column : column + 8] = WHITE
    assert layout(land_cover(image)).spots == count
    for text in every_wording(image, "long"):
        assert re.search(rf"{number(count)} small bright (objects|spots|structures)\b", text), text


@pytest.mark.parametrize(
    ("turned", "words"),
    [
        ((0, 1), "parallel lines run from top to bottom|vertical lines"),
        ((1, 0), "parallel lines run from left to right|horizontal lines"),
        ((1, 1), "parallel lines run diagonally|diagonal lines"),
    ],
)
def test_stripes_are_described_as_parallel_lines(turned: tuple[int, int], words: str) -> None:
    rows, columns = np.mgrid[:128, :128]
    wave = np.sin((turned[0] * rows + turned[1] * columns) * 2 * np.pi / 12)
    image = (np.uint8(GREEN) + 40 * wave[..., None]).clip(0, 255).astype(np.uint8)
    assert all(re.search(words, text) for text in every_wording(image, "long"))
    assert "lines" not in described(halves(), "long")  # one border is not a pattern


def test_a_chequer_board_is_described_with_lines_at_right_angles() -> None:
    board = np.kron(np.indices((10, 10)).sum(0) % 2, np.ones((12, 12)))
    image = np.where(board[..., None] > 0, np.uint8(TAN), np.uint8(GREY)).astype(np.uint8)
    assert "at right angles" in described(image, "long")


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((64, 0, 64, 127), "from left to right"),
        ((0, 64, 127, 64), "from top to bottom"),
        ((0, 0, 127, 127), "from the upper left to the lower right"),
        ((127, 0, 0, 127), "from the lower left to the upper right"),
    ],
)
def test_a_strip_is_described_with_its_direction(ends: tuple[int, int, int, int], words: str) -> None:
    image = picture(GREEN)
    rows, columns = line(*ends)
    for row, column in zip(rows, columns, strict=True):
        image[max(0, row - 5) : row + 6, max(0, column - 5) : column + 6] = GREY
    for text in every_wording(image, "long"):
        assert re.search(rf"a (narrow|wide) strip of (smooth|even) grey surface (runs|stretches) {words}", text), text
    assert words in described(image, "objects")


def test_different_textures_are_described_by_different_words() -> None:
    for noise, words in ((0, "smooth"), (20, "fine"), (60, "detail|edges")):
        image = blocks(3) if noise == 0 else picture(GREEN, noise=noise)
        image = picture(TAN, noise=1.5) if noise == 0 else image
        assert re.search(words, described(image, "long").rpartition(". ")[2] or described(image, "long"))


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_the_named_position_agrees_with_the_centroid(seed: int) -> None:
    """The centroid of a rectangle lies on the side that its place names; without a side it lies near the middle."""
    rng = np.random.default_rng(seed)
    top, bottom = np.sort(rng.choice(65, 2, replace=False))
    left, right = np.sort(rng.choice(65, 2, replace=False))
    where = np.zeros((64, 64), bool)
    where[top:bottom, left:right] = True
    named = place(where)
    assert named in POSITIONS
    across, down = (left + right) / 128, (top + bottom) / 128
    for word, centre, sign in (("left", across, -1), ("right", across, 1), ("upper", down, -1), ("lower", down, 1)):
        if word in named:
            assert sign * (centre - 0.5) > 0.09
    if named in ("centre", "whole", "spread", "row", "column"):
        assert abs(across - 0.5) <= 0.101 or named == "row"
        assert abs(down - 0.5) <= 0.101 or named == "column"


def test_fractions_in_words_grow_with_the_fraction() -> None:
    fractions = {
        "small": 0.0, "quarter": 1 / 4, "third": 1 / 3, "about half": 1 / 2, "more than half": 0.6, "most": 0.75,
        "nearly all": 1.0,
    }  # fmt: skip
    order = [next(key for key in fractions if key in fraction_of(fraction)) for fraction in np.linspace(0, 1, 201)]
    assert [fractions[key] for key in order] == sorted(fractions[key] for key in order) and set(order) == set(fractions)
    for key, fraction in list(fractions.items())[1:]:
        assert key in fraction_of(fraction)


def test_every_kind_of_land_cover_is_recognised_by_its_colour() -> None:
    colours = {
        "green": GREEN, "dark green": (25, 55, 25), "turquoise": (90, 190, 190), "blue": BLUE, "dark": (20, 20, 22),
        "bare": TAN, "grey": GREY, "white": WHITE, "red": (180, 70, 55),
    }  # fmt: skip
    image = np.concatenate([picture(colour, 24) for colour in colours.values()], 1)[:, : 5 * 24]
    rest = np.concatenate([picture(colour, 24) for colour in colours.values()], 1)[:, 4 * 24 :]
    kinds = land_cover(np.concatenate([image, rest])).kinds
    result = [COLOURS[kinds[12, 12 + 24 * at]] for at in range(5)] + [
        COLOURS[kinds[36, 36 + 24 * at]] for at in range(4)
    ]
    assert result == list(colours)


def test_an_image_without_colour_is_described_by_shades() -> None:
    image = np.repeat(np.linspace(20, 240, 128).astype(np.uint8)[None, :, None], 128, 0).repeat(3, 2)
    text = described(image, "layout").lower()
    assert "dark" in text and "bright" in text
    assert not re.search("green|blue|paved|built|roof|ground", text)


# ------------------------------------------------------------------------------------ the offline one: masks and scenes


def test_the_classes_of_a_mask_take_precedence_over_colours() -> None:
    mask = np.zeros((300, 300), np.uint8)
    mask[:, 150:] = 1
    mask[100:200, :60] = 2
    mask[:20] = 255
    metadata = ImageMetadata(mask=mask, classes=("water", "building", "TallGrass", "never seen"))
    for text in every_wording(picture(GREY, noise=20), "layout", metadata):
        assert re.search(r"building areas (cover|fill|take up) about half of the image (on|in) the right", text), text
        assert re.search(r"water.*left", text) and "tall grass" in text, text
        assert not re.search(r"grey|never|building areas covers", text), text


def test_a_mask_without_meaningful_class_names_is_ignored() -> None:
    for classes in ((), ("background", "class 1")):
        metadata = ImageMetadata(mask=np.eye(40, dtype=np.uint8), classes=classes)
        assert described(halves(), "layout", metadata) == described(halves(), "layout")


@pytest.mark.parametrize(
    ("scene", "phrase"),
    [
        ("airport", "an airport"), ("BaseballField", "a baseball field"), ("storage_tanks", "storage tanks"),
        ("dense residential", "a dense residential area"), ("Farmland", "farmland"), ("overpass", "an overpass"),
        ("bare land", "bare land"), ("university", "a university"), ("tennis court", "a tennis court"),
        ("campus", "a campus"), ("palace", "a palace"), ("circular farmland", "circular farmland"),
        ("industrial-area", "an industrial area"), ("St. Mary's church", "a st mary's church"),
    ],
)  # fmt: skip
def test_a_scene_name_gets_the_correct_article(scene: str, phrase: str) -> None:
    assert scene_phrase(scene_words(scene)) == phrase


@pytest.mark.parametrize("scene", ["", "   ", "class 12", "???", "12", "\0\n\t", "-'-"])
def test_scene_names_without_meaningful_words_are_ignored(scene: str) -> None:
    assert scene_words(scene) == ""
    assert described(halves(), "short", ImageMetadata(scene)) == described(halves(), "short")


@given(st.text(max_size=80) | st.text(alphabet="ab -'.,;:\n", min_size=1, max_size=20).map(lambda text: text * 500))
@settings(max_examples=80, deadline=None)
def test_any_scene_name_gives_a_clean_text_of_limited_length(scene: str) -> None:
    for plan in PLANS:
        text = described(halves(), plan, ImageMetadata(scene))
        assert text == " ".join(text.split()) and text.endswith(".") and "\n" not in text
        assert len(text) < 700 and text.encode()
    assert len(scene_words(scene)) <= 60 and len(scene_words(scene).split()) <= 8


def test_a_lone_surrogate_or_a_very_long_scene_name_does_not_fail() -> None:
    assert described(halves(), "short", ImageMetadata("river \ud83d")).encode()
    assert described(halves(), "short", ImageMetadata("x" * 10_000)).encode()


def test_every_plan_mentions_the_scene() -> None:
    for plan in PLANS:
        assert all("storage tanks" in text for text in every_wording(blocks(1), plan, ImageMetadata("StorageTanks")))


# -------------------------------------------------------------------------------------- the offline one: for any image


@given(
    st.sampled_from([(1, 1), (1, 40), (40, 1), (3, 5), (32, 32), (150, 150), (600, 400), (2, 700)]),
    st.integers(0, 2**40), st.integers(0, 60), st.sampled_from(["", "airport", "dense residential"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_image_has_a_well_formed_text_or_a_reason(
    shape: tuple[int, int], seed: int, noise: int, scene: str
) -> None:
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.standard_normal((*shape, 3)), (shape[0] / 8, shape[1] / 8, 0))
    image = 128 + 60 * smooth / (smooth.std() + 1e-9) + rng.normal(0, noise, (*shape, 3))
    image = image.clip(0, 255).astype(np.uint8)
    for attempt in range(4):
        [text] = OfflineCaptioner()(image[None], [ImageMetadata(scene)], attempt, [seed])
        if isinstance(text, str):
            well_formed(text)
        else:
            assert (image.max(2) <= 2).mean() > 0.5 or (not scene and text == Undescribed("one flat colour"))


@given(arrays(np.uint8, (12, 12, 3)))
@settings(max_examples=60, deadline=None)
def test_arbitrary_pixels_give_a_well_formed_text_or_no_data(image: np.ndarray) -> None:
    for attempt in range(4):
        [text] = OfflineCaptioner()(image[None], [ImageMetadata("port")], attempt, [3])
        if isinstance(text, str):
            well_formed(text)
        else:
            assert text == Undescribed("no data") and (image.max(2) <= 2).mean() > 0.5


@pytest.mark.parametrize("seed", range(40))
def test_texts_of_plans_are_well_formed_and_increase_in_length(seed: int) -> None:
    image = blocks(seed, cells=2 ** (seed % 5))
    for scene in ("", "storage tanks", "dense residential"):
        texts = {plan: described(image, plan, ImageMetadata(scene), seed) for plan in PLANS}
        for text in texts.values():
            well_formed(text)
        words = {plan: len(text.split()) for plan, text in texts.items()}
        assert words["short"] <= 13 and words["short"] <= words["layout"] < words["long"], texts
        assert not COLOUR_WORDS & set(re.findall(r"[\w-]+", texts["objects"].lower())), texts["objects"]


def test_the_same_seed_gives_the_same_text_and_other_seeds_give_others() -> None:
    captioner, image = OfflineCaptioner(), blocks(5)
    for attempt in range(4):
        texts = [captioner(image[None], [NOTHING], attempt, [seed])[0] for seed in range(20)]
        assert texts == [captioner(image[None], [NOTHING], attempt, [seed])[0] for seed in range(20)]
        assert len(set(texts)) > 4
    assert captioner(image[None], [NOTHING], 0, [7]) != captioner(image[None], [NOTHING], 4, [7]) or (
        captioner(image[None], [NOTHING], 0, [8]) != captioner(image[None], [NOTHING], 4, [8]))  # fmt: skip
    assert [captioner.plans[attempt % captioner.attempts] for attempt in (0, 3, 4)] == ["short", "objects", "short"]


def test_a_text_does_not_depend_on_its_batch() -> None:
    captioner = OfflineCaptioner()
    images = np.stack([blocks(seed) for seed in range(6)])
    metadata = [ImageMetadata(scene) for scene in ("", "river", "port", "", "airport", "forest")]
    together = captioner(images, metadata, 2, range(6))
    alone = [captioner(images[at : at + 1], metadata[at : at + 1], 2, [at])[0] for at in range(6)]
    images.flags.writeable = False
    assert together == alone == captioner(images, metadata, 2, range(6))
    assert captioner(images[:0], [], 0, []) == []


def test_black_images_and_flat_images_without_metadata_are_not_described() -> None:
    captioner = OfflineCaptioner()
    black, flat = np.zeros((1, 64, 64, 3), np.uint8), picture(BLUE)[None]
    specks = black.copy()
    specks[0, ::8, ::5] = 255  # 2.5 % of the pixels; none is the most frequent value of its neighbourhood
    for scene in ("", "airport"):
        for attempt in range(4):
            assert captioner(black, [ImageMetadata(scene)], attempt, [0]) == [Undescribed("no data")]
            assert captioner(specks, [ImageMetadata(scene)], attempt, [0]) == [Undescribed("no data")]
    assert captioner(flat, [NOTHING], 0, [0]) == [Undescribed("one flat colour")]
    assert "blue water across the whole image." in captioner(flat, [ImageMetadata("sea")], 0, [0])[0]
    mask = ImageMetadata(mask=np.zeros((8, 8), np.uint8), classes=("water",))
    assert "water" in captioner(flat, [mask], 0, [0])[0].lower()


def test_black_edges_without_data_are_not_called_dark() -> None:
    image = halves()
    image[:40] = 0
    assert not re.search("dark|black", described(image, "long"))


@pytest.mark.parametrize("plans", [[], ["short", "longest"]])
def test_unknown_plans_are_refused(plans: list[str]) -> None:
    with pytest.raises(UserError, match=r"captioner\.plans=.*short, layout, long, objects"):
        OfflineCaptioner(plans=plans)


def test_nouns_have_correct_plurals_and_articles() -> None:
    rng = np.random.default_rng(0)
    for seed in range(30):
        measured = layout(land_cover(blocks(seed)))
        for part in measured.parts:
            called = noun(part, measured, "", rng, colours=True)
            assert called.plural == called.text.endswith("s") and not called.of.startswith(("a ", "an "))
    assert [article(word) for word in ("airport", "river", "university", "hour", "one way road")] == [
        "an", "a", "a", "an", "a",
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_make_captioners(path: Path) -> None:
    captioner = instantiate(OmegaConf.load(path))
    assert captioner.name == path.stem and captioner.batch_size > 0 and captioner.attempts == 4
    hash(captioner)


# ------------------------------------------------------------------------------------------- networks of transformers

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    *SPECIAL, "a", "an", "aerial", "image", "of", "green", "blue", "field", "water", "river", "with", "the",
)  # fmt: skip
CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == "image" %}<|vision_start|><|image_pad|><|vision_end|>{% else %}\
{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SHARP = 0.5  # scale of random weights, so that different images give different texts


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random BLIP of a few thousand weights; like the real one, its decoder starts with an id its tokenizer lacks."""
    folder, count = tmp_path_factory.mktemp("blip"), len(WORDS)
    text = dict(
        vocab_size=count + 2, hidden_size=16, encoder_hidden_size=16, intermediate_size=16, projection_dim=8,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, bos_token_id=count, eos_token_id=2,
        sep_token_id=3, pad_token_id=0, initializer_range=SHARP,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, projection_dim=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16, initializer_range=SHARP,
    )  # fmt: skip
    torch.manual_seed(0)
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen2.5-VL of a few thousand weights with a chat template; its tokens are bytes."""
    folder = tmp_path_factory.mktemp("qwen")
    extra = [f"<|{name}|>" for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")]
    vocabulary = {letter: number for number, letter in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocabulary, [], eos_token="<|im_end|>", additional_special_tokens=extra)
    start, end, image, video = (tokenizer.convert_tokens_to_ids(token) for token in extra[2:])
    text = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
        rope_parameters={"type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 1e4}, initializer_range=SHARP,
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, patch_size=4, window_size=16,
        fullatt_block_indexes=[0], initializer_range=SHARP,
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
        vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"shortest_edge": 64, "longest_edge": 4096}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=4, size=sizes), tokenizer, Qwen2VLVideoProcessor(patch_size=4),
        chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def noisy(count: int = 4, size: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_greedy_blip_gives_the_same_text_as_the_library_itself(blip: str) -> None:
    """With a prefix, which is removed from the text, and without a prefix."""
    network = BlipForConditionalGeneration.from_pretrained(blip, use_safetensors=True).eval()
    processor = BlipProcessor.from_pretrained(blip)
    captioner = ImageTextToText("blip", blip, prompts=["", "an aerial image of"], temperatures=[0, 0], max_new_tokens=9)
    seen = set()
    for attempt, prefix in enumerate(captioner.prompts):
        for image, text in zip(noisy(), captioner(noisy(), [NOTHING] * 4, attempt, range(4)), strict=True):
            given = processor(images=Image.fromarray(image), text=prefix or None, return_tensors="pt")
            ids = network.generate(**given, max_new_tokens=9, do_sample=False)[0]
            whole = processor.decode(ids[ids < len(WORDS)], skip_special_tokens=True)
            assert whole.startswith(prefix) and text == caption(whole.removeprefix(prefix), "")
            seen.add(text)
    assert len(seen) > 3


def test_a_chat_network_receives_the_image_and_the_prompt(qwen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requested, decode = [], Qwen2Tokenizer.decode
    generate = Qwen2_5_VLForConditionalGeneration.generate

    def watched(self, **inputs):
        requested.append(inputs)
        return generate(self, **inputs)

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "generate", watched)
    captioner = ImageTextToText("qwen", qwen, prompts=["What lies where? It is {scene}."], max_new_tokens=5, side=40)
    metadata = [NOTHING, ImageMetadata("river"), NOTHING, ImageMetadata("river")]
    texts = captioner(noisy(), metadata, 0, range(4))
    tokenizer = Qwen2Tokenizer.from_pretrained(qwen)
    [first, second] = [decode(tokenizer, given["input_ids"][0]) for given in requested]
    assert "|>What lies where?<|im_end|>" in first and "|>What lies where? It is river.<|im_end|>" in second
    assert first.count("<|image_pad|>") == (40 // 8) ** 2 and first.endswith("<|im_start|>assistant\n")
    assert [len(given["input_ids"]) for given in requested] == [2, 2]
    assert all(isinstance(text, (str, Undescribed)) for text in texts)
    assert not any(isinstance(text, str) and re.search("lies|user|assistant", text) for text in texts)


@pytest.mark.parametrize("which", ["blip", "qwen"])
def test_a_sampled_text_depends_on_the_seed_of_its_image_and_not_on_the_batch(
    which: str, request: pytest.FixtureRequest
) -> None:
    captioner = ImageTextToText(
        which, request.getfixturevalue(which), prompts=["a", "the left of {scene}"], temperatures=[0, 1], top_p=1.0,
        max_new_tokens=12,
    )  # fmt: skip
    images, metadata = noisy(), [NOTHING, ImageMetadata("river"), NOTHING, ImageMetadata("river")]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    together = captioner(images, metadata, 1, [4, 5, 6, 7])
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    order = [2, 0, 3, 1]
    turned = captioner(images[order], [metadata[at] for at in order], 1, [[4, 5, 6, 7][at] for at in order])
    alone = [captioner(images[at : at + 1], [metadata[at]], 1, [4 + at])[0] for at in range(4)]
    assert together == alone and turned == [together[at] for at in order]
    same = np.repeat(images[:1], 12, 0)
    assert len({str(text) for text in captioner(same, [NOTHING] * 12, 1, range(12))}) > 6
    assert len({str(text) for text in captioner(same, [NOTHING] * 12, 0, range(12))}) == 1


def test_seeded_noise_samples_tokens_by_their_probabilities() -> None:
    """The fraction of seeds with a token as argmax is the token's probability, within four standard deviations."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf]).repeat(4000, 1)
    drawn = SeededNoise(range(4000))(torch.empty(0), logits).argmax(1)
    fraction = torch.bincount(drawn, minlength=5) / 4000
    expected = logits[0].softmax(0)
    assert (fraction - expected).abs().le(4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_further_attempts_repeat_the_plans_that_sample(blip: str) -> None:
    captioner = ImageTextToText("blip", blip, prompts=["a", "b", "c"], temperatures=[0, 0.5, 1])
    assert [captioner.plan(attempt) for attempt in range(7)] == [0, 1, 2, 1, 2, 1, 2]
    assert [ImageTextToText("x", blip).plan(attempt) for attempt in range(3)] == [0, 0, 0]
    assert captioner(noisy(), [NOTHING] * 4, 1, range(4)) != captioner(noisy(), [NOTHING] * 4, 3, range(4))


def test_a_network_is_loaded_only_once_on_first_use(blip: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    captioning = "captioning.captioners.image_text_to_text"
    loads, load = [], BlipProcessor.from_pretrained
    monkeypatch.setattr(f"{captioning}.AutoProcessor.from_pretrained", lambda *a, **k: loads.append(a) or load(blip))
    __import__(captioning, fromlist=["_loaded"])._loaded.cache_clear()
    captioner = ImageTextToText("blip", blip, max_new_tokens=2)
    assert loads == []
    for attempt in range(3):
        captioner(noisy(1), [NOTHING], attempt, [0])
    assert len(loads) == 1


@pytest.mark.parametrize("path", ["{folder}/nothing", "owner/nothing", "{folder}"])
def test_a_missing_network_gives_a_one_line_error(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = path.format(folder=tmp_path)
    captioner = ImageTextToText("x", path, revision="abc")
    with pytest.raises(UserError) as caught:
        captioner(noisy(1), [NOTHING], 0, [0])
    line = str(caught.value)
    assert (
        f"captioner.path={path} (captioner.revision=abc)" in line and "captioner=offline" in line and "\n" not in line
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompts": ["a", "b"], "temperatures": [0]}, "captioner.prompts has 2 entries, captioner.temperatures 1"),
        ({"prompts": [], "temperatures": []}, "captioner.prompts has 0"),
        ({"temperatures": [-1]}, "captioner.temperatures"),
        ({"top_p": 0}, "top_p=0"),
        ({"dtype": "int8"}, "captioner.dtype=int8"),
    ],
)
def test_invalid_options_are_refused(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        ImageTextToText("x", "owner/name", **options)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("  a green\n field ", "a green field"), ('"A river."', "A river."), ("", NO_TEXT), (" ... !?", NO_TEXT),
        ("12 34", NO_TEXT), ("What lies where? A river", "A river"), ("what LIES where?: a river,", "a river"),
        ("a\x00 field\ufffd", "a field"),
    ],
)  # fmt: skip
def test_the_output_of_a_network_is_cleaned_into_a_caption(written: str, expected: str | Undescribed) -> None:
    assert caption(written, "What lies where?") == expected


def test_a_truncated_last_sentence_is_removed_unless_it_is_the_only_one() -> None:
    assert caption("A river. It is beside a", "", cut_off=True) == "A river."
    assert caption("A river. It is beside a", "") == "A river. It is beside a"
    assert caption("A river beside a", "", cut_off=True) == "A river beside a"


def test_prompts_contain_the_scene_or_drop_the_sentences_about_it() -> None:
    requested = "This is {scene}. What lies where? Is it {scene}?"
    assert prompt(requested, "BaseballField") == "This is baseball field. What lies where? Is it baseball field?"
    assert prompt(requested, "") == prompt(requested, "class 3") == "What lies where?"
    assert prompt("a picture of {scene} with", "") == ""
    assert prompt("{not} {0} {scene}", "a {scene}") == "{not} {0} a scene"


def test_prompt_tokens_are_removed_from_the_generated_tokens() -> None:
    given = torch.tensor([[7, 1, 2, 3]])
    for written, rest in (
        ([7, 1, 2, 3, 4, 5], [4, 5]),
        ([9, 1, 2, 4, 5], [4, 5]),
        ([4, 5], [4, 5]),
        ([9, 4, 1, 2], [9, 4, 1, 2]),
    ):
        assert without_prompt(torch.tensor([written]), given).tolist() == [rest]
    assert without_prompt(torch.tensor([[1, 2]]), None).tolist() == [[1, 2]]
