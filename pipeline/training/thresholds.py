"""Fit the probabilities below which the class of an image is reported as unknown."""

import math

import numpy as np
import numpy.typing as npt

# the fractions of the validation images whose class is reported, for each of which the model has a threshold
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99)


def fit_thresholds(probabilities: npt.NDArray[np.float64]) -> dict[float, float]:
    """Return a threshold for each of COVERAGES from the probabilities (N, num_classes) of the validation split, N ≥ 1.

    At least that fraction of the images has a most probable class whose probability is at or above the threshold. The
    threshold is in the middle between the probabilities of two images, so that rounding moves no validation image to
    the other side, and is 0 where no image is below. This is selective classification by the softmax response (Geifman
    and El-Yaniv 2017, arXiv:1705.08500) at a fixed coverage.
    """
    ascending = np.sort(probabilities.max(1))
    return {coverage: _threshold(ascending, coverage) for coverage in COVERAGES}


def _threshold(ascending: npt.NDArray[np.float64], coverage: float) -> float:
    """Return the threshold that at least this fraction of the sorted probabilities (N,) reaches."""
    lowest_covered = ascending[len(ascending) - math.ceil(coverage * len(ascending))]
    below = ascending[ascending < lowest_covered]
    return float((below[-1] + lowest_covered) / 2) if len(below) else 0.0
