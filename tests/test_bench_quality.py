"""The benchmark of equal training times: number of steps, and composition of every change."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from runtime.application import CONFIGS
from scripts.bench_quality import QUICK, steps_within

with initialize_config_dir(str(CONFIGS), version_base="1.3"):
    CHANGES = [list(change) for change in compose("config").bench_quality.changes]


@pytest.mark.parametrize(
    ("seconds", "probe_seconds", "steps"), [(300, 20.0, 1500), (300, 20.9, 1400), (300, 3.01, 9900), (1, 50, 2)]
)
def test_steps_fit_into_the_given_seconds_and_are_rounded(seconds: float, probe_seconds: float, steps: int) -> None:
    result = steps_within(seconds, 100, probe_seconds)
    assert result == steps
    assert result * probe_seconds / 100 <= seconds


@pytest.mark.parametrize("change", CHANGES, ids=" ".join)
def test_every_change_composes(change: list[str]) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        changed, default = compose("config", [*change, *QUICK]), compose("config", list(QUICK))
    assert (changed == default) == (not change or change == ["eval.steps=25"])


def test_no_change_is_listed_twice() -> None:
    assert len({tuple(change) for change in CHANGES}) == len(CHANGES) and CHANGES[0] == []
