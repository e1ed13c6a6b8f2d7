"""The report on a pruning run: which images were kept and dropped, why, and how the balance of scenes changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from report.data_card import REASONS
from report.embedding_map import embedding_map
from report.figures import cluster_sizes, entropy_histogram, map_figure, scene_bars, world_figure
from report.page import LEADS, Gallery, SampleGrid, figure_bytes, write_report

REPORT_PAGE = "report.html"
#: Largest number of scenes with a separate gallery, the largest first.
MOST_SCENES = 40
NO_SCENE = "no scene"
#: Counts that the page shows if the method provides them.
COUNTED = ("dropped_by_entropy", "returned_by_entropy", "skipped_as_duplicate")
#: Largest number of images on the map.
MAPPED = 3000
WORLD_MAPPED = 6000
LEAKS = "Leaks between the splits"


#: Notes under the headings of the report.
_NOTES = {
    "tables": "Exact counts. The budget is a fraction of all images of the corpus, including unreadable ones.",
    "figures": "Grey is the corpus before pruning, blue is the kept subset.",
    "scenes": "Images by scene before and after pruning. If the long tail is preserved, small scenes have a high kept "
    "fraction.",
    "reasons": "Reasons why images were kept or dropped; each image has one reason.",
    "sheets": "Images of two splits that are near-duplicates pixel by pixel. A measurement on the left image of a "
    "pair uses content that also occurs in the split of the right one. Images of the same place on another date, and "
    "of different locations, are counted separately and are no duplicates, unless other_date or elsewhere says "
    "otherwise.",
    "leaks": "Numbers of images of a split that are similar to an image of another split, among the compared images.",
    "seconds": "Time by stage; a stage with a cached result takes almost no time.",
    "clusters": "Sizes of the clusters from which images were drawn. Balanced pruning reduces the largest clusters "
    "and keeps the smallest complete.",
}


def write_prune_report(
    path: Path | str,
    selection: pd.DataFrame,
    summary: Mapping[str, Any],
    images: np.ndarray,
    generator: np.random.Generator,
    per_group: int = 24,
    embeddings: np.ndarray | None = None,
    locations: pd.DataFrame | None = None,
    links: Mapping[str, str] | None = None,
    leaks: Sequence[SampleGrid] = (),
) -> None:
    """Write the report of one pruning run; reads at most `2 * per_group` images of at most `MOST_SCENES` scenes.

    Args:
        selection: the rows of selection.parquet, in corpus order.
        summary: the content of summary.json.
        images: uint8 [N, R, R, 3], memory-mapped.
        generator: draws the images shown.
        per_group: number of images shown for each group: kept images of a scene, dropped images of a scene, and images
            dropped for one reason.
        embeddings: float [N, D], memory-mapped, for the map; None: no map.
        locations: N rows with lon and lat in degrees, NaN: unknown, for the world map; None: no world map.
        links: pages next to this one, by title.
        leaks: grids of images that the splits share.
    """
    galleries, left_out = _galleries(selection, images, generator, per_group)
    reasons = reason_galleries(selection, images, generator, per_group)
    tables = {"scenes": _scenes(summary), "reasons": _reasons(selection), "seconds": _seconds(summary)}
    if result := summary.get("leaks"):
        tables["leaks"] = _leaks(result)
    if (selection["cluster"] >= 0).any():
        tables["clusters"] = _clusters(selection)
    write_report(
        path,
        title=f"{summary['method']}: {summary['kept']:,} of {summary['images']:,} images kept",
        intro=f"{percentage(1 - summary['kept'] / max(summary['images'], 1))} of the corpus was removed by the method "
        f"{summary['method']}. This page shows kept and dropped images, and the reasons.",
        key_figures=_key_figures(summary),
        links=links,
        tables={name: table for name, table in tables.items() if len(table)},
        figures=[
            *_figures(selection, summary),
            *_map(selection, embeddings, generator),
            *_world(selection, locations, generator),
        ],
        grids=leaks,
        headings={"sheets": LEAKS},
        galleries={
            title: groups
            for title, groups in ((str(summary["method"]), galleries), ("dropped, by reason", reasons))
            if groups
        },
        notes=_NOTES
        | {"galleries": LEADS["galleries"] + (f" The {left_out:,} smallest scenes are not shown." if left_out else "")},
    )


def _galleries(
    selection: pd.DataFrame, images: np.ndarray, generator: np.random.Generator, per_group: int
) -> tuple[list[Gallery], int]:
    """Galleries of the largest scenes, and the number of scenes left out; unreadable images cannot be shown."""
    readable = (selection["reason"] != "unreadable").to_numpy()
    kept = selection["kept"].to_numpy(dtype=bool)
    scenes = selection["scene"].fillna("").astype(str).to_numpy(dtype=object)
    codes, names = pd.factorize(scenes, sort=True)
    counts = np.bincount(codes[readable], minlength=len(names))
    order = [code for code in np.argsort(-counts, kind="stable") if counts[code]]
    galleries = []
    for code in order[:MOST_SCENES]:
        inside = readable & (codes == code)
        groups = [np.flatnonzero(inside & state) for state in (kept, ~kept)]
        # sorted: one pass over the file
        shown = [np.sort(generator.permutation(group)[:per_group]) for group in groups]
        title = names[code] or ("all images" if len(order) == 1 else NO_SCENE)
        galleries.append(Gallery(title, images[shown[0]], images[shown[1]], len(groups[0]), len(groups[1])))
    return galleries, max(len(order) - MOST_SCENES, 0)


def reason_galleries(
    selection: pd.DataFrame, images: np.ndarray, generator: np.random.Generator, per_group: int
) -> list[Gallery]:
    """Galleries of the images that were dropped for each reason; unreadable images cannot be shown."""
    reasons = selection["reason"].to_numpy(dtype=object)
    nothing, galleries = images[:0], []
    for reason in sorted(set(reasons) - {"kept", "unreadable"}):
        rows = np.flatnonzero(reasons == reason)
        shown = np.sort(generator.permutation(rows)[: 2 * per_group])
        note = REASONS.get(str(reason), "dropped for this reason")
        galleries.append(Gallery(reason, nothing, np.array(images[shown]), 0, len(rows), note))
    return galleries


def _map(
    selection: pd.DataFrame, embeddings: np.ndarray | None, generator: np.random.Generator
) -> list[tuple[str, str, bytes]]:
    """The map of a sample; half of the sample are kept images if there are enough."""
    if embeddings is None:
        return []
    kept = selection["kept"].to_numpy(dtype=bool)
    readable = (selection["reason"] != "unreadable").to_numpy()
    groups = [np.flatnonzero(readable & state) for state in (kept, ~kept)]
    rows = np.sort(np.concatenate([generator.permutation(group)[: MAPPED // 2] for group in groups]))
    if len(rows) < 3:
        return []
    scenes = selection["scene"].fillna("").to_numpy(dtype=str)[rows]
    locations = embedding_map(np.asarray(embeddings[rows], dtype=np.float32), scenes)
    caption = (
        f"{len(rows):,} sampled images in the plane of the embedding space that separates the scenes best. Blue should "
        "cover the same area as grey, evenly."
    )
    return [("Map", caption, figure_bytes(map_figure(locations, scenes, kept[rows])))]


def _world(
    selection: pd.DataFrame, locations: pd.DataFrame | None, generator: np.random.Generator
) -> list[tuple[str, str, bytes]]:
    """The world map of a sample of the images with known locations; half are kept images if there are enough."""
    if locations is None:
        return []
    locations = locations[["lon", "lat"]].apply(pd.to_numeric, errors="coerce")
    known = np.isfinite(locations.to_numpy(dtype=float)).all(axis=1)
    kept = selection["kept"].to_numpy(dtype=bool)
    groups = [np.flatnonzero(known & state) for state in (kept, ~kept)]
    rows = np.sort(np.concatenate([generator.permutation(group)[: WORLD_MAPPED // 2] for group in groups]))
    if len(rows) == 0:
        return []
    shown = locations.iloc[rows]
    figure = world_figure(shown["lon"].to_numpy(), shown["lat"].to_numpy(), kept[rows])
    caption = f"Locations of {len(rows):,} images. Kept images should occur in every region with informative images."
    return [("World", caption, figure_bytes(figure))]


def _figures(selection: pd.DataFrame, summary: Mapping[str, Any]) -> list[tuple[str, str, bytes]]:
    figures = []
    for key, title in (("scenes", "Scenes"), ("true_scenes", "Scenes by the corpus's own labels")):
        scenes = summary.get(key) or {}
        if len(scenes) < 2 or (key == "true_scenes" and scenes == summary.get("scenes")):
            continue
        before, after = ({name: counts[state] for name, counts in scenes.items()} for state in ("before", "after"))
        caption = "Left: images on a log scale. Right: their fraction; after pruning, even bars mean a balanced subset."
        figures.append((title, caption, figure_bytes(scene_bars(before, after))))
    entropy = selection["entropy"].to_numpy(dtype=np.float32)
    if np.isfinite(entropy).any():
        threshold = summary.get("entropy_threshold")
        caption = "Flat images (open water, cloud, no data) lie at the left, textured ones at the right." + (
            " Images left of the line were removed first." if threshold is not None else ""
        )
        figure = entropy_histogram(entropy, threshold, selection["kept"].to_numpy(dtype=bool))
        figures.append(("Entropy", caption, figure_bytes(figure)))
    sizes = _cluster_counts(selection)
    if len(sizes):
        caption = "A steep grey slope means that a few kinds of images dominate the corpus; blue should be flatter."
        figure = cluster_sizes(sizes["before"].to_numpy(), sizes["after"].to_numpy())
        figures.append(("Clusters", caption, figure_bytes(figure)))
    return figures


def _key_figures(summary: Mapping[str, Any]) -> dict[str, str]:
    threshold = summary.get("entropy_threshold")
    key_figures = {
        "method": str(summary["method"]),
        "images": f"{summary['images']:,}",
        "kept": f"{summary['kept']:,}",
        "unreadable": f"{summary['unreadable']:,}",
        **({"why": _why(summary["quarantined"])} if summary.get("quarantined") else {}),
        "ratio removed": f"{summary['ratio']:g}",
        "seed": str(summary["seed"]),
    }
    if strata := summary.get("strata"):
        origin = "of the reference set" if strata["source"] == "reference" else "strata of the corpus (no labels)"
        key_figures["scenes"] = f"{strata['count']:,}, {origin}"
    if threshold is not None:
        key_figures["entropy threshold"] = f"{threshold:.2f} bits"
    counts = summary.get("diagnostics") or {}
    key_figures |= {name.replace("_", " "): f"{counts[name]:,}" for name in COUNTED if name in counts}
    if (accuracy := counts.get("scene_accuracy")) is not None:
        key_figures["scene accuracy on the reference"] = f"{accuracy:.1%}"
    if weights := summary.get("weights"):
        key_figures["largest weight"] = f"{weights['largest']:,.0f}"
        key_figures["effective size by weight"] = f"{weights['effective_size']:,.0f} images"
    if summary.get("images_per_second"):
        key_figures["images a second"] = f"{summary['images_per_second']:,.0f}"
    return key_figures


def _why(quarantined: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in quarantined.items())


def _scenes(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Table with scene, before, after, kept fraction, fraction before and fraction after, the largest scene first."""
    scenes = sorted((summary.get("scenes") or {}).items(), key=lambda item: (-item[1]["before"], item[0]))
    total = max(sum(counts["before"] for _, counts in scenes), 1)
    kept = max(sum(counts["after"] for _, counts in scenes), 1)
    return pd.DataFrame(
        [
            {
                "scene": name or NO_SCENE,
                "before": counts["before"],
                "after": counts["after"],
                "kept": percentage(counts["after"] / max(counts["before"], 1)),
                "fraction before": percentage(counts["before"] / total),
                "fraction after": percentage(counts["after"] / kept),
            }
            for name, counts in scenes
        ]
    )


