"""Random images, every scene alike: what scenes give without clusters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune.allocation import water_fill
from prune.clusters import members_of
from prune.pool import Pool, Selection
from prune.scenes import OPEN_SCENE, assign_scenes, fit_prototypes
from runtime.errors import UserError


@dataclass(frozen=True)
class SceneRandom:
    """Water-fill the budget over the scenes of the reference set, then draw at random inside each (a control of ours).

    Raises a UserError without a reference.

    Args:
        prototypes_per_class: k-means prototypes of each reference class.
        floor_quantile: as in `RSPrune`.
    """

    uses_reference = True

    prototypes_per_class: int = 8
    floor_quantile: float = 0.01

    def select(self, pool: Pool, budget: int, generator: np.random.Generator) -> Selection:
        if len(pool.reference_embeddings) == 0:
            raise UserError("scene_random needs a labelled reference: give reference and labels, or use random")
        prototypes = fit_prototypes(
            pool.reference_embeddings,
            pool.reference_labels,
            self.prototypes_per_class,
            self.floor_quantile,
            int(generator.integers(2**31)),
        )
        scene, similarity = assign_scenes(pool.embeddings, prototypes)
        names = np.array([*prototypes.names, OPEN_SCENE], dtype=object)
        rows = np.flatnonzero(pool.readable)
        groups = [rows[group] for group in members_of(scene[rows], len(names))]
        budgets = water_fill(np.array([len(group) for group in groups]), min(budget, len(rows)))
        kept = [generator.permutation(group)[:count] for group, count in zip(groups, budgets, strict=True)]
        scene_names = names[scene]
        scene_names[~pool.readable] = ""
        similarity[~pool.readable] = np.nan
        return Selection.of(pool, np.concatenate(kept), "not_drawn", scene=scene_names, scene_similarity=similarity)
