"""Tables of result rows: data frames at full precision, converted to Markdown, LaTeX and CSV.

The metrics are those of `eval.metrics.METRICS`; the columns have their full names. Tables contain nothing that differs
between a resumed and an uninterrupted run: no seconds, no machine, no commit.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eval.metrics import METRICS, SETS, Quantity
from eval.reference_names import REFERENCE_ROWS
from report.results import BASELINE, Row, read_results, weighting_name, write_text

#: Name of the table of each stage.
TABLE_OF_STAGE = {
    "generation": "generation",
    "convergence": "convergence",
    "subset": "subset_quality",
    "super_resolution": "super_resolution",
    "semantic_synthesis": "semantic_synthesis",
    "ablation": "ablation",
}
#: Stages whose rows have no additional fields; the additional fields of other stages (ablation, experiment) are texts.
PLAIN_STAGES = frozenset({*TABLE_OF_STAGE, "reference"} - {"ablation"})
#: Keys of a row that record how it was computed; tables do not show them.
ROW_METADATA = frozenset({"stage", "metrics", "fingerprint", "commit", "machine", "config", "seconds", "kept", "flops"})
#: Notes of the tables: what each one shows and how to read it.
TABLE_NOTES = {
    "generation": "Generated images compared with real held-out images: a scene-balanced set, and a set in the "
    "corpus's own proportions.",
    "convergence": "The same metrics during training, on the validation split. At each step all methods have seen the "
    "same number of images.",
    "subset_quality": "The kept real images compared with the held-out images, before any training; Vendi score "
    "(effective number of kinds), evenness of the true scenes, fractions of near-duplicates (perceptual hash) and of "
    "images of low information (JPEG bytes).",
    "super_resolution": "Held-out images restored from a quarter of their side. All networks use the default dial, "
    "unless the config of a row names another one. scratch: the same network without a foundation. regression: EDSR "
    "with as many weights and steps.",
    "semantic_synthesis": "Images drawn from held-out masks, with guidance by the masks. scratch: the same network "
    "without a foundation. nearest_mask: the training image whose mask agrees most.",
    "starts": "Downstream tasks that start from the foundation of rsprune, minus those that start from another one, "
    "at equal lengths of fine-tuning and with equal images, batches and noise: mean over the seeds, and its 95 % "
    "interval by Student's t.",
    "dial": "Super-resolution by one network with different values of its dial: 0 gives the mean image, 1 gives one "
    "draw with all detail.",
    "ablation": "One option changed at a time, measured on the validation split.",
    "generator": "One option of the generator's training or sampling changed at a time, on RS-Prune's subset, for "
    "equal seconds of training, measured on the validation split.",
    "augmentation": "A segmenter trained on real images, on generated ones (0 real) or on both, for the same number "
    "of steps, measured on real held-out images. prune: how the generated images were chosen from a pool; ratio: the "
    "removed fraction of the pool. The generated images of a row were drawn from masks of its real images; in rows "
    "with 0 real images, from the masks of the largest number of real images. Rows with the same number of real "
    "images are compared with one another.",
    "pair_detection": "Detection of captions that were exchanged between images of a corpus. dldc estimates the "
    "exchanged fraction itself; clip_score and random are given the true one. In rows without exchanges, the removed "
    "captions are the corpus's own. Error of scenes' fractions: mean absolute difference between the estimated or "
    "given fraction and the true one.",
    "pair_training": "Text-to-image models at equal steps, trained on: raw pairs, with a fraction of the captions "
    "exchanged between scenes; cleaned pairs (prune=dldc ratio=null); as many pairs chosen by clip_score; repaired "
    "pairs (mismatched images described again); and the clean pairs before the exchange. The fitted CLIPs evaluate "
    "with the true captions; the one on features of the selection's encoder is of the same kind as the one that "
    "cleaned the pairs.",
    "cleaning_probe": "Small text-to-image models by the fraction of every scene's pairs that was cleaned, on the "
    "validation split.",
    "caption_quality": "Captions of the same images by their source: the fraction classified as mismatched; the mean "
    "log ratio between the fit to the image and the fit to another image of its scene; and CLIP scores by models that "
    "were fitted to the given captions of other images.",
    "joint_conditions": "Images drawn by one model with all of its conditions, without each one, with each one only, "
    "and with none, which is its foundation. Edge agreement: F-score of Canny's edges within 1 px of those of the "
    "real image.",
    "scenes": "Fraction of images in which CLIP recognises the image's scene among all scenes of the table. The "
    "images are those that each method's model generated from the scene-balanced held-out captions, and the "
    "photographs with these captions.",
}
#: Tables with groups: rows with the same whole number in this field are placed together and compared only within the
#: group.
GROUPED_BY = {"augmentation": "real images", "joint_conditions": "images"}
#: Numbers of a row that are shown but are not metrics: heading and decimals.
PLAIN = {
    "images_seen": ("images seen", 0),
    "loss": ("loss", 4),
    "edge_agreement": ("edge agreement ↑", 3),
    "swap_removed": ("removed", 3),
    "swap_precision": ("precision", 3),
    "swap_recall": ("recall", 3),
    "swap_precision_at_true": ("precision at the true fraction", 3),
    "swap_auc": ("area under ROC", 3),
    "scene_fraction_error": ("error of scenes' fractions", 3),
    "caption_mismatched": ("mismatched", 3),
    "caption_fit": ("fit", 2),
    "caption_words": ("words", 1),
    "captions_different": ("different", 3),
    "caption_chosen": ("chosen", 3),
}
#: Stage of the reference rows.
REFERENCE = "reference"

_CELL = ("corpus", "prune", "ratio", "weighting", "step")
_FIRST, _LAST = ("full", "random", "rsprune"), ("scratch",)
_NOTHING = "–"
_SPREAD = "_spread"
_ARROWS = {"lower": "↓", "higher": "↑", "": ""}


def method_order(name: str) -> tuple[int, str]:
    """Sort key of methods: full, random, rsprune, others by name, scratch."""
    if name in _FIRST:
        return _FIRST.index(name), name
    return len(_FIRST) + (name in _LAST), name


# ---------------------------------------------------------------- rows to data frames


def build_tables(rows: Iterable[Row]) -> dict[str, pd.DataFrame]:
    """Tables by name, with numbers at full precision; no table without measured rows.

    The names are those of `TABLE_OF_STAGE`; other stages give their own name. The columns are kind ("measured" or
    "reference"), corpus, prune, ratio, weighting, step, seeds (how many), the additional fields of ablation rows, then
    the metrics. Rows of one cell that differ only in the seed are combined: means and, for several seeds, standard
    deviations as `<metric>_spread` in place of intervals. Of several rows for one cell and seed, the newest counts.
    Reference rows are at the bottom of every table with which they share a distance.
    """
    rows = list(rows)
    tables = {}
    others = {row["stage"] for row in rows} - {*TABLE_OF_STAGE, REFERENCE}
    for stage, name in (TABLE_OF_STAGE | {stage: stage for stage in sorted(others)}).items():
        measured = [_record(row, "measured", extras=stage not in PLAIN_STAGES) for row in rows if row["stage"] == stage]
        if measured:
            references = [_record(row, REFERENCE, extras=False) for row in rows if row["stage"] == REFERENCE]
            tables[name] = _frame(name, measured, references)
            tables[name].attrs["encoder"] = evaluation_encoder(rows)
            tables[name].attrs["grouped_by"] = GROUPED_BY.get(name)
    return tables


def evaluation_encoder(rows: Sequence[Row]) -> str:
    """The encoder of the first metrics in the newest row that has metrics of an encoder, or ""."""
    quantities = (Quantity.parse(name) for row in reversed(rows) for name in row["metrics"])
    return next((quantity.of for quantity in quantities if quantity and quantity.entry.by == "encoder"), "")


def _record(row: Row, kind: str, *, extras: bool) -> dict[str, Any]:
    """A table row with its seed; metrics are floats, missing ones NaN."""
    record: dict[str, Any] = {"kind": kind, **{name: row.get(name) for name in _CELL}, "seed": row.get("seed")}
    if kind == "measured" and record["weighting"] is None:
        record["weighting"] = weighting_name(0)
    if extras:
        known = {*ROW_METADATA, *record}
        record |= {f"field:{key}": str(value) for key, value in row.items() if key not in known}
    for name, value in row["metrics"].items():
        number = isinstance(value, (Real, type(None))) and not isinstance(value, bool)
        if number and (name in PLAIN or Quantity.parse(name) is not None):
            record[f"metric:{name}"] = np.nan if value is None else float(value)
    return record


def _frame(name: str, measured: list[dict[str, Any]], references: list[dict[str, Any]]) -> pd.DataFrame:
    metrics = sorted({key for record in measured for key in record if key.startswith("metric:")}, key=_column_order)
    compared = {key for key in metrics if _is_distance(key)}
    corpora = {record["corpus"] for record in measured}
    references = [record for record in references if record["corpus"] in corpora and compared & set(record)]
    sets = {_held_out(key) for key in metrics}
    known = {key for record in references for key in record if key.startswith("metric:") and _held_out(key) in sets}
    metrics = sorted({*metrics, *(known if name == "generation" else ())}, key=_column_order)
    fields = sorted({key for record in measured for key in record if key.startswith("field:")})
    cell = ["kind", *_CELL, *fields]
    newest = {tuple(record.get(key) for key in (*cell, "seed")): record for record in [*measured, *references]}
    frame = pd.DataFrame(list(newest.values())).reindex(columns=[*cell, "seed", *metrics])
    frame[metrics] = frame[metrics].astype("float64")
    groups = frame.groupby(cell, dropna=False, sort=False)
    ends = [key for key in metrics if (quantity := Quantity.parse(key.removeprefix("metric:"))) and quantity.part]
    mean, spread = groups[metrics].mean(), groups[metrics].std().drop(columns=ends).add_suffix(_SPREAD)
    columns = {name: part[name].to_numpy() for part in (mean, spread) for name in part}
    table = pd.DataFrame({"seeds": groups.size().to_numpy(), **columns}, index=mean.index)
    table.loc[table["seeds"] > 1, ends] = np.nan  # intervals are defined for the images of one seed
    order = [column for key in metrics for column in (key, key + _SPREAD) if column in table]
    table = table.dropna(axis=1, how="all").reset_index()
    table = table[[column for column in [*cell, "seeds", *order] if column in table or column in cell]]
    table = table.reindex(columns=[*cell, *(c for c in table.columns if c not in cell)])
    rank = [_row_order(name, row) for row in table.to_dict("records")]
    table = table.iloc[sorted(range(len(table)), key=rank.__getitem__)].reset_index(drop=True)
    return table.astype({"step": "Int64"}).rename(columns=lambda key: key.split(":", 1)[-1])


def _row_order(name: str, record: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key of rows: by corpus, reference rows last; convergence by step first, which groups methods at one step.

    Rows without a method come before rows with one; groups of `GROUPED_BY` are ordered by their number.
    """
    method, measured = str(record["prune"]), record["kind"] == "measured"
    known = list(REFERENCE_ROWS)
    rank = method_order(method) if measured else (known.index(method) if method in known else len(known), method)
    step, ratio = (-1 if pd.isna(record[key]) else record[key] for key in ("step", "ratio"))
    early, late = (step, 0) if name == "convergence" and measured else (0, step)
    fields = sorted((key, str(value)) for key, value in record.items() if key.startswith("field:"))
    weighting = record["weighting"] != weighting_name(0), str(record["weighting"])
    if pd.isna(record["prune"]):
        rank = -1, ""
    early = int(record[f"field:{GROUPED_BY[name]}"]) if name in GROUPED_BY and measured else early
    return not measured, str(record["corpus"]), early, rank, ratio, weighting, late, fields


