"""Every pruning method compared with brute force, its paper's rule, or a property that must hold."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from prune import RSPrune, select_from_arrays
from prune.clusters import Clustering, Points, corpus_clusters, members_of, normalise
from prune.methods.d2 import greedy
from prune.methods.density import nearest_feasible, outer_distance
from prune.methods.facility import FacilityLocation, lazy_greedy
from prune.methods.herding import herd
from prune.methods.hierarchical import sample_tree
from prune.methods.kcenter import KCenterGreedy
from prune.methods.moderate import ModerateCoreset
from prune.methods.rsprune import RSPrune as RSPruneMethod
from prune.methods.semdedup import SemDeDup, largest_cosine_before
from prune.methods.ssp import SSPPrototypes
from prune.neighbours import nearest_neighbours
from prune.pool import PairScores, Pool
from runtime.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "prune").glob("*.yaml"))


def method_of(name: str):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return instantiate(compose("config", overrides=[f"prune={name}"]).prune, _convert_="all")


ABLATION = yaml.safe_load((CONFIGS / "ablation" / "default.yaml").read_text(encoding="utf-8"))["changes"]
METHODS = {name: method_of(name) for name in NAMES}
SELECTIVE = {name: method for name, method in METHODS.items() if name != "full"}


def pool_of(embeddings: np.ndarray, *, unreadable: int = 0, classes: int = 3, seed: int = 0) -> Pool:
    """A pool with a random reference of some classes, and random caption scores, which some images lack."""
    random = np.random.default_rng(seed)
    size, dimensions = embeddings.shape
    reference = random.standard_normal((classes * 10, dimensions)).astype(np.float32)
    readable = np.ones(size, dtype=bool)
    readable[random.permutation(size)[:unreadable]] = False
    return Pool(
        ids=np.arange(size).astype(str),
        readable=readable,
        entropy=random.uniform(0, 8, size).astype(np.float32),
        embeddings=embeddings.astype(np.float32),
        reference_embeddings=reference,
        reference_labels=np.repeat(np.array([f"class {i}" for i in range(classes)], dtype=object), 10),
        pair_scores=pair_scores_of(size, random),
    )


def pair_scores_of(size: int, random: np.random.Generator) -> PairScores:
    """Scores in which every third image is mismatched, and every tenth has no caption."""
    mismatch, fit, cosine = random.random((3, size)).astype(np.float32)
    mismatch[mismatch > 0.67], mismatch[mismatch < 0.1] = 1, np.nan
    without = np.isnan(mismatch)
    scene = np.array([f"class {i}" for i in range(3)], dtype=object)[random.integers(3, size=size)]
    return PairScores(mismatch, np.where(without, np.nan, fit), np.where(without, np.nan, cosine), scene)


def cloud(size: int, dimensions: int = 8, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = 3 * random.standard_normal((5, dimensions))
    return (centres[random.integers(5, size=size)] + random.standard_normal((size, dimensions))).astype(np.float32)


# ---------------------------------------------------------------- properties of every method


@pytest.mark.parametrize("name", SELECTIVE)
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 120), st.integers(0, 20), st.floats(0, 0.999, allow_subnormal=False), st.integers(0, 3))
def test_every_method_keeps_the_exact_budget_without_repeats(name, size, unreadable, ratio, seed):
    pool = pool_of(cloud(size, seed=seed), unreadable=min(unreadable, size), seed=seed)
    budget = size - round(ratio * size)
    selection = SELECTIVE[name].select(pool, budget, np.random.default_rng(seed))
    assert len(selection.kept) == min(budget, int(pool.readable.sum()))
    assert (np.diff(selection.kept) > 0).all() and pool.readable[selection.kept].all()
    assert (selection.reason[~pool.readable] == "unreadable").all()
    assert set(np.flatnonzero(selection.reason == "kept")) == set(selection.kept)


@pytest.mark.parametrize("name", SELECTIVE)
@pytest.mark.parametrize("embeddings", [np.ones((40, 6)), np.zeros((40, 6)), np.eye(40, 6), np.ones((1, 6))])
def test_every_method_keeps_the_exact_budget_of_degenerate_pools(name, embeddings):
    """All equal, all zero, fewer distinct images than clusters, a single one; ratio 0 and 0.999."""
    pool = pool_of(embeddings)
    for budget in (len(embeddings), 1, 0):
        assert len(SELECTIVE[name].select(pool, budget, np.random.default_rng(0)).kept) == budget


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_bit_identical_selections(name):
    pool = pool_of(cloud(400), unreadable=7)
    first, second = (METHODS[name].select(pool, 60, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first.kept, second.kept)
    np.testing.assert_array_equal(first.centroid_distance, second.centroid_distance)


@pytest.mark.parametrize("name", ["entropy_only", "herding", "facility"])
def test_order_free_methods_keep_the_same_images_for_any_corpus_order(name):
    embeddings = cloud(150)
    order = np.random.default_rng(1).permutation(150)
    pool = pool_of(embeddings)
    shuffled = replace(pool, entropy=pool.entropy[order], embeddings=embeddings[order])
    kept = METHODS[name].select(pool, 30, np.random.default_rng(0)).kept
    again = METHODS[name].select(shuffled, 30, np.random.default_rng(0)).kept
    assert set(order[again]) == set(kept)


@pytest.mark.parametrize("name", ["kcenter", "facility"])
def test_coverage_grows_with_the_budget(name):
    """The largest distance from an image to its nearest kept one never increases."""
    pool = pool_of(cloud(200))
    vectors = normalise(pool.embeddings - pool.embeddings.mean(axis=0))
    best = [
        (vectors @ vectors[METHODS[name].select(pool, budget, np.random.default_rng(0)).kept].T).max(axis=1)
        for budget in (5, 20, 80)
    ]
    measure = np.min if name == "kcenter" else np.mean
    assert measure(best[0]) <= measure(best[1]) <= measure(best[2])


@pytest.mark.parametrize("change", ABLATION)
def test_every_ablation_override_composes_and_instantiates(change):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=["prune=rsprune", change])
    assert instantiate(cfg.prune, _convert_="all") and instantiate(cfg.entropy)


# ---------------------------------------------------------------- the rule of each method


def test_nearest_neighbours_agree_with_brute_force_and_leave_out_the_image_itself():
    points = normalise(np.concatenate([cloud(60), cloud(1).repeat(4, axis=0)]))
    result, cosines = nearest_neighbours(points, 5)
    products = points @ points.T
    np.fill_diagonal(products, -np.inf)
    np.testing.assert_allclose(cosines, -np.sort(-products, axis=1)[:, :5], atol=1e-5)
    assert (result != np.arange(64)[:, None]).all()


def test_largest_cosine_before_agrees_with_brute_force():
    points = normalise(cloud(50))
    products = points @ points.T
    expected = [-np.inf] + [products[row, :row].max() for row in range(1, 50)]
    np.testing.assert_allclose(largest_cosine_before(points), expected, rtol=1e-5)


def test_semdedup_drops_copies_first():
    originals = cloud(40, seed=2)
    pool = pool_of(np.concatenate([originals, originals[:20] * 1.0001]))
    kept = SemDeDup(clusters=2).select(pool, 40, np.random.default_rng(0)).kept
    assert len({row % 40 for row in kept}) == 40


@pytest.mark.parametrize(("keep", "sign"), [("hard", 1), ("easy", -1)])
def test_ssp_keeps_the_images_farthest_from_or_nearest_to_their_prototypes(keep, sign):
    pool = pool_of(cloud(100))
    selection = SSPPrototypes(keep=keep, clusters=4).select(pool, 25, np.random.default_rng(0))
    distance = sign * selection.centroid_distance
    dropped = np.setdiff1d(np.arange(100), selection.kept)
    assert distance[selection.kept].min() >= distance[dropped].max()


def test_ssp_refuses_an_unknown_value_of_keep():
    with pytest.raises(UserError, match="give hard or easy"):
        SSPPrototypes(keep="medium")


def test_kcenter_is_within_twice_the_best_radius():
    """Gonzalez 1985: the greedy radius is at most twice the optimum, which is found here by trying all triples."""
    pool = pool_of(cloud(14, 3))
    vectors = normalise(pool.embeddings - pool.embeddings.mean(axis=0))
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    best = min(distances[:, list(triple)].min(axis=1).max() for triple in itertools.combinations(range(14), 3))
    kept = KCenterGreedy().select(pool, 3, np.random.default_rng(0)).kept
    assert distances[:, kept].min(axis=1).max() <= 2 * best + 1e-6


def test_herding_takes_the_best_next_image_every_time():
    embeddings = cloud(30)
    mean = embeddings.mean(axis=0)
    taken: list[int] = []
    for _ in range(8):
        rest = [row for row in range(30) if row not in taken]
        taken.append(min(rest, key=lambda row: np.linalg.norm(mean - embeddings[[*taken, row]].mean(axis=0))))
    assert herd(embeddings, mean, 8).tolist() == taken


def test_moderate_keeps_the_middle_third_of_the_centroid_distances():
    pool = pool_of(cloud(90))
    selection = ModerateCoreset().select(pool, 30, np.random.default_rng(0))
    order = np.argsort(selection.centroid_distance, kind="stable")
    assert set(selection.kept) == set(order[30:60])


def test_nearest_feasible_solves_the_quadratic_program():
    requested, sizes = np.array([6.0, 3.0, 1.0]), np.array([4, 9, 9])
    assert nearest_feasible(requested, sizes, 10).tolist() == [4, 4, 2]  # one shift of +1 for all that can grow
    best = min(
        (candidate for candidate in itertools.product(range(5), range(10), range(10)) if sum(candidate) == 10),
        key=lambda candidate: ((np.array(candidate) - requested) ** 2).sum(),
    )
    assert best == (4, 4, 2)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.floats(0, 1, allow_subnormal=False), st.integers(0, 9))
def test_nearest_feasible_meets_the_budget_and_the_group_sizes(sizes, fraction, seed):
    sizes = np.array(sizes)
    budget = int(fraction * sizes.sum())
    requested = budget * np.random.default_rng(seed).dirichlet(np.full(len(sizes), 0.3))
    result = nearest_feasible(requested, sizes, budget)
    assert result.sum() == budget and (result >= 0).all() and (result <= sizes).all()


def test_outer_distance_is_the_mean_over_the_nearest_centroids():
    centroids = np.eye(3, dtype=np.float32)
    centroids[2] = centroids[1]
    np.testing.assert_allclose(outer_distance(centroids, 1), [1, 0, 0])
    np.testing.assert_allclose(outer_distance(centroids, 2), [1, 0.5, 0.5])


def test_d2_takes_the_highest_score_and_lowers_those_of_its_neighbours():
    score = np.array([1.0, 0.9, 0.5])
    neighbours, weights = np.array([[1], [0], [0]]), np.full((3, 1), 0.8)
    assert greedy(score.copy(), neighbours, weights, 3).tolist() == [0, 2, 1]
    assert greedy(score.copy(), neighbours, np.zeros((3, 1)), 3).tolist() == [0, 1, 2]


def test_facility_location_agrees_with_plain_greedy():
    points = normalise(cloud(40))
    result, cosines = nearest_neighbours(points, 39)
    similarity = (1 + cosines) / 2
    dense = np.ones((40, 40))
    np.put_along_axis(dense, result, similarity, axis=1)
    taken: list[int] = []
    for _ in range(6):
        rest = [column for column in range(40) if column not in taken]
        taken.append(max(rest, key=lambda column: dense[:, [*taken, column]].max(axis=1).sum()))
    assert lazy_greedy(result, similarity, 6).tolist() == taken


def test_facility_location_covers_the_corpus_better_than_random():
    pool = pool_of(cloud(300))
    vectors = normalise(pool.embeddings - pool.embeddings.mean(axis=0))

    def served(name_or_method):
        kept = name_or_method.select(pool, 15, np.random.default_rng(0)).kept
        return (vectors @ vectors[kept].T).max(axis=1).mean()

    assert served(FacilityLocation()) > served(METHODS["random"])


def test_a_tree_is_sampled_evenly_at_every_level():
    # 12 images in 4 clusters (6, 2, 2, 2), which lie in 2 (8 and 4 images)
    images = np.repeat([0, 1, 2, 3], [6, 2, 2, 2])
    levels = [images, np.array([0, 0, 1, 1])]
    kept = sample_tree(levels, 8, np.random.default_rng(0))
    assert np.bincount(images[kept], minlength=4).tolist() == [2, 2, 2, 2]
    assert len(set(sample_tree(levels, 12, np.random.default_rng(0)))) == 12


def test_hierarchical_and_flat_kmeans_find_pure_clusters():
    random = np.random.default_rng(0)
    centres = normalise(random.standard_normal((32, 64)))
    truth = random.integers(32, size=3000)
    embeddings = (centres[truth] + 0.02 * random.standard_normal((3000, 64))).astype(np.float32)
    points = Points(embeddings, np.zeros(64, np.float32))
    for clustering in (Clustering(64, hierarchical=False), Clustering(8, hierarchical=True)):
        labels, distances = clustering(points, np.arange(3000), 64, np.random.default_rng(0))
        purity = sum(np.bincount(truth[group]).max() for group in members_of(labels, labels.max() + 1)) / 3000
        assert purity > 0.95
        assert (distances > -1e-6).all() and set(labels) == set(range(labels.max() + 1))
    assert labels.max() + 1 > 32  # about as many as requested
    capped, _ = Clustering(8, hierarchical=False)(points, np.arange(3000), 64, np.random.default_rng(0))
    assert capped.max() + 1 <= 8


@pytest.mark.parametrize("embeddings", [np.ones((300, 4)), np.r_[np.ones((290, 4)), 3 * np.eye(4).repeat(3, 0)[:10]]])
def test_splitting_ends_at_equal_images_and_the_budget_is_met(embeddings):
    method = RSPruneMethod(entropy_quantile=0, scenes=False, images_per_cluster=1, max_clusters=3)
    assert len(method.select(pool_of(embeddings), 100, np.random.default_rng(0)).kept) == 100


def test_euclidean_clusters_measure_euclidean_distance():
    pool = pool_of(cloud(60))
    selection = RSPruneMethod(entropy_quantile=0, spherical=False).select(pool, 20, np.random.default_rng(0))
    assert len(selection.kept) == 20 and selection.centroid_distance.max() > 2  # beyond any cosine distance


def test_flat_clustering_assigns_images_to_the_nearest_centroid():
    pool = pool_of(cloud(200), unreadable=5)
    rows, points, labels, _ = corpus_clusters(pool, 6, np.random.default_rng(0))
    assert len(rows) == 195 and labels.max() < 6
    means = np.stack([normalise(points[rows[labels == k]].mean(axis=0)[None])[0] for k in range(labels.max() + 1)])
    assert ((points[rows] @ means.T).argmax(axis=1) == labels).mean() > 0.95


def test_otsu_splits_two_modes():
    pool = pool_of(cloud(100))
    entropy = np.concatenate([np.full(30, 1.0), np.full(70, 6.0)]) + np.random.default_rng(0).normal(0, 0.2, 100)
    pool = replace(pool, entropy=entropy.astype(np.float32))
    selection = RSPruneMethod(entropy_otsu=True).select(pool, 20, np.random.default_rng(0))
    assert entropy[:30].max() < selection.diagnostics["entropy_threshold"] < entropy[30:].min()
    assert (selection.reason[:30] == "low_entropy").all() and "low_entropy" not in selection.reason[30:]


# ---------------------------------------------------------------- library use


def test_rsprune_selects_from_arrays_reproducibly():
    embeddings = cloud(200)
    bits = np.random.default_rng(0).uniform(0, 8, 200)
    selection = RSPrune(ratio=0.85).select(
        embeddings, entropy=bits, reference=embeddings[:50], labels=np.arange(50) % 4
    )
    assert selection.kept.dtype == np.int64 and len(selection.kept) == 30
    assert len(selection.scene) == len(selection.reason) == 200
    again = RSPrune(ratio=0.85).select(embeddings, entropy=bits, reference=embeddings[:50], labels=np.arange(50) % 4)
    np.testing.assert_array_equal(selection.kept, again.kept)


def test_methods_select_from_embeddings_alone():
    selection = RSPrune(ratio=0.5, uniformity=0.5).select(cloud(60).astype(np.float16))
    assert len(selection.kept) == 30 and "low_entropy" not in selection.reason
    assert len(select_from_arrays(SemDeDup(), cloud(60), ratio=0.9).kept) == 6


def test_invalid_arrays_and_options_are_named_in_the_error():
    embeddings = cloud(30)
    embeddings[[4, 9], 2] = np.nan
    with pytest.raises(UserError, match=r"embeddings of 2 images are not finite \(rows 4, 9\)"):
        RSPrune().select(embeddings)
    readable = ~np.isnan(embeddings).any(axis=1)
    assert len(RSPrune(ratio=0.5).select(np.nan_to_num(embeddings), readable=readable).kept) == 15
    with pytest.raises(UserError, match="belong together"):
        RSPrune().select(cloud(30), reference=cloud(5))
    with pytest.raises(UserError, match="entropy must have shape"):
        RSPrune().select(cloud(30), entropy=np.ones(29))
    with pytest.raises(UserError, match="dimensions"):
        RSPrune().select(cloud(30), reference=np.ones((5, 3)), labels=np.arange(5))
    with pytest.raises(UserError, match="scene_random needs"):
        select_from_arrays(METHODS["scene_random"], cloud(30), ratio=0.5)
    for name in ("dldc", "clip_score", "rsprune_dldc"):
        with pytest.raises(UserError, match=f"{name} needs scores of images and captions"):
            select_from_arrays(METHODS[name], cloud(30), ratio=0.5)
    with pytest.raises(UserError, match="ratio=1"):
        RSPrune(ratio=1.0)
    with pytest.raises(TypeError):
        RSPrune(uniformly=1)
