"""The page about image-text pairs: correct scores and thresholds, the right pairs first, captions are escaped."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from corpus.index import Corpus
from prune.selection import write_selection
from report.figures import ACCENT, SCORE_BINS, pair_histogram, score_edges
from report.pairs_report import (
    LONGEST_CAPTION,
    MOST_PANELS,
    MOST_SCENES,
    PAIRS_LINK,
    PAIRS_PAGE,
    PER_GROUP,
    PairTable,
    cut_of,
    cuts_by_scene,
    shortened,
    write_pairs_report,
)
from runtime.artefacts import write_json

EVIL = '<script>alert("1")</script> & <b>bold</b> ' + "plane " * 1700
CUTS = {"port": -0.5, "<i>ice": 0.75, "forest": 0.0}
SIZES = {"port": 30, "<i>ice": 20, "forest": 10}


class Images:
    """A memory map that records which rows are read; each row has its own colour."""

    shape = (10_000, 200, 200, 3)

    def __init__(self) -> None:
        self.read: list[int] = []

    def __getitem__(self, row: int) -> np.ndarray:
        self.read.append(row)
        return np.full((200, 200, 3), colour_of(row), np.uint8)


def colour_of(row: int) -> tuple[int, int, int]:
    return 40 * (row % 6), 40 * (row // 6 % 6), 40 * (row // 36 % 6)


def candidates(seed: int = 0) -> pd.DataFrame:
    """Images 0.. of the scenes; two captions each, one of them chosen by the loops; every fifth image was repaired."""
    random = np.random.default_rng(seed)
    rows, image = [], 0
    for scene, size in SIZES.items():
        for number in range(size):
            levels = random.permutation([random.uniform(0.1, 3), random.uniform(-3, -0.1)])
            if number % 5 == 0:
                levels = -np.abs(levels)
            written = [("given", 0, level) for level in levels]
            if number % 5 == 0:
                written.append(("offline", 1, random.uniform(0.1, 3)))
            for source, made_in, level in written:
                rows.append((image, scene, f"{source} {image} {len(rows)}", source, made_in, CUTS[scene] + level))
            image += 1
    table = pd.DataFrame(rows, columns=["image", "scene", "caption", "source", "round", "evidence"])
    table["fit"] = random.permutation(len(table)) / 10
    offset = table["evidence"] - table["scene"].map(CUTS)
    table["mismatch"] = 1 / (1 + np.exp(2 * offset))
    good = table["mismatch"] <= 0.5
    table["chosen"] = good & ~table["image"].where(good, -1).duplicated()
    return table.astype({name: np.float32 for name in ("evidence", "fit", "mismatch")})


def write_captions(directory: Path, table: pd.DataFrame, **summary) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    table.assign(id=table["image"].astype(str), cosine_fitted=np.float32(0)).to_parquet(directory / "captions.parquet")
    random = np.random.default_rng(1)
    for name, middle in (("other", -1.0), ("same", 1.0)):
        np.save(directory / f"shuffled_{name}.npy", np.sort(random.normal(middle, 0.3, 500)).astype(np.float32))
    metadata = {
        "most_mismatch": 0.5, "mismatched_fraction": 0.123, "sources": {"given": 120, "offline": 12},
        "refused": {"empty caption": 3, "caption without words": 1234}, "scorers": ["fitted", "remoteclip"],
        "captioner": "offline", "scenes": {name: {"mismatched_fraction": 0.25} for name in set(table["scene"])},
    }  # fmt: skip
    write_json(directory / "summary.json", {**metadata, **summary})
    return directory


def shown(html: str) -> list[tuple[str, list[tuple[str, str, str]], tuple[int, ...]]]:
    """For every card its group's name, its captions (tag, text, note) and the colour of its image."""
    cards = re.findall(
        r'<figure class="(?:kept|dropped)"><img src="([^"]+)" alt="([^"]+) pair \d+"(.*?)</figure>', html, re.S
    )
    result = []
    for source, alt, body in cards:
        lines = re.findall(r'<(del|span class="text") dir="auto">(.*?)</(?:del|span)><small>(.*?)</small>', body, re.S)
        picture = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")
        assert max(picture.size) <= 128
        result.append((alt, [(tag[:3], text, note) for tag, text, note in lines], picture.getpixel((64, 64))))
    return result


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[str, pd.DataFrame, Images]:
    directory = tmp_path_factory.mktemp("pairs")
    table, images = candidates(), Images()
    write_pairs_report(
        directory / PAIRS_PAGE, write_captions(directory / "captions", table), np.arange(0, 60, 2), images, "dldc"
    )
    return (directory / PAIRS_PAGE).read_text(encoding="utf-8"), table, images


