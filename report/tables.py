"""Result rows to tables: DataFrames, and from them Markdown, LaTeX and CSV.

A row of `results.jsonl` is one finished cell: `stage`, `corpus`, `prune`, `ratio`, `seed`, `step`, flat `metrics`,
`fingerprint`, `commit`, `machine`. Tables hold nothing that differs between a resumed and an undisturbed run: no
seconds, no machine, no commit.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import pandas as pd

from runtime.artefacts import plain
from runtime.errors import UserError

Row = Mapping[str, Any]

#: Table name of each stage.
TABLE_OF_STAGE = {
    "generation": "generation",
    "convergence": "convergence",
    "subset": "subset_quality",
    "super_resolution": "super_resolution",
    "semantic_synthesis": "semantic_synthesis",
    "ablation": "ablation",
}
#: What each table shows and how to read it.
TABLE_NOTES = {
    "generation": "Generated images against real held-out images: a scene-balanced set and one as nature mixes it.",
    "convergence": "The same measures during training: at each step every method has seen equally many images.",
    "subset_quality": "The kept real images themselves against the held-out images, before any training; Vendi score "
    "(effective number of kinds), evenness of the true scenes, shares of near-duplicates and of low information.",
    "super_resolution": "Held-out images restored from a quarter of their side; scratch: same network, same steps.",
    "semantic_synthesis": "Images drawn from held-out masks; scratch: same network, same steps.",
    "ablation": "One choice changed at a time.",
    "scenes": "Share of images in which CLIP sees the scene that they are of, among all scenes of the table: generated "
    "from the scene-balanced held-out captions by each method's model, and the photographs with these captions.",
}
#: What each floor is; rows of stage "floor".
FLOOR_NOTES = {
    "halves": "two halves of the held-out set against each other, the least to expect of perfect images",
    "real_train": "real training images, unpruned",
    "reconstruction": "held-out images through the autoencoder, the most its latents can hold",
    "pca16": "held-out images through 16 principal components, the latents' size, without training",
}
KEY = ("stage", "corpus", "prune", "ratio", "seed", "step", "fingerprint")

_CELL = ("corpus", "prune", "ratio", "seed", "step")
_FIRST, _LAST = ("full", "random", "rsprune"), ("scratch",)
_HELD_OUT = ("balanced", "natural")
_METRICS = (
    "fid", "fd_", "kid", "precision", "recall", "density", "coverage", "clip_", "scene_accuracy", "psnr", "ssim",
    "mask_agreement", "feature_distance", "vendi", "scene_entropy", "near_duplicates", "low_information",
)  # fmt: skip
_LOWER = ("fid", "fd_", "kid", "feature_distance", "lpips", "loss", "near_duplicates", "low_information")
_HIGHER = (
    "precision", "recall", "density", "coverage", "clip_", "scene_accuracy", "psnr", "ssim", "mask_agreement", "vendi",
    "scene_entropy",
)  # fmt: skip
_DISTANCES = ("fid", "fd_", "kid")
_TIMING = re.compile(r"(^|_)(seconds?|minutes|hours|time|duration|eta|per_second)($|_)")
_NOTHING = "–"
_DIFFERENCE = "_minus_"


# ---------------------------------------------------------------- results.jsonl


def read_results(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a results file, oldest first; none where the file is missing.

    Raises:
        UserError: a line is not a JSON object with a stage and metrics.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is not JSON ({error.msg}): remove the line and run again") from error
        if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict) or "stage" not in row:
            raise UserError(f"{path}:{number} is no result row (stage, metrics): remove the line and run again")
        rows.append(row)
    return rows


def append_result(path: Path | str, row: Row) -> None:
    """Add a row at the end of a results file; a row with the same `KEY` goes. Readers see the old file or the new one.

    Values that JSON cannot hold (NaN, infinity) become null.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _finite(plain(row))
    with _locked(path.parent):
        rows = [old for old in read_results(path) if _key(old) != _key(new)]
        _write(path, "".join(json.dumps(item, allow_nan=False) + "\n" for item in [*rows, new]))


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One writer at a time in this directory: the cells of a sweep may finish together."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# ---------------------------------------------------------------- rows to DataFrames


def method_order(name: str) -> tuple[int, str]:
    """Sort key of methods: full, random, rsprune, others by name, scratch."""
    if name in _FIRST:
        return _FIRST.index(name), name
    return len(_FIRST) + (name in _LAST), name


