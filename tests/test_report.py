"""Report, figures, sheets: pixels at the right place, pictures inside the file, consistent counts."""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageColor

from report.documents import publish, write_results
from report.embedding_map import embedding_map
from report.figures import (
    CORRECTNESS,
    GAP,
    PAPER,
    cluster_sizes,
    comparison_sheet,
    confusion_figure,
    contact_sheet,
    convergence_figure,
    correctness_pictures,
    entropy_histogram,
    scene_bars,
    world_figure,
)
from report.page import Gallery, figure_bytes, png_bytes, write_report
from report.prune_report import write_prune_report
from report.tables import build_tables, scene_table, to_markdown


class Page(HTMLParser):
    """Images, links, table cells and ids of an HTML file."""

    def __init__(self, path):
        super().__init__()
        self.images, self.links, self.ids, self.text, self.open = [], [], set(), [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.images += [attributes] if tag == "img" else []
        self.links += [attributes["href"]] if tag == "a" else []
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        if tag not in ("img", "meta", "wbr", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text += [data.strip()] if data.strip() and self.open[-1] not in ("style", "script") else []

    def picture(self, alt: str) -> np.ndarray:
        source = next(image["src"] for image in self.images if image["alt"] == alt)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).convert("RGB"))


@pytest.fixture
def tiles() -> np.ndarray:
    """uint8 [7, 6, 4, 3]; every pixel differs from the paper and from those of the other tiles."""
    return np.random.default_rng(0).integers(0, 200, (7, 6, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("captioned", [False, True])
def test_contact_sheet_places_every_tile_at_its_position(tiles, scale, captioned):
    labels = ["a caption of several words"] * 7 if captioned else None
    sheet = np.asarray(contact_sheet(tiles, 3, labels, scale))
    height, width = 6 * scale, 4 * scale
    below = (sheet.shape[0] - GAP) // 3 - height - GAP
    assert (below > 0) == captioned
    for index, tile in enumerate(tiles):
        row, column = divmod(index, 3)
        top, left = GAP + row * (height + GAP + below), GAP + column * (width + GAP)
        block = sheet[top : top + height, left : left + width]
        np.testing.assert_array_equal(block[::scale, ::scale], tile)
        np.testing.assert_array_equal(block, np.kron(tile, np.ones((scale, scale, 1), dtype=np.uint8)))
    if not captioned:
        painted = (sheet != PAPER).any(axis=2).sum()
        assert painted == 7 * height * width


def test_captions_are_drawn_below_their_tile_within_its_width():
    tiles = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet(tiles, 2, ["a satellite image of a coast, tropical forest and ocean", ""], 2))
    below = (sheet[GAP + 128 :] != PAPER).any(axis=(0, 2))
    assert below[GAP : GAP + 128].any()
    assert not below[GAP + 128 + 1 :].any()


def test_comparison_sheet_enlarges_small_inputs_and_labels_rows_at_the_left(tiles):
    sheet = np.asarray(comparison_sheet({"input": tiles[:2, ::2, ::2], "truth": tiles[:2]}, scale=2))
    right = sheet.shape[1] - 2 * (8 + GAP)
    np.testing.assert_array_equal(sheet[GAP : GAP + 12 : 4, right : right + 8 : 4], tiles[0, ::2, ::2])
    np.testing.assert_array_equal(sheet[2 * GAP + 12 : 2 * GAP + 24 : 2, right : right + 8 : 2], tiles[0])
    assert (sheet[:, : right - GAP] != PAPER).any()
    with pytest.raises(ValueError, match="different numbers"):
        comparison_sheet({"a": tiles[:2], "b": tiles[:3]})


def test_correctness_maps_are_drawn_in_colours_explained_by_a_legend(tiles):
    fractions = np.zeros((2, 8, 8, 3), dtype=np.float32)
    fractions[0, :4, :, 0], fractions[0, 4:, :, 1], fractions[1, :4, :, 2], fractions[1, 4:] = 1, 1, 1, np.nan
    red, blue, green, grey = (ImageColor.getrgb(colour) for colour in CORRECTNESS.values())
    assert list(CORRECTNESS) == ["hallucination", "omission", "improvement", "no detail"]
    pictures = correctness_pictures(fractions)
    assert pictures.dtype == np.uint8 and pictures.shape == fractions.shape
    for of, colour in ((pictures[0, :4], red), (pictures[0, 4:], blue), (pictures[1, :4], green)):
        assert (of == colour).all() and max(colour) == colour[(red, green, blue).index(colour)]
    assert (pictures[1, 4:] == grey).all()
    half = correctness_pictures(np.full((1, 1, 1, 3), 1 / 3))
    np.testing.assert_array_equal(half[0, 0, 0], np.mean([red, blue, green], axis=0).round())
    plain = comparison_sheet({"truth": tiles[:2], "correctness": pictures})
    sheet = comparison_sheet({"truth": tiles[:2], "correctness": pictures}, legend=CORRECTNESS)
    np.testing.assert_array_equal(np.asarray(sheet)[: plain.height, : plain.width], np.asarray(plain))
    below = np.asarray(sheet)[plain.height :]
    for colour in (red, blue, green, grey):
        assert (below == colour).all(-1).sum() >= 144  # a swatch of 12 x 12 px


def test_convergence_figure_draws_every_method_with_its_numbers_and_interval():
    frame = pd.DataFrame({"step": [200, 100], "kid": [10.0, 100.0], "kid_low": [8.0, 90.0], "kid_high": [12.0, 110.0]})
    figure = convergence_figure(
        {"rsprune": frame, "full": frame * 2, "none": frame[["step"]]}, "kid", references={"real": 3.0}
    )
    axes = figure.axes[0]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}
    assert curves == {"full": [[200, 200], [400, 20]], "rsprune": [[100, 100], [200, 10]]}
    assert len(axes.collections) == 2
    assert axes.get_yscale() == "log"
    assert {3.0} == {line.get_ydata()[0] for line in axes.lines if line.get_label()[0] == "_"}
    panels = convergence_figure({"rsprune": frame.assign(seconds=[7.0, 3.0])}, "kid", x=("step", "seconds")).axes
    assert [panel.get_xlabel() for panel in panels] == ["step", "seconds"]
    assert panels[1].lines[0].get_xydata().tolist() == [[3, 100], [7, 10]]
    with pytest.raises(ValueError, match="nothing"):
        convergence_figure({"rsprune": frame}, "nothing")