def _held_out(column: str) -> str | None:
    """The held-out set of a metric; None: the column is not a metric."""
    quantity = Quantity.parse(column.removeprefix("metric:"))
    return None if quantity is None else quantity.held_out


def _is_distance(column: str) -> bool:
    quantity = Quantity.parse(column.removeprefix("metric:"))
    return quantity is not None and quantity.entry.by == "encoder"


def _column_order(column: str) -> tuple[Any, ...]:
    """Sort key of columns: plain numbers, balanced before natural, order of `METRICS`, a metric before its interval."""
    name = column.removeprefix("metric:")
    quantity = Quantity.parse(name)
    if quantity is None:
        return -1, list(PLAIN).index(name), "", "", 0
    sets, parts = (*SETS, ""), ("", "low", "high")
    place = list(METRICS).index(quantity.metric)
    return sets.index(quantity.held_out), place, quantity.of, quantity.minus, parts.index(quantity.part)


# ---------------------------------------------------------------- how a table looks


@dataclass(frozen=True)
class Cell:
    """Content of one cell: a value, its interval or spread ("": none), and whether it is the best measured value.

    Attributes:
        key: the number at full precision, by which rows are sorted; None: the cell has no number.
    """

    value: str
    interval: str = ""
    best: bool = False
    number: bool = False
    key: float | None = None

    @property
    def text(self) -> str:
        return f"{self.value} {self.interval}".strip()


