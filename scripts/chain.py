"""The list of trainings of `make reproduce`, in order; used by the chain and by its plan (`dry_run=true`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from omegaconf import DictConfig

from downstream.conditional import SCRATCH
from report.results import run_name, weighting_name
from runtime.application import changed_config
from runtime.errors import UserError

#: `train.weighting` with which images are drawn in proportion to the number of corpus images of their kind.
NATURAL = 1.0


class Pretraining(NamedTuple):
    """The training of one foundation model.

    Attributes:
        cfg: with its method, weighting and seed.
        new_subset: whether it is the first one on its subset; then the subset is measured too.
    """

    cfg: DictConfig
    method: str
    new_subset: bool

    @property
    def name(self) -> str:
        """Its name among the trainings."""
        return run_name(self.method, weighting_name(self.cfg.train.weighting))


class FineTuning(NamedTuple):
    """One training of a task.

    Attributes:
        method: of the foundation, or `scratch`.
        foundation: name of a `Pretraining`; None: from scratch.
    """

    cfg: DictConfig
    task: str
    method: str
    foundation: str | None


class Part(NamedTuple):
    """All trainings of one seed. Foundations are fine-tuned for the first `profile.fine_tuned_seeds` seeds."""

    cfg: DictConfig
    pretrainings: list[Pretraining]
    fine_tunings: list[FineTuning]
    first: bool


def chain(cfg: DictConfig, tasks: Iterable[str]) -> list[Part]:
    """The trainings of a config by seed, in order.

    Args:
        tasks: names of the tasks for which the corpus is suitable.
    Raises:
        UserError: the profile names a method that it does not train.
    """
    check_profile(cfg)
    parts = []
    for index, seed in enumerate(cfg.profile.seeds):
        chosen = changed_config(f"seed={seed}")
        requested = tasks if index < cfg.profile.fine_tuned_seeds else []
        tunings = _fine_tunings(chosen, requested, longer=index == 0 and cfg.profile.slow_rivals)
        parts.append(Part(chosen, _pretrainings(chosen), tunings, first=index == 0))
    return parts


def check_profile(cfg: DictConfig) -> None:
    """Refuse (UserError) a profile that fine-tunes or weights a method that it does not train."""
    for option in ("downstream", "natural"):
        missing = set(cfg.profile[option]) - set(cfg.profile.methods)
        if missing:
            raise UserError(f"profile.{option} names {sorted(missing)}, which profile.methods does not train: add them")


def _pretrainings(cfg: DictConfig) -> list[Pretraining]:
    """One training per method, and for the methods in `profile.natural` another one with natural weights."""
    requested = [(method, cfg.train.weighting) for method in cfg.profile.methods]
    requested += [(method, NATURAL) for method in cfg.profile.natural]
    result, seen = [], set()
    for method, weighting in requested:
        changed = changed_config(f"prune={method}", f"train.weighting={weighting}", f"seed={cfg.seed}")
        result.append(Pretraining(changed, method, method not in seen))
        seen.add(method)
    return result


def _fine_tunings(cfg: DictConfig, tasks: Iterable[str], *, longer: bool) -> list[FineTuning]:
    """Every task from every foundation, and from scratch with as many steps and with the foundation's steps added.

    Args:
        longer: whether to include the last one.
    """
    steps = cfg.profile.fine_tuning_steps
    options = [f"seed={cfg.seed}"] + ([] if steps is None else [f"downstream.loop.steps={steps}"])
    chosen = changed_config(*options)
    starts = [chosen]
    if longer:
        starts.append(changed_config(*options, f"downstream.extra_steps={cfg.train.loop.steps}"))
    result = []
    for task in tasks:
        for method in cfg.profile.downstream:
            result.append(FineTuning(chosen, task, method, run_name(method, weighting_name(cfg.train.weighting))))
        result += [FineTuning(start, task, SCRATCH, None) for start in starts]
    return result
