"""Compute how far the probabilities of a classifier are from the fractions of images that it classifies correctly."""

from typing import Any

import numpy as np

from pipeline.evaluation.predictions import Predictions, Probabilities

NUM_BINS = 15  # of equal width, as in Guo et al. 2017


def calibration(predictions: Predictions, probabilities: Probabilities) -> dict[str, Any]:
    """Return the expected calibration error of probabilities (N, num_classes) and the bins that it is computed from.

    The error is that of Guo et al. 2017 (arXiv:1706.04599): an image is in the bin (lower, upper] that contains the
    probability of its predicted class, and the error is the mean over all images of the absolute difference between the
    accuracy and the mean probability in its bin. Both are None in a bin without images. They are fractions.
    """
    confidences = predictions.confidences(probabilities).astype(np.float64)
    bins = np.clip(np.ceil(confidences * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    num_correct = np.bincount(bins, weights=predictions.is_correct, minlength=NUM_BINS)
    confidence_sums = np.bincount(bins, weights=confidences, minlength=NUM_BINS)
    return {
        "expected_calibration_error": float(np.abs(num_correct - confidence_sums).sum() / len(predictions)),
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