@dataclass(frozen=True)
class Shown:
    """A table for display: headings with direction arrows, and rows of cells with their kind."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Whether each column contains only numbers."""
        columns = [[cells[index] for _, cells in self.rows] for index in range(len(self.headings))]
        return tuple(
            any(cell.number for cell in column) and all(cell.number or cell.value == _NOTHING for cell in column)
            for column in columns
        )


def metric_of(column: str) -> str | None:
    """The metric of a column in a table of `build_tables`; None: the column is not a metric."""
    quantity = Quantity.parse(column) or Quantity.parse(column.removesuffix(_SPREAD))
    return None if quantity is None else quantity.metric


def show(table: pd.DataFrame) -> Shown:
    """Round a table, merge intervals and spreads into their cells, and mark the best measured value of every metric.

    Columns that are equal in all measured rows (corpus, seeds, step), columns without values, and metrics that only the
    CSV file shows are left out. The best value is found among measured rows of one corpus and one group of
    `GROUPED_BY`, and of one step if a method has several. Values that round to the same text share the mark; a single
    value has no mark. A table without the column `kind` is shown unchanged.
    """
    if "kind" not in table.columns:
        return _show_plain(table)
    measured = table["kind"] == "measured"
    columns = [name for name in table.columns if _is_shown(table, name, measured)]
    best = {name: _best(table, name, measured) for name in columns if _better(name)}
    rows = []
    for position, (_, row) in enumerate(table.iterrows()):
        cells = tuple(_cell(row, name, best=name in best and position in best[name]) for name in columns)
        rows.append((str(row["kind"]), cells))
    return Shown(tuple(_heading(name) for name in columns), tuple(rows))


