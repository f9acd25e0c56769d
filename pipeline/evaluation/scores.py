"""Compute scores of classes from counts of images; validation and evaluation both use them."""

from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


def f1_scores(*, num_correct: Counts, actual: Counts, predicted: Counts) -> npt.NDArray[Any]:
    """Return the F1 score of each class, (num_classes,) float64, from numbers of images.

    `actual` has the images of each class, `predicted` the images that were classified as it, and `num_correct` those
    that are in both. A class that is neither in the images nor in the predictions has the F1 score 0.
    """
    scores: npt.NDArray[Any] = 2 * num_correct / np.maximum(actual + predicted, 1)
    return scores
