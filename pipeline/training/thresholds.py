"""Fit the probabilities below which the class of an image is reported as unknown."""

import math

import numpy as np
import numpy.typing as npt

# the fractions of the validation images whose class is reported, for each of which the model has a threshold
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99)

# A threshold is at least half of this below the probabilities that it covers: their last bits depend on how an image is
# computed (a change of the log odds by d changes a probability p by p (1 - p) d), and those that `evaluate` writes are
# rounded to float32.
MIN_LOG_ODDS_GAP, MIN_GAP = 1e-4, 2e-7


def fit_thresholds(probabilities: npt.NDArray[np.float64]) -> dict[float, float]:
    """Return a threshold for each of COVERAGES from the probabilities (N, num_classes) of the validation split, N ≥ 1.

    At least that fraction of the images has a most probable class whose probability is at or above the threshold, and
    more only where probabilities are equal but for rounding. The threshold is in the middle between the probabilities
    of two images, so that rounding moves no covered image to the other side, and is 0 where no image is below. This is
    selective classification by the softmax response (Geifman and El-Yaniv 2017, arXiv:1705.08500) at a fixed coverage.
    """
    ascending = np.sort(probabilities.max(1))
    return {coverage: _threshold(ascending, coverage) for coverage in COVERAGES}


def _threshold(ascending: npt.NDArray[np.float64], coverage: float) -> float:
    """Return the threshold that at least this fraction of the sorted probabilities (N,) reaches."""
    lowest_covered = ascending[len(ascending) - math.ceil(coverage * len(ascending))]
    min_gap = MIN_LOG_ODDS_GAP * lowest_covered * (1 - lowest_covered) + MIN_GAP
    below = ascending[ascending < lowest_covered - min_gap]
    return float((below[-1] + lowest_covered) / 2) if len(below) else 0.0
