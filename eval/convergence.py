"""Numbers of a convergence curve: the area under it, and when it reached a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.metrics import Quantity

CONVERGENCE = "convergence.jsonl"
AXES = ("step", "images_seen", "seconds")


def area_under_curve(x: Sequence[float], y: Sequence[float]) -> float:
    """Mean height of a curve over its span, by the trapezoidal rule; for a single point its height."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return float(np.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 and x[-1] > x[0] else float(y[-1])


def first_reached(
    x: Sequence[float], y: Sequence[float], target: float, *, lower_is_better: bool = True
) -> float | None:
    """The x at which a curve first reaches a target, interpolated linearly; None if it never does."""
    gain = np.asarray(y, dtype=np.float64) - target
    gain = -gain if lower_is_better else gain
    reached = np.flatnonzero(gain >= 0)
    if len(reached) == 0:
        return None
    index = int(reached[0])
    if index == 0:
        return float(x[0])
    fraction = -gain[index - 1] / (gain[index] - gain[index - 1])
    return float(x[index - 1] + fraction * (x[index] - x[index - 1]))


def lower_is_better(name: str) -> bool:
    """Whether lower values are better: true for the loss and for metrics that `METRICS` marks so."""
    quantity = Quantity.parse(name)
    return name == "loss" if quantity is None else quantity.entry.better == "lower"


def summarise(lines: Sequence[Mapping[str, float]], targets: Mapping[str, float]) -> dict[str, dict]:
    """Areas under the curves of a run's metrics over images seen, and when each target was reached.

    Args:
        lines: lines of convergence.jsonl, in order.
        targets: targets by the name of the metric in the lines; the target of an unmeasured metric is never reached.
    Returns:
        `area_under_curve`, by metric; and `reached`, by metric: step, images_seen and seconds, null if never reached.
    """
    metrics = [key for key in lines[0] if key not in AXES and all(line[key] is not None for line in lines)]
    images = [line["images_seen"] for line in lines]
    areas = {key: area_under_curve(images, [line[key] for line in lines]) for key in metrics}
    reached = {
        key: {
            "target": target,
            **{
                axis: first_reached(
                    [line[axis] for line in lines],
                    [line[key] for line in lines],
                    target,
                    lower_is_better=lower_is_better(key),
                )
                if key in metrics
                else None
                for axis in AXES
            },
        }
        for key, target in targets.items()
    }
    return {"area_under_curve": areas, "reached": reached}
