"""Tables: numbers recomputed from the rows, marks, references, escapes, and the results file."""

from __future__ import annotations

import csv
import json
import multiprocessing
import re

import pytest

from report.results import append_result, read_results
from report.tables import build_tables, latex_escape, seeds_line, to_markdown, to_text, write_tables
from runtime.errors import UserError


def row(stage: str, prune: str, metrics: dict, *, step: int | None = 100, seed: int = 0, **fields) -> dict:
    return {
        "stage": stage, "corpus": "bluemarble", "prune": prune, "ratio": None if stage == "reference" else 0.85,
        "seed": seed, "step": step, "metrics": metrics, "fingerprint": "f" + prune, "commit": "c", "machine": "m",
        **fields,
    }  # fmt: skip


KID = "balanced_kid_x1000_geoembed"


def kid(value: float, **others: float) -> dict[str, float]:
    return {KID: value, f"{KID}_low": value - 13.4, f"{KID}_high": value + 12.6, **others}


GENERATION = [
    row("generation", "scratch", kid(500.4, balanced_precision_geoembed=0.1)),
    row("generation", "zebra", kid(300.25, balanced_precision_geoembed=0.31249)),
    row("generation", "rsprune", kid(227.4, balanced_precision_geoembed=0.5, balanced_fd_geoembed=140.06, seconds=9.0)),
    row("generation", "full", kid(330.1, balanced_precision_geoembed=0.6, balanced_fd_geoembed=150.0)),
    row("generation", "random", kid(310.9, balanced_precision_geoembed=0.5996)),
]
REFERENCES = [
    row("reference", "pca", kid(46.2, balanced_psnr=30.2), step=None),
    row("reference", "real_train", kid(8.46, balanced_psnr=None), step=None),
]


