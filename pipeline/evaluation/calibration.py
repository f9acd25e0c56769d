"""Compute how far the probabilities of a classifier are from the fractions of images that it classifies correctly."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.predictions import Predictions, Probabilities

NUM_BINS = 15  # of equal width, as in Guo et al. 2017


def calibration(predictions: Predictions, probabilities: Probabilities) -> dict[str, Any]:
    """Return the expected calibration error of probabilities (N, num_classes) and the bins that it is computed from.

    The error is that of Guo et al. 2017 (arXiv:1706.04599): an image is in the bin (lower, upper] that contains the
    probability of its predicted class, and the error is the mean over all images of the absolute difference between the
    accuracy and the mean probability in its bin. Both are None in a bin without images. They are fractions.
    """
    confidences = predictions.confidences(probabilities)
    counts, num_correct, confidence_sums = _bin_sums(confidences, predictions.is_correct)
    return {
        "expected_calibration_error": expected_calibration_error(confidences, predictions.is_correct),
        "bins": [
            {
                "lower": index / NUM_BINS,
                "upper": (index + 1) / NUM_BINS,
                "images": int(count),
                "mean_confidence": float(confidence_sums[index] / count) if count else None,
                "accuracy": float(num_correct[index] / count) if count else None,
            }
            for index, count in enumerate(counts)
        ],
    }


def expected_calibration_error(confidences: npt.NDArray[np.float32], is_correct: npt.NDArray[np.bool_]) -> float:
    """Return the expected calibration error from the probabilities of the predicted classes, (N,) both."""
    _, num_correct, confidence_sums = _bin_sums(confidences, is_correct)
    return float(np.abs(num_correct - confidence_sums).sum() / len(confidences))


def bins_of(confidences: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the bin of each image, (N,) from 0, by the probability of its predicted class."""
    bins = np.ceil(confidences.astype(np.float64) * NUM_BINS).astype(np.int64) - 1
    return np.clip(bins, 0, NUM_BINS - 1)


def _bin_sums(
    confidences: npt.NDArray[np.float32], is_correct: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the number of images, that of correct ones and the sum of the probabilities in each bin: (NUM_BINS,)."""
    exact, bins = confidences.astype(np.float64), bins_of(confidences)
    counts = np.bincount(bins, minlength=NUM_BINS)
    num_correct = np.bincount(bins, weights=is_correct, minlength=NUM_BINS)
    return counts, num_correct, np.bincount(bins, weights=exact, minlength=NUM_BINS)
