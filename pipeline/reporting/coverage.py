"""Compute how often the model is right if it reports a class only where its probability is high enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.intervals import Interval, wilson_interval
from pipeline.evaluation.predictions import Predictions

TYPICAL_COVERAGE = 0.95  # of the threshold that the text of the report describes
FEW_IMAGES = 100  # of a split: with fewer ones, the report warns that its figures show little


@dataclass(frozen=True)
class ThresholdResult:
    """What a threshold of the model gives on the test split.

    `stated` is the coverage on validation for which it was fitted. `reported` of the `images` test images have a
    probability at or above it, and `correct` ones of these are classified correctly.
    """

    stated: float
    threshold: float
    images: int
    reported: int
    correct: int

    @property
    def coverage(self) -> float:
        """Return the fraction of the test images whose class is reported."""
        return self.reported / self.images

    @property
    def coverage_interval(self) -> Interval:
        """Return the 95 % confidence interval of the coverage."""
        return wilson_interval(self.reported, self.images)

    @property
    def accuracy(self) -> float | None:
        """Return the fraction of the reported classes that are correct, or None if none is reported."""
        return self.correct / self.reported if self.reported else None

    @property
    def accuracy_interval(self) -> Interval | None:
        """Return the 95 % confidence interval of the accuracy, or None if no class is reported."""
        return wilson_interval(self.correct, self.reported) if self.reported else None


@dataclass(frozen=True)
class CoverageCurve:
    """The coverage and the accuracy of the reported classes, (K,) float64 both, of all K thresholds that differ.

    `images` (K,) int64 is the number of images whose class is reported. The first threshold is the highest one.
    """

    images: npt.NDArray[np.int64]
    coverages: npt.NDArray[np.float64]
    accuracies: npt.NDArray[np.float64]


def coverage_curve(predictions: Predictions) -> CoverageCurve:
    """Return the risk-coverage curve (El-Yaniv and Wiener 2010) of the predictions, as accuracies."""
    confidences = predictions.confidences(predictions.best_probabilities)
    order = np.argsort(-confidences, kind="stable")
    is_last = np.append(np.diff(confidences[order]) != 0, True)  # of equal probabilities, which are reported together
    images = np.flatnonzero(is_last) + 1
    num_correct = predictions.is_correct[order].cumsum()[images - 1]
    return CoverageCurve(images, images / len(predictions), num_correct / images)


def threshold_results(predictions: Predictions, thresholds: Mapping[float, float]) -> list[ThresholdResult]:
    """Return what each threshold, by the coverage for which it was fitted, gives on the images of the predictions."""
    confidences = predictions.confidences(predictions.best_probabilities).astype(np.float64)
    found = []
    for stated, threshold in sorted(thresholds.items()):
        is_reported = confidences >= threshold
        correct = int(predictions.is_correct[is_reported].sum())
        found.append(ThresholdResult(stated, threshold, len(predictions), int(is_reported.sum()), correct))
    return found


def typical_result(results: Sequence[ThresholdResult]) -> ThresholdResult | None:
    """Return the result of the threshold nearest to TYPICAL_COVERAGE, or None without thresholds."""
    return min(results, key=lambda result: abs(result.stated - TYPICAL_COVERAGE), default=None)
