"""The report on image-text pairs: scores with the cut of every scene, and its best and worst pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from report.figures import pair_histogram, score_edges, signed
from report.page import LEADS, Caption, PairCard, Picture, ScenePairs, figure_bytes, write_report
from report.prune_report import MOST_SCENES, NO_SCENE, REPORT_PAGE, percentage
from runtime.artefacts import read_json
from runtime.progress import progress

PAIRS_PAGE = "pairs.html"
PAIRS_LINK, BACK_LINK = "Image-text pairs: scores, best and worst", "Report of the pruning run"
#: Largest number of scenes with a separate histogram, the largest first.
MOST_PANELS = 24
#: Number of best pairs, and of worst pairs, shown for each scene.
PER_GROUP = 6
#: Longer side of a shown image in pixels, and length of a shown caption in characters.
THUMBNAIL = 128
LONGEST_CAPTION = 220
#: Columns that are read.
COLUMNS = ["image", "scene", "caption", "source", "round", "evidence", "fit", "mismatch", "chosen"]


@dataclass(frozen=True)
class PairTable:
    """Candidate captions of the captioning loops, and the decisions on them.

    Attributes:
        rows: the columns `COLUMNS`, and `given` (scorers learned from it), `bad` (mismatch probability above the cut),
            `thrown` (bad and not the best of its image) and `kept` (its image is kept).
        most_mismatch: the cut, a probability.
    """

    rows: pd.DataFrame
    most_mismatch: float

    @classmethod
    def of(cls, candidates: pd.DataFrame, kept: np.ndarray, most_mismatch: float) -> PairTable:
        """Make the table of a pruning run.

        Args:
            candidates: rows of the loops' table.
            kept: int64, rows of the kept images in the corpus.
            most_mismatch: the cut, a probability.
        """
        # if no image came with a caption, the captions of the first round are used as given ones
        first = candidates["round"].min() if len(candidates) else 0
        bad = candidates["mismatch"] > most_mismatch
        rows = candidates.assign(
            scene=candidates["scene"].astype(str),
            given=candidates["round"] == first,
            bad=bad,
            thrown=bad & ~candidates["chosen"],
            kept=candidates["image"].isin(kept),
        )
        return cls(rows, most_mismatch)

    @property
    def given(self) -> pd.DataFrame:
        return self.rows[self.rows["given"]]

    @property
    def chosen(self) -> pd.DataFrame:
        """The best candidate of every image."""
        return self.rows[self.rows["chosen"]]

    @property
    def new(self) -> pd.Series:
        """Kind of each chosen caption: "repaired", "described" or "" (given).

        A new caption is "repaired" if its image came with captions, and "described" if it came without.
        """
        chosen = self.chosen
        had = chosen["image"].isin(self.given["image"])
        words = np.where(chosen["given"], "", np.where(had, "repaired", "described"))
        return pd.Series(words, index=chosen.index)


def cut_of(evidence: np.ndarray, bad: np.ndarray) -> float | None:
    """Evidence that separates the mismatched from the matched pairs of a scene, halfway between the nearest of both.

    Such a value exists because the mismatch probability in a scene never grows with the evidence.

    Args:
        evidence: float [P].
        bad: bool [P], whether a pair is mismatched.
    Returns:
        the value; None if all pairs are matched or all are mismatched.
    """
    if bad.all() or not bad.any():
        return None
    return (float(evidence[bad].max()) + float(evidence[~bad].min())) / 2


def cuts_by_scene(table: PairTable) -> dict[str, float]:
    """The cut of every scene that has one."""
    result = {
        name: cut_of(rows["evidence"].to_numpy(), rows["bad"].to_numpy()) for name, rows in table.rows.groupby("scene")
    }
    return {str(name): cut for name, cut in result.items() if cut is not None}


def best_pairs(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """The chosen and not mismatched candidates that fit best, the best first."""
    good = rows[rows["chosen"] & ~rows["bad"]]
    return good.sort_values("fit", ascending=False, kind="stable").head(most)


def worst_pairs(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """The given candidates that are most likely mismatched, one per image, the worst first.

    Candidates of equal probability are ordered by evidence; less evidence is worse.
    """
    given = rows[rows["given"]].sort_values(["mismatch", "evidence"], ascending=[False, True], kind="stable")
    return given.drop_duplicates("image").head(most)


def shortened(text: str, most: int = LONGEST_CAPTION) -> str:
    """A caption on one line of at most `most` characters; an ellipsis replaces the rest."""
    text = " ".join(text[: 20 * most].split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def write_pairs_report(path: Path | str, captions: Path, kept: np.ndarray, images: np.ndarray, name: str) -> None:
    """Write the page of one pruning run; reads at most `2 * PER_GROUP` images of at most `MOST_SCENES` scenes.

    Args:
        path: path of the page.
        captions: directory of the loops' stage.
        kept: int64, rows of the corpus that the method keeps.
        images: uint8 [N, R, R, 3], memory-mapped.
        name: name of the method.
    """
    summary = read_json(captions / "summary.json")
    candidates = pd.read_parquet(captions / "captions.parquet", columns=COLUMNS)
    table = PairTable.of(candidates, kept, float(summary["most_mismatch"]))
    scenes = table.chosen["scene"].value_counts()
    names = sorted(scenes.index, key=lambda scene: (-scenes[scene], scene))
    fractions = {scene: key_figures.get("mismatched_fraction") for scene, key_figures in summary["scenes"].items()}
    by_scene = _scenes(table, names, fractions)
    pairs = _pairs(table, images, names, by_scene)
    write_report(
        path,
        title=f"{name}: {len(table.rows):,} captions of {len(scenes):,} scenes",
        intro=_intro(table, summary, name),
        key_figures=_key_figures(table, summary, kept),
        tables={"scenes": by_scene} if len(by_scene) else {},
        figures=_figures(table, captions),
        panels=_panels(table, captions, names, fractions),
        pairs=pairs,
        links={BACK_LINK: REPORT_PAGE},
        notes={
            "figures": "Blue: the given pairs. Grey: pairs whose captions were shuffled among scenes. Where the blue "
            "curve follows the grey one, captions fit no better than shuffled ones. Captions left of the cut are "
            "thrown out; each scene has its own cut. The text below a scene gives the estimated fraction of its "
            "captions that are mismatched." + _left_out(len(names) - MOST_PANELS, "drawn"),
            "tables": "Exact counts, the largest scene first. Click on a heading to sort.",
            "scenes": "Mismatched fraction: estimated fraction of the given captions that are of another scene. Thrown "
            "out: given captions beyond the cut, except the best caption of an image. Repaired: images whose new "
            "caption is better than the given one. No good one: images whose best caption is beyond the cut.",
            "pairs": LEADS["pairs"] + _left_out(len(names) - MOST_SCENES, "shown"),
        },
    )


def _left_out(scenes: int, what: str) -> str:
    return f" The {scenes:,} smallest scenes are not {what}." if scenes > 0 else ""


def _intro(table: PairTable, summary: Mapping[str, Any], name: str) -> str:
    new = table.new
    repaired, described = int((new == "repaired").sum()), int((new == "described").sum())
    without = int(table.chosen["bad"].sum())
    more = f", {described:,} images without a caption were described" if described else ""
    return (
        f"Every caption was scored by how well it fits its image, compared with captions of other scenes. An estimated "
        f"{percentage(summary['mismatched_fraction'])} of the given captions are of another scene. {repaired:,} images "
        f"got a better caption from the captioner {summary['captioner']}{more}, {without:,} have no good caption.\n\n"
        f"The method {name} keeps {int(table.chosen['kept'].sum()):,} of the {len(table.chosen):,} images that have a "
        "caption. Training reads the best captions, unless captioning.captions=given."
    )


def _key_figures(table: PairTable, summary: Mapping[str, Any], kept: np.ndarray) -> dict[str, str]:
    new, chosen = table.new, table.chosen
    sources = ", ".join(f"{count:,} {source}" for source, count in summary["sources"].items())
    refused = ", ".join(f"{count:,} {reason}" for reason, count in summary["refused"].items())
    described = int((new == "described").sum())
    nameless = len(np.setdiff1d(kept, chosen["image"]))
    return {
        "candidates": f"{len(table.rows):,}" + (f": {sources}" if sources else ""),
        "images": f"{len(chosen):,}",
        "mismatched fraction": percentage(summary["mismatched_fraction"]),
        "given captions thrown out": f"{int(table.given['thrown'].sum()):,}",
        "images repaired": f"{int((new == 'repaired').sum()):,}",
        **({"images described that had no caption": f"{described:,}"} if described else {}),
        "images without a good caption": f"{int(chosen['bad'].sum()):,}",
        "images kept": f"{len(kept):,}" + (f", {nameless:,} without a caption" if nameless else ""),
        "refused captions": refused or "none",
        "thrown out above": f"{table.most_mismatch:.0%} mismatch",
        "scorers": ", ".join(summary["scorers"]),
        "captioner": str(summary["captioner"]),
    }


def _figures(table: PairTable, captions: Path) -> list[Picture]:
    """Histograms of both scores over all scenes."""
    given, cuts = table.given, list(cuts_by_scene(table).values())
    if len(given) == 0:
        return []
    line = "The line is the median of the cuts, the band reaches from the lowest to the highest."
    if len(cuts) < 2:
        line = "The line is the cut." if cuts else "No scene has captions on both sides of the cut."
    titles = {
        "evidence": ("Is it another scene's caption?", f"Shuffled among scenes. {line}", "other", cuts),
        "fit": (
            "Is it another image's caption?",
            "Shuffled among images of the same scene. Captions of one scene are often similar; then the blue and the "
            "grey curve are similar too. The best caption of an image is the good one with the largest score.",
            "same",
            (),
        ),
    }
    figures = []
    for column, (title, caption, kind, lines) in titles.items():
        scores, shuffled = given[column].to_numpy(), np.load(captions / f"shuffled_{kind}.npy")
        figure = pair_histogram(scores, shuffled, score_edges(scores, shuffled), lines, title=column.capitalize())
        figures.append(Picture(title, caption, figure_bytes(figure)))
    return figures


def _panels(
    table: PairTable, captions: Path, names: Sequence[str], fractions: Mapping[str, float | None]
) -> list[Picture]:
    """A small histogram of the evidence in each of the largest scenes, all on the same axis."""
    cuts, shuffled = cuts_by_scene(table), np.load(captions / "shuffled_other.npy")
    edges = score_edges(table.given["evidence"].to_numpy(), shuffled)
    by_scene = dict(iter(table.given.groupby("scene")["evidence"]))
    panels = []
    for name in progress(names[:MOST_PANELS], "histograms of scenes", unit="scene"):
        own, scores = [cuts[name]] if name in cuts else [], by_scene.get(name, pd.Series(dtype=float)).to_numpy()
        caption = f"{_known(fractions.get(name))} mismatched, " + (f"cut\u00a0{signed(own[0])}" if own else "no cut")
        figure = pair_histogram(scores, shuffled, edges, own, small=True)
        panels.append(Picture(name or NO_SCENE, caption, figure_bytes(figure)))
    return panels


def _known(fraction: float | None) -> str:
    return "unknown" if fraction is None else percentage(fraction)


def _scenes(table: PairTable, names: Sequence[str], fractions: Mapping[str, float | None]) -> pd.DataFrame:
    """Table of counts by scene, in the order of `names`."""
    chosen = table.chosen.assign(**{word: table.new == word for word in ("repaired", "described")})
    chosen["images"] = 1
    given = table.given.assign(captions=1)
    counts = chosen.groupby("scene")[["images", "repaired", "described", "bad", "kept"]].sum()
    counts = counts.join(given.groupby("scene")[["captions", "thrown"]].sum()).fillna(0).astype(int).loc[list(names)]
    described = {"described": counts["described"]} if counts["described"].any() else {}
    return pd.DataFrame(
        {
            "scene": [name or NO_SCENE for name in names],
            "images": counts["images"],
            "captions": counts["captions"],
            "mismatched fraction": [_known(fractions.get(name)) for name in names],
            "thrown out": counts["thrown"],
            "repaired": counts["repaired"],
            **described,
            "no good one": counts["bad"],
            "kept": counts["kept"],
        }
    ).reset_index(drop=True)


def _pairs(table: PairTable, images: np.ndarray, names: Sequence[str], counts: pd.DataFrame) -> list[ScenePairs]:
    """Best and worst pairs of the largest scenes.

    Args:
        counts: table from `_scenes`, one row per name.
    """
    by_scene = dict(iter(table.rows.groupby("scene")))
    groups = {
        name: (best_pairs(by_scene[name], PER_GROUP), worst_pairs(by_scene[name], PER_GROUP))
        for name in names[:MOST_SCENES]
    }
    shown = {int(image) for both in groups.values() for group in both for image in group["image"]}
    thumbnails = {image: _thumbnail(images[image]) for image in sorted(shown)}  # sorted: one pass over the file
    result = []
    for (name, (best, worst)), row in zip(groups.items(), counts.to_dict("records"), strict=False):
        cards = _cards(by_scene[name], best, worst, thumbnails)
        thrown = f"{row['thrown out']:,} of {row['captions']:,} given captions thrown out"
        titles = {"best": "Best pairs", "worst": f"Worst pairs; {thrown}"}
        line = f"{row['images']:,} images, {row['mismatched fraction']} of captions mismatched, "
        line += f"{row['kept']:,} kept"
        shown_groups = {kind: (titles[kind], cards[kind]) for kind in cards if cards[kind]}
        result.append(ScenePairs(name or NO_SCENE, line, shown_groups))
    return result


def _cards(
    rows: pd.DataFrame, best: pd.DataFrame, worst: pd.DataFrame, thumbnails: Mapping[int, np.ndarray]
) -> dict[str, list[PairCard]]:
    """The pairs of a scene to show, each with the caption that it replaced or that replaced it."""
    old = worst_pairs(rows[rows["image"].isin(best["image"])], len(rows))
    old = old[old["thrown"]].set_index("image").to_dict("index")
    new = rows[rows["chosen"] & rows["image"].isin(worst["image"])].set_index("image").to_dict("index")
    cards: dict[str, list[PairCard]] = {"best": [], "worst": []}
    for row in best.to_dict("records"):
        before = [old[row["image"]]] if row["image"] in old and not row["given"] else []
        cards["best"].append(_card(row, [*before, row], thumbnails))
    for row in worst.to_dict("records"):
        cards["worst"].append(_card(row, [row, new[row["image"]]] if row["thrown"] else [row], thumbnails))
    return cards


def _card(
    pair: Mapping[str, Any], captions: Sequence[Mapping[str, Any]], thumbnails: Mapping[int, np.ndarray]
) -> PairCard:
    return PairCard(thumbnails[pair["image"]], [_caption(row) for row in captions], bool(pair["kept"]))


def _caption(row: Mapping[str, Any]) -> Caption:
    chance = row["mismatch"]
    mismatch = "under 0.1%" if chance < 0.001 else f"{chance:.1%}" if chance < 0.0995 else f"{chance:.0%}"
    alone = ", no better caption" if row["bad"] and row["chosen"] else ""
    note = f"{row['source']}, mismatch {mismatch}, fit\u00a0{signed(row['fit'])}{alone}"
    return Caption(shortened(row["caption"]), note, bool(row["thrown"]))


def _thumbnail(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(np.asarray(image))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(picture)
