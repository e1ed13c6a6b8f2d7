"""The table and pictures of README, docs/results.md and docs/benchmarks.md.

Results of commands are copied from `results/` to `results/published/`, with one file of rows per section. These files
are part of the repository, so README's table and docs/results.md can be reproduced from them anywhere, byte for byte.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from eval.metrics import Quantity
from report.experiments import overtaken, snapshots
from report.results import BASELINE, SUBJECT, Row, read_results, weighting_name, write_text
from report.starts import starts, starts_table
from report.tables import TABLE_NOTES, build_tables, evaluation_encoder, to_markdown
from runtime.artefacts import finite, read_json
from runtime.errors import UserError

#: Findings of the tables about the method, including the unfavourable ones.
FINDINGS = (
    "**Blue Marble.** A model trained on the subset of `rsprune` draws images that are nearer to scene-balanced ones "
    "than models trained on everything or on a random subset, with every seed. Its images are farther from real images "
    "in the corpus's own proportions. If the subset is sampled in proportion to the weights of its images, the model "
    "is as near to these as the other models, and no nearer to the balanced ones. As a subset, `rsprune` cannot be "
    "distinguished from `scene_random`, which takes random images inside the same scenes. On a corpus of overlapping "
    "crops and damaged tiles the two differ.\n\n"
    "**Downstream tasks.** Over three seeds and at equal steps, the foundation of `rsprune` is not a better start than "
    "that of a random subset by more than the interval. Super-resolution is far nearer to real images than bicubic "
    "enlargement and than a regression network with as many weights and steps, at about one decibel less PSNR than "
    "that network. After 500 steps the start no longer matters. Images drawn from masks are nearer to real ones from "
    "any foundation than from scratch, but they follow their masks less closely.\n\n"
    "**AID.** This corpus is already curated and balanced. On it, `rsprune` is worse than `random` and `scene_random`: "
    "its subset is farther from both held-out sets, with every seed. With weighted images it is as near as theirs. "
    "Trainings on AID are missing here until they are computed with the evaluation encoder.\n\n"
    "**Version.** Some tables were computed with an earlier version, in which the reference set did not yet determine "
    "which images repeat each other: those of methods and of single options evaluated without training, of AID's "
    "subsets and of the synthetic long tail. On Blue Marble both versions keep the same images for seed 0. On the "
    "synthetic long tail `rsprune` now keeps 0.092 near-duplicates instead of 0.207.\n\n"
    "**Image-text pairs.** `dldc` finds captions of other scenes and estimates their number. Models trained on cleaned "
    "pairs are as good as models trained on pairs that were never exchanged. Captions of other images of the same "
    "scene are not found; `dldc` only ranks them better than `clip_score` does."
)
#: Directories of results on AID's photographs, their titles and their settings.
AID = {
    "aid_defaults": ("every default", "nothing changed but the corpus"),
    "aid": ("its own autoencoder", "autoencoder and text encoder (1,000 steps) trained on them"),
}
#: Folder in `results` that is part of the repository: rows as the commands wrote them, one file per section.
PUBLISHED = "published"
TAIL_FILE = "long_tail"


@dataclass(frozen=True)
class Section:
    """A section of docs/results.md.

    Attributes:
        title: title of the section.
        source: path in `results` where the commands write its rows; `{profile}` is replaced by the name of the profile.
        tables: names of the tables in the section, in order.
        intro: text above the tables.
    """

    title: str
    source: str
    tables: tuple[str, ...]
    intro: str = ""


def _on_aid(folder: str) -> Section:
    name, how = AID[folder]
    intro = (
        "`scripts/reproduce.py` on a folder (docs/training.md has the command): AID's photographs at 64 px with "
        f"RSICD's captions, {how}. A random guess among the 30 scenes is right in 0.033 of all cases."
    )
    return Section(f"Aerial images: AID, {name}", f"{folder}/local/results.jsonl", ("generation",), intro)


#: Sections by the name of their file in `results/published`, in the order of the document.
SECTIONS = {
    "chain": Section(
        "The chain, with every metric",
        "{profile}/results.jsonl",
        ("generation", "subset_quality", "super_resolution", "dial", "semantic_synthesis"),
    ),
    "quality": Section("Every method, judged without training", "{profile}/quality/results.jsonl", ("subset_quality",)),
    "ablation": Section(
        "RS-Prune with one choice changed at a time", "{profile}/ablation/results.jsonl", ("ablation",)
    ),
    "generator": Section(
        "The generator in equal seconds of training", "{profile}/generator/results.jsonl", ("generator",)
    ),
    "augmentation": Section(
        "Generated images as training data", "{profile}/augmentation/results.jsonl", ("augmentation",)
    ),
    "ratio_compute": Section(
        "How much to prune for how much training", "experiments/ratio_compute/results.jsonl", ("ratio_compute",)
    ),
    "methods": Section("Methods at equal images seen", "experiments/methods/results.jsonl", ("methods",)),
    "weighting": Section("A subset by its images' weights", "experiments/weighting/results.jsonl", ("weighting",)),
    "guidance": Section("Guidance", "experiments/guidance/results.jsonl", ("guidance",)),
    "outer": Section(
        "An outer reference set: the scenes of AID's aerial photographs",
        "aid_reference/{profile}/quality/results.jsonl",
        ("subset_quality",),
    ),
    "curated": Section(
        "A curated corpus: AID's photographs, judged without training",
        "aid_quality/{profile}/quality/results.jsonl",
        ("subset_quality",),
    ),
    **{folder: _on_aid(folder) for folder in AID},
    "pairs": Section(
        "Image-text pairs: AID's photographs with RSICD's captions",
        "aid_pairs/{profile}/pair_cleaning/results.jsonl",
        ("pair_detection", "pair_training", "caption_quality"),
        "`scripts/pair_cleaning.py` on a folder ([pairs.md](pairs.md) has the commands). Detection and captions at 128 "
        "px. Trainings at 64 px, 2,000 steps from the shipped foundation with its autoencoder, all with one frozen "
        "text encoder that was trained on the clean captions; 300 images of the test split.",
    ),
    TAIL_FILE: Section("A made long tail", "long_tail/long_tail.json", ()),
}
#: Names of the rows in README's table; other rows keep their names.
NAMES = {
    "full": "`full`: all images",
    "random": "`random`",
    "rsprune": "`rsprune`",
    "reconstructed_train": "reference row: real images through the autoencoder",
}


def fill_readme(published: Path, readme: Path) -> None:
    """Write the table of four columns and its sentence between the marks in a README."""
    rows = read_results(published / "chain.jsonl")
    table = overview_table(rows)
    body = table.to_markdown(index=False, tablefmt="pipe", colalign=["left", *["right"] * 3], disable_numparse=True)
    filled = "\n\n".join(["<!-- results -->", body, overview_sentence(rows), "<!-- /results -->"])
    text = readme.read_text(encoding="utf-8")
    text = re.sub(r"<!-- results -->.*<!-- /results -->", lambda _: filled, text, flags=re.DOTALL)
    write_text(readme, text)


def overview_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Table of generation results as texts: method, KID×1000 to the balanced and to the natural set, seeds."""
    generation, encoder = build_tables(rows)["generation"], evaluation_encoder(rows)
    generation = generation[(generation["kind"] == "measured") | generation["prune"].isin(NAMES)]
    columns = {name: Quantity("kid_x1000", encoder, name).name for name in ("balanced", "natural")}
    lines = []
    for _, row in generation.iterrows():
        kept = f", {1 - row['ratio']:.0%} kept" if pd.notna(row["ratio"]) and row["ratio"] else ""
        weighted = ", sampled by weight" if row["weighting"] == weighting_name(1) else ""
        values = {
            f"{name} ↓": f"{row[column]:.1f}" + (f" ± {spread:.1f}" if pd.notna(spread) else "")
            for name, column in columns.items()
            for spread in [row.get(f"{column}_spread")]
        }
        seeds = str(row["seeds"]) if row["kind"] == "measured" else "–"
        lines.append({"method": f"{NAMES.get(row['prune'], row['prune'])}{kept}{weighted}", **values, "seeds": seeds})
    return pd.DataFrame(lines)