def _is_shown(table: pd.DataFrame, name: str, measured: pd.Series) -> bool:
    if name == "kind":
        return not measured.all()
    if name == "step":  # 0: no training, as for bicubic interpolation
        return table.loc[measured & (table["step"] > 0), name].nunique() > 1
    if name in ("corpus", "seeds", "weighting"):
        return table.loc[measured, name].nunique(dropna=False) > 1
    if name.endswith(_SPREAD) and name.removesuffix(_SPREAD) in table.columns:
        return False
    quantity = Quantity.parse(name)
    if quantity is not None:
        entry, encoder = quantity.entry, table.attrs.get("encoder", "")
        other = entry.by == "encoder" and encoder not in ("", quantity.of)
        if quantity.minus not in ("", BASELINE):  # the verdict of the report shows these differences
            return False
        if quantity.part or entry.shown == "file" or (other and (entry.shown != "both" or quantity.minus)):
            return False
    return name == "prune" or bool(table[name].notna().any())


def _better(name: str) -> str:
    """Better direction of a column: "lower", "higher", or "" for a difference or for a column that is not a metric."""
    quantity = Quantity.parse(name)
    return "" if quantity is None or quantity.minus else quantity.entry.better


def _best(table: pd.DataFrame, name: str, measured: pd.Series) -> set[int]:
    """Positions of the rows with the best value of a metric."""
    group = [table.attrs["grouped_by"]] if table.attrs.get("grouped_by") else []
    several_steps = table[measured].duplicated(["corpus", "prune", "ratio", "weighting", *group]).any()
    groups: dict[Any, list[int]] = {}
    for position, (_, row) in enumerate(table.iterrows()):
        if measured.iloc[position] and pd.notna(row[name]):
            step = None if not several_steps or pd.isna(row["step"]) else row["step"]
            groups.setdefault((row["corpus"], step, *row[group]), []).append(position)
    result: set[int] = set()
    sign = 1 if _better(name) == "higher" else -1
    for positions in groups.values():
        if len(positions) > 1:
            values = {position: float(table[name].iloc[position]) for position in positions}
            top = max(values.values(), key=lambda value: sign * value)
            result |= {position for position in positions if _number(name, values[position]) == _number(name, top)}
    return result


