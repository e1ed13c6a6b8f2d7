"""Test of the project's claim: paired differences between RS-Prune and every other method, with a verdict for each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from eval.metrics import SETS, Quantity
from report.results import SUBJECT, Row, run_name
from report.tables import evaluation_encoder, method_order

CLAIM = (
    "A diffusion model trained on the subset that RS-Prune keeps generates better images than one trained on the whole "
    "corpus, on a random subset or on the subset of scene_random."
)
#: The methods that the claim names.
RIVALS = ("full", "random", "scene_random")
#: Basis of an interval: seeds; paired images of one seed; images of one seed with separate intervals of the methods.
SEEDS, PAIRED, UNPAIRED = "seeds", "paired images", "unpaired images"
METRIC = "kid_x1000"


@dataclass(frozen=True)
class Comparison:
    """A difference of KID × 1000, `subject` minus `other`, with its 95 % interval (NaN where unknown).

    Attributes:
        subject, other: names of the runs, from `run_name`.
        seeds: number of seeds that both have.
        basis: SEEDS, PAIRED or UNPAIRED.
    """

    corpus: str
    ratio: float | None
    step: int | None
    held_out: str
    subject: str
    other: str
    mean: float
    low: float
    high: float
    seeds: int
    basis: str

    @property
    def word(self) -> str:
        """Verdict: better, worse, tie (the interval contains zero), or unknown (no interval); lower is better."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "unknown"
        if self.low <= 0 <= self.high:
            return "tie"
        return "better" if self.mean < 0 else "worse"


def t_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval by Student's t; the ends are NaN for a single one."""
    values = np.asarray(differences, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def compare(rows: Iterable[Row], stage: str = "generation") -> list[Comparison]:
    """Compare the runs of RS-Prune with those of all other methods of the same corpus, step and ratio.

    Runs without pruning are compared with all ratios. Of several rows for one run and seed, the newest counts.

    Args:
        rows: rows of results.
        stage: "generation", or "subset" for the kept images themselves.
    """
    rows = list(rows)
    encoder = evaluation_encoder(rows)
    runs: dict[tuple, dict[int, Mapping]] = {}
    for row in rows:
        if row["stage"] == stage:
            name = run_name(row["prune"], row.get("weighting"))
            key = row["corpus"], row.get("step"), row.get("ratio"), row["prune"], name
            runs.setdefault(key, {})[row.get("seed")] = row["metrics"]
    result = []
    for (corpus, step, ratio, method, subject), mine in runs.items():
        rivals = [
            (other, theirs)
            for (where, when, fraction, rival, other), theirs in runs.items()
            if method == SUBJECT != rival and (where, when) == (corpus, step) and fraction in (ratio, 0, None)
        ]
        for other, theirs in rivals:
            for held_out in SETS:
                values = _difference(mine, theirs, Quantity(METRIC, encoder, held_out), subject, other)
                if values is not None:
                    result.append(Comparison(corpus, ratio, step, held_out, subject, other, *values))
    return sorted(result, key=_order)


def _order(comparison: Comparison) -> tuple:
    return (
        comparison.corpus, comparison.ratio or 0, comparison.step or 0, comparison.subject,
        SETS.index(comparison.held_out), method_order(comparison.other),
    )  # fmt: skip


def _difference(
    mine: Mapping[int, Mapping], theirs: Mapping[int, Mapping], quantity: Quantity, subject: str, other: str
) -> tuple[float, float, float, int, str] | None:
    """Mean, low, high, seeds and basis of a difference; None if no seed has both values."""
    common = [seed for seed in mine if seed in theirs]
    common = [seed for seed in common if None not in (mine[seed].get(quantity.name), theirs[seed].get(quantity.name))]
    if not common:
        return None
    mean, low, high = t_interval([mine[seed][quantity.name] - theirs[seed][quantity.name] for seed in common])
    if len(common) > 1:
        return mean, low, high, len(common), SEEDS
    ours, others = mine[common[0]], theirs[common[0]]
    for metrics, minus, sign in ((ours, other, 1), (others, subject, -1)):
        parts = [metrics.get(Quantity(METRIC, quantity.of, quantity.held_out, minus, part).name) for part in _PARTS]
        if None not in parts:
            low, high = sorted((sign * parts[1], sign * parts[2]))
            return sign * parts[0], low, high, 1, PAIRED
    half = math.hypot(_half(ours, quantity), _half(others, quantity))
    return mean, mean - half, mean + half, 1, UNPAIRED


_PARTS = ("", "low", "high")


def _half(metrics: Mapping, quantity: Quantity) -> float:
    """Half the width of the interval of a metric; NaN if it has none."""
    low, high = (metrics.get(f"{quantity.name}_{part}") for part in ("low", "high"))
    return math.nan if low is None or high is None else (high - low) / 2


def headline(comparisons: Sequence[Comparison]) -> str:
    """Sentence on whether the rows support the claim, against every method that it names and on every held-out set."""
    claimed = [item for item in comparisons if item.subject == SUBJECT and item.other in RIVALS]
    if not claimed:
        return "The rows cannot test the claim yet."
    words = {item.word for item in claimed}
    missing = [name for name in RIVALS if name not in {item.other for item in claimed}]
    left_out = f" Not measured: {', '.join(missing)}." if missing else ""
    if "better" not in words:
        return f"The rows do not support the claim.{left_out}"
    if words == {"better"} and not missing:
        return "The rows support the claim."
    return f"The rows support the claim in part.{left_out}"


def sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """One sentence per run of RS-Prune and held-out set: which methods it is better than, worse than or tied with."""
    groups: dict[tuple, list[Comparison]] = {}
    for item in comparisons:
        groups.setdefault((item.corpus, item.ratio, item.step, item.subject, item.held_out), []).append(item)
    several = len({key[:3] for key in groups}) > 1
    result = []
    for (corpus, ratio, step, subject, held_out), items in groups.items():
        parts = []
        for word, phrase in _PHRASES.items():
            if names := [item.other for item in items if item.word == word]:
                parts.append(f"{phrase} {_listed(names)}")
        where = f" ({corpus}, ratio {ratio:g}, step {step})" if several and ratio is not None else ""
        result.append(f"On the {held_out} set{where} {subject} is {'; '.join(parts)}.")
    return result


_PHRASES = {
    "better": "better than",
    "worse": "worse than",
    "tie": "tied with",
    "unknown": "without an interval against",
}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def seeds_note(comparisons: Sequence[Comparison]) -> str:
    """Note on the number of seeds of the comparisons, and on the meaning of their intervals."""
    if not comparisons:
        return ""
    counts = sorted({item.seeds for item in comparisons})
    parts = []
    if counts[-1] > 1:
        shown = str(counts[-1]) if counts[0] in (1, counts[-1]) else f"{max(counts[0], 2)} to {counts[-1]}"
        parts.append(
            f"{shown} seeds: the mean paired difference over seeds of the selection and the training, with its 95 % "
            "interval by Student's t."
        )
    if counts[0] == 1:
        parts.append(
            "One seed"
            + (" where the table says so" if counts[-1] > 1 else "")
            + ": the interval covers the sampling of images only, not the variation between seeds."
        )
    if any(item.basis == UNPAIRED for item in comparisons):
        parts.append("An unpaired interval combines those of both methods and is wider than a paired one.")
    parts.append("Intervals are not corrected for the number of comparisons.")
    return " ".join(parts)
