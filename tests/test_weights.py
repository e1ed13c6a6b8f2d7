"""Number of corpus images that a kept image represents, and its use in training and distances."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torchmetrics.image.kid import poly_kernel

from eval.distances import kernel_distance, weighted_kernel_distance
from prune import weights
from prune.weights import effective_size, images_represented
from runtime.errors import UserError
from train.captions import Captions
from train.data import Subset, sampling_fractions, subset_batches
from train.objective import Objective


def clustered(count: int = 600, dimensions: int = 96, kinds: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings float16 of kinds with sizes that follow a power law, and the kinds."""
    generator = np.random.default_rng(4)
    sizes = np.arange(1, kinds + 1) ** -1.0
    kind = generator.choice(kinds, count, p=sizes / sizes.sum())
    centres = generator.standard_normal((kinds, dimensions))
    return (centres[kind] + 0.3 * generator.standard_normal((count, dimensions))).astype(np.float16), kind


def by_hand(embeddings: np.ndarray, readable: np.ndarray, kept: np.ndarray) -> np.ndarray:
    values = embeddings.astype(np.float64)
    values -= values[readable].mean(axis=0)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    result = np.zeros(len(values))
    for row in np.flatnonzero(readable):
        result[row if row in kept else kept[(values[kept] @ values[row]).argmax()]] += 1
    return result


def test_weights_count_the_corpus_images_nearest_to_each_kept_image() -> None:
    embeddings, _ = clustered()
    generator = np.random.default_rng(0)
    readable = generator.random(len(embeddings)) < 0.9
    embeddings[~readable] = 0
    kept = np.sort(generator.permutation(np.flatnonzero(readable))[:60])
    embeddings[kept[1]] = embeddings[kept[0]]  # two equal ones: each represents itself
    result = images_represented(embeddings, readable, kept, generator)
    assert result.dtype == np.float32 and result.sum() == readable.sum() and (result[kept] >= 1).all()
    assert result[np.setdiff1d(np.arange(len(result)), kept)].sum() == 0
    np.testing.assert_array_equal(result, by_hand(embeddings, readable, kept))


