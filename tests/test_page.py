"""The interactive parts of the page: charts have the numbers of their curves, tables the data for sorting."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from report.curves import averaged, chart
from report.figures import convergence_figure
from report.page import Picture, SampleGrid, png_bytes, write_report
from report.sheets import HELD_OUT, sample_grids
from report.tables import build_tables
from report.verdict_view import verdict_view

KID = "balanced_kid_x1000_geoembed"
EVIL = '</script><b>&"evil'


def frame(scale: float = 1.0) -> pd.DataFrame:
    columns = {"step": [10, 20], "images_seen": [320, 640], "seconds": [1.5, 3.0], KID: [400.0 * scale, 90.0 * scale]}
    return pd.DataFrame(columns)


def rows() -> list[dict]:
    values = {
        "full": [(0, 300.04), (1, 310.0)],
        "rsprune": [(0, 227.0), (1, 231.0)],
        "random": [(0, 300.01), (1, 260.0)],
    }
    result = [
        {"stage": "generation", "corpus": "c", "prune": name, "ratio": 0 if name == "full" else 0.85, "seed": seed,
         "step": 9, "fingerprint": "f", "metrics": {KID: value}}
        for name, seeds in values.items() for seed, value in seeds
    ]  # fmt: skip
    real = {"stage": "reference", "corpus": "c", "prune": "real_train", "ratio": None, "seed": 0, "step": 0}
    return [*result, {**real, "metrics": {KID: 8.0}}]


def write(path: Path) -> str:
    tile = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    curves = {"rsprune": averaged([frame(), frame(0.5)]), EVIL: averaged([frame(2), frame(3)])}
    tiles = {"full": np.stack([tile] * 2), EVIL: np.stack([255 - tile] * 2)}
    write_report(
        path,
        title="t",
        intro="i",
        verdict=verdict_view(rows()),
        tables=build_tables(rows()),
        figures=[
            Picture("Curve", "falls", png_bytes(tile), chart(curves, KID, references={"real_train": 8.0}, seeds=2))
        ],
        grids=[SampleGrid("Side by side", "alike", tiles, ["a coast", "<i>ice"])],
    )
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("page") / "report.html")


def test_curves_of_several_seeds_are_averaged_with_minimum_and_maximum():
    curve = averaged([frame(1.0), frame(0.5), frame(0.9)])
    assert curve[KID].tolist() == pytest.approx([320, 72])
    assert curve[f"{KID}_low"].tolist() == [200, 45] and curve[f"{KID}_high"].tolist() == [400, 90]
    alone = frame()
    assert averaged([alone]) is alone


def test_a_chart_contains_every_value_of_its_curves_and_null_for_missing_ones():
    missing = frame().assign(**{f"{KID}_low": [390.0, np.nan], f"{KID}_high": [410.0, np.nan]}).iloc[::-1]
    data = chart({"random": frame(2), "rsprune": missing, "none": frame()[["step"]]}, KID, references={"real": 3.0})
    series = {line["name"]: line["points"] for line in data["series"]}
    assert list(series) == ["random", "rsprune"]
    assert series["rsprune"] == [
        {"step": 10, "images_seen": 320, "seconds": 1.5, "value": 400, "low": 390, "high": 410},
        {"step": 20, "images_seen": 640, "seconds": 3.0, "value": 90, "low": None, "high": None},
    ]
    assert [point["value"] for point in series["random"]] == [800, 180]
    assert [axis["key"] for axis in data["axes"]] == ["step", "images_seen", "seconds"]
    assert data["references"] == [{"name": "real", "value": 3.0}] and data["log"]
    assert "one seed" in data["band"] and "lowest" in chart({"a": missing}, KID, references={}, seeds=3)["band"]
    json.dumps(data, allow_nan=False)
    axes = chart({"a": frame().assign(flops=1e12)}, KID, references={})["axes"]
    assert axes[-1] == {"key": "flops", "label": "FLOPs"}


def test_an_interactive_chart_has_the_colours_of_the_static_figure():
    curves = {name: frame() for name in ("zebra", "random", "herding")}
    drawn = {line.get_label(): line.get_color() for line in convergence_figure(curves, KID).axes[0].lines}
    assert {line["name"]: line["colour"] for line in chart(curves, KID, references={})["series"]} == drawn


def test_the_page_embeds_escaped_chart_data_beside_the_static_figure(html):
    [text] = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    data = json.loads(text)
    points = {line["name"]: [point["value"] for point in line["points"]] for line in data["series"]}
    assert points == {"rsprune": [300, 67.5], EVIL: [1000, 225]}
    assert "<b>&" not in html and "<i>ice" not in html
    assert re.search(r'<img src="[^"]+" alt="Curve: falls" loading="lazy">', html)  # shown until a script hides it
    assert "<svg hidden>" in html


def test_headings_and_cells_contain_the_attributes_for_sorting(html):
    table = html[html.index('id="table-generation"') :]
    assert re.search(r"<table data-sortable>", table)
    headings = re.findall(r'<th scope="col" aria-sort="none" data-sort="(\w+)"', table[: table.index("</thead>")])
    assert headings[:2] == ["text", "number"]
    measured, references = re.findall(r"<tbody>(.*?)</tbody>", table, re.DOTALL)[:2]
    values = [float(value) for value in re.findall(r'data-value="([^"]+)"', measured)]
    assert {305.02, 229.0, 280.005} <= {round(value, 6) for value in values}  # means, not rounded as shown
    assert "real_train" in references and "real_train" not in measured


def test_single_row_tables_are_not_sortable_and_formatted_numbers_are_parsed(tmp_path):
    single = build_tables([row for row in rows() if row["prune"] != "random"][2:])
    plain = pd.DataFrame({"fraction": ["12.5%", "9%"], "count": [1234, 5], "version": ["1.2.3", "1,234"]})
    write_report(tmp_path / "a.html", title="t", intro="i", tables={**single, "plain": plain})
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.count("<table data-sortable>") == 1
    cells = re.findall(
        r"<td(?: data-value=\"([^\"]+)\")?(?: class=\"number\")?>", text[text.index('id="table-plain"') :]
    )
    assert cells == ["12.5", "1234.0", "", "9.0", "5.0", "1234.0"]


def test_the_verdict_precedes_the_figures_and_shows_paired_differences(html):
    assert html.index('id="verdict"') < html.index('id="figures"') < html.index('id="table-generation"')
    assert "The rows" in html and "2 seeds: the mean paired difference" in html
    body = html[html.index('class="comparisons"') :]
    cells = re.findall(r"<tr>(.*?)</tr>", body[body.index("<tbody>") : body.index("</tbody>")])
    shown = [[re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td data.*?</td>", row)] for row in cells]
    # differences to full -73.04 and -79, to random -73.01 and -29: t of one degree of freedom is 12.7062
    assert shown[0] == ["full", "balanced", "better", "-76.0", "[-113.9, -38.2]", "2 seeds"]
    assert shown[1] == ["random", "balanced", "tie", "-51.0", "[-330.6, +228.6]", "2 seeds"]
    natural = [{**row, "weighting": "natural"} for row in rows() if row["prune"] == "rsprune"]
    titles = [group["title"] for group in verdict_view([*rows(), *natural])["groups"]]
    assert ["natural weights" in title for title in titles] == [False, True]
    assert verdict_view([row for row in rows() if row["prune"] != "rsprune"]) is None


def test_the_page_of_the_same_rows_is_bit_identical(html, tmp_path):
    assert write(tmp_path / "again.html") == html


def test_sample_grids_show_the_images_of_every_method_for_each_seed(tmp_path):
    measured = {}
    for number, name in enumerate(("rsprune", "full")):
        measured[name] = []
        for seed in (0, 1):
            drawn, place = tmp_path / "generated" / f"{name}{seed}", tmp_path / "measured" / f"{name}{seed}"
            for folder in (drawn, place):
                folder.mkdir(parents=True)
            np.save(drawn / "images.npy", np.full((20, 4, 4, 3), 10 * number + seed, dtype=np.uint8))
            captions = [f"prompt {index}" for index in range(20)]
            (drawn / "stage.json").write_text(json.dumps({"inputs": {"captions": captions}}))
            inputs = {"images": f"generated/{name}{seed}", "held_out": {"corpus": "gone", "rows": list(range(20))}}
            (place / "stage.json").write_text(json.dumps({"inputs": inputs}))
            measured[name].append(place)
    (tmp_path / "generated" / "full1" / "images.npy").unlink()
    first, second = sample_grids(measured, [3, 7])
    assert first.title.endswith("seed 3") and list(first.columns) == ["full", "rsprune"]
    assert first.prompts == [f"prompt {index}" for index in range(8)]
    assert {name: set(images.ravel()) for name, images in first.columns.items()} == {"full": {10}, "rsprune": {0}}
    assert list(second.columns) == ["rsprune"] and set(second.columns["rsprune"].ravel()) == {1}
    assert HELD_OUT not in first.columns  # its corpus is gone


PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const table = document.querySelector("#table-generation table"), found = { errors: window.failed };
  const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
  const heading = [...table.tHead.rows[0].cells].find((cell) => cell.textContent.includes("KID"));
  found.orders = [[heading.ariaSort, ...names()]];
  for (let click = 0; click < 3; click += 1) {
    heading.querySelector("button").click();
    found.orders.push([heading.getAttribute("aria-sort"), ...names()]);
  }
  const chart = document.querySelector(".chart"), lines = () => chart.querySelectorAll("polyline").length;
  found.lines = [lines()];
  chart.querySelector(".legend button").click();
  found.lines.push(lines());
  const point = chart.querySelector("circle").getBoundingClientRect();
  const at = { clientX: point.x + 4, clientY: point.y + 4 };
  chart.querySelector("svg").dispatchEvent(new PointerEvent("pointermove", at));
  const tip = chart.querySelector(".tip"), box = tip.getBoundingClientRect();
  found.tip = tip.textContent;
  found.away = [box.left - point.left, box.top - point.bottom, point.top - box.bottom];
  found.picture = getComputedStyle(chart.querySelector("img")).display;
  found.room = innerWidth - document.documentElement.scrollWidth;
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
}, 200));</script>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_sorts_toggles_and_shows_tooltips_in_a_browser(html, tmp_path):
    early = "<script>window.failed = []; addEventListener('error', (event) => failed.push(event.message));</script>"
    page = html.replace("<head>", "<head>" + early, 1).replace("</body>", PROBE + "</body>")
    (tmp_path / "probe.html").write_text(page, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command += ["--window-size=1400,1000", f"file://{tmp_path / 'probe.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(re.search(r"FOUND(\{.*?\})END", unescape(done.stdout), re.DOTALL)[1])
    assert result["errors"] == [] and result["room"] >= 0 and result["picture"] == "none"
    assert [order[1:] for order in result["orders"]] == [
        ["full", "random", "rsprune"], ["rsprune", "random", "full"], ["full", "random", "rsprune"],
        ["full", "random", "rsprune"],
    ]  # fmt: skip
    assert [order[0] for order in result["orders"]] == ["none", "ascending", "descending", "none"]
    assert result["lines"] == [2, 1]
    assert 0 < result["away"][0] < 30 and max(result["away"][1:]) < 0  # next to the point, at its height
    assert result["tip"].splitlines()[1:] == ["1,000 [800, 1,200]", "step 10", "images seen 320", "seconds 1.5"]