def _cell(row: pd.Series, name: str, *, best: bool) -> Cell:
    value = row[name]
    if pd.isna(value):
        return Cell(_NOTHING)
    if isinstance(value, str):
        return Cell(value)
    return Cell(_number(name, value), _interval(row, name), best, number=True, key=float(value))


def _interval(row: pd.Series, name: str) -> str:
    """The spread over training seeds, or the interval of one seed's images."""
    quantity = Quantity.parse(name)
    spread = row.get(name + _SPREAD)
    if spread is not None and pd.notna(spread):
        return f"± {spread:.{_decimals(name)}f}"
    if quantity is None:
        return ""
    low, high = (row.get(replace(quantity, part=part).name) for part in ("low", "high"))
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    return f"[{low:.{_decimals(name)}f}, {high:.{_decimals(name)}f}]"


def _number(name: str, value: float) -> str:
    if isinstance(value, Integral):
        return str(value)
    if name == "ratio":
        return f"{value:g}"
    quantity = Quantity.parse(name)
    sign = "+" if quantity is not None and quantity.minus else ""
    return f"{value:{sign},.{_decimals(name)}f}"


def _decimals(name: str) -> int:
    quantity = Quantity.parse(name)
    return PLAIN[name][1] if quantity is None and name in PLAIN else 3 if quantity is None else quantity.entry.decimals


def _heading(name: str) -> str:
    quantity = Quantity.parse(name)
    if quantity is None:
        return PLAIN[name][0] if name in PLAIN else name
    by = quantity.of if quantity.entry.by else ""
    words = [quantity.held_out, quantity.entry.name, by, f"minus {quantity.minus}'s" if quantity.minus else ""]
    return " ".join(word for word in (*words, _ARROWS[_better(name)]) if word)


def _show_plain(table: pd.DataFrame) -> Shown:
    """Show any other table: whole numbers with thousands separators, other numbers with four digits."""

    def cell(value: Any) -> Cell:
        if isinstance(value, str):
            number = re.fullmatch(r"(-?\d[\d,]*(?:\.\d+)?) ?%?", value)
            return Cell(value, number=bool(number), key=float(number[1].replace(",", "")) if number else None)
        if pd.isna(value):
            return Cell(_NOTHING)
        if isinstance(value, Integral) and not isinstance(value, bool):
            return Cell(f"{value:,}", number=True, key=float(value))
        return Cell(f"{value:.4g}", number=True, key=float(value)) if isinstance(value, Real) else Cell(str(value))

    rows = (tuple(cell(value) for value in row) for row in table.itertuples(index=False, name=None))
    return Shown(tuple(str(name) for name in table.columns), tuple(("measured", row) for row in rows))