def _reasons(selection: pd.DataFrame) -> pd.DataFrame:
    counts = selection["reason"].value_counts()
    return pd.DataFrame(
        [
            {"reason": name, "images": int(count), "fraction": percentage(count / max(len(selection), 1))}
            for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ]
    )


def _leaks(result: Mapping[str, Any]) -> pd.DataFrame:
    """Table with one row per pair of splits."""
    named = {f"{name} in train": part for name, part in result["held_out"].items()}
    if result.get("val_test"):
        named["val in test"] = result["val_test"]
    counts = ("looked_at", "exact_copies", "near_duplicates", "same_location_other_date", "look_alike_elsewhere")
    return pd.DataFrame(
        [
            {"splits": name, **{count.replace("_", " "): f"{part.get(count, 0):,}" for count in counts}}
            for name, part in named.items()
        ]
    )


def _seconds(summary: Mapping[str, Any]) -> pd.DataFrame:
    seconds = summary.get("seconds") or {}
    rows = [{"stage": name, "seconds": f"{value:.1f}"} for name, value in seconds.items()]
    return pd.DataFrame([*rows, {"stage": "total", "seconds": f"{sum(seconds.values()):.1f}"}] if rows else [])


def _cluster_counts(selection: pd.DataFrame) -> pd.DataFrame:
    """Counts before and after by (scene, cluster), because cluster numbers may start again in every scene."""
    inside = selection[selection["cluster"] >= 0]
    return inside.groupby(["scene", "cluster"])["kept"].agg(before="size", after="sum")


def _clusters(selection: pd.DataFrame) -> pd.DataFrame:
    sizes = _cluster_counts(selection)
    points = {"largest": 1.0, "90 %": 0.9, "median": 0.5, "10 %": 0.1, "smallest": 0.0}
    rows = [
        {"cluster": name, **{state: round(float(sizes[state].quantile(point))) for state in ("before", "after")}}
        for name, point in points.items()
    ]
    return pd.DataFrame([*rows, {"cluster": "clusters with images", **{s: int((sizes[s] > 0).sum()) for s in sizes}}])


def percentage(value: float) -> str:
    """A fraction as a readable percentage."""
    return f"{value:.2%}" if 0 < value < 0.001 else f"{value:.1%}"
