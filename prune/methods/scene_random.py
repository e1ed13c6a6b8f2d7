"""Random images with the same number from every scene: the effect of scenes without clusters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.allocation import water_fill
from prune.clusters import members_of
from prune.pool import Pool, Selection
from prune.scenes import SceneRule
from runtime.errors import UserError


@dataclass(frozen=True)
class SceneRandom:
    """Water-fill the budget over the scenes of the reference set, then draw at random inside each scene.

    This is a control experiment of this project, not a published method.

    Args:
        prototypes_per_class, threshold_quantile, scene_classifier, split_open: as in `RSPrune`.
    Raises:
        UserError: by `select`, if there is no reference.
    """

    uses_reference = True

    prototypes_per_class: int = 8
    threshold_quantile: float = 0.01
    scene_classifier: str = "prototypes"
    split_open: bool = True

    def __post_init__(self) -> None:
        _ = self._scene_rule  # raises an error for an unknown classifier

    @property
    def _scene_rule(self) -> SceneRule:
        return SceneRule(self.prototypes_per_class, self.threshold_quantile, self.scene_classifier, self.split_open)

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        if len(pool.reference_embeddings) == 0:
            raise UserError("scene_random needs a labelled reference: give reference and labels, or use random")
        scenes = self._scene_rule(pool, int(generator.integers(2**31)))
        names = np.array(scenes.names, dtype=object)
        rows = np.flatnonzero(pool.readable)
        groups = [rows[group] for group in members_of(scenes.scene[rows], len(names))]
        budgets = water_fill(np.array([len(group) for group in groups]), min(budget, len(rows)))
        kept = [generator.permutation(group)[:count] for group, count in zip(groups, budgets, strict=True)]
        scene_names = np.where(pool.readable, names[scenes.scene], "")
        similarity = np.where(pool.readable, scenes.similarity, np.float32(np.nan))
        diagnostics = {"scene_accuracy": scenes.accuracy}
        return Selection.of(
            pool,
            np.concatenate(kept),
            "not_drawn",
            scene=scene_names,
            scene_similarity=similarity,
            diagnostics=diagnostics,
        )
