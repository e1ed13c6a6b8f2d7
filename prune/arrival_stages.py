"""The stages of `prune/arrive.py`: compare each new corpus with the kept set, then decide on all arrivals together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from corpus.index import Corpus, open_corpus
from corpus.locations import Locations
from prune.arrivals import (
    BLOCK,
    CANDIDATE,
    LOW_ENTROPY,
    NOT_NEEDED,
    UNREADABLE,
    VERDICTS,
    WORTH,
    Gathered,
    ImageData,
    Likeness,
    among_arrivals,
    counts_of,
    digests,
    fill,
    first_of_scenes,
    nearest_and_repeated_kept,
    priority,
    swaps,
)
from prune.clusters import Points
from prune.features import corpus_embeddings, corpus_entropy, scan_corpus
from prune.kept import Kept, KeptIndex, kept_index
from prune.library import budget_of, refuse_not_finite
from prune.neighbour_index import nearest, paired_cosines
from prune.scenes import OPEN_SCENE, assign_scenes
from prune.selection import pair_rule
from report.arrivals_report import write_arrivals_report
from runtime.artefacts import COMPLETE, read_json, stage, write_json
from runtime.cost import Clock
from runtime.errors import UserError
from runtime.notices import notice

#: Files that the stages write.
COMPARISON, ARRIVALS, SUMMARY, REPORT_PAGE = "beside.parquet", "arrivals.parquet", "summary.json", "report.html"
GROWING, FIXED = "growing", "fixed"
#: Where the repeated image lies: in the kept set or among the arrivals.
KEPT, ARRIVED = "kept", "arrived"


@dataclass(frozen=True)
class Thresholds:
    """Thresholds that new images are judged by.

    Attributes:
        entropy: local entropy in bits below which an image is low in information.
        likeness: rule by which one image repeats another.
    """

    entropy: float
    likeness: Likeness


def arrive(cfg: DictConfig, kept: Kept) -> Path:
    """Judge a new corpus, together with the earlier arrivals if `arrive.after` names an earlier answer.

    Args:
        cfg: configuration that `prune.kept.as_selected` returned.
        kept: the opened selection.
    Returns:
        the directory of the answer.
    Raises:
        UserError: an option is invalid, or the earlier answer belongs to another selection.
    """
    budget, clock = budget_option(cfg.arrive.budget), Clock()
    rule = pair_rule(cfg)
    earlier = None if cfg.arrive.after is None else open_earlier(Path(str(cfg.arrive.after)).expanduser(), kept)
    with clock("index of what is kept"):
        index = kept_index(kept)
    limits = thresholds(cfg, kept, index, rule)
    with clock("scan"):
        new = scan_corpus(instantiate(cfg.corpus.train), cfg.runs, kept.measure, kept.encoder)
    if new.resolution != kept.corpus.resolution:
        raise UserError(
            f"the images of {new.name} have {new.resolution} px, but those of {kept.directory} have "
            f"{kept.corpus.resolution} px: give corpus.train.resolution"
        )
    corpora = {corpus.fingerprint: corpus for corpus in [*(earlier.corpora if earlier else ()), new]}
    parts = {}
    with clock("compare with what is kept"):
        for name in sorted(corpora):  # sorted: the answer does not depend on the order of arrival
            parts[name] = judged(corpora[name], kept, index, limits, cfg.runs)
    inputs = {"selection": kept.directory.resolve().name, "parts": {name: part.name for name, part in parts.items()}}
    inputs["budget"] = budget

    def build(directory: Path) -> None:
        with clock("compare what arrived"):
            table, data = together([corpora[name] for name in parts], list(parts.values()), kept, index, cfg.runs)
            table = answered(table, data, kept, index, limits.likeness, budget)
        summary = summarise(table, kept, index, limits, budget, clock.seconds)
        table.drop(columns="row").to_parquet(directory / ARRIVALS, index=False)
        write_json(directory / SUMMARY, summary)
        write_arrivals_report(
            directory / REPORT_PAGE, table, summary, data.images, kept.corpus, np.random.default_rng([0, 7])
        )

    directory = stage(cfg.runs, "arrivals", inputs, build)
    announce(directory, new, earlier)
    return directory


def budget_option(value: Any) -> str | int:
    """The option `arrive.budget`, checked.

    Raises:
        UserError: the value is neither `growing` nor `fixed` nor a number.
    """
    if value in (GROWING, FIXED):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise UserError(f"arrive.budget={value} is unknown: give {GROWING}, {FIXED} or a number of images")


def thresholds(cfg: DictConfig, kept: Kept, index: KeptIndex, rule: Any) -> Thresholds:
    """The thresholds of the selection; where it has none, those of the options.

    Raises:
        UserError: an option is out of range.
    """
    options = cfg.arrive
    for name in ("near", "similarity"):
        if not -1 <= options[name] <= 1:
            raise UserError(f"arrive.{name}={options[name]} is not a cosine: give a number between -1 and 1")
    if not 0 <= options.entropy_quantile <= 1:
        raise UserError(
            f"arrive.entropy_quantile={options.entropy_quantile} is not a fraction: give a number between 0 and 1"
        )
    if int(options.neighbours) < 1:
        raise UserError(f"arrive.neighbours={options.neighbours} is too small: give at least 1")
    bits = options.entropy_bits
    if bits is None:
        bits = kept.summary.get("entropy_threshold")
    if bits is None:
        bits = float(np.quantile(kept.table["entropy"].to_numpy(dtype=np.float64), options.entropy_quantile))
    likeness = Likeness(index.similarities(options.similarity), float(options.near), int(options.neighbours), rule)
    return Thresholds(float(bits), likeness)


@dataclass(frozen=True)
class Earlier:
    """An earlier answer: the corpora that had arrived, and its table."""

    corpora: tuple[Corpus, ...]
    table: pd.DataFrame


def open_earlier(directory: Path, kept: Kept) -> Earlier:
    """Open an earlier answer for the same selection.

    Raises:
        UserError: the directory holds no answer, the answer is of another selection, or one of its corpora is gone.
    """
    if not (directory / ARRIVALS).is_file() or not (directory / COMPLETE).is_file():
        raise UserError(
            f"arrive.after={directory} is not a result of prune/arrive.py: give the directory that it prints"
        )
    inputs = read_json(directory / COMPLETE)["inputs"]
    if inputs["selection"] != kept.directory.resolve().name:
        raise UserError(f"arrive.after={directory} belongs to selection {inputs['selection']}, not to {kept.directory}")
    corpora = []
    for name in inputs["parts"]:
        place = directory.resolve().parent.parent / "corpus" / name
        if not (place / COMPLETE).is_file():
            raise UserError(f"arrive.after={directory}: its images are no longer in {place}: compare all images anew")
        corpora.append(open_corpus(place))
    return Earlier(tuple(corpora), pd.read_parquet(directory / ARRIVALS))


def judged(corpus: Corpus, kept: Kept, index: KeptIndex, limits: Thresholds, runs: Path | str) -> Path:
    """Run the stage `arrived` for one corpus, or find it done; returns its directory."""
    likeness = limits.likeness
    inputs = {
        "index": index.fingerprint, "corpus": corpus.fingerprint, "entropy": limits.entropy, "near": likeness.near,
        "neighbours": likeness.neighbours, "similarity": likeness.similarity.tolist(), "rule": likeness.rule,
    }  # fmt: skip

    def build(directory: Path) -> None:
        entropy = corpus_entropy(corpus, kept.measure, runs)
        data = _image_data(corpus, kept, index, runs)
        refuse_not_finite(data.points.embeddings, corpus.readable, f"the embeddings of corpus {corpus.name}")
        comparison_with_kept(corpus, entropy, data, kept, index, limits).to_parquet(directory / COMPARISON, index=False)

    return stage(runs, "arrived", inputs, build)


def comparison_with_kept(
    corpus: Corpus, entropy: np.ndarray, data: ImageData, kept: Kept, index: KeptIndex, limits: Thresholds
) -> pd.DataFrame:
    """Table of the comparison of a corpus with the kept set alone, one row per image in corpus order.

    Args:
        entropy: float [N], local entropy in bits.
        data: embeddings, pixels and locations of the N images.
    """
    readable = np.flatnonzero(corpus.readable)
    scene, scene_similarity = assign_scenes(data.points.embeddings, index.prototypes)
    scenes, theirs = scene[readable], kept.image_data(index.prototypes.centre)
    closest, cosine, result = nearest_and_repeated_kept(
        data, readable, scenes, theirs, index.index, kept.rows, limits.likeness
    )
    ids = kept.corpus.manifest["id"].to_numpy(dtype=object)
    columns = _columns(len(corpus))
    for name, values in (
        ("scene_code", scenes),
        ("scene_similarity", scene_similarity[readable]),
        ("nearest_kept", ids[closest]),
        ("similarity", cosine),
        ("duplicate_of", np.where(result.match < 0, "", ids[result.match])),
        ("duplicate_in", np.where(result.match < 0, "", KEPT)),
        ("duplicate_similarity", result.cosine),
        ("correlation", result.correlation),
        ("digest", digests(corpus.images, readable)),
    ):
        columns[name][readable] = values
    verdict = np.full(len(corpus), UNREADABLE, dtype=object)
    verdict[readable] = np.where(result.verdict == "", CANDIDATE, result.verdict)
    verdict[corpus.readable & (entropy < limits.entropy)] = LOW_ENTROPY
    known = {"id": corpus.manifest["id"], "verdict": verdict, "reason": corpus.manifest["reason"].astype(str)}
    columns |= {"entropy": entropy.astype(np.float32), "row": np.arange(len(corpus)), "corpus": corpus.fingerprint}
    return pd.DataFrame({**known, **columns})


def _columns(count: int) -> dict[str, np.ndarray]:
    """Default columns for `count` images about which nothing is known."""
    texts = ("nearest_kept", "duplicate_of", "duplicate_in", "digest")
    numbers = ("scene_similarity", "similarity", "duplicate_similarity", "correlation")
    return {
        **{name: np.full(count, "", dtype=object) for name in texts},
        **{name: np.full(count, np.nan, dtype=np.float32) for name in numbers},
        "scene_code": np.full(count, -1),
    }


def _image_data(corpus: Corpus, kept: Kept, index: KeptIndex, runs: Path | str) -> ImageData:
    embeddings = corpus_embeddings(corpus, kept.encoder, runs)
    points = Points(embeddings, index.prototypes.centre)
    return ImageData(points, corpus.images, Locations.together([Locations.of(corpus.manifest, corpus.resolution)]))


def together(
    corpora: Sequence[Corpus], parts: Sequence[Path], kept: Kept, index: KeptIndex, runs: Path | str
) -> tuple[pd.DataFrame, ImageData]:
    """`union` of the tables and images that the stages of the corpora left."""
    tables = [pd.read_parquet(part / COMPARISON) for part in parts]
    return union(tables, [_image_data(corpus, kept, index, runs) for corpus in corpora])


def union(tables: Sequence[pd.DataFrame], data: Sequence[ImageData]) -> tuple[pd.DataFrame, ImageData]:
    """Join the tables of `comparison_with_kept` and the images of all arrivals; `row` then counts through all parts.

    An image that arrived twice (the same id and the same pixels, or unreadable for the same reason) gets one row.
    """
    starts = np.concatenate([[0], np.cumsum([len(table) for table in tables])])
    table = pd.concat([part.assign(row=part["row"] + start) for part, start in zip(tables, starts, strict=False)])
    again = table.duplicated(["id", "digest", "reason"])
    points = Points(Gathered([part.points.embeddings for part in data]), data[0].points.centre)
    images = Gathered([part.images for part in data])
    return table[~again].reset_index(drop=True), ImageData(
        points, images, Locations.together([part.locations for part in data])
    )


def answered(
    table: pd.DataFrame, data: ImageData, kept: Kept, index: KeptIndex, likeness: Likeness, budget: str | int
) -> pd.DataFrame:
    """The final verdicts: find repetitions among the arrivals, then spread the budget over the remaining images."""
    names = np.array([*index.prototypes.names, OPEN_SCENE], dtype=object)
    code = table["scene_code"].to_numpy()
    table = table.assign(
        scene=np.where(code < 0, "", names[code]), unknown_scene=code == len(index.prototypes.names),
        gain=(1 - table["similarity"]).astype(np.float32), added=False, replaces="",
    ).drop(columns="scene_code")  # fmt: skip
    verdict = table["verdict"].to_numpy(dtype=object)
    candidates = np.flatnonzero(verdict == CANDIDATE)
    keys = (table[name].to_numpy()[candidates] for name in ("gain", "digest", "id"))
    candidates = candidates[priority(*keys)]
    result = among_arrivals(data, table["row"].to_numpy()[candidates], code[candidates], likeness)
    repeated = result.match >= 0
    place = pd.Series(np.arange(len(table)), index=table["row"])
    first = table["id"].to_numpy(dtype=object)[place[result.match[repeated]].to_numpy()]
    at = candidates[repeated]
    for name, values in (
        ("duplicate_of", first),
        ("duplicate_in", ARRIVED),
        ("duplicate_similarity", result.cosine[repeated]),
        ("correlation", result.correlation[repeated]),
    ):
        table.loc[at, name] = values
    verdict[at] = result.verdict[repeated]
    free = candidates[~repeated]
    most = budget if isinstance(budget, int) else budget_of(len(table), float(kept.summary["ratio"]))
    counts = fill(index.counts, np.bincount(code[free], minlength=len(names)), most)
    chosen = free[first_of_scenes(code[free], counts)]
    if budget == FIXED:
        chosen, replaced = _proposed(table, chosen, kept, index)
        table.loc[chosen, "replaces"] = replaced
    verdict[free] = NOT_NEEDED
    verdict[chosen] = WORTH
    table.loc[chosen, "added"] = True
    return table.assign(verdict=verdict)


def _proposed(table: pd.DataFrame, chosen: np.ndarray, kept: Kept, index: KeptIndex) -> tuple[np.ndarray, np.ndarray]:
    """Rows of arrivals that would replace a kept image, and the ids of the kept images that they would replace."""
    similarity, neighbour = nearest_others(kept, index)
    ids = kept.table["id"].to_numpy(dtype=object)
    order = np.lexsort((ids, -similarity))
    pairs = swaps(table["gain"].to_numpy()[chosen], similarity, neighbour, order)
    arrivals, neighbours = (np.array([pair[at] for pair in pairs], dtype=np.int64) for at in (0, 1))
    return chosen[arrivals], ids[neighbours]


def nearest_others(kept: Kept, index: KeptIndex) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of each kept image to the nearest other kept image, float32 [K], and its position, int64 [K]; -1: none."""
    points, rows = Points(kept.embeddings, index.prototypes.centre), kept.rows
    similarity, neighbour = np.full(len(rows), -1, np.float32), np.full(len(rows), -1)
    for start in range(0, len(rows) if len(rows) > 1 else 0, BLOCK):
        own = np.arange(start, min(start + BLOCK, len(rows)))
        vectors = points[rows[own]]
        result = nearest(index.index, vectors, 3)  # includes the image itself or copies of it
        others = points[rows[result.ravel().clip(0)]].reshape(*result.shape, -1)
        cosines = np.where((result < 0) | (result == own[:, None]), -1, paired_cosines(vectors, others))
        best = cosines.argmax(axis=1)
        similarity[own], neighbour[own] = (values[np.arange(len(own)), best] for values in (cosines, result))
    return similarity, neighbour