def overview_sentence(rows: Sequence[Row]) -> str:
    """Sentence that compares `SUBJECT` with `BASELINE`; its wording follows from the numbers, favourable or not."""
    generation, encoder = build_tables(rows)["generation"], evaluation_encoder(rows)
    uniform = generation[(generation["kind"] == "measured") & (generation["weighting"] == weighting_name(0))]
    uniform = uniform.set_index("prune")
    parts = []
    for name in ("balanced", "natural"):
        column = Quantity("kid_x1000", encoder, name).name
        mine, theirs = (float(uniform.loc[method, column]) for method in (SUBJECT, BASELINE))
        parts.append(f"{'better' if mine < theirs else 'worse'} on the {name} set ({mine:.1f} against {theirs:.1f})")
    text = f"Compared with random pruning, training on the subset of `{SUBJECT}` is {parts[0]} and {parts[1]}"
    result = starts(rows)
    result = result[result["other"] == BASELINE]
    if not len(result):
        return text + "."
    last = result[result["step"] == result["step"].max()]
    counts = [int((last["verdict"] == verdict).sum()) for verdict in ("better", "tie", "worse")]
    gain = "a gain" if counts[0] > counts[1] + counts[2] else "no reliable gain"
    return (
        f"{text}. For the downstream tasks its foundation is {gain}: {len(last)} comparisons at equal steps "
        f"({int(last['step'].max())} steps, up to {int(last['seeds'].max())} seeds) give {counts[0]} better, "
        f"{counts[1]} ties and {counts[2]} worse."
    )


