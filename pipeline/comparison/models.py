"""Answer whether one model is better than another on images like those of the test split."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from pipeline.comparison.paired import LEVEL, detectable_difference, difference_interval, mcnemar
from pipeline.comparison.pairing import Pairing
from pipeline.evaluation.calibration import expected_calibration_error
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.scores import f1_scores

Verdict = Literal["better", "worse", "not shown"]  # what is said of A
RESAMPLES = 2000
RESAMPLES_AT_ONCE = 50  # limits the memory for the drawn indices
SMALLEST_PROBABILITY = 1e-12  # in the logarithm of the loss


@dataclass(frozen=True)
class Difference:
    """A figure of two models and the interval of their difference, `a` minus `b`."""

    a: float
    b: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """Return the value of A minus that of B."""
        return self.a - self.b


@dataclass(frozen=True)
class ClassDifference:
    """The recalls of a class, and the p-value of McNemar's test on its images, raw and corrected for all classes."""

    name: str
    images: int
    recall_a: float
    recall_b: float
    p_value: float
    corrected_p_value: float

    @property
    def verdict(self) -> Verdict:
        """Return what the corrected p-value allows to say of A on this class."""
        return verdict_of(self.recall_a - self.recall_b, is_shown=self.corrected_p_value <= LEVEL)


@dataclass(frozen=True)
class ModelComparison:
    """The comparison of two models on the same images.

    `both`, `only_a`, `only_b` and `neither` count images by which model is right. `detectable` is the smallest
    difference of accuracies that these images show with 80 % power at this level, None if there is none. `loss` is the
    cross-entropy in nats; it and `calibration_error` are of the calibrated probabilities where both models have them.
    """

    pairing: Pairing
    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float
    level: float
    accuracy: Difference
    macro_f1: Difference
    loss: Difference
    calibration_error: Difference
    classes: tuple[ClassDifference, ...]
    detectable: float | None

    @property
    def verdict(self) -> Verdict:
        """Return what is shown of A: both McNemar's test and the interval of the difference must agree."""
        is_shown = self.p_value <= self.level and not self.accuracy.low <= 0 <= self.accuracy.high
        return verdict_of(self.accuracy.difference, is_shown=is_shown)


def compare_models(pairing: Pairing, *, level: float = LEVEL, seed: int = 0) -> ModelComparison:
    """Compare two models on the images of a pairing; `level` is that of the two-sided test and of the intervals.

    The intervals of loss, macro F1 and expected calibration error are percentile intervals of a bootstrap over images,
    in which both models get the same images (Efron and Tibshirani 1993, chapter 13); `seed` is that of its draws.
    """
    right_a, right_b = pairing.a.is_correct, pairing.b.is_correct
    number = len(pairing)
    both, only_a, only_b = (int(each.sum()) for each in (right_a & right_b, right_a & ~right_b, right_b & ~right_a))
    low, high = difference_interval(only_a, only_b, number, level=level)
    losses = [_losses(each, probabilities) for each, probabilities in _probabilities(pairing)]
    confidences = [each.confidences(probabilities) for each, probabilities in _probabilities(pairing)]

    def bootstrap(statistic: Callable[[npt.NDArray[np.int64]], tuple[float, float]]) -> Difference:
        return _bootstrap(statistic, number=number, level=level, seed=seed)

    return ModelComparison(
        pairing=pairing,
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=number - both - only_a - only_b,
        p_value=mcnemar(only_a, only_b),
        level=level,
        accuracy=Difference(float(right_a.mean()), float(right_b.mean()), low, high),
        macro_f1=bootstrap(lambda rows: (_macro_f1(pairing.a, rows), _macro_f1(pairing.b, rows))),
        loss=bootstrap(lambda rows: (float(losses[0][rows].mean()), float(losses[1][rows].mean()))),
        calibration_error=bootstrap(
            lambda rows: (
                expected_calibration_error(confidences[0][rows], right_a[rows]),
                expected_calibration_error(confidences[1][rows], right_b[rows]),
            )
        ),
        classes=compare_classes(pairing),
        detectable=detectable_difference(number, discordance=(only_a + only_b) / number, level=level),
    )


def compare_classes(pairing: Pairing) -> tuple[ClassDifference, ...]:
    """Compare the recalls of the classes that have images.

    The p-values are corrected by Holm 1979, "A simple sequentially rejective multiple test procedure": with probability
    1 - level no class is called different that is not.
    """
    right_a, right_b, actual = pairing.a.is_correct, pairing.b.is_correct, pairing.a.actual
    rows = []
    for index, name in enumerate(pairing.a.class_names):
        of_class = actual == index
        if of_class.any():
            a, b = right_a[of_class], right_b[of_class]
            p_value = mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))
            rows.append((name, int(of_class.sum()), float(a.mean()), float(b.mean()), p_value))
    corrected = holm([row[-1] for row in rows])
    return tuple(ClassDifference(*row, each) for row, each in zip(rows, corrected, strict=True))


def holm(p_values: list[float]) -> list[float]:
    """Return the p-values corrected for their number (Holm 1979), in the same order."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, float)[order] * factors))
    return [float(each) for each in corrected]


def verdict_of(difference: float, *, is_shown: bool) -> Verdict:
    """Return what is said of A, whose figure is higher than that of B by `difference`."""
    if not is_shown or difference == 0:
        return "not shown"
    return "better" if difference > 0 else "worse"


def _probabilities(pairing: Pairing) -> list[tuple[Predictions, npt.NDArray[np.float32]]]:
    """Return each model's predictions with its calibrated probabilities, or with its raw ones if one has no others."""
    is_calibrated = all(each.calibrated_probabilities is not None for each in (pairing.a, pairing.b))
    return [(each, each.best_probabilities if is_calibrated else each.probabilities) for each in (pairing.a, pairing.b)]


def _losses(predictions: Predictions, probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the cross-entropy of each image in nats: (N,)."""
    of_actual = probabilities[np.arange(len(predictions)), predictions.actual].astype(np.float64)
    return -np.log(np.maximum(of_actual, SMALLEST_PROBABILITY))


def _macro_f1(predictions: Predictions, rows: npt.NDArray[np.int64]) -> float:
    """Return the mean F1 of the classes, over some images."""
    number = len(predictions.class_names)
    actual, predicted = predictions.actual[rows], predictions.predicted[rows]
    counts = [np.bincount(each, minlength=number) for each in (actual[actual == predicted], actual, predicted)]
    return float(f1_scores(num_correct=counts[0], actual=counts[1], predicted=counts[2]).mean())


def _bootstrap(
    statistic: Callable[[npt.NDArray[np.int64]], tuple[float, float]], *, number: int, level: float, seed: int
) -> Difference:
    """Return a figure of both models, and the interval of the difference over images drawn with replacement."""
    rows = np.arange(number)

    def difference(drawn: npt.NDArray[np.int64]) -> float:
        a, b = statistic(drawn)
        return a - b

    low, high = stats.bootstrap(
        (rows,),
        difference,
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        vectorized=False,
        confidence_level=1 - level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Difference(*statistic(rows), float(low), float(high))
