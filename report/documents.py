"""README's tables and pictures, docs/results.md and docs/benchmarks.md, from what the commands left in `results/`."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from report.results import read_results
from report.tables import TABLE_NOTES, build_tables, metric_of, to_markdown
from runtime.artefacts import read_json
from runtime.errors import UserError

#: What the tables say of the method, the unfavourable included.
FINDINGS = (
    "In plain sentences: on Blue Marble `rsprune` is nearest to scene-balanced images and among the farthest from "
    "images in nature's proportions, before training and after. As a subset it cannot be told from "
    "`scene_random`, which takes images at random inside the same scenes. As a start for the downstream tasks its "
    "model is no better than the others' beyond the intervals, and training from scratch for as many steps in all "
    "is better at super-resolution and follows masks better. On AID, which is curated and balanced already, `rsprune` "
    "loses to `random` and to `scene_random`: its subset is farther from both held-out sets, with every seed. With its "
    "images weighted by those that they stand for it is as near as theirs. Trainings on AID are missing here until "
    "they are computed with the evaluation encoder."
)
#: Directories of results on AID's photographs, how they are called and what they were made with.
AID = {
    "aid_defaults": ("every default", "nothing changed but the corpus"),
    "aid": ("its own autoencoder", "autoencoder and text encoder (1,000 steps) trained on them"),
}
#: Titles of docs/results.md.
CHAIN, QUALITY = "The chain, with every metric", "Every method, judged without training"
ABLATION = "RS-Prune with one choice changed at a time"
OUTER = "An outer reference set: the scenes of AID's aerial photographs"
ON_AID = {folder: f"Aerial images: AID, {name}" for folder, (name, _) in AID.items()}
TAIL = "A made long tail"
CURATED = "A curated corpus: AID's photographs, judged without training"
#: In the document's order.
SECTIONS = (CHAIN, QUALITY, ABLATION, OUTER, CURATED, *ON_AID.values(), TAIL)
#: README's tables and the metrics they show; docs/results.md has all of them.
TABLES = {
    "generation": ("kid_x1000", "scene_accuracy"),
    "subset_quality": ("kid_x1000", "near_duplicates", "scene_entropy"),
    "super_resolution": ("kid_x1000", "psnr", "ssim"),
    "semantic_synthesis": ("kid_x1000", "miou", "pixel_accuracy"),
}


def fill_readme(results: Path, readme: Path) -> None:
    """Put the tables of a results directory between the marks of a README; what they share is said once, below."""
    tables = build_tables(read_results(results / "results.jsonl"))
    parts, shared = [], ""
    for name, metrics in TABLES.items():
        if name not in tables:
            continue
        seeds, table, explained = to_markdown(name, headline(tables[name], metrics)).strip().split("\n\n")
        first = TABLE_NOTES[name]
        shared = max(shared, explained.removeprefix(first).strip(), key=len)
        parts.append(f"**{name.replace('_', ' ').capitalize()}.** {seeds} {first}\n\n{table}")
    text = readme.read_text(encoding="utf-8")
    filled = "<!-- results -->\n" + "\n\n".join([*parts, shared]) + "\n<!-- /results -->"
    text = re.sub(r"<!-- results -->.*<!-- /results -->", lambda _: filled, text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")


def headline(table: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """A table with some of its metrics, in their place; all that is no metric stays."""
    return table[[name for name in table.columns if (found := metric_of(name)) is None or found in metrics]]


def full_tables(results: Path) -> str:
    """Markdown of README's tables with every metric."""
    tables = build_tables(read_results(results / "results.jsonl"))
    return "\n\n".join(
        f"### {name.replace('_', ' ').capitalize()}\n\n{to_markdown(name, tables[name]).strip()}"
        for name in TABLES
        if name in tables
    )


def screenshot(page: Path, target: Path, width: int, height: int) -> None:
    """Photograph a page in headless Chromium.

    Raises:
        UserError: there is no Chromium.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise UserError("no Chromium on PATH to photograph the report with: install it and run make readme again")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={target}"]
        subprocess.run([chromium, *flags, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
    Image.open(target).convert("P", palette=Image.Palette.ADAPTIVE).save(target, optimize=True)


def write_results(results: Path, target: Path) -> None:
    """docs/results.md: what the commands measured. A section whose results are not here stays as it is."""
    found = result_sections(results)
    old = sections_of(target.read_text(encoding="utf-8")) if target.is_file() else {}
    titles = [*found, *(title for title in old if title not in found)]
    titles.sort(key=lambda title: [*SECTIONS, title].index(title))
    texts = (f"## {title}\n\n{found.get(title) or old[title]}" for title in titles)
    note = (
        "Generated by `make readme` from `results/`: do not edit. How to read the columns: [method.md](method.md), 5."
    )
    target.write_text("\n\n".join(["# Results", note, FINDINGS, *texts]) + "\n", encoding="utf-8")


def sections_of(text: str) -> dict[str, str]:
    """The sections of the second level of a Markdown document, by their titles."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {title: body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def result_sections(results: Path) -> dict[str, str]:
    """The sections of docs/results.md for which there are results."""
    found = {}
    if (results / "results.jsonl").is_file():
        found[CHAIN] = full_tables(results)
    curated_table = results.parent / "aid_quality" / results.name / "quality" / "subset_quality.md"
    outer_table = results.parent / "aid_reference" / results.name / "quality" / "subset_quality.md"
    known = {
        QUALITY: results / "quality" / "subset_quality.md",
        ABLATION: results / "ablation" / "ablation.md",
        OUTER: outer_table,
        CURATED: curated_table,
    }
    found |= {title: path.read_text(encoding="utf-8").strip() for title, path in known.items() if path.is_file()}
    for folder, (_, how) in AID.items():
        tables = results.parent / folder / "local" / "tables"
        shown = [tables / f"{table}.md" for table in ("generation", "scenes")]
        if shown[0].is_file():
            found[ON_AID[folder]] = aid_section(tables.parent, how, [path for path in shown if path.is_file()])
    path = results.parent / "long_tail" / "long_tail.json"
    if path.is_file():
        found[TAIL] = long_tail_section(read_json(path))
    return found