@pytest.mark.parametrize("many", [10**9, 0])
def test_an_inverted_file_gives_nearly_the_exact_weights(monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    """With one level of lists, and with lists that are themselves in an inverted file."""
    monkeypatch.setattr(weights, "MANY_KEPT", many)
    monkeypatch.setattr(weights, "LIST_IMAGES", 12)
    embeddings, kind = clustered(4000)
    readable = np.ones(len(embeddings), bool)
    kept = np.arange(0, len(embeddings), 7)
    exact = images_represented(embeddings, readable, kept, np.random.default_rng(0))
    monkeypatch.setattr(weights, "EXACT", 0)
    result = images_represented(embeddings, readable, kept, np.random.default_rng(0))
    again = images_represented(embeddings, readable, kept, np.random.default_rng(0))
    np.testing.assert_array_equal(result, again)
    assert result.sum() == len(embeddings) and not np.array_equal(result, exact)
    by_kind = [np.bincount(kind, weights=values, minlength=12) for values in (result, exact)]
    np.testing.assert_allclose(*by_kind, rtol=0.02, atol=2)
    assert np.corrcoef(result[kept], exact[kept])[0, 1] > 0.8


@pytest.mark.parametrize("many", [10**9, 0])
def test_empty_lists_hide_no_image(monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    """If all kept images are equal, all lists except one are empty."""
    monkeypatch.setattr(weights, "MANY_KEPT", many)
    monkeypatch.setattr(weights, "LIST_IMAGES", 5)
    embeddings = np.random.default_rng(1).standard_normal((200, 8)).astype(np.float32)
    kept = np.arange(50)
    embeddings[kept] = embeddings[0]
    monkeypatch.setattr(weights, "EXACT", 0)
    monkeypatch.setattr(weights, "PROBES", 1)
    assert images_represented(embeddings, np.ones(200, bool), kept, np.random.default_rng(0)).sum() == 200


def test_weights_do_not_depend_on_the_lookup_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, _ = clustered(3000)
    kept = np.arange(0, 3000, 5)
    monkeypatch.setattr(weights, "EXACT", 0)
    monkeypatch.setattr(weights, "MANY_KEPT", 0)
    monkeypatch.setattr(weights, "LIST_IMAGES", 20)
    readable = np.ones(3000, bool)
    result = images_represented(embeddings, readable, kept, np.random.default_rng(0))
    monkeypatch.setattr(weights, "TOGETHER", 7)
    np.testing.assert_array_equal(images_represented(embeddings, readable, kept, np.random.default_rng(0)), result)


def test_weights_are_zero_if_nothing_is_kept_and_one_if_everything_is() -> None:
    embeddings, _ = clustered(50)
    readable = np.ones(50, bool)
    assert not images_represented(embeddings, readable, np.empty(0, np.int64), np.random.default_rng(0)).any()
    assert (images_represented(embeddings, readable, np.arange(50), np.random.default_rng(0)) == 1).all()


def test_effective_size_of_known_weights() -> None:
    assert effective_size(np.array([0, 2, 2, 2], np.float32)) == 3
    assert effective_size(np.zeros(3, np.float32)) == 0
    assert effective_size(np.array([9, 1], np.float32)) == pytest.approx(100 / 82)


def test_the_weighted_distance_is_the_mean_over_pairs_of_different_images() -> None:
    generator = np.random.default_rng(2)
    first, second = generator.standard_normal((30, 5)), generator.standard_normal((41, 5)) + 0.3
    weight = generator.integers(1, 9, 30).astype(float)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return poly_kernel(torch.from_numpy(x), torch.from_numpy(y)).numpy()

    pairs = np.outer(weight, weight) - np.diag(weight**2)
    within = (kernel(first, first) * pairs).sum() / pairs.sum()
    other = kernel(second, second)
    within += (other.sum() - np.trace(other)) / (41 * 40)
    between = (kernel(first, second) * weight[:, None]).sum() / (41 * weight.sum())
    result = weighted_kernel_distance(first, weight, second)
    assert result.value == pytest.approx(1000 * (within - 2 * between))
    assert result.low < result.value < result.high
    even = weighted_kernel_distance(first, np.full(30, 7.0), second[:30])
    assert even == pytest.approx(kernel_distance(first, second[:30]))


def test_weights_correct_the_distance_of_an_unevenly_drawn_subset() -> None:
    """A weighted subset with as many rare as common images has the distribution of the corpus."""
    generator = np.random.default_rng(3)
    draw = lambda common, rare: np.concatenate(  # noqa: E731
        [generator.standard_normal((common, 6)), generator.standard_normal((rare, 6)) + 2]
    )
    corpus, subset = draw(1800, 200), draw(200, 200)
    weight = np.repeat([9.0, 1.0], 200)
    plain = weighted_kernel_distance(subset, np.ones(400), corpus)
    mended = weighted_kernel_distance(subset, weight, corpus)
    assert plain.low > 100 and mended.low < 0 < mended.high and mended.high < 0.2 * plain.value


def test_sampling_fractions_range_from_uniform_to_natural() -> None:
    weight = np.array([1, 4, 16], np.float32)
    assert sampling_fractions(weight, 0) is None
    np.testing.assert_allclose(sampling_fractions(weight, 0.5), np.array([1, 2, 4]) / 7)
    np.testing.assert_allclose(sampling_fractions(weight, 1), weight / 21)
    for wrong in (-0.1, 1.5):
        with pytest.raises(UserError, match=r"train\.weighting"):
            sampling_fractions(weight, wrong)


def test_training_draws_images_by_their_sampling_fractions() -> None:
    """The latents of image i are all i, so a batch shows which images it contains."""
    latents = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None, None, None], (1, 4, 1, 2, 2))
    captions = Captions.of(pd.DataFrame({"caption": [""] * 4}))
    texts = np.zeros((len(captions.texts), 2, 3), np.float32)

    def drawn(fractions: np.ndarray | None, size: int = 20_000) -> np.ndarray:
        subset = Subset(latents, (1, 2, 2), captions, texts, np.ones(len(texts), np.int64), np.empty((4, 0)), fractions)
        return subset_batches(subset, Objective(), size)(np.random.default_rng(0), slice(None))[0][:, 0, 0, 0].numpy()

    fractions = sampling_fractions(np.array([1, 2, 3, 10]), 1)
    np.testing.assert_allclose(np.bincount(drawn(fractions).astype(int)) / 20_000, fractions, atol=0.015)
    np.testing.assert_array_equal(drawn(None, 50), np.random.default_rng(0).integers(4, size=50))
