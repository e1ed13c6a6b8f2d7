"""The list of all metrics, `METRICS`, their computation, and their names.

The full name of a metric is `<held-out set>_<metric>_<encoder or model>`, for example `balanced_kid_x1000_geoembed`;
parts that do not apply are left out. `Quantity` builds and parses such names. Tables, report, convergence and README
read `METRICS`, which is the only list of metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from eval import classification, distances, memorisation, pairs, restoration, subsets, waste
from eval.distances import Interval

#: Names of the held-out sets, which are prefixes of the names of metrics.
SETS = ("balanced", "natural")
#: The encoder whose Fréchet distance is called `fid`.
INCEPTION = "inception"
FID = "fid"


class Metric(NamedTuple):
    """A metric of a set of images.

    Attributes:
        name: heading of its column in tables.
        better: "lower", "higher", or "" if neither is better.
        decimals: number of decimals in tables.
        needs: names of the inputs of `compute`, in order; the metric is computed if all of them are known.
        compute: function that returns a float, an `Interval`, or None if the metric is undefined.
        by: last part of the full name: "encoder", "clip" (name of the CLIP model) or "" (none).
        biased: whether the value depends on the number of images, so that only sets of equal size can be compared.
        shown: where it is shown: in tables for the evaluation encoder ("evaluation"), also for the encoder of the
            selection ("both"), or only in CSV files ("file").
    """

    name: str
    better: str
    decimals: int
    needs: tuple[str, ...]
    compute: Callable[..., float | Interval | None]
    by: str = ""
    biased: bool = False
    shown: str = "evaluation"


_TWO_SETS = ("features", "reference")
_PAIRS = ("images", "truth")
_LOW = ("degraded", "low")
_CORRECTNESS = ("images", "truth", "enlarged")
METRICS: dict[str, Metric] = {
    "fd": Metric("FD", "lower", 1, _TWO_SETS, distances.frechet_distance, "encoder", biased=True),
    "kid_x1000": Metric("KID×10³", "lower", 1, _TWO_SETS, distances.kernel_distance, "encoder", shown="both"),
    "weighted_kid_x1000": Metric(
        "weighted KID×10³",
        "lower",
        1,
        ("weighted_features", "weights", "reference"),
        distances.weighted_kernel_distance,
        "encoder",
        shown="both",
    ),
    "precision": Metric("precision", "higher", 3, _TWO_SETS, distances.precision, "encoder", biased=True),
    "recall": Metric("recall", "higher", 3, _TWO_SETS, distances.recall, "encoder", biased=True),
    "density": Metric("density", "higher", 3, _TWO_SETS, distances.density, "encoder", biased=True, shown="file"),
    "coverage": Metric("coverage", "higher", 3, _TWO_SETS, distances.coverage, "encoder", biased=True, shown="file"),
    "fd_infinity": Metric(
        "FD∞", "lower", 1, _TWO_SETS, distances.extrapolated_frechet_distance, "encoder", biased=True, shown="file"
    ),
    "classification_accuracy": Metric(
        "classification accuracy",
        "higher",
        3,
        ("features", "scenes", "reference", "reference_scenes"),
        classification.classification_accuracy,
        "encoder",
        biased=True,
    ),
    "nearest_training": Metric(
        "nearest training image",
        "",
        3,
        ("features", "reference", "training_embeddings", "training_rows"),
        memorisation.nearest_training,
        "encoder",
    ),
    "clip": Metric("CLIP score", "higher", 2, ("clip_scores",), pairs.mean_score, "clip"),
    "scene_accuracy": Metric("scene accuracy", "higher", 3, ("confusion",), pairs.scene_accuracy, "clip"),
    "psnr": Metric("PSNR (dB)", "higher", 2, _PAIRS, pairs.peak_signal_noise_ratio),
    "ssim": Metric("SSIM", "higher", 3, _PAIRS, pairs.structural_similarity),
    "psnr_y": Metric("PSNR-Y (dB)", "higher", 2, _PAIRS, pairs.luma_peak_signal_noise_ratio, shown="file"),
    "ssim_y": Metric("SSIM-Y", "higher", 3, _PAIRS, pairs.luma_structural_similarity, shown="file"),
    "lpips": Metric("LPIPS", "lower", 3, ("lpips_scores",), pairs.mean_score),
    "niqe": Metric("NIQE", "lower", 2, ("images",), restoration.niqe, shown="file"),
    "consistency": Metric("consistency (dB)", "higher", 2, _LOW, restoration.consistency),
    "colour_error": Metric("colour error", "lower", 2, _PAIRS, restoration.colour_error),
    "reflectance": Metric("reflectance error", "lower", 4, _LOW, restoration.reflectance, shown="file"),
    "spectral": Metric("spectral angle (°)", "lower", 2, _LOW, restoration.spectral, shown="file"),
    "spatial": Metric("shift (px)", "lower", 3, _LOW, restoration.spatial, shown="file"),
    "synthesis": Metric("synthesis", "", 4, ("images", "enlarged"), restoration.synthesis, shown="file"),
    "hallucination": Metric("hallucination", "lower", 3, _CORRECTNESS, restoration.hallucination),
    "omission": Metric("omission", "lower", 3, _CORRECTNESS, restoration.omission, shown="file"),
    "improvement": Metric("improvement", "higher", 3, _CORRECTNESS, restoration.improvement, shown="file"),
    "spread": Metric("spread of samples", "", 2, ("samples",), restoration.spread),
    "diversity": Metric("diversity", "higher", 3, ("sample_features",), restoration.diversity, "encoder"),
    "feature_distance": Metric(
        "feature distance", "lower", 3, ("features", "truth_features"), pairs.feature_distance, "encoder"
    ),
    "miou": Metric("mIoU", "higher", 3, ("segmentation", "masks", "classes"), pairs.mean_intersection_over_union),
    "pixel_accuracy": Metric("pixel accuracy", "higher", 3, ("segmentation", "masks", "classes"), pairs.pixel_accuracy),
    "vendi": Metric("Vendi score", "higher", 1, ("subset_features",), subsets.vendi_score, "encoder"),
    "near_duplicates": Metric("near-duplicates", "lower", 3, ("subset_images",), waste.near_duplicate_fraction),
    "low_information": Metric(
        "low information", "lower", 3, ("subset_images", "corpus_images"), waste.low_information_fraction
    ),
    "scene_entropy": Metric("scene evenness", "higher", 3, ("subset_scenes", "scene_count"), subsets.scene_entropy),
}


@dataclass(frozen=True)
class Quantity:
    """The parts of the full name of a number.

    Attributes:
        metric: a key of `METRICS`.
        of: the encoder or model that computes it, or "".
        held_out: a name of `SETS`, or "".
        minus: the method whose value is subtracted, or "".
        part: "", "low" or "high" (an interval's ends).
    """

    metric: str
    of: str = ""
    held_out: str = ""
    minus: str = ""
    part: str = ""

    @property
    def name(self) -> str:
        base = [FID] if self.metric == "fd" and self.of == INCEPTION else [self.metric, self.of]
        minus = ["minus", self.minus] if self.minus else []
        return "_".join(word for word in (self.held_out, *base, *minus, self.part) if word)

    @property
    def entry(self) -> Metric:
        return METRICS[self.metric]

    @classmethod
    def parse(cls, name: str) -> Quantity | None:
        """Parse a full name; None if it is not the name of a metric."""
        rest, part = name, ""
        for end in ("low", "high"):
            if rest.endswith(f"_{end}"):
                rest, part = rest.removesuffix(f"_{end}"), end
        rest, _, minus = rest.partition("_minus_")
        held_out = next((held for held in SETS if rest.startswith(f"{held}_")), "")
        rest = rest.removeprefix(f"{held_out}_") if held_out else rest
        if rest == FID:
            return cls("fd", INCEPTION, held_out, minus, part)
        for metric in sorted(METRICS, key=len, reverse=True):  # `fd_infinity_x` is not `fd` of an encoder `infinity_x`
            entry = METRICS[metric]
            of = rest.removeprefix(metric).removeprefix("_")
            if rest in (metric, f"{metric}_{of}") and bool(of) == bool(entry.by):
                return cls(metric, of, held_out, minus, part)
        return None


def compute(
    inputs: Mapping[str, Any], *, of: Mapping[str, str], held_out: str = "", only: Sequence[str] | None = None
) -> dict[str, float | None]:
    """Compute every metric whose inputs are known; the ends of an interval are named `…_low` and `…_high`.

    Args:
        inputs: inputs by the names in `Metric.needs`.
        of: names of the encoder and of the CLIP model, by "encoder" and "clip".
        held_out: name of the held-out set.
        only: keys of `METRICS` to compute; None: all metrics that can be computed.
    Returns:
        values by full name.
    """
    result: dict[str, float | None] = {}
    for key, metric in METRICS.items():
        if (only is not None and key not in only) or not set(metric.needs) <= inputs.keys():
            continue
        quantity = Quantity(key, of.get(metric.by, ""), held_out)
        value = metric.compute(*(inputs[need] for need in metric.needs))
        if isinstance(value, Interval):
            parts = zip(("", "low", "high"), value, strict=True)
            result |= {replace(quantity, part=part).name: _finite(number) for part, number in parts}
        else:
            result[quantity.name] = _finite(value)
    return result


def _finite(value: float | None) -> float | None:
    """The number, or None if it is not finite, because JSON has no NaN."""
    return None if value is None or not np.isfinite(value) else float(value)