def test_histogram_and_bars_draw_the_counts():
    entropy = np.array([0.5, 1.5, 1.6, 3.0, np.nan], dtype=np.float32)
    axes = entropy_histogram(entropy, 1.0, np.array([0, 1, 0, 1, 0], dtype=bool)).axes[0]
    heights = [sum(bar.get_height() for bar in container) for container in axes.containers]
    assert heights == [4, 2]
    left, right = scene_bars({"ocean": 90, "ice": 10}, {"ocean": 5}).axes
    assert [list(bars.datavalues) for bars in left.containers] == [[90, 10], [5, 0]]
    assert [list(bars.datavalues) for bars in right.containers] == [[0.9, 0.1], [1, 0]]
    many = scene_bars({f"s{index}": index + 1 for index in range(100)}, {}, most=10).axes[0]
    assert sum(many.containers[0].datavalues) == 5050
    assert len(many.containers[0]) == 10


CONFUSIONS = {
    "photographs": {"airport": {"airport": 3, "beach": 1}, "beach": {"beach": 4}},
    "rsprune": {"airport": {"beach": 1, "forest": 3}, "beach": {"beach": 2, "forest": 2}},
}


def test_scene_table_shows_the_recognised_fraction_of_each_scene():
    table = scene_table(CONFUSIONS)
    assert table.to_dict("list") == {
        "scene": ["airport", "beach", "all"], "images": [4, 4, 8], "photographs": [0.75, 1.0, 0.875],
        "rsprune": [0.0, 0.5, 0.25],
    }  # fmt: skip
    assert "| all     |        8 |         0.875 |      0.25 |" in to_markdown("scenes", table)