def seeds_line(table: pd.DataFrame) -> str:
    """First line of a table of measurements, with the number of seeds; "" for other tables."""
    if not {"seeds", "kind"} <= set(table.columns):
        return ""
    most = int(table.loc[table["kind"] == "measured", "seeds"].max())
    if most == 1:
        return "One seed: the variation over seeds of the selection and the training is not known."
    return f"Mean over up to {most} seeds of the selection and the training, ± their standard deviation."


def note(name: str, table: pd.DataFrame) -> str:
    """Caption of a table: what it shows, how to read it, and what its reference rows are."""
    parts = [TABLE_NOTES.get(name, "")]
    shown = show(table)
    if any(heading.endswith(("↓", "↑")) for heading in shown.headings):
        parts.append("↓ lower is better, ↑ higher is better, bold: the best measured value.")
    if any(cell.interval.startswith("[") for _, cells in shown.rows for cell in cells):
        parts.append("Brackets: 95 % interval for the sampling of images, without the variation over training seeds.")
    if any((quantity := Quantity.parse(column)) and quantity.minus for column in table.columns):
        parts.append("Differences are paired (same prompts, noise and held-out images); below zero is better.")
    if encoder := table.attrs.get("encoder"):
        parts.append(f"The encoder {encoder} is not used for selection, autoencoder or training.")
    if "kind" in table.columns and (table["kind"] == REFERENCE).any():
        rows = table.loc[table["kind"] == REFERENCE, "prune"].unique()
        parts.append(
            "Reference rows, with the same numbers of images as all other rows: "
            + "; ".join(f"{row}: {REFERENCE_ROWS[row]}" for row in rows if row in REFERENCE_ROWS)
            + "."
        )
    return " ".join(part for part in parts if part)


def scene_table(confusions: Mapping[str, Mapping[str, Mapping[str, int]]]) -> pd.DataFrame:
    """How often each scene is recognised: one row per scene and one for all, one column per model or photographs.

    Args:
        confusions: for each column, the number of images by true scene and then by recognised scene.
    """
    first = next(iter(confusions.values()))
    rows = []
    for scene in [*sorted({scene for of_one in confusions.values() for scene in of_one}), None]:
        row = {"scene": "all" if scene is None else scene}
        for name, confusion in confusions.items():
            chosen = confusion if scene is None else {scene: confusion.get(scene, {})}
            images = sum(sum(seen.values()) for seen in chosen.values())
            if confusion is first:
                row["images"] = images
            right = sum(seen.get(of, 0) for of, seen in chosen.items())
            row[name] = round(right / images, 3) if images else None
        rows.append(row)
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- data frames to files


def _texts(shown: Shown, bold: str, escape: Any = str) -> pd.DataFrame:
    """The cells as texts, with the best values in bold."""
    rows = [
        [
            f"{bold.format(escape(cell.value)) if cell.best else escape(cell.value)} {escape(cell.interval)}".strip()
            for cell in cells
        ]
        for _, cells in shown.rows
    ]
    return pd.DataFrame(rows, columns=[escape(heading) for heading in shown.headings])