def screenshot(page: Path, target: Path, width: int, height: int) -> None:
    """Take a screenshot of a page with headless Chromium.

    Raises:
        UserError: Chromium is not installed.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise UserError(
            "no Chromium on PATH, which makes the screenshot of the report: install it and run make readme again"
        )
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={target}"]
        subprocess.run([chromium, *flags, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
    Image.open(target).convert("P", palette=Image.Palette.ADAPTIVE).save(target, optimize=True)


def publish(results: Path, profile: str) -> Path:
    """Copy rows from `results` to `results/published`; a section without new rows is not changed."""
    target = results / PUBLISHED
    target.mkdir(parents=True, exist_ok=True)
    for name, section in SECTIONS.items():
        source = results / section.source.format(profile=profile)
        if not source.is_file():
            continue
        rows = [finite(read_json(source))] if name == TAIL_FILE else read_results(source)
        write_text(target / f"{name}.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    return target


def write_results(published: Path, target: Path) -> None:
    """Write docs/results.md from the published rows; a section without rows is not changed."""
    result = {section.title: text for name, section in SECTIONS.items() if (text := section_text(published, name))}
    old = sections_of(target.read_text(encoding="utf-8")) if target.is_file() else {}
    titles = [*result, *(title for title in old if title not in result)]
    order = [section.title for section in SECTIONS.values()]
    titles.sort(key=lambda title: [*order, title].index(title))
    texts = (f"## {title}\n\n{result.get(title) or old[title]}" for title in titles)
    note = (
        "Generated by `make tables` from `results/published/`: do not edit. [numbers.md](numbers.md) explains "
        "the columns, [method.md](method.md), section 5, has the formulas."
    )
    write_text(target, "\n\n".join(["# Results", note, FINDINGS, *texts]) + "\n")


def section_text(published: Path, name: str) -> str:
    """The Markdown of a section from its published rows; empty if there are none."""
    section, path = SECTIONS[name], published / f"{name}.jsonl"
    if not path.is_file():
        return ""
    if name == TAIL_FILE:
        return long_tail_section(json.loads(path.read_text(encoding="utf-8")))
    rows = read_results(path)
    tables = build_tables([row for row in rows if row.get("what") != "snapshot"])
    shown = [table for table in section.tables if table in tables]
    heading = "### {}\n\n" if len(section.tables) > 1 else ""
    texts = [
        heading.format(table.replace("_", " ").capitalize()) + to_markdown(table, tables[table]).strip()
        for table in shown
    ]
    if name == "chain" and (result := starts_text(rows)):
        texts.append(f"### Starts of the downstream tasks\n\n{result}")
    crossing = crossings(rows) if name == "ratio_compute" else ""
    return "\n\n".join(part for part in (section.intro, *texts, crossing) if part)


def starts_text(rows: Sequence[Row]) -> str:
    """Text about the foundations from `starts`, its note first; empty if no task was fine-tuned from several."""
    table = starts_table(rows)
    if not len(table):
        return ""
    body = table.to_markdown(index=False, tablefmt="pipe", disable_numparse=True)
    return f"{TABLE_NOTES['starts']}\n\n{body}"


def crossings(rows: Sequence[Row]) -> str:
    """For each ratio, the number of images after which training on everything is better than training on a subset."""
    metric = Quantity("kid_x1000", evaluation_encoder(rows), "balanced").name
    result = overtaken(snapshots(rows), metric)
    lines = []
    for ratio, seeds in result.groupby("ratio"):
        reached = seeds["images_seen"].dropna()
        spread = f" ± {reached.std():,.0f}" if len(reached) > 1 else ""
        value = f"{reached.mean():,.0f}{spread}" if len(reached) else "–"
        lines.append({"ratio": f"{ratio:g}", "seeds": len(seeds), "overtaken in": len(reached), "images seen": value})
    note = (
        f"images seen: number of training images after which training on the whole corpus is nearer to the balanced "
        f"validation set than training on the subset ({metric}). overtaken in: number of seeds in which this happens "
        "within the experiment."
    )
    return f"{pd.DataFrame(lines).to_markdown(index=False, tablefmt='pipe', disable_numparse=True)}\n\n{note}"


def sections_of(text: str) -> dict[str, str]:
    """The sections of the second level of a Markdown document, by their titles."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {title: body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def long_tail_section(result: Mapping[str, Any]) -> str:
    """Section about the images that the methods kept of the synthetic long-tailed corpus."""
    table = pd.DataFrame(result["methods"]).drop(columns="seconds")
    return (
        f"`scripts/long_tail.py`: {result['images']:,} tiles of {result['corpus']}, class counts by a power law, "
        f"overlapping crops, {result['noise']:.0%} blank, hazy or empty tiles, no labels; ratio={result['ratio']:g}. "
        "`scenes`: classes with at least one kept tile.\n\n" + markdown(table)
    )


