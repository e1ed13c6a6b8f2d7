"""README's table and sentence compared with the published rows, and the toy example of docs/method.md."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from report.documents import fill_readme, overview_sentence, overview_table
from report.figures import overview, toy_figure
from report.results import read_results
from scripts.toy_example import COUNTS, RATIO, lifted, toy_example, two_rings

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"


def rows(**values: tuple[float, float]) -> list[dict]:
    """Generation rows of two seeds, from (balanced, natural) by method."""
    return [
        {
            "stage": "generation", "corpus": "c", "prune": method, "ratio": 0.0 if method == "full" else 0.85,
            "seed": seed, "step": 10,
            "metrics": {
                "balanced_kid_x1000_efficientnet_lite2": pair[0] + seed,
                "natural_kid_x1000_efficientnet_lite2": pair[1] - seed,
            },
        }
        for method, pair in values.items()
        for seed in (0, 1)
    ]  # fmt: skip


def test_the_table_has_four_columns_and_the_means_of_its_seeds() -> None:
    table = overview_table(rows(full=(10, 5), random=(12, 6), rsprune=(8, 9)))
    assert list(table.columns) == ["method", "balanced ↓", "natural ↓", "seeds"]
    assert table["method"].tolist() == ["`full`: all images", "`random`, 15% kept", "`rsprune`, 15% kept"]
    assert table["balanced ↓"].tolist() == ["10.5 ± 0.7", "12.5 ± 0.7", "8.5 ± 0.7"]
    assert set(table["seeds"]) == {"2"}
    [line] = overview_table([row for row in rows(rsprune=(8, 9)) if row["seed"] == 0]).to_dict("records")
    assert line == {"method": "`rsprune`, 15% kept", "balanced ↓": "8.0", "natural ↓": "9.0", "seeds": "1"}


@pytest.mark.parametrize(("mine", "words"), [((8, 9), ("better", "worse")), ((20, 1), ("worse", "better"))])
def test_the_words_of_the_sentence_follow_from_the_numbers(mine: tuple[float, float], words: tuple[str, str]) -> None:
    text = overview_sentence(rows(random=(12, 6), rsprune=mine))
    assert f"{words[0]} on the balanced set ({mine[0] + 0.5:.1f} against 12.5)" in text
    assert f"{words[1]} on the natural set ({mine[1] - 0.5:.1f} against 5.5)" in text


def test_readme_has_the_table_of_the_published_rows(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(
        re.sub(r"(<!-- results -->).*(<!-- /results -->)", r"\1 old \2", text, flags=re.S), encoding="utf-8"
    )
    fill_readme(PUBLISHED, copy)
    assert copy.read_text(encoding="utf-8") == text
    result = read_results(PUBLISHED / "chain.jsonl")
    mine = [
        row for row in result if row["stage"] == "generation" and row["prune"] == "rsprune" and "weighting" not in row
    ]
    value = np.mean([row["metrics"]["balanced_kid_x1000_efficientnet_lite2"] for row in mine])
    assert f"| {value:.1f} ± " in re.sub(" +", " ", text)


def test_no_table_of_readme_is_wider_than_four_columns_or_a_laptop() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert tables and max(line.count("|") for line in tables) <= 5
    assert max(len(line) for line in tables) <= 120


def test_every_link_of_readme_and_docs_has_a_target() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_toy_example_keeps_rare_points_and_thins_frequent_ones() -> None:
    example = toy_example()
    random, pruned = (
        {name: int((example.kept[method] & (example.classes == name)).sum()) for name in COUNTS}
        for method in ("random", "rsprune")
    )
    budget = len(example.points) - round(RATIO * len(example.points))
    assert sum(random.values()) == sum(pruned.values()) == budget
    assert pruned["outliers"] == COUNTS["outliers"]  # a scene of its own, below its share of the budget
    assert abs(pruned["outer ring"] - pruned["inner ring"]) <= 2 and random["outer ring"] > 8 * random["inner ring"]
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for method, counts in (("random", random), ("rsprune", pruned)):
        assert f"| `{method}` | " + " | ".join(str(counts[name]) for name in COUNTS) + " |" in text
    assert all((example.kept[name] == toy_example().kept[name]).all() for name in example.kept)
    # spread along the ring: the largest gap between neighbours is smaller than at random
    gaps = []
    for method in ("random", "rsprune"):
        points = example.points[example.kept[method] & (example.classes == "inner ring")]
        angles = np.sort(np.arctan2(points[:, 1], points[:, 0]))
        gaps.append(np.diff(angles, append=angles[0] + 2 * np.pi).max())
    assert gaps[1] < gaps[0]


def test_distances_in_the_plane_are_cosines_of_the_lifted_points() -> None:
    points, _ = two_rings(np.random.default_rng(1))
    features = lifted(points).astype(np.float64)
    cosine = (features[0] @ features.T) / np.linalg.norm(features[0]) / np.linalg.norm(features, axis=1)
    distance = np.linalg.norm(points - points[0], axis=1)
    assert cosine[distance < 0.1].min() > 0.95 and np.abs(cosine[distance > 3]).mean() < 0.15


def test_the_figures_show_the_given_points_and_tiles() -> None:
    example = toy_example()
    figure = toy_figure(example.points, example.classes, example.kept)
    texts = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    assert f"outliers: {COUNTS['outliers']}" in texts and len(figure.axes) == 3
    tiles = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (40, 200)] * 8)
    picture = overview(np.linspace(-90, 90, 50), np.linspace(-60, 60, 50), np.arange(50) < 10, tiles[::2], tiles[1::2])
    pixels = np.asarray(picture)
    assert isinstance(picture, Image.Image) and picture.width > 1000
    left, right = np.split(pixels[-70:-10], [picture.width // 2], axis=1)
    assert (left == 40).any() and not (left == 200).all(-1).any() and (right == 200).any()