def to_markdown(name: str, table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown: the line about seeds, the table with reference rows at the bottom, and its note."""
    shown = show(table)
    texts = _texts(shown, "**{}**", lambda text: text.replace("|", "\\|"))
    align = ["right" if number else "left" for number in shown.numeric]
    body = texts.to_markdown(index=False, tablefmt="pipe", colalign=align, disable_numparse=True)
    return _with_notes(name, table, body)


def to_text(name: str, table: pd.DataFrame, width: int) -> str:
    """A table for a terminal: Markdown; if that is wider than `width`, with a line per column if that is narrower."""
    markdown = to_markdown(name, table)
    if _width(markdown) <= width:
        return markdown
    shown = show(table)
    texts = _texts(shown, "**{}**", str).T.reset_index()
    texts.columns = texts.iloc[0]
    align = ["left", *["right"] * (texts.shape[1] - 1)]
    body = texts[1:].to_markdown(index=False, tablefmt="pipe", colalign=align, disable_numparse=True)
    return min(markdown, _with_notes(name, table, body), key=_width)


def _with_notes(name: str, table: pd.DataFrame, body: str) -> str:
    """The text of a table below the line about seeds and above its note."""
    return "\n\n".join(part for part in (seeds_line(table), body, note(name, table)) if part) + "\n"


def _width(markdown: str) -> int:
    """Length of the longest line of the table in a text."""
    return max(len(line) for line in markdown.splitlines() if line.startswith("|"))


_SYMBOLS = {"×": r"$\times$", "³": r"\textsuperscript{3}", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "–": "--"}
_SYMBOLS |= {"±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}


@lru_cache(maxsize=4096)
def latex_escape(text: str) -> str:
    """Text with all special characters of LaTeX escaped (the rules of pandas, and the symbols of this project)."""
    escaped = pd.DataFrame([[text]]).style.format(escape="latex").hide(axis="index").hide(axis="columns")
    line = escaped.to_latex().splitlines()[1].removesuffix(r" \\")
    return "".join(_SYMBOLS.get(character, character) for character in line)


def to_latex(name: str, table: pd.DataFrame) -> str:
    """A booktabs table of the text width with caption and label `tab:<name>`; a rule separates the reference rows."""
    shown = show(table)
    texts = _texts(shown, r"\textbf{{{}}}", latex_escape)
    columns = "".join("r" if number else "l" for number in shown.numeric)
    style = texts.style.hide(axis="index")
    body = style.to_latex(hrules=True, column_format=columns)
    kinds = [kind for kind, _ in shown.rows]
    lines = body.splitlines()
    start = lines.index(r"\midrule") + 1
    for index in range(len(kinds) - 1, 0, -1):
        if kinds[index] != kinds[index - 1]:
            lines.insert(start + index, r"\midrule")
    caption = " ".join(part for part in (seeds_line(table), note(name, table)) if part)
    head = [r"% needs \usepackage{booktabs,graphicx}", r"\begin{table}", r"\centering"]
    head += [rf"\caption{{{latex_escape(caption)}}}", rf"\label{{tab:{name}}}"]
    head += [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
    return "\n".join([*head, *lines[:-1], lines[-1] + "}", r"\end{table}"]) + "\n"


def to_csv(table: pd.DataFrame) -> str:
    """The table as CSV, with all columns at full precision."""
    return table.to_csv(index=False, lineterminator="\n")


def write_tables(tables: Mapping[str, pd.DataFrame], directory: Path | str) -> list[Path]:
    """Write `<name>.md`, `<name>.tex` and `<name>.csv` of every table and return their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in tables.items():
        texts = {".md": to_markdown(name, table), ".tex": to_latex(name, table), ".csv": to_csv(table)}
        for suffix, text in texts.items():
            paths.append(directory / f"{name}{suffix}")
            write_text(paths[-1], text)
    return paths


def publish(results: Path, name: str) -> None:
    """Write the tables of `results/results.jsonl`, print the table of this name, and print where they are.

    A table that is wider than the terminal is printed with a line per column if it is narrower then.
    """
    tables = build_tables(read_results(results / "results.jsonl"))
    write_tables(tables, results)
    print(to_text(name, tables[name], shutil.get_terminal_size((120, 24)).columns))
    print(f"results: {results}")