def test_confusion_figure_draws_fractions_of_each_scene():
    panels = confusion_figure(CONFUSIONS).axes
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == ["airport", "beach", "forest"]  # forest was recognised, though not requested
    assert [axes.get_title(loc="left") for axes in panels[:2]] == ["photographs", "rsprune"]
    np.testing.assert_allclose(panels[0].images[0].get_array(), [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(panels[1].images[0].get_array(), [[0, 0.25, 0.75], [0, 0.5, 0.5], [0, 0, 0]])
    many = {"photographs": {f"s{number:03d}": {"s000": 1 + number} for number in range(300)}}
    fractions = confusion_figure(many, most=5).axes[0].images[0].get_array()
    assert fractions.shape == (5, 5) and not fractions.any()  # the five largest scenes, recognised as another one


def test_figures_are_reproducible_and_change_no_global_state():
    import matplotlib.pyplot as plt

    before = dict(plt.rcParams)
    pngs = {figure_bytes(cluster_sizes([5, 3, 1], [1, 1, 0])) for _ in range(2)}
    assert len(pngs) == 1
    assert dict(plt.rcParams) == before
    assert plt.get_fignums() == []


def _write(path, tiles, **options):
    kid = "balanced_kid_x1000_geoembed"
    metrics = {kid: 227.0, f"{kid}_low": 214.0, f"{kid}_high": 240.0}
    base = {"corpus": "c", "ratio": 0.85, "seed": 0, "fingerprint": "f"}
    rows = [
        {**base, "stage": "generation", "prune": "rsprune", "step": 9, "metrics": metrics},
        {**base, "stage": "generation", "prune": "<b>&evil", "step": 9, "metrics": {kid: 300.0}},
        {**base, "stage": "reference", "prune": "real_train", "step": None, "metrics": {kid: 8.0}},
    ]
    sheet = path.with_name("sheet.png")
    sheet.write_bytes(png_bytes(contact_sheet(tiles, 4)))
    write_report(
        path,
        title="A <title>",
        intro="First.\n\nSecond.",
        tables=build_tables(rows),
        figures=[("Curve", "falls", png_bytes(tiles[0]))],
        sheets=[("Sheet", "drawn", sheet)],
        galleries={"rsprune": [Gallery("ocean", tiles[:2], tiles[2:], 2, 1234)]},
        key_figures={"seed": "0"},
        **options,
    )
    return Page(path)


def test_report_is_one_file_with_every_picture_inside(tmp_path, tiles):
    page = _write(tmp_path / "report.html", tiles)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|<script[^>]* src|<link", html)
    assert len(page.images) == 2 + len(tiles)
    assert all(re.match(r"data:image/(png|webp);base64,", image["src"]) for image in page.images)
    assert all(image["alt"] and image["loading"] == "lazy" for image in page.images)
    np.testing.assert_array_equal(page.picture("Curve: falls"), tiles[0])
    np.testing.assert_array_equal(page.picture("Sheet: drawn"), np.asarray(contact_sheet(tiles, 4)))
    assert page.picture("ocean, kept image 2").shape == tiles[0].shape
    assert page.open == []  # every element is closed
    assert {link.removeprefix("#") for link in page.links} <= page.ids
    assert [p.name for p in tmp_path.glob("*.partial")] == []


def test_report_escapes_names_and_shows_intervals_references_and_totals(tmp_path, tiles):
    page = _write(tmp_path / "report.html", tiles)
    shown = {"A <title>", "<b>&evil", "227.0", "[214.0, 240.0]", "reference rows", "real_train"}
    assert shown | {"Dropped, 5 of 1,234"} <= set(page.text)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"<b>227\.0</b>", html)
    assert '<tr class="reference"><td>real_train' in html
    assert "<b>&evil" not in html


def test_report_leaves_out_empty_sections_and_takes_notes(tmp_path, tiles):
    write_report(tmp_path / "empty.html", title="t", intro="i")
    page = Page(tmp_path / "empty.html")
    assert page.links == []
    assert page.images == []
    page = _write(tmp_path / "noted.html", tiles, notes={"generation": "My note.", "sheets": "My lead."})
    assert {"My note.", "My lead."} <= set(page.text)


def _selection(images: int) -> pd.DataFrame:
    index = np.arange(images)
    kept = index % 5 == 0
    reason = np.where(kept, "kept", np.where(index % 5 == 1, "low_entropy", "redundant")).astype(object)
    reason[[1, 2]] = "unreadable"
    entropy = np.linspace(0, 7, images, dtype=np.float32)
    entropy[[1, 2]] = np.nan
    return pd.DataFrame(
        {
            "id": index.astype(str), "kept": kept, "reason": reason, "entropy": entropy,
            "scene": np.where(index < images // 4, "ice", "ocean"), "scene_similarity": np.float32(0.5),
            "cluster": np.where(index % 5 == 1, -1, index % 3).astype(np.int32), "centroid_distance": np.float32(0.1),
        }
    )  # fmt: skip


def _summary(selection: pd.DataFrame) -> dict:
    scenes = {
        name: {"before": len(group), "after": int(group["kept"].sum())} for name, group in selection.groupby("scene")
    }
    return {
        "method": "rsprune", "ratio": 0.8, "images": len(selection), "unreadable": 2,
        "kept": int(selection["kept"].sum()), "seed": 0, "scenes": scenes,
        "true_scenes": scenes, "reasons": {}, "entropy_threshold": 1.25,
        "seconds": {"entropy": 1.04, "embedding": 2.0}, "images_per_second": 1234.5, "versions": {},
    }  # fmt: skip


def test_prune_report_shows_counts_and_images_of_the_right_group(tmp_path):
    selection = _selection(2000)
    images = np.zeros((2000, 16, 16, 3), dtype=np.uint8)
    images[selection["kept"], ..., 1] = 255  # green: kept
    images[~selection["kept"], ..., 0] = 255  # red: dropped
    images[[1, 2]] = 0
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    path = tmp_path / "report.html"
    write_prune_report(path, selection, _summary(selection), mapped, np.random.default_rng(0), per_group=300)

    page = Page(path)
    text = " ".join(page.text)
    assert "rsprune: 400 of 2,000 images kept" in text
    assert "ocean 1500 of" not in text
    for scene, before in (("ocean", 1500), ("ice", 498)):  # without the two unreadable ones
        kept = int((selection["kept"] & (selection["scene"] == scene)).sum())
        assert f"{scene} {kept:,} of {before:,} kept" in text
        assert page.picture(f"{scene}, kept image 1").mean(axis=(0, 1)).argmax() == 1
    dropped = [image for image in page.images if image["alt"].startswith(("ocean, dropped", "ice, dropped"))]
    assert len(dropped) == 600
    reds = {page.picture(image["alt"])[8, 8, 0] > 200 for image in dropped[::25]}
    assert reds == {True}
    for name, count in selection["reason"].value_counts().items():
        assert f"{name} {count:,} {count / 2000:.1%}" in text
    assert "total 3.0" in text
    assert "1.25 bits" in text
    for reason in set(selection.loc[~selection["kept"], "reason"]) - {"unreadable"}:
        assert page.picture(f"{reason}, dropped image 1")[8, 8, 0] > 200


def test_prune_report_maps_the_embeddings(tmp_path):
    selection = _selection(300)
    embeddings = np.random.default_rng(0).standard_normal((300, 12)).astype(np.float16)
    images = np.zeros((300, 8, 8, 3), dtype=np.uint8)
    pictures = []
    for name, given in (("with", embeddings), ("without", None)):
        write_prune_report(
            tmp_path / name, selection, _summary(selection), images, np.random.default_rng(0), embeddings=given
        )
        pictures.append(sum(image["src"].startswith("data:image/png") for image in Page(tmp_path / name).images))
    assert pictures[0] == pictures[1] + 1


def test_prune_report_shows_counts_of_the_entropy_step_and_the_duplicate_guard(tmp_path):
    selection, images = _selection(50), np.zeros((50, 8, 8, 3), dtype=np.uint8)
    counts = {"dropped_by_entropy": 1234, "returned_by_entropy": 0, "skipped_as_duplicate": 56, "clusters": 7}
    summary = {**_summary(selection), "diagnostics": counts}
    write_prune_report(tmp_path / "a", selection, summary, images, np.random.default_rng(0))
    text = " ".join(Page(tmp_path / "a").text)
    assert "dropped by entropy 1,234" in text
    assert "returned by entropy 0" in text and "skipped as duplicate 56" in text


def test_prune_report_shows_locations_weights_and_quarantine_reasons(tmp_path):
    selection = _selection(300)
    locations = pd.DataFrame({"lon": np.linspace(-170, 170, 300), "lat": np.linspace(-80, 80, 300)})
    locations.loc[:9, "lon"] = np.nan
    summary = {**_summary(selection), "quarantined": {"empty file": 2}}
    summary |= {"weights": {"largest": 41.0, "effective_size": 1203.4}, "diagnostics": {"scene_accuracy": 0.875}}
    images = np.zeros((300, 8, 8, 3), dtype=np.uint8)
    write_prune_report(tmp_path / "a", selection, summary, images, np.random.default_rng(0), locations=locations)
    text = " ".join(Page(tmp_path / "a").text)
    assert "Locations of 290 images" in text and "2 empty file" in text
    assert "largest weight 41 effective size by weight 1,203 images" in text and "87.5%" in text
    kept = selection["kept"].to_numpy()
    axes = world_figure(locations["lon"].to_numpy()[10:], locations["lat"].to_numpy()[10:], kept[10:]).axes[0]
    drawn = {points.get_label(): points.get_offsets() for points in axes.collections}
    assert len(drawn["kept"]) == kept[10:].sum() and len(drawn["dropped"]) == (~kept[10:]).sum()
    np.testing.assert_allclose(drawn["kept"], locations.to_numpy()[10:][kept[10:]])


def test_a_map_with_scenes_of_one_image_gives_no_warning_of_a_library():
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(30, 8))
    scenes = np.array(["forest"] * 14 + ["river"] * 15 + ["port"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        places = embedding_map(embeddings, scenes)
    assert places.shape == (30, 2) and np.isfinite(places).all()


@pytest.mark.parametrize("kinds", [1, 2, 5])
def test_the_embedding_map_separates_different_kinds(kinds):
    random = np.random.default_rng(0)
    truth = np.arange(200) % kinds
    embeddings = 4 * random.standard_normal((kinds, 30))[truth] + random.standard_normal((200, 30))
    locations = embedding_map(embeddings, truth.astype(str))
    assert locations.shape == (200, 2) and np.isfinite(locations).all()
    if kinds > 1:
        means = np.stack([locations[truth == kind].mean(axis=0) for kind in range(kinds)])
        nearest = ((locations[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
        assert (nearest == truth).mean() > 0.8


@pytest.mark.parametrize("embeddings", [np.zeros((5, 4)), np.ones((1, 4)), np.zeros((0, 4)), np.eye(3)])
def test_the_embedding_map_of_degenerate_embeddings_is_finite(embeddings):
    scenes = np.array(["a", "b", "c"] * 2, dtype=str)[: len(embeddings)]
    assert np.isfinite(embedding_map(embeddings, scenes)).all()


def test_prune_report_of_the_same_seed_is_the_same_file(tmp_path):
    selection, images = _selection(200), np.random.default_rng(1).integers(0, 255, (200, 8, 8, 3), dtype=np.uint8)
    for name in ("a", "b"):
        write_prune_report(
            tmp_path / name, selection, _summary(selection), images, np.random.default_rng(0), per_group=5
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_prune_report_omits_figures_without_scenes_clusters_and_entropy(tmp_path):
    selection = _selection(50).assign(scene="", cluster=-1, entropy=np.float32("nan"))
    summary = {**_summary(selection), "entropy_threshold": None, "scenes": {}, "true_scenes": {}}
    images = np.zeros((50, 8, 8, 3), dtype=np.uint8)
    write_prune_report(tmp_path / "report.html", selection, summary, images, np.random.default_rng(0))
    page = Page(tmp_path / "report.html")
    assert "all images" in page.text
    assert not [image for image in page.images if image["src"].startswith("data:image/png")]


def test_the_results_document_is_updated_and_keeps_sections_without_new_rows(tmp_path: Path) -> None:
    """Long runs are made on different days: a table that is not computed again is kept."""
    target, results = tmp_path / "results.md", tmp_path / "results"
    target.write_text("# Results\n\nold note\n\n## A made long tail\n\nold tail\n\n## Of a user\n\ntheir own\n")
    row = {
        "stage": "subset", "corpus": "x", "prune": "random", "ratio": 0.5, "seed": 0, "step": 0,
        "metrics": {"balanced_kid_x1000_efficientnet_lite2": 12.345}, "fingerprint": "f", "commit": "c",
    }  # fmt: skip
    (results / "local" / "quality").mkdir(parents=True)
    (results / "local" / "quality" / "results.jsonl").write_text(json.dumps(row) + "\n")
    published = publish(results, "local")
    assert [path.name for path in published.iterdir()] == ["quality.jsonl"]
    write_results(published, target)
    text = target.read_text()
    locations = [text.index(part) for part in ("## Every method", "12.3", "old tail", "their own")]
    assert locations == sorted(locations) and "old note" not in text and text.count("## A made long tail") == 1
    write_results(published, target)
    assert target.read_text() == text
    metadata = {
        "methods": [{"method": "random", "scenes": 7, "seconds": 1.0}],
        "images": 9,
        "corpus": "x",
        "noise": 0.1,
    }
    (results / "long_tail").mkdir()
    (results / "long_tail" / "long_tail.json").write_text(json.dumps({**metadata, "ratio": 0.5}))
    write_results(publish(results, "local"), target)
    assert (
        "old tail" not in target.read_text() and "9 tiles of x" in target.read_text() and "12.3" in target.read_text()
    )