def test_the_best_and_worst_pairs_are_shown_with_their_images(page):
    html, table, _ = page
    cards = shown(html)
    for scene in SIZES:
        rows = table[table["scene"] == scene].to_dict("records")
        best = sorted((row for row in rows if row["chosen"]), key=lambda row: -row["fit"])[:PER_GROUP]
        worst: dict[int, dict] = {}
        for row in sorted((row for row in rows if row["round"] == 0), key=lambda row: row["evidence"]):
            worst.setdefault(row["image"], row)
        chosen = {row["image"]: row for row in rows if row["chosen"]}
        name = scene.replace("<", "&lt;").replace(">", "&gt;")
        result = [card for card in cards if card[0] == f"{name}, best"]
        assert [lines[-1][1] for _, lines, _ in result] == [row["caption"] for row in best]
        for (_, lines, colour), row in zip(result, best, strict=True):
            old = [("del", worst[row["image"]]["caption"])] if row["round"] else []
            assert [line[:2] for line in lines] == [*old, ("spa", row["caption"])]
            assert np.abs(np.subtract(colour, colour_of(row["image"]))).max() <= 6
        result = [card for card in cards if card[0] == f"{name}, worst"]
        for (_, lines, colour), (image, row) in zip(result, list(worst.items())[:PER_GROUP], strict=True):
            assert [line[:2] for line in lines] == [("del", row["caption"]), ("spa", chosen[image]["caption"])]
            assert lines[0][2].startswith(f"given, mismatch {row['mismatch']:.0%}, fit\u00a0")
            assert np.abs(np.subtract(colour, colour_of(image))).max() <= 6
    states = re.findall(r'<span class="state">(\w+)</span>', html)
    assert len(states) == len(cards) and set(states) == {"kept", "dropped"}
    repaired = [lines for alt, lines, _ in cards if lines[-1][2].startswith("offline")]
    assert repaired and all(lines[0][0] == "del" for lines in repaired)


def test_kept_and_dropped_images_are_labelled(page):
    html, _, _ = page
    figures = re.findall(
        r'<figure class="(kept|dropped)">.*?class="state">(\w+)<.*?"auto">(?:given|offline) (\d+) ', html, re.S
    )
    assert len(figures) == 2 * PER_GROUP * len(SIZES)
    assert all(one == two == ("dropped" if int(image) % 2 else "kept") for one, two, image in figures)


