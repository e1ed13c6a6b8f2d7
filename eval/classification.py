"""Classification accuracy score: a scene classifier trained on generated images and tested on real ones."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

#: Inverse strength of the L2 penalty. It is fixed, so that no result is tuned on its own test images.
PENALTY = 0.01
ITERATIONS = 1000


def classification_accuracy(
    features: np.ndarray, scenes: np.ndarray, reference: np.ndarray, reference_scenes: np.ndarray
) -> float | None:
    """Classification accuracy score (Ravuri and Vinyals 2019), on the features of a frozen encoder.

    The classifier is an L2-regularised multinomial logistic regression on features that are standardised over the
    training images; the paper trains a ResNet-50 on the images themselves. The optimum is unique and found without
    random numbers. Images of unknown scene, "", are used neither for training nor for testing.

    Args:
        features: float [N, D], features of the training images.
        scenes: str [N], scenes of the training images.
        reference: float [M, D], features of the real held-out images to test on.
        reference_scenes: str [M], scenes of these images.
    Returns:
        fraction of the labelled held-out images that are classified correctly; None if there are no such images, or if
        the training images have fewer than two scenes.
    """
    taught, tested = scenes != "", reference_scenes != ""
    if len(set(scenes[taught].tolist())) < 2 or not tested.any():
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=ITERATIONS))
    model.fit(np.asarray(features, dtype=np.float64)[taught], scenes[taught])
    return float(model.score(np.asarray(reference, dtype=np.float64)[tested], reference_scenes[tested]))