def build_tables(rows: Iterable[Row]) -> dict[str, pd.DataFrame]:
    """Tables by name (values of `TABLE_OF_STAGE`), full-precision numbers; a table without measured rows is left out.

    Columns: kind ("measured" or "floor"), corpus, prune, ratio, seed, step, the fields that only ablation rows have,
    then the metrics. Of several rows for one cell the newest counts. Floors stand at the bottom of every table with
    which they share a distance.
    """
    rows = list(rows)
    tables = {}
    for stage, name in TABLE_OF_STAGE.items():
        measured = [_record(row, "measured", extras=stage == "ablation") for row in rows if row["stage"] == stage]
        if not measured:
            continue
        floors = [_record(row, "floor", extras=False) for row in rows if row["stage"] == "floor"]
        tables[name] = _frame(name, measured, floors)
    return tables


def _record(row: Row, kind: str, *, extras: bool) -> dict[str, Any]:
    """A table row; its metrics carry float values, missing ones NaN."""
    record: dict[str, Any] = {"kind": kind, **{name: row.get(name) for name in _CELL}}
    if extras:
        known = {"stage", "metrics", "fingerprint", "commit", "machine", *_CELL}
        record |= {f"field:{name}": str(value) for name, value in row.items() if name not in known}
    for name, value in row["metrics"].items():
        if isinstance(value, (Real, type(None))) and not isinstance(value, bool) and not _TIMING.search(name):
            record[f"metric:{name}"] = math.nan if value is None else float(value)
    return record


def _frame(name: str, measured: list[dict[str, Any]], floors: list[dict[str, Any]]) -> pd.DataFrame:
    metrics = {key for record in measured for key in record if key.startswith("metric:")}
    distances = {key for key in metrics if _base(key.removeprefix("metric:"))[1].startswith(_DISTANCES)}
    corpora = {record["corpus"] for record in measured}
    floors = [record for record in floors if record["corpus"] in corpora and distances & set(record)]
    if name == "generation" and any("metric:psnr" in record for record in floors):
        metrics |= {"metric:psnr"}  # of the autoencoder and of PCA: what the latents can hold
    fields = sorted({key for record in measured for key in record if key.startswith("field:")})
    columns = ["kind", *_CELL, *fields, *sorted(metrics, key=_metric_order)]

    newest = {tuple(record.get(key) for key in ("kind", *_CELL, *fields)): record for record in [*measured, *floors]}
    ordered = sorted(newest.values(), key=lambda record: _row_order(name, record))
    frame = pd.DataFrame([{key: record.get(key) for key in columns} for record in ordered], columns=columns)
    for key in columns:
        if key in ("seed", "step"):
            frame[key] = frame[key].astype("Int64")
        elif key == "ratio" or key.startswith("metric:"):
            frame[key] = frame[key].astype("float64")
    return frame.rename(columns=lambda key: key.split(":", 1)[-1])


def _row_order(name: str, record: dict[str, Any]) -> tuple[Any, ...]:
    """Floors last; by corpus; convergence by step first, so that methods at one step stand together."""
    method = str(record["prune"])
    if record["kind"] == "floor":
        known = list(FLOOR_NOTES)
        rank = (known.index(method) if method in known else len(known), method)
    else:
        rank = method_order(method)
    step = -1 if record["step"] is None else record["step"]
    ratio = -1.0 if record["ratio"] is None else record["ratio"]
    seed = -1 if record["seed"] is None else record["seed"]
    early, late = (step, 0) if name == "convergence" and record["kind"] == "measured" else (0, step)
    fields = sorted((key, value) for key, value in record.items() if key.startswith("field:"))
    return record["kind"] == "floor", str(record["corpus"]), early, rank, ratio, seed, late, fields


def _base(metric: str) -> tuple[str, str]:
    """A metric's held-out set ("" none) and its name without it."""
    held_out, _, rest = metric.partition("_")
    return (held_out, rest) if held_out in _HELD_OUT and rest else ("", metric)


def _metric_order(column: str) -> tuple[Any, ...]:
    """Balanced before natural, distances before scores, a metric before its interval."""
    held_out, name = _base(column.removeprefix("metric:"))
    stem = re.sub(r"_(low|high)$", "", name)
    kind = next((index for index, start in enumerate(_METRICS) if stem.startswith(start)), len(_METRICS))
    sets = (*_HELD_OUT, "")
    return sets.index(held_out), kind, stem, ("", "_low", "_high").index(name[len(stem) :])


# ---------------------------------------------------------------- how a table looks


