"""Near-duplicates and low information: compared with ImageHash, brute force, known images and real tiles."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from corpus.sources.bluemarble import BlueMarble
from eval.held_out import HeldOut
from eval.subset_quality import subset_quality
from eval.waste import (
    BLOCK,
    NEAR_DUPLICATE_BITS,
    ImageRows,
    jpeg_bytes_per_pixel,
    low_information_fraction,
    near_duplicate_fraction,
    nearest_hash,
    perceptual_hashes,
)

SIZE = 64


def noise(count: int, seed: int = 0, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def picture(height: int, width: int, kind: int) -> np.ndarray:
    """An image from integer arithmetic only."""
    y, x = np.mgrid[:height, :width]
    red, green = x * y // (7 + kind) + kind * x, x * x // 16 + y * (3 + kind)
    return (np.stack([red, green, y * y // (5 + kind) + x], axis=-1) % 256).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "kind", "expected"),
    [
        (64, 64, 0, "8c356d5b36a9625a"),
        (150, 150, 1, "8103073b073efc3f"),
        (48, 80, 2, "851a36ec38771c67"),
        (32, 32, 3, "aa75fa578049f458"),
        (16, 16, 4, "aa73c056f05dc31e"),
    ],
)
def test_perceptual_hashes_equal_those_of_imagehash(height: int, width: int, kind: int, expected: str) -> None:
    """Expected: `str(imagehash.phash(image))` by ImageHash 4.3.2 with Pillow 12.3."""
    assert perceptual_hashes(picture(height, width, kind)[None]).tobytes().hex() == expected


def test_the_nearest_hash_agrees_with_brute_force_over_several_blocks() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 2 * BLOCK + 50, dtype=np.uint64)
    hashes[BLOCK + 7] = hashes[3] ^ np.uint64(0b1011)
    numbers = hashes.tolist()
    expected = [
        min((number ^ other).bit_count() for place, other in enumerate(numbers) if place != index)
        for index, number in enumerate(numbers)
    ]
    assert nearest_hash(hashes).tolist() == expected
    assert expected[3] == expected[BLOCK + 7] == 3
    assert nearest_hash(hashes[:1]).tolist() == [65]


def test_only_copies_count_as_near_duplicates() -> None:
    images = np.concatenate([noise(10), noise(10)[:2]])
    assert near_duplicate_fraction(images) == pytest.approx(4 / 12)
    assert near_duplicate_fraction(images[:10]) == near_duplicate_fraction(images[:1]) == 0
    assert near_duplicate_fraction(images[:0]) == 0


def test_rows_of_a_memory_map_give_the_same_fractions_as_arrays(tmp_path) -> None:
    images = np.concatenate([noise(300), np.full((20, SIZE, SIZE, 3), 9, np.uint8)])
    np.save(tmp_path / "images.npy", images)
    rows = np.arange(0, 320, 3)
    lazy = ImageRows(np.load(tmp_path / "images.npy", mmap_mode="r"), rows)
    assert near_duplicate_fraction(lazy) == near_duplicate_fraction(images[rows]) > 0
    assert low_information_fraction(lazy, lazy) == low_information_fraction(images[rows], images[rows])


# ---------------------------------------------------------------- real tiles, the rates of docs/method.md


@pytest.fixture(scope="module")
def marble() -> BlueMarble:
    return BlueMarble(resolution=SIZE, stride=SIZE)


def cut(world: np.ndarray, corners: np.ndarray, down: int = 0, right: int = 0) -> np.ndarray:
    return np.stack([world[y + down : y + down + SIZE, x + right : x + right + SIZE] for y, x in corners])


def recompressed(images: np.ndarray, quality: int) -> np.ndarray:
    result = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        result.append(np.asarray(Image.open(file)))
    return np.stack(result)


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (lambda world, corners: cut(world, corners, right=1), 0.98),
        (lambda world, corners: cut(world, corners, down=1, right=1), 0.82),
        (lambda world, corners: recompressed(cut(world, corners), 90), 0.99),
        (lambda world, corners: recompressed(cut(world, corners), 75), 0.97),
        (lambda world, corners: np.rint(cut(world, corners) * 0.8).astype(np.uint8), 0.98),
        (lambda world, corners: np.minimum(np.rint(cut(world, corners) * 1.2), 255).astype(np.uint8), 0.93),
    ],
    ids=["1 px right", "1 px down and right", "JPEG 90", "JPEG 75", "darker", "brighter, ice saturated"],
)
def test_changed_tiles_of_blue_marble_count_as_near_duplicates(
    marble: BlueMarble, change: Callable, least: float
) -> None:
    corners = marble.corners()
    corners = corners[(corners < np.array(marble.world.shape[:2]) - SIZE - 2).all(axis=1)][::3]
    tiles = cut(marble.world, corners)
    textured = tiles.mean(axis=3).std(axis=(1, 2)) >= 4  # grey levels; open sea is flatter
    corners, tiles = corners[textured], tiles[textured]
    bits = np.bitwise_count(perceptual_hashes(tiles) ^ perceptual_hashes(change(marble.world, corners)))
    assert len(tiles) > 500 and (bits <= NEAR_DUPLICATE_BITS).mean() >= least


def test_tiles_of_different_places_are_rarely_near_duplicates(marble: BlueMarble) -> None:
    tiles = cut(marble.world, marble.corners())
    assert len(tiles) == 2562 and near_duplicate_fraction(tiles) <= 0.025  # tiles that share no pixel
    corners = marble.corners()[(marble.corners() < np.array(marble.world.shape[:2]) - SIZE - 4).all(axis=1)]
    first, second = perceptual_hashes(cut(marble.world, corners)), perceptual_hashes(cut(marble.world, corners, 4, 4))
    assert (np.bitwise_count(first ^ second) <= NEAR_DUPLICATE_BITS).mean() <= 0.05


def test_shifted_crops_are_near_duplicates_and_different_photographs_are_not(shared_data) -> None:
    paths = sorted((shared_data / "aid" / "images").rglob("*.jpg"))[::20]
    photographs = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    assert near_duplicate_fraction(photographs) <= 0.005
    first, second = perceptual_hashes(photographs[:, :142, :142]), perceptual_hashes(photographs[:, 2:144, 2:144])
    assert (np.bitwise_count(first ^ second) <= NEAR_DUPLICATE_BITS).mean() >= 0.85


# ---------------------------------------------------------------- low information


def test_flat_tiles_have_low_information_and_noisy_ones_do_not() -> None:
    y, x = np.mgrid[:SIZE, :SIZE]
    waves = 128 + 60 * np.sin(np.linspace(0.05, 1.5, 50)[:, None, None] * x + 0.1 * y)
    corpus = np.repeat(waves[..., None], 3, axis=3).astype(np.uint8)
    flat = np.stack([np.full((SIZE, SIZE, 3), level, np.uint8) for level in (0, 90, 255)])
    assert low_information_fraction(flat, corpus) == 1
    assert low_information_fraction(noise(5), corpus) == 0
    assert low_information_fraction(np.concatenate([flat, noise(5)]), corpus) == pytest.approx(3 / 8)
    assert low_information_fraction(corpus[:0], corpus) == 0


@pytest.mark.parametrize("flat", [0, 30, 70, 100])
def test_a_fifth_of_the_corpus_has_low_information_even_with_equal_tiles(flat: int) -> None:
    """A threshold alone would count none or all of the tiles with exactly that value."""
    corpus = np.concatenate([np.full((flat, SIZE, SIZE, 3), 9, np.uint8), noise(100 - flat)])
    assert low_information_fraction(corpus, corpus) == pytest.approx(0.2)
    assert low_information_fraction(corpus[:flat], corpus) == pytest.approx(min(1, 20 / flat) if flat else 0)


def test_jpeg_bytes_per_pixel_agree_with_pillow() -> None:
    images = np.concatenate([noise(2), picture(64, 64, 1)[None], np.zeros((1, 64, 64, 3), np.uint8)])
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=75, subsampling=0)
        sizes.append(file.tell() / SIZE**2)
    np.testing.assert_allclose(jpeg_bytes_per_pixel(images), sizes, rtol=0.02)


# ---------------------------------------------------------------- metrics of a subset


@pytest.mark.parametrize(
    ("images", "alike", "waste"),
    [(np.repeat(noise(1), 40, axis=0), False, 1.0), (noise(40), True, 0.0)],
    ids=["copies with different features", "different images with equal features"],
)
def test_the_waste_of_a_subset_is_measured_on_pixels_and_not_on_features(
    images: np.ndarray, alike: bool, waste: float
) -> None:
    random = np.random.default_rng(0)
    embeddings = random.standard_normal((40, 6)).astype(np.float32)
    if alike:
        embeddings = np.repeat(embeddings[:1], 40, axis=0) + 1e-6 * embeddings
    manifest = pd.DataFrame({"scene": np.full(40, "", dtype=object)})
    corpus = SimpleNamespace(images=images, readable=np.ones(40, dtype=bool), manifest=manifest)
    features = {"some_encoder": random.standard_normal((30, 6)).astype(np.float32)}
    held = HeldOut("balanced", corpus, np.arange(30), features, [""] * 30)
    result = subset_quality(
        np.arange(40), np.ones(40), {"balanced": held}, corpus, {"some_encoder": embeddings}, seed=0
    )
    assert result["near_duplicates"] == waste
    assert result["low_information"] == pytest.approx(0.2)
