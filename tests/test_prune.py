"""The pruning core compared with independent computation: entropy, allocation, budgets, properties of RS-Prune."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import shannon_entropy

from prune.allocation import allocate, allocate_distinct, proportional, water_fill
from prune.entropy import AGGREGATES, LocalEntropy, local_entropy, patch_entropies
from prune.library import select_from_arrays
from prune.methods.baselines import Full, Random
from prune.methods.entropy_only import EntropyOnly
from prune.methods.rsprune import RSPrune, distinct_of, nearest_similarities, pick_in_cluster
from prune.pool import Pool, Selection, checked
from prune.ranks import ascending, below_quantile
from prune.scenes import assign_scenes, fit_prototypes
from prune.selection import budget_of
from runtime.errors import UserError


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None].astype(np.uint8), 3, axis=2)


def test_entropy_of_known_images():
    assert local_entropy(grey(np.full((64, 64), 77))) == 0
    checkerboard = np.indices((64, 64)).sum(0) % 2 * 255
    assert local_entropy(grey(checkerboard)) == pytest.approx(1)
    ramp = np.tile(np.arange(256).reshape(16, 16), (4, 4))  # every 16 px patch holds every level once
    assert local_entropy(grey(ramp), 16) == pytest.approx(8)


def test_entropy_agrees_with_scikit_image():
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    luma = (image @ np.array([9798, 19235, 3735]) + 2**14) >> 15
    expected = [shannon_entropy(luma[y : y + 8, x : x + 8]) for y in range(0, 40, 8) for x in range(0, 56, 8)]
    np.testing.assert_allclose(patch_entropies(image, 8), expected)


def test_fewer_bins_merge_neighbouring_levels():
    levels = np.tile(np.array([[8, 9], [200, 201]], dtype=np.uint8), (8, 8))
    assert LocalEntropy()(grey(levels)) == pytest.approx(2)
    assert LocalEntropy(bins=128)(grey(levels)) == pytest.approx(1)
    assert LocalEntropy(bins=2)(levels) == pytest.approx(1)  # grey images are used unchanged


def test_aggregates_of_four_known_patches():
    flat, busy = np.full((16, 16), 9), np.arange(256).reshape(16, 16)
    image = grey(np.block([[flat, busy], [busy, busy]]))
    bits = {name: LocalEntropy(aggregate=name, quantile=0.5, bits=4.0)(image) for name in AGGREGATES}
    assert bits == pytest.approx({"mean": 6, "min": 0, "quantile": 8, "fraction": 0.75})


def test_entropy_excludes_no_data_pixels():
    busy, hole = np.arange(1, 257).reshape(16, 16) % 255 + 1, np.zeros((16, 16), dtype=int)
    image = grey(np.block([[hole, busy], [hole, busy]]))
    assert LocalEntropy(no_data=0)(image) == pytest.approx(LocalEntropy()(grey(busy)))
    assert LocalEntropy()(image) < LocalEntropy(no_data=0)(image)
    assert LocalEntropy(no_data=0)(grey(np.zeros((32, 32)))) == 0


def test_a_median_filter_removes_sensor_noise():
    noisy = np.full((64, 64), 100)
    speckle = np.random.default_rng(0).permutation(64 * 64)[:200]
    noisy.flat[speckle] = 255
    assert LocalEntropy()(grey(noisy)) > 0.2
    assert LocalEntropy(denoise=True)(grey(noisy)) < 0.05


def test_unknown_aggregates_and_bins_are_refused():
    with pytest.raises(UserError, match="aggregate=max: give one of"):
        LocalEntropy(aggregate="max")
    with pytest.raises(UserError, match="power of two"):
        LocalEntropy(bins=100)


capacities = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@settings(deadline=None)
@given(capacities, st.floats(0, 1, allow_subnormal=False), st.floats(0, 1, allow_subnormal=False))
def test_allocations_meet_the_budget_and_the_group_sizes(sizes, fraction, uniformity):
    sizes = np.array(sizes)
    budget = int(fraction * sizes.sum())
    for allocation in (water_fill(sizes, budget), proportional(sizes, budget), allocate(sizes, budget, uniformity)):
        assert allocation.sum() == budget
        assert (allocation >= 0).all() and (allocation <= sizes).all()


def test_water_filling_is_the_most_even_allocation():
    np.testing.assert_array_equal(water_fill(np.array([2, 10, 10, 1]), 13), [2, 5, 5, 1])
    even = water_fill(np.array([5, 50, 500]), 100)
    assert even.tolist() == [5, 47, 48]


def test_proportional_uses_largest_remainders():
    assert proportional(np.array([50, 30, 20]), 10).tolist() == [5, 3, 2]
    assert proportional(np.array([1, 1, 1]), 2).sum() == 2


@pytest.mark.parametrize(
    ("images", "ratio", "kept"), [(100, 0.85, 15), (101, 0.5, 51), (7, 0.0, 7), (16830, 0.85, 2524)]
)
def test_budget_of_returns_the_number_of_kept_images(images, ratio, kept):
    assert budget_of(images, ratio) == kept


@pytest.mark.parametrize("ratio", [1, 1.5, -0.1, float("nan")])
def test_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(UserError, match="ratio="):
        budget_of(10, ratio)


def blobs(sizes: list[int], unreadable: int = 0, seed: int = 0, dimensions: int = 16) -> tuple[Pool, np.ndarray]:
    """A pool of Gaussian blobs, one per scene, labelled a..; returns it with the true scene of every image."""
    random = np.random.default_rng(seed)
    centres = 8 * random.standard_normal((len(sizes), dimensions))
    scenes = np.repeat(np.arange(len(sizes)), sizes)
    embeddings = (centres[scenes] + random.standard_normal((len(scenes), dimensions))).astype(np.float32)
    labels = np.repeat(np.array([chr(ord("a") + index) for index in range(len(sizes))], dtype=object), 100)
    reference = centres[np.repeat(np.arange(len(sizes)), 100)] + random.standard_normal((len(labels), dimensions))
    readable = np.ones(len(scenes), dtype=bool)
    readable[random.permutation(len(scenes))[:unreadable]] = False
    pool = Pool(
        ids=np.arange(len(scenes)).astype(str),
        readable=readable,
        entropy=random.uniform(1, 7, len(scenes)).astype(np.float32),
        embeddings=embeddings,
        reference_embeddings=reference.astype(np.float32),
        reference_labels=labels,
    )
    return pool, scenes


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 300), st.integers(0, 40), st.floats(0, 0.999, allow_subnormal=False), st.integers(0, 5))
def test_every_method_keeps_the_exact_budget(images, unreadable, ratio, seed):
    first = images - images // 3 - images // 7
    pool, _ = blobs([first, images // 3, images // 7], min(unreadable, images - 1), seed)
    budget = budget_of(len(pool), ratio)
    possible = min(budget, int(pool.readable.sum()))
    for method in (Random(), RSPrune()):
        selection = method.select(pool, budget, np.random.default_rng(seed))
        assert len(selection.kept) == possible
        assert (np.diff(selection.kept) > 0).all()  # ascending, hence no repeats
        assert pool.readable[selection.kept].all()
        assert (selection.reason[selection.kept] == "kept").all()
        assert (selection.reason == "kept").sum() == possible
        assert (selection.reason[~pool.readable] == "unreadable").all()


def test_full_keeps_all_readable_images():
    pool, _ = blobs([30, 5], unreadable=4)
    assert len(Full().select(pool, 3, np.random.default_rng(0)).kept) == 31


def test_rsprune_balances_the_long_tail_and_names_the_scenes():
    pool, scenes = blobs([900, 60, 40])
    selection = RSPrune(entropy_quantile=0, threshold_quantile=0).select(pool, 90, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(scenes[selection.kept]), [30, 30, 30])
    np.testing.assert_array_equal(selection.scene, np.array(["a", "b", "c"], dtype=object)[scenes])


def test_uniformity_zero_is_proportional():
    pool, scenes = blobs([900, 60, 40])
    selection = RSPrune(entropy_quantile=0, threshold_quantile=0, uniformity=0.0).select(
        pool, 100, np.random.default_rng(0)
    )
    assert abs(np.bincount(scenes[selection.kept])[0] - 90) <= 2


def test_entropy_step_drops_lowest_entropies_and_returns_the_best_to_fill_the_budget():
    pool, _ = blobs([200])
    selection = RSPrune(entropy_quantile=0.5).select(pool, 150, np.random.default_rng(0))
    dropped = np.flatnonzero(selection.reason == "low_entropy")
    assert selection.diagnostics["returned_by_entropy"] == 50
    assert pool.entropy[dropped].max() < pool.entropy[selection.kept].min()


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 10**6).map(lambda parts: parts / 10**6))
def test_below_quantile_counts_distinct_values_below_the_quantile(count, quantile):
    values = np.arange(count, dtype=np.float64)
    assert below_quantile(count, quantile) == (values < np.quantile(values, quantile) - 1e-9).sum()


@pytest.mark.parametrize("quantile", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_without_equal_entropies_the_entropy_step_is_a_threshold(quantile):
    pool, _ = blobs([150, 50], unreadable=13)
    threshold = np.quantile(pool.entropy[pool.readable], quantile)
    selection = RSPrune(entropy_quantile=quantile).select(pool, 1, np.random.default_rng(0))
    expected = pool.readable & (pool.entropy < threshold)
    np.testing.assert_array_equal(selection.reason == "low_entropy", expected)
    assert selection.diagnostics["entropy_threshold"] == pytest.approx(threshold)
    assert (
        selection.diagnostics["dropped_by_entropy"] == expected.sum()
        and selection.diagnostics["returned_by_entropy"] == 0
    )


def test_equal_entropies_at_the_cut_do_not_disable_the_entropy_step():
    pool, _ = blobs([301])
    pool = replace(pool, entropy=np.where(np.arange(301) < 240, 0, pool.entropy).astype(np.float32))
    selection = RSPrune().select(pool, 40, np.random.default_rng(0))
    dropped = np.flatnonzero(selection.reason == "low_entropy")
    assert selection.diagnostics["dropped_by_entropy"] == len(dropped) == 60  # ceil(0.2 * 300)
    assert dropped.max() < 240
    assert 15 < (dropped < 120).sum() < 45  # from the whole corpus, not only its beginning
    again = RSPrune().select(pool, 40, np.random.default_rng(99))
    np.testing.assert_array_equal(np.flatnonzero(again.reason == "low_entropy"), dropped)


def test_equal_entropies_do_not_change_the_random_numbers_of_the_method():
    """If the same images are dropped, by a draw among equal entropies or by rank, the result is bit-identical."""
    pool, _ = blobs([250, 60])
    tied = replace(pool, entropy=np.minimum(pool.entropy, 3))
    first = RSPrune(entropy_quantile=0.6).select(tied, 50, np.random.default_rng(3))
    dropped = first.reason == "low_entropy"
    apart = replace(pool, entropy=np.where(dropped, pool.entropy, 10 + pool.entropy).astype(np.float32))
    second = RSPrune(entropy_quantile=0.6).select(apart, 50, np.random.default_rng(3))
    np.testing.assert_array_equal(first.kept, second.kept)
    np.testing.assert_array_equal(first.cluster, second.cluster)


@pytest.mark.parametrize("rule", [{"entropy_bits": 3.0}, {"entropy_otsu": True}])
def test_an_entropy_threshold_keeps_images_at_the_threshold(rule):
    pool, _ = blobs([200])
    pool = replace(pool, entropy=np.repeat(np.float32([0.0, 1.0, 3.0, 7.0]), 50))
    selection = RSPrune(**rule).select(pool, 20, np.random.default_rng(0))
    threshold = selection.diagnostics["entropy_threshold"]
    np.testing.assert_array_equal(selection.reason == "low_entropy", pool.entropy < threshold)
    assert 0 < selection.diagnostics["dropped_by_entropy"] < 200


def test_returned_images_are_counted_separately_from_dropped_ones():
    pool, _ = blobs([201])
    metadata = RSPrune(entropy_quantile=0.5).select(pool, 150, np.random.default_rng(0)).diagnostics
    assert metadata["dropped_by_entropy"] == 100 and metadata["returned_by_entropy"] == 49
    pool = replace(pool, entropy=np.full(201, np.nan, dtype=np.float32))
    metadata = RSPrune(entropy_quantile=0.5).select(pool, 150, np.random.default_rng(0)).diagnostics
    assert (
        metadata["dropped_by_entropy"] == metadata["returned_by_entropy"] == 0 and metadata["entropy_threshold"] is None
    )


def test_ascending_orders_equal_values_randomly_but_reproducibly():
    values = np.random.default_rng(0).permutation(50).astype(np.float32)
    np.testing.assert_array_equal(ascending(values), np.argsort(values))
    order = ascending(np.zeros(1000))
    assert sorted(order.tolist()) == list(range(1000)) and abs(order[:500].mean() - 499.5) < 50
    np.testing.assert_array_equal(order, ascending(np.ones(1000)))
    values = np.random.default_rng(0).integers(0, 5, 1000).astype(np.float32)
    assert (np.diff(values[ascending(values)]) >= 0).all()


def test_entropy_only_draws_among_equal_entropies_and_needs_entropies():
    pool, _ = blobs([400])
    tied = replace(pool, entropy=np.repeat(np.float32([1.0, 5.0]), 200))
    kept = EntropyOnly().select(tied, 100, np.random.default_rng(0)).kept
    assert kept.min() >= 200 and 30 < (kept < 300).sum() < 70
    with pytest.raises(UserError, match="give entropy"):
        EntropyOnly().select(replace(pool, entropy=np.full(400, np.nan, np.float32)), 10, np.random.default_rng(0))


def test_images_of_unknown_scenes_are_labelled_open_and_kept():
    pool, _ = blobs([200, 200])
    stranger = np.zeros_like(pool.embeddings[:30])
    stranger[:, 3] = -60
    stranger += np.random.default_rng(1).standard_normal(stranger.shape)
    pool = Pool(
        ids=np.arange(430).astype(str),
        readable=np.ones(430, dtype=bool),
        entropy=np.full(430, 5, dtype=np.float32),
        embeddings=np.concatenate([pool.embeddings, stranger.astype(np.float32)]),
        reference_embeddings=pool.reference_embeddings,
        reference_labels=pool.reference_labels,
    )
    selection = RSPrune(threshold_quantile=0.001).select(pool, 60, np.random.default_rng(0))
    assert (selection.scene[400:] == "open").mean() > 0.9
    assert (selection.kept >= 400).sum() >= 10


def test_the_open_threshold_holds_for_images_outside_the_reference():
    random = np.random.default_rng(0)
    centres = random.standard_normal((5, 64))
    labels = np.repeat(np.arange(5), 60)
    reference, others = (centres[np.repeat(np.arange(5), n)] + random.standard_normal((5 * n, 64)) for n in (60, 2000))
    prototypes = fit_prototypes(reference, labels.astype(str), 8, 0.05, seed=0)
    scenes, _ = assign_scenes(others, prototypes)
    assert np.mean(scenes == 5) < 0.1  # near the requested 5 %; it would be far above if measured on the fitted images


def test_a_reference_with_one_image_per_class_sets_no_threshold():
    prototypes = fit_prototypes(np.eye(3, 8), np.array(["a", "b", "c"]), 4, 0.01, seed=0)
    assert prototypes.threshold == -np.inf and len(prototypes.vectors) == 3


def test_same_seed_gives_the_same_selection():
    pool, _ = blobs([300, 100, 20])
    first, second = (RSPrune().select(pool, 60, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first.kept, second.kept)
    np.testing.assert_array_equal(first.cluster, second.cluster)
    other = Random().select(pool, 60, np.random.default_rng(8))
    assert not np.array_equal(Random().select(pool, 60, np.random.default_rng(7)).kept, other.kept)


def test_cluster_picks_start_near_the_centroid_then_spread_and_skip_duplicates():
    angles = np.array([0.0, 0.001, 0.3, 0.6, 0.9])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    picked, skipped = pick_in_cluster(points, angles.astype(np.float32), 3, 0.34, 0.98)
    assert picked.tolist() == [0, 4, 2] or picked.tolist() == [0, 4, 3]
    assert skipped == 0  # only one image of the first part
    picked, skipped = pick_in_cluster(points, angles.astype(np.float32), 4, 1.0, 0.98)
    assert 1 not in picked and skipped == 1
    assert pick_in_cluster(points, angles.astype(np.float32), 5, 1.0, 0.98)[1] == 0  # all are taken, none skipped


@settings(deadline=None, max_examples=50)
@given(
    st.integers(2, 40),
    st.floats(0, 1, allow_subnormal=False),
    st.floats(0, 1, allow_subnormal=False),
    st.sampled_from([0.5, 0.9, 0.98, 2.0]),
    st.integers(0, 99),
)
def test_the_duplicate_guard_counts_every_image_that_it_skips(size, fraction, representativeness, similarity, seed):
    """Compared with the rule in plain Python."""
    random = np.random.default_rng(seed)
    angles = random.choice(random.uniform(0, 2, 8), size) + 1e-3 * random.standard_normal(size)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    distances, budget = random.permutation(size).astype(np.float32), 1 + int(fraction * (size - 2))
    taken, expected, waiting = [], 0, np.argsort(distances).tolist()
    while waiting and len(taken) < max(1, round(representativeness * budget)):
        index = waiting.pop(0)
        if taken and (points[taken] @ points[index]).max() >= np.float32(similarity):
            expected += 1
        else:
            taken.append(index)
    picked, skipped = pick_in_cluster(points, distances, budget, representativeness, similarity)
    assert picked[: len(taken)].tolist() == taken and len(set(picked.tolist())) == budget
    assert skipped == expected


def test_a_selection_counts_images_skipped_by_the_duplicate_guard():
    pool, _ = blobs([300, 40])
    copies = np.concatenate([pool.embeddings, pool.embeddings[:60] * 1.0001])
    pool = replace(
        pool, ids=np.arange(400).astype(str), readable=np.ones(400, bool), embeddings=copies,
        entropy=np.full(400, 5, np.float32),
    )  # fmt: skip
    guarded, free = (
        RSPrune(duplicate_similarity=limit, representativeness=1.0, reference_duplicates=None).select(
            pool, 80, np.random.default_rng(0)
        )
        for limit in (0.9999, 2.0)
    )
    assert guarded.diagnostics["skipped_as_duplicate"] > 0 and not np.array_equal(guarded.kept, free.kept)
    assert free.diagnostics["skipped_as_duplicate"] == 0
    idle = RSPrune(duplicate_similarity=1.1, representativeness=1.0, reference_duplicates=None)
    idle = idle.select(pool, 80, np.random.default_rng(0))
    assert idle.diagnostics["skipped_as_duplicate"] == 0 and np.array_equal(idle.kept, free.kept)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.sampled_from([0.5, 0.9, 0.98, 2.0]), st.integers(0, 99))
def test_distinct_of_marks_images_that_repeat_no_earlier_distinct_one(size, similarity, seed):
    """Compared with the rule in plain Python."""
    random = np.random.default_rng(seed)
    angles = random.choice(random.uniform(0, 2, 8), size) + 1e-3 * random.standard_normal(size)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    order, expected = random.permutation(size), []
    for index in order:
        if not expected or (points[expected] @ points[index]).max() < np.float32(similarity):
            expected.append(int(index))
    result = distinct_of(points, order, np.float32(similarity))
    assert np.flatnonzero(result).tolist() == sorted(expected)


def test_nearest_similarities_equal_those_of_all_pairs():
    points = np.random.default_rng(0).standard_normal((2100, 5)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    pairs = points @ points.T
    np.fill_diagonal(pairs, -np.inf)
    np.testing.assert_allclose(nearest_similarities(points), pairs.max(axis=1), rtol=1e-5)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    st.floats(0, 1, allow_subnormal=False),
    st.floats(0, 1, allow_subnormal=False),
)
def test_repetitions_are_allocated_only_after_all_distinct_images(groups, fraction, uniformity):
    distinct, more = np.array(groups).T
    sizes = distinct + more
    budget = int(fraction * sizes.sum())
    result = allocate_distinct(distinct, sizes, budget, uniformity)
    assert result.sum() == budget and (result >= 0).all() and (result <= sizes).all()
    if budget <= distinct.sum():
        assert (result <= distinct).all()
    else:
        assert (result >= distinct).all()


def test_images_closer_than_reference_images_count_as_repetitions():
    """The reference's images are 0.3 rad apart: crops within that distance of one another count as one."""
    angles = np.concatenate([np.arange(6) * 0.3 + 0.01 * copy for copy in range(5)])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    pool = Pool(
        ids=np.arange(30).astype(str), readable=np.ones(30, bool), entropy=np.full(30, 5, np.float32),
        embeddings=points, reference_embeddings=points[:6], reference_labels=np.array(["a"] * 6, dtype=object),
    )  # fmt: skip
    options = {"entropy_quantile": 0.0, "threshold_quantile": 0.0, "prototypes_per_class": 1, "clusters_per_scene": 1}
    selection = RSPrune(**options).select(pool, 6, np.random.default_rng(0))
    assert sorted(selection.kept % 6) == [0, 1, 2, 3, 4, 5] and selection.diagnostics["repetitions"] == 24
    more = RSPrune(**options).select(pool, 9, np.random.default_rng(0)).kept  # repetitions fill the rest
    assert len(set(more % 6)) == 6 and len(set(more.tolist())) == 9
    free = RSPrune(**options, reference_duplicates=None, representativeness=1.0, duplicate_similarity=2.0)
    selection = free.select(pool, 6, np.random.default_rng(0))
    assert selection.diagnostics["repetitions"] == 0 and len(set(selection.kept % 6)) < 6


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([0, 1, 2, 3], "prune=mine keeps 4 images, but must keep 3 of 6"),
        ([0, 1, 1], "keeps 3 images, 1 of them twice"),
        ([0, 1, 5], "keeps 3 images, 1 of them unreadable"),
    ],
)
def test_a_method_that_breaks_the_budget_is_refused(kept: list[int], message: str) -> None:
    class Mine:
        def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
            return replace(Selection.of(pool, np.arange(budget), "not_drawn"), kept=np.array(kept))

    embeddings = np.eye(6, dtype=np.float32)
    readable = np.arange(6) < 5
    with pytest.raises(UserError, match="keeps"):
        select_from_arrays(Mine(), embeddings, ratio=0.5, readable=readable)
    pool = Pool(np.arange(6).astype(str), readable, np.zeros(6), embeddings, embeddings[:0], np.empty(0, dtype=object))
    with pytest.raises(UserError, match=message):
        checked(Mine().select(pool, 3, np.random.default_rng(0)), pool, 3, "mine")
    fewer = Selection.of(pool, np.arange(5), "not_drawn")
    assert checked(fewer, pool, 6, "mine") is fewer, "all readable images, where there are fewer than the budget"