@dataclass(frozen=True)
class Cell:
    """What one cell shows: a value, its 95 % interval ("" none), and whether it is the best measured one."""

    value: str
    interval: str = ""
    best: bool = False
    number: bool = False

    @property
    def text(self) -> str:
        return f"{self.value} {self.interval}".strip()


@dataclass(frozen=True)
class Shown:
    """A table as it is shown: headings with direction arrows, and rows of cells with their kind."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers only."""
        columns = [[cells[index] for _, cells in self.rows] for index in range(len(self.headings))]
        return tuple(
            any(cell.number for cell in column) and all(cell.number or cell.value == _NOTHING for cell in column)
            for column in columns
        )


def direction(metric: str) -> int:
    """-1: lower is better, 1: higher is better, 0: unknown, or a difference (its best is its metric's)."""
    name = _base(metric)[1]
    if _DIFFERENCE in name:
        return 0
    return -1 if name.startswith(_LOWER) else 1 if name.startswith(_HIGHER) else 0


def show(table: pd.DataFrame) -> Shown:
    """Round a table, fold intervals into their cells and mark the best measured value of every metric.

    Columns that are the same in all measured rows (corpus, seed, step) and columns without any value are left out.
    The best is sought among measured rows of one corpus, and of one step where a method has several. Values that
    round to the same text share the mark; a single value has none. A table without a `kind` is shown as it is.
    """
    if "kind" not in table.columns:
        return _show_plain(table)
    measured = table["kind"] == "measured"
    columns = [name for name in table.columns if _is_shown(table, name, measured)]
    best = {name: _best(table, name, measured) for name in columns if direction(name)}
    rows = []
    for position, (_, row) in enumerate(table.iterrows()):
        cells = tuple(_cell(row, name, best=name in best and position in best[name]) for name in columns)
        rows.append((str(row["kind"]), cells))
    return Shown(tuple(_heading(name) for name in columns), tuple(rows))


def _is_shown(table: pd.DataFrame, name: str, measured: pd.Series) -> bool:
    if name == "kind":
        return not measured.all()
    if name == "step":  # 0: no training at all, as with bicubic
        return table.loc[measured & (table["step"] > 0), name].nunique() > 1
    if name in ("corpus", "seed"):
        return table.loc[measured, name].nunique(dropna=False) > 1
    if re.search(r"_(low|high)$", name) and re.sub(r"_(low|high)$", "", name) in table.columns:
        return False
    return name == "prune" or bool(table[name].notna().any())


def _best(table: pd.DataFrame, name: str, measured: pd.Series) -> set[int]:
    """Positions of the rows with the best value of a metric."""
    several_steps = table[measured].duplicated(["corpus", "prune", "ratio", "seed"]).any()
    groups: dict[Any, list[int]] = {}
    for position, (_, row) in enumerate(table.iterrows()):
        if measured.iloc[position] and pd.notna(row[name]):
            step = None if not several_steps or pd.isna(row["step"]) else row["step"]
            groups.setdefault((row["corpus"], step), []).append(position)
    found: set[int] = set()
    for positions in groups.values():
        if len(positions) > 1:
            values = {position: float(table[name].iloc[position]) for position in positions}
            top = max(values.values(), key=lambda value: direction(name) * value)
            found |= {position for position in positions if _number(name, values[position]) == _number(name, top)}
    return found


def _cell(row: pd.Series, name: str, *, best: bool) -> Cell:
    value = row[name]
    if pd.isna(value):
        return Cell(_NOTHING)
    if isinstance(value, str):
        return Cell(value)
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    interval = ""
    if pd.notna(low) and pd.notna(high):
        places = _places(name, float(value))
        interval = f"[{low:.{places}f}, {high:.{places}f}]"
    return Cell(_number(name, value), interval, best, number=True)


def _number(name: str, value: float) -> str:
    if isinstance(value, Integral):
        return str(value)
    if name == "ratio":
        return f"{value:g}"
    if name == "images_seen":  # a count, though a column with gaps holds floats
        return f"{value:,.0f}"
    sign = "+" if _DIFFERENCE in name else ""
    return f"{value:{sign}.{_places(name, float(value))}f}"


def _places(name: str, value: float) -> int:
    """Decimals worth showing."""
    base = _base(name)[1]
    if base.startswith("kid"):
        return 0 if abs(value) >= 10 else 1
    if base.startswith(("fd_", "fid")):
        return 1
    if base == "vendi":
        return 1
    return 2 if base.startswith("psnr") else 3


