"""Do generated images teach what a scene looks like? A classifier trained on them and tested on real ones."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

#: Inverse strength of the L2 penalty. Fixed, so that no row is tuned on the images that it is tested on.
PENALTY = 0.01
ITERATIONS = 1000


def classification_accuracy(
    features: np.ndarray, scenes: np.ndarray, reference: np.ndarray, reference_scenes: np.ndarray
) -> float | None:
    """Classification accuracy score (Ravuri and Vinyals 2019), on the features of a frozen encoder.

    L2-regularised multinomial logistic regression on features that are standardised over the training images. The paper
    trains a ResNet-50 on the images themselves. The optimum is unique and found without random numbers.

    Args:
        features: float [N, D] of the images to train on; scenes: str [N].
        reference: float [M, D] of the real held-out images to test on; reference_scenes: str [M].
            Images of no known scene, "", are neither trained nor tested on.
    Returns:
        fraction of the labelled held-out images that get their own scene; None of no such images, or where the images
        to train on have fewer than two scenes.
    """
    taught, tested = scenes != "", reference_scenes != ""
    if len(set(scenes[taught].tolist())) < 2 or not tested.any():
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=ITERATIONS))
    model.fit(np.asarray(features, dtype=np.float64)[taught], scenes[taught])
    return float(model.score(np.asarray(reference, dtype=np.float64)[tested], reference_scenes[tested]))