def lines_of(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


def test_methods_are_ordered_and_references_come_last():
    table = build_tables([*REFERENCES, *GENERATION])["generation"]
    assert table["prune"].tolist() == ["full", "random", "rsprune", "zebra", "scratch", "real_train", "pca"]
    assert table["kind"].tolist() == ["measured"] * 5 + ["reference"] * 2


def test_paired_differences_have_a_sign_and_are_not_marked_as_best():
    key = f"{KID}_minus_random"
    paired = {key: -20.4, f"{key}_low": -33.6, f"{key}_high": -7.2}
    rows = [row("generation", "random", kid(310.9)), row("generation", "rsprune", kid(290.5, **paired))]
    markdown = to_markdown("generation", build_tables(rows)["generation"])
    head, _, *body = lines_of(markdown)
    place = head.index("balanced KID×10³ geoembed minus random's")
    assert {line[0]: line[place] for line in body} == {"random": "–", "rsprune": "-20.4 [-33.6, -7.2]"}
    assert "Differences are paired" in markdown
    every = {name.replace("random", "full"): value for name, value in paired.items()}
    rows[-1]["metrics"] |= every
    table = build_tables(rows)["generation"]
    assert to_markdown("generation", table) == markdown  # the others are in the report's verdict
    assert set(every) <= set(table.columns)


def test_markdown_shows_rounded_values_intervals_and_the_best_measured_one():
    markdown = to_markdown("generation", build_tables([*GENERATION, *REFERENCES])["generation"])
    head, _, *body = lines_of(markdown)
    column = {name: index for index, name in enumerate(head)}
    cells = {line[column["prune"]]: line for line in body}
    shown = column["balanced KID×10³ geoembed ↓"]
    assert cells["rsprune"][shown] == "**227.4** [214.0, 240.0]"
    assert cells["full"][shown] == "330.1 [316.7, 342.7]"
    assert cells["real_train"][shown] == "8.5 [-4.9, 21.1]"  # better than any method, but a reference row: not marked
    precision = column["balanced precision geoembed ↑"]
    assert cells["full"][precision] == "**0.600**"
    assert cells["random"][precision] == "**0.600**"  # 0.5996 is displayed as equal, so it is marked too
    assert cells["zebra"][precision] == "0.312"
    distance = column["balanced FD geoembed ↓"]
    assert cells["rsprune"][distance] == "**140.1**"
    assert cells["scratch"][distance] == "–"
    assert cells["pca"][column["balanced PSNR (dB) ↑"]] == "30.20"
    assert cells["pca"][column["kind"]] == "reference"


def test_a_table_wider_than_the_terminal_has_a_line_per_column():
    table = build_tables(GENERATION[:2])["generation"]
    markdown = to_markdown("generation", table)
    assert to_text("generation", table, 10_000) == markdown
    text = to_text("generation", table, 60)
    wide, narrow = ([line for line in lines_of(form) if set(line[0]) - set(":-")] for form in (markdown, text))
    assert [list(column) for column in zip(*wide, strict=True)] == narrow
    many = build_tables([row("generation", f"method{number}", kid(number)) for number in range(40)])["generation"]
    assert to_text("generation", many, 60) == to_markdown(
        "generation", many
    )  # it would be wider with a line per column


def test_a_single_value_is_not_marked_as_best():
    markdown = to_markdown("generation", build_tables(GENERATION[:1])["generation"])
    assert "**" not in markdown


def test_natural_weights_get_a_separate_row_and_a_column_of_weightings():
    natural = row("generation", "rsprune", kid(260.0), weighting="natural")
    table = build_tables([natural, *GENERATION, *REFERENCES])["generation"]
    head, _, *body = lines_of(to_markdown("generation", table))
    shown = [(line[head.index("prune")], line[head.index("weighting")]) for line in body]
    assert shown[2:5] == [("rsprune", "uniform"), ("rsprune", "natural"), ("zebra", "uniform")]
    assert shown[-1] == ("pca", "–")
    assert "weighting" not in to_markdown("generation", build_tables(GENERATION)["generation"])


def test_csv_contains_every_number_of_the_rows_exactly_and_no_timing(tmp_path):
    rows = [*GENERATION, *REFERENCES]
    write_tables(build_tables(rows), tmp_path)
    with open(tmp_path / "generation.csv", encoding="utf-8", newline="") as handle:
        read = {line["prune"]: line for line in csv.DictReader(handle)}
    for source in rows:
        for name, value in source["metrics"].items():
            if name == "seconds":
                assert name not in read[source["prune"]]
            elif value is not None:
                assert float(read[source["prune"]][name]) == value
            else:
                assert read[source["prune"]][name] == ""
    assert not {"machine", "commit", "fingerprint"} & read["full"].keys()
    assert "**" not in (tmp_path / "generation.csv").read_text(encoding="utf-8")


def test_tables_do_not_depend_on_the_order_of_rows_nor_on_timing():
    resumed = [{**r, "metrics": {**r["metrics"], "train_seconds": 3.0}, "machine": "other"} for r in GENERATION[::-1]]
    first, second = build_tables([*GENERATION, *REFERENCES]), build_tables([*REFERENCES[::-1], *resumed])
    assert first["generation"].to_csv() == second["generation"].to_csv()


def test_convergence_marks_the_best_of_each_step_and_balanced_references_only():
    rows = [
        row("convergence", name, {**kid(value), "images_seen": 300 * step}, step=step)
        for name, step, value in [("rsprune", 50, 400), ("full", 50, 390), ("rsprune", 100, 200), ("full", 100, 290)]
    ]
    reference = row("reference", "real_train", kid(8.0, natural_kid_x1000_geoembed=1.0), step=None)
    table = build_tables([*rows, reference])["convergence"]
    assert list(zip(table["step"][:4], table["prune"][:4], strict=True)) == [
        (50, "full"), (50, "rsprune"), (100, "full"), (100, "rsprune"),
    ]  # fmt: skip
    assert "natural_kid_x1000_geoembed" not in table
    bold = [line for line in to_markdown("convergence", table).splitlines() if "**" in line]
    assert [re.search(r"\*\*([\d.]+)\*\*", line).group(1) for line in bold] == ["390.0", "200.0"]
    assert ["15,000" in line for line in bold] == [True, False] and " 30,000 |" in bold[1]


def test_references_join_only_tables_with_the_same_distance():
    rows = [
        row("super_resolution", "bicubic", {"psnr": 27.0, "kid_x1000_geoembed": 500.0}),
        row("subset", "full", kid(100.0)),
        *REFERENCES,
    ]
    tables = build_tables(rows)
    assert set(tables) == {"super_resolution", "subset_quality"}
    assert tables["super_resolution"]["kind"].tolist() == ["measured"]
    assert tables["subset_quality"]["kind"].tolist() == ["measured", "reference", "reference"]
    assert "balanced_psnr" not in tables["subset_quality"]


def test_the_newest_row_of_a_cell_counts_and_ablations_keep_their_fields():
    old, new = row("subset", "full", kid(1.0)), {**row("subset", "full", kid(2.0)), "fingerprint": "other"}
    assert build_tables([old, new])["subset_quality"][KID].tolist() == [2.0]
    rows = [row("ablation", "rsprune", kid(5.0), patch=8), row("ablation", "rsprune", kid(6.0), patch=16)]
    assert set(build_tables(rows)["ablation"]["patch"]) == {"8", "16"}


def test_seeds_of_a_cell_become_a_mean_and_a_spread():
    rows = [row("generation", "full", kid(value), seed=seed) for seed, value in enumerate((10.0, 13.0, 16.0))]
    table = build_tables([*rows, row("generation", "random", kid(20.0))])["generation"]
    assert table["seeds"].tolist() == [3, 1]
    assert table[KID].tolist() == [13.0, 20.0] and table[f"{KID}_spread"].iloc[0] == pytest.approx(3.0)
    markdown = to_markdown("generation", table)
    cells = {line[0]: line for line in lines_of(markdown)[2:]}
    assert "**13.0** ± 3.0" in cells["full"] and "20.0 [6.6, 32.6]" in cells["random"]
    assert markdown.splitlines()[0] == seeds_line(table) and "3 seeds" in seeds_line(table)
    one = build_tables([row("generation", "full", kid(1.0))])["generation"]
    assert to_markdown("generation", one).startswith("One seed:")


def test_only_kid_is_shown_for_the_selection_encoder():
    other = {"balanced_kid_x1000_efficientnet_lite0": 9.0, "balanced_precision_efficientnet_lite0": 0.3}
    table = build_tables([row("generation", "full", kid(1.0, **other, balanced_density_geoembed=0.5))])["generation"]
    head = lines_of(to_markdown("generation", table))[0]
    assert "balanced KID×10³ efficientnet_lite0 ↓" in head
    assert not {"balanced precision efficientnet_lite0 ↑", "balanced density geoembed ↑"} & set(head)
    assert {*other, "balanced_density_geoembed"} <= set(table.columns)


def test_latex_escapes_and_uses_booktabs(tmp_path):
    rows = [row("generation", "my_method 50% & #1 {x}", kid(10.0)), row("generation", "full", kid(20.0)), *REFERENCES]
    write_tables(build_tables(rows), tmp_path)
    text = (tmp_path / "generation.tex").read_text(encoding="utf-8")
    assert r"my\_method 50\% \& \#1 \{x\}" in text
    assert r"\textbf{10.0} [-3.4, 22.6]" in text
    assert text.count(r"\midrule") == 2  # under the heading, and above the references
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    columns = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", text).group(1))
    assert all(len(re.findall(r"(?<!\\)&", line)) == columns - 1 for line in body.strip().splitlines())
    assert re.search(r"(?<!\\)[_%#]", "\n".join(text.splitlines()[7:-3])) is None
    assert text.isascii()
    assert latex_escape("a\\b~^×") == r"a\textbackslash b\textasciitilde \textasciicircum $\times$"


def test_append_replaces_the_same_cell_and_keeps_the_others(tmp_path):
    path = tmp_path / "results" / "results.jsonl"
    first, second = row("generation", "full", kid(1.0)), row("generation", "random", kid(2.0))
    for item in (first, second, {**first, "metrics": {"kid": float("nan")}, "commit": "later"}):
        append_result(path, item)
    assert [(r["prune"], r["commit"]) for r in read_results(path)] == [("random", "c"), ("full", "later")]
    assert read_results(path)[1]["metrics"] == {"kid": None}  # JSON has no NaN
    for name, value in [("step", 200), ("seed", 1), ("ratio", 0.5), ("corpus", "aid"), ("fingerprint", "g")]:
        append_result(path, {**second, name: value})
    assert len(read_results(path)) == 7
    assert [p.name for p in path.parent.iterdir()] == ["results.jsonl"]


def test_append_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    append_result(path, row("generation", "full", kid(1.0)))
    before = path.read_bytes()

    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr("report.results.os.replace", no_space)
    with pytest.raises(OSError, match="no space"):
        append_result(path, row("generation", "random", kid(2.0)))
    assert path.read_bytes() == before


def _append_ten(path, worker):
    for step in range(10):
        append_result(path, row("generation", f"m{worker}", kid(1.0), step=step))


def test_append_from_several_processes_loses_nothing(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_ten, args=(path, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {(r["prune"], r["step"]) for r in read_results(path)} == {(f"m{w}", s) for w in range(3) for s in range(10)}


def test_the_error_about_a_broken_line_names_the_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(GENERATION[0]) + "\n{half", encoding="utf-8")
    with pytest.raises(UserError, match=r"results\.jsonl:2 is not JSON"):
        read_results(path)
    assert read_results(tmp_path / "none.jsonl") == []