#: How to read the table of stages in docs/benchmarks.md.
STAGE_NOTE = (
    'Rows in images/s are speeds. A row "A, of B" in % is the speed of A divided by the speed of B. "(limit)" marks '
    'the speed that a stage could reach at best. "As torch leaves it" means a process without the settings that our '
    "commands make for memory allocation and for denormal numbers."
)


def write_benchmarks(results: Path, target: Path) -> None:
    """Write docs/benchmarks.md with the measurements of `make bench` and the name of the machine."""
    parts = ["# Benchmarks", "Generated by `make readme` from the results of `make bench`: do not edit."]
    path = results / "bench.json"
    if path.is_file():
        result = read_json(path)
        rows = [{"": name, "images/s": f"{value:,.1f}"} for name, value in result["images_per_second"].items()]
        rows += [{"": name, "images/s": f"{value:.0%}"} for name, value in result["fractions"].items()]
        parts += [
            f"Machine: {result['machine']}. Files: {result['files']}.",
            "## Stages",
            STAGE_NOTE,
            markdown(pd.DataFrame(rows)),
        ]
    path = results / "bench_selection.json"
    if path.is_file():
        result = read_json(path)
        table = pd.DataFrame(result["rows"]).drop(columns=["kinds_kept", "evenness"])
        quality = pd.DataFrame(result["rows"])[["kinds_kept", "evenness"]]
        parts += [
            "## Selection",
            f"Synthetic clustered embeddings, {result['dimensions']} dimensions, float16 on disk, ratio=0.85. "
            "`peak_gb`: largest resident memory of a separate process, including the mapped embeddings. "
            "`kinds_kept`: fraction of the true clusters with a kept image; `evenness`: normalised entropy of the kept "
            "images over the true clusters, 1 is even.",
            markdown(pd.concat([table, quality], axis=1)),
            "Growth from the second largest to the largest size: "
            + ", ".join(f"{name} ~ N^{value:.2f}" for name, value in result["exponents"].items())
            + ".",
        ]
        if result.get("unknown"):
            parts += [
                "The reference knows 20 of 80 classes, which are 100 of 400 kinds:",
                markdown(pd.DataFrame(result["unknown"])),
            ]
    path = results / "bench_training.json"
    if path.is_file():
        result = read_json(path)
        rows = [{"": name, "images/s": f"{value:,.1f}"} for name, value in result["images_per_second"].items()]
        rows += [{"": name, "images/s": f"{value:.2f}"} for name, value in result["ratios"].items()]
        parts += [
            "## Training",
            f"Machine: {result['machine']}. {result['network']}; {result['gflop_per_image']:.2f} GFLOP per image. "
            f"Large matrix products reach {result['peak_gflops']:,.0f} GFLOP/s on this machine: "
            f"{result['model_flops_utilisation']:.0%} model FLOPs utilisation.",
            markdown(pd.DataFrame(rows)),
        ]
    parts += pair_benchmarks(results / "bench_pairs.json")
    if len(parts) > 2:  # without measurements the document is not changed
        target.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def pair_benchmarks(path: Path) -> list[str]:
    """Paragraphs about scoring pairs; none if it was not measured."""
    if not path.is_file():
        return []
    result = read_json(path)
    rows = [{"pairs": f"{int(count):,}", **seconds} for count, seconds in result["pairs"].items()]
    network = [{"": name, "figure": f"{value:,.2f}"} for name, value in result["network"].items()]
    return [
        "## Image-text pairs",
        f"Machine: {result['machine']}. Synthetic features of 256 dimensions and captions of ten words, 30 scenes. "
        "Seconds of each step in a separate process, and the largest resident memory of this process.",
        markdown(pd.DataFrame(rows)),
        markdown(pd.DataFrame(network)),
    ]


def markdown(table: pd.DataFrame) -> str:
    """A data frame as a table in GitHub's Markdown."""
    return table.to_markdown(index=False, tablefmt="pipe", floatfmt=",.3f", intfmt=",")