def aid_section(results: Path, how: str, tables: Sequence[Path]) -> str:
    """What the chain found on AID's photographs."""
    return (
        "`scripts/reproduce.py` on a folder (docs/training.md has the command): AID's photographs at 64 px with "
        f"RSICD's captions, {how}. A guess among the 30 scenes would be right in 0.033 of all cases; the text "
        f"encoder itself recognises the scene of {real_accuracy(results):.3f} of the held-out photographs.\n\n"
        + "\n\n".join(path.read_text(encoding="utf-8").strip() for path in tables)
    )


def long_tail_section(found: Mapping[str, Any]) -> str:
    """What the methods kept of the made long tail."""
    table = pd.DataFrame(found["methods"]).drop(columns="seconds")
    return (
        f"`scripts/long_tail.py`: {found['images']:,} tiles of {found['corpus']}, class counts by a power law, "
        f"overlapping crops, {found['noise']:.0%} blank, hazy or empty tiles, no labels; ratio={found['ratio']:g}. "
        "`scenes`: classes with at least one kept tile.\n\n" + markdown(table)
    )


def real_accuracy(results: Path) -> float:
    """How often the CLIP model of a chain's runs recognises the scene of a held-out image."""
    run_of = read_json(results / "runs.json")
    return next(
        read_json(Path(place[0]) / "summary.json")["scene_accuracy_real"]
        for name, place in run_of.items()
        if name.startswith("foundation/")
    )


def write_benchmarks(results: Path, target: Path) -> None:
    """docs/benchmarks.md: what `make bench` measured, with the machine named."""
    parts = ["# Benchmarks", "Generated by `make readme` from what `make bench` left: do not edit."]
    path = results / "bench.json"
    if path.is_file():
        found = read_json(path)
        rows = [{"": name, "images/s": f"{value:,.1f}"} for name, value in found["images_per_second"].items()]
        rows += [{"": name, "images/s": f"{value:.0%}"} for name, value in found["shares"].items()]
        parts += [f"Machine: {found['machine']}. Files: {found['files']}.", "## Stages", markdown(pd.DataFrame(rows))]
    path = results / "bench_selection.json"
    if path.is_file():
        found = read_json(path)
        table = pd.DataFrame(found["rows"]).drop(columns=["kinds_found", "evenness"])
        quality = pd.DataFrame(found["rows"])[["kinds_found", "evenness"]]
        parts += [
            "## Selection",
            f"Synthetic clustered embeddings, {found['dimensions']} dimensions, float16 on disk, ratio=0.85. "
            "`peak_gb`: largest resident memory of a process of its own, the mapped embeddings included. "
            "`kinds_found`: share of the true clusters with a kept image; `evenness`: entropy of the kept over the "
            "true clusters, 1 is even.",
            markdown(pd.concat([table, quality], axis=1)),
            "Growth from the second largest to the largest size: "
            + ", ".join(f"{name} ~ N^{value:.2f}" for name, value in found["exponents"].items())
            + ".",
        ]
        if found.get("unknown"):
            parts += [
                "The reference knows 20 of 80 classes, which are 100 of 400 kinds:",
                markdown(pd.DataFrame(found["unknown"])),
            ]
    path = results / "bench_training.json"
    if path.is_file():
        found = read_json(path)
        rows = [{"": name, "images/s": f"{value:,.1f}"} for name, value in found["images_per_second"].items()]
        rows += [{"": name, "images/s": f"{value:.2f}"} for name, value in found["ratios"].items()]
        parts += [
            "## Training",
            f"Machine: {found['machine']}. {found['network']}; {found['gflop_per_image']:.2f} GFLOP an image, of "
            f"{found['peak_gflops']:,.0f} GFLOP/s that large matrix products reach here: "
            f"{found['model_flops_utilisation']:.0%} model FLOPs utilisation.",
            markdown(pd.DataFrame(rows)),
        ]
    if len(parts) > 2:  # nothing was measured here: what the document says stays
        target.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def markdown(table: pd.DataFrame) -> str:
    """A GitHub table of any frame."""
    return table.to_markdown(index=False, tablefmt="pipe", floatfmt=",.3f", intfmt=",")