def _heading(name: str) -> str:
    held_out, base = _base(name)
    base, _, other = base.partition(_DIFFERENCE)
    label = {"kid_x1000": "KID×10³", "psnr": "PSNR (dB)", "ssim": "SSIM"}.get(base, base)
    if other:
        label += f" minus {other}'s"
    arrow = {-1: "↓", 0: "", 1: "↑"}[direction(name)]
    return " ".join(part for part in (held_out, label, arrow) if part)


def _show_plain(table: pd.DataFrame) -> Shown:
    """Any table: whole numbers with thousands separators, others with four digits."""

    def cell(value: Any) -> Cell:
        if isinstance(value, str):
            return Cell(value, number=bool(re.fullmatch(r"-?[\d.,]+ ?%?", value)))
        if pd.isna(value):
            return Cell(_NOTHING)
        if isinstance(value, Integral) and not isinstance(value, bool):
            return Cell(f"{value:,}", number=True)
        return Cell(f"{value:.4g}", number=True) if isinstance(value, Real) else Cell(str(value))

    rows = (tuple(cell(value) for value in row) for row in table.itertuples(index=False, name=None))
    return Shown(tuple(str(name) for name in table.columns), tuple(("measured", row) for row in rows))


def note(name: str, table: pd.DataFrame) -> str:
    """A table's caption: what it shows, how to read it, what its floors are."""
    parts = [TABLE_NOTES.get(name, "")]
    shown = show(table)
    if any(heading.endswith(("↓", "↑")) for heading in shown.headings):
        parts.append("↓ lower is better, ↑ higher is better, bold: the best measured value.")
    if any(cell.interval for _, cells in shown.rows for cell in cells):
        parts.append("Brackets: 95 % interval of the sampling of images, not of the training seed.")
    if any(_DIFFERENCE in column for column in table.columns):
        parts.append("Differences are paired (same prompts, noise and held-out images): below zero is better.")
    if "kind" in table.columns and (table["kind"] == "floor").any():
        floors = table.loc[table["kind"] == "floor", "prune"].unique()
        named = "; ".join(f"{floor}: {FLOOR_NOTES[floor]}" for floor in floors if floor in FLOOR_NOTES)
        parts.append(
            "Floors are what the yardstick gives where nothing was generated" + (f" ({named})." if named else ".")
        )
    return " ".join(part for part in parts if part)


def scene_table(confusions: Mapping[str, Mapping[str, Mapping[str, int]]]) -> pd.DataFrame:
    """How often each scene is recognised: a row a scene and one for all, a column a model or the photographs.

    Args:
        confusions: by column, images by the scene that they are of and then by the one seen in them.
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


# ---------------------------------------------------------------- DataFrames to files


def to_markdown(name: str, table: pd.DataFrame) -> str:
    """A GitHub table, floors at the bottom, and its note."""
    shown = show(table)
    lines = [
        _markdown_row(shown.headings),
        "| " + " | ".join("---:" if number else "---" for number in shown.numeric) + " |",
    ]
    for _, cells in shown.rows:
        lines.append(_markdown_row([_emphasise(_plain_pipe(c.value), c, "**{}**") for c in cells], escape=False))
    return "\n".join(lines) + f"\n\n{note(name, table)}\n"


def _markdown_row(cells: Sequence[str], *, escape: bool = True) -> str:
    return "| " + " | ".join(_plain_pipe(cell) if escape else cell for cell in cells) + " |"


def _plain_pipe(text: str) -> str:
    return text.replace("|", "\\|")


def _emphasise(value: str, cell: Cell, bold: str) -> str:
    value = bold.format(value) if cell.best else value
    return f"{value} {cell.interval}".strip()


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "×": r"$\times$",
    "³": r"\textsuperscript{3}",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "–": "--",
}


def latex_escape(text: str) -> str:
    """Text with every character that LaTeX would read as a command replaced."""
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(name: str, table: pd.DataFrame) -> str:
    """A booktabs table that fits the text width, with caption and label `tab:<name>`; a rule parts off the floors."""
    shown = show(table)
    columns = "".join("r" if number else "l" for number in shown.numeric)
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_escape(note(name, table))}}}",
        rf"\label{{tab:{name}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(latex_escape(heading) for heading in shown.headings) + r" \\",
        r"\midrule",
    ]
    previous = "measured"
    for kind, cells in shown.rows:
        if kind != previous:
            lines.append(r"\midrule")
        previous = kind
        texts = [_emphasise(latex_escape(cell.value), cell, r"\textbf{{{}}}") for cell in cells]
        lines.append(" & ".join(texts) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def to_csv(table: pd.DataFrame) -> str:
    """Every column at full precision."""
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
            _write(paths[-1], text)
    return paths