def summarise(
    table: pd.DataFrame,
    kept: Kept,
    index: KeptIndex,
    limits: Thresholds,
    budget: str | int,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Content of the summary.json of an answer."""
    added = table["added"].to_numpy(dtype=bool)
    arrived, new = (rows["scene"].value_counts() for rows in (table, table[added]))
    names = [*index.prototypes.names, OPEN_SCENE]
    return {
        "selection": str(kept.directory),
        "method": kept.summary["method"],
        "ratio": kept.summary["ratio"],
        "kept": len(kept.table),
        "arrived": len(table),
        "parts": {name: int(count) for name, count in table["corpus"].value_counts(sort=False).items()},
        "budget": budget,
        "added": int(added.sum()),
        "unknown_scene": int(table["unknown_scene"].sum()),
        "verdicts": counts_of(table["verdict"], VERDICTS),
        "scenes": {
            name: {"kept": int(count), "arrived": int(arrived.get(name, 0)), "added": int(new.get(name, 0))}
            for name, count in zip(names, index.counts, strict=True)
        },
        "unreadable": {
            str(reason): int(count)
            for reason, count in table.loc[table["verdict"] == UNREADABLE, "reason"].value_counts().items()
        },
        "thresholds": {
            "entropy_bits": limits.entropy,
            "scene_threshold": index.prototypes.threshold,
            "redundant_similarity": {
                "known scene": float(limits.likeness.similarity[0]),
                "unknown scene": float(limits.likeness.similarity[-1]),
            },
            "near": limits.likeness.near,
        },
        "index_bytes": index.bytes,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }  # fmt: skip


def announce(directory: Path, new: Corpus, earlier: Earlier | None) -> None:
    """Print one line on stderr: the verdicts on the new corpus, and what they change in an earlier answer."""
    table = pd.read_parquet(directory / ARRIVALS)
    own = table[table["corpus"] == new.fingerprint]
    counts = ", ".join(f"{count:,} {name}" for name, count in counts_of(own["verdict"], VERDICTS).items() if count)
    line = f"{new.name}: {len(own):,} images arrived: {counts}"
    if earlier is not None:
        keys = ["id", "digest"]
        before = earlier.table.loc[earlier.table["added"], keys]
        now = table.loc[table["added"], keys]
        gone = len(before) - len(before.merge(now, on=keys))
        line += f"; of all {len(table):,} images so far, {len(now):,} are added; {gone:,} added before no longer are"
    notice(line)