def test_counts_agree_with_the_table(page):
    html, table, _ = page
    rows, metadata = table.to_dict("records"), dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    good = [row["image"] for row in rows if row["mismatch"] <= 0.5]
    repaired = Counter(row["scene"] for row in rows if row["chosen"] and row["source"] == "offline")
    thrown = Counter(row["scene"] for row in rows if row["round"] == 0 and row["mismatch"] > 0.5)
    assert set(good) == set(range(60))  # so every bad caption is removed
    assert metadata["candidates"] == "132: 120 given, 12 offline" and metadata["images"] == "60"
    assert metadata["images repaired"] == "12" == str(sum(repaired.values()))
    assert metadata["given captions thrown out"] == str(sum(thrown.values()))
    assert metadata["refused captions"] == "3 empty caption, 1,234 caption without words"
    assert metadata["mismatched fraction"] == "12.3%" and metadata["images kept"] == "30"
    assert metadata["scorers"] == "fitted, remoteclip" and metadata["images without a good caption"] == "0"
    body = html[html.index('id="table-scenes"') :]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", body, re.S)]
    assert [row for row in cells if row] == [
        [name.replace("<", "&lt;").replace(">", "&gt;"), str(size), str(2 * size), "25.0%", str(thrown[name]),
         str(repaired[name]), "0", str(size // 2)]
        for name, size in SIZES.items()
    ]  # fmt: skip


def test_the_cut_of_every_scene_separates_pairs_by_mismatch_probability():
    table = candidates()
    result = cuts_by_scene(PairTable.of(table, np.arange(3), 0.5))
    for scene, cut in result.items():
        evidence = table.loc[table["scene"] == scene, "evidence"]
        assert evidence[evidence < CUTS[scene]].max() < cut < evidence[evidence > CUTS[scene]].min()
    assert set(result) == set(CUTS)
    stricter = cuts_by_scene(PairTable.of(table, np.arange(3), 0.2))
    assert all(stricter[scene] > result[scene] for scene in result)
    assert cut_of(np.array([1.0, 2.0]), np.array([False, False])) is None
    assert cut_of(np.array([1.0, 2.0]), np.array([True, True])) is None
    assert cut_of(np.array([3.0, 1.0, 2.0]), np.array([False, True, True])) == 2.5


@pytest.mark.parametrize("small", [False, True])
def test_the_histogram_contains_every_pair_and_draws_the_cut(small):
    random = np.random.default_rng(0)
    given, shuffled = random.normal(2, 1, 4000), random.normal(-1, 0.5, 1000)
    given[0] = 1e6  # an outlier is counted, and does not stretch the axis
    edges = score_edges(given, shuffled)
    axes = pair_histogram(given, shuffled, edges, [0.5, -0.25, 0.0], small=small).axes[0]
    grey, blue, band = (axes.patches[index] for index in range(3))
    for stairs, values in ((grey, shuffled), (blue, given)):
        fractions = stairs.get_data().values
        assert len(fractions) == SCORE_BINS and fractions.sum() == pytest.approx(1)
        inside = [np.mean((values >= low) & (values < high)) for low, high in pairwise(edges)]
        np.testing.assert_allclose(fractions[1:-1], inside[1:-1], atol=1e-12)
    assert axes.get_xlim()[1] < 10
    assert (band.get_x(), band.get_width()) == (-0.25, 0.75)
    [line] = axes.lines
    assert line.get_xdata() == [0.0, 0.0] and line.get_color() == ACCENT
    assert not pair_histogram(given, shuffled, edges, small=small).axes[0].lines
    [line] = pair_histogram(given, np.empty(0), score_edges(), [0.1], small=small).axes[0].lines
    assert line.get_xdata() == [0.1, 0.1]


def test_the_page_has_histograms_of_all_scenes_together_and_of_each_scene(page):
    html, table, _ = page
    panels = re.findall(r'<div class="panels">(.*?)</div>', html, re.S)[0]
    result = re.findall(r"<h3>(.*?)</h3>.*?<figcaption>25.0% mismatched, cut\u00a0(.*?)</figcaption>", panels)
    assert [name for name, _ in result] == ["port", "&lt;i&gt;ice", "forest"]
    cuts = cuts_by_scene(PairTable.of(table, np.arange(3), 0.5))
    assert [float(cut.replace("\N{MINUS SIGN}", "-")) for _, cut in result] == pytest.approx(
        [cuts[name] for name in SIZES], abs=0.006
    )
    assert html.count("data:image/png;base64,") == 2 + len(SIZES)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|<script[^>]* src|<link", html)


def test_captions_are_escaped_and_shortened(tmp_path):
    table = candidates()
    table["caption"] = np.where(table.index % 2, EVIL, "x" * 10_000)
    write_pairs_report(
        tmp_path / "a.html", write_captions(tmp_path / "c", table), np.arange(60), Images(), "<u>method</u>"
    )
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<b>bold" not in html and "alert(&#34;1" in html and "<i>ice" not in html and "<u>method" not in html
    texts = [text for _, lines, _ in shown(html) for _, text, _ in lines]
    assert texts and all(text.endswith("…") for text in texts)
    assert len(html) < 1_000_000
    assert len(shortened("y" * 5000)) == LONGEST_CAPTION and shortened("a  b\n c") == "a b c"
    assert shortened("z" * LONGEST_CAPTION) == "z" * LONGEST_CAPTION


def test_the_number_of_images_read_for_the_page_is_bounded(tmp_path, page):
    _, _, few = page
    assert len(few.read) <= 2 * PER_GROUP * len(SIZES) and few.read == sorted(set(few.read))
    base, parts = candidates(), []
    for number in range(MOST_SCENES + 5):
        scene = base[base["scene"] == "port"]
        parts.append(scene.assign(image=scene["image"] + 30 * number, scene=f"s{number:02d}"))
    images, many = Images(), pd.concat(parts, ignore_index=True)
    captions = write_captions(tmp_path / "c", many)
    write_pairs_report(tmp_path / "a.html", captions, np.arange(9), images, "dldc")
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert 0 < len(images.read) <= 2 * PER_GROUP * MOST_SCENES and max(images.read) < 30 * MOST_SCENES
    assert html.count("data:image/png;base64,") == 2 + MOST_PANELS
    assert "The 5 smallest scenes are not shown." in html and f"The {MOST_SCENES + 5 - MOST_PANELS} smallest" in html
    assert len(re.findall(r"<tr><td", html)) == MOST_SCENES + 5


def test_the_page_of_a_corpus_without_captions_counts_described_images(tmp_path):
    table = candidates()
    table["round"] += 1
    table["source"] = "offline"
    late = table["image"].isin([3, 4])  # described only in the second round, because the first one failed
    table.loc[late, "round"] = 2
    write_pairs_report(tmp_path / "a.html", write_captions(tmp_path / "c", table), np.arange(70), Images(), "dldc")
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    metadata = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert metadata["images repaired"] == "12" and metadata["images described that had no caption"] == "2"
    assert metadata["images kept"] == "70, 10 without a caption"


def test_the_page_handles_no_mismatches_only_mismatches_and_no_pairs(tmp_path):
    table = candidates()
    right = table[table["chosen"] & (table["round"] == 0)].assign(mismatch=np.float32(0))
    wrong = table[table["round"] == 0].drop_duplicates("image").assign(mismatch=np.float32(1), chosen=True)
    for name, rows in (("right", right), ("wrong", wrong), ("none", table[:0])):
        captions = write_captions(tmp_path / name, rows)
        if name == "none":
            for path in captions.glob("*.npy"):
                np.save(path, np.empty(0, np.float32))
        write_pairs_report(tmp_path / f"{name}.html", captions, np.arange(20), Images(), "dldc")
    pages = {name: (tmp_path / f"{name}.html").read_text(encoding="utf-8") for name in ("right", "wrong", "none")}
    assert "mismatched, cut" not in pages["right"] and "no cut" in pages["right"] and "<del" not in pages["right"]
    groups = {name: Counter(alt.split(", ")[1] for alt, _, _ in shown(html)) for name, html in pages.items()}
    assert groups["right"]["best"] == groups["right"]["worst"] > 0
    assert groups["wrong"]["best"] == 0 < groups["wrong"]["worst"] and "no better caption" in pages["wrong"]
    assert "<del" not in pages["wrong"]  # an image's only caption is not removed
    assert not groups["none"] and 'id="table-scenes"' not in pages["none"]


@pytest.mark.parametrize("there", [True, False])
def test_the_report_links_to_the_pairs_page_if_it_exists(tmp_path, page, there):
    table = pd.DataFrame(
        {"id": ["a", "b"], "kept": [True, False], "reason": ["kept", "redundant"], "entropy": np.float32([1, 2]),
         "scene": ["x", "x"], "scene_similarity": np.float32(0), "cluster": np.int32(-1),
         "centroid_distance": np.float32(0), "weight": 1.0}
    )  # fmt: skip
    manifest = table[["id"]].assign(scene="x", caption="", readable=True, reason="")
    summary = {"method": "dldc", "ratio": 0.5, "images": 2, "unreadable": 0, "kept": 1, "seed": 0, "scenes": {}}
    corpus = Corpus("c", tmp_path, np.zeros((2, 8, 8, 3), np.uint8), manifest, None, ())
    if there:
        (tmp_path / PAIRS_PAGE).write_text(page[0], encoding="utf-8")
    write_selection(tmp_path, table, summary, corpus, np.eye(2, 4, dtype=np.float32))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (f'<a href="{PAIRS_PAGE}">{PAIRS_LINK}</a>' in html) is there
    assert '<a href="report.html">' in page[0]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
