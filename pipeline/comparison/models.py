"""Answer whether one model is better than another on images like those of the test split."""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from scipy import stats

from pipeline.artifacts import Labels
from pipeline.comparison.paired import LEVEL, detectable_difference, difference_interval, mcnemar
from pipeline.comparison.pairing import Pairing
from pipeline.core.errors import UserError
from pipeline.evaluation.calibration import NUM_BINS, bins_of
from pipeline.evaluation.predictions import Predictions, Probabilities
from pipeline.evaluation.scores import f1_scores

Values = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "not shown"]  # A compared with B
RESAMPLES = 2000
RESAMPLES_AT_ONCE = 50  # 20 MB of drawn indices for 50,000 images
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
    """The recalls of a class, and the p-value of McNemar's test on its images, raw and corrected for all classes.

    `level` is the probability that a class of the comparison is called different that is not.
    """

    name: str
    images: int
    recall_a: float
    recall_b: float
    p_value: float
    corrected_p_value: float
    level: float = LEVEL

    @property
    def verdict(self) -> Verdict:
        """Return what is shown of A on this class, by the corrected p-value."""
        return verdict_of(self.recall_a - self.recall_b, is_shown=self.corrected_p_value <= self.level)


@dataclass(frozen=True)
class AccuracyComparison:
    """The comparison of two models' accuracies on the same images, without the other figures.

    `both`, `only_a`, `only_b` and `neither` count images by which model is right. `level` is that of the two-sided test
    and of the interval.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float
    level: float
    accuracy: Difference

    @property
    def verdict(self) -> Verdict:
        """Return what is shown of A: both McNemar's test and the interval of the difference must agree."""
        is_shown = self.p_value <= self.level and not self.accuracy.low <= 0 <= self.accuracy.high
        return verdict_of(self.accuracy.difference, is_shown=is_shown)


@dataclass(frozen=True)
class ModelComparison(AccuracyComparison):
    """The comparison of two models on the same images.

    `detectable` is the smallest difference of accuracies that these images show with 80 % power at this level, None if
    there is none. `loss` is the cross-entropy in nats; it and `calibration_error` are of the calibrated probabilities
    where both models have them.
    """

    pairing: Pairing
    macro_f1: Difference
    loss: Difference
    calibration_error: Difference
    classes: tuple[ClassDifference, ...]
    detectable: float | None


def compare_models(pairing: Pairing, *, level: float = LEVEL, seed: int = 0) -> ModelComparison:
    """Compare two models on the images of a pairing; `level` is that of the two-sided test and of the intervals.

    The intervals of macro F1, loss and expected calibration error are from a bootstrap over images in which both models
    get the same images (Efron and Tibshirani 1993, chapter 13); `seed` is that of its draws. Raises UserError where the
    models have a single image in common.
    """
    number = len(pairing)
    if number < 2:
        raise UserError(
            "found 1 image on which both models can be compared; allowed: two or more, since one image does not show "
            "how much images differ; evaluate the models on a larger split"
        )
    right_a, right_b = pairing.a.is_correct, pairing.b.is_correct
    both, only_a, only_b = (int(each.sum()) for each in (right_a & right_b, right_a & ~right_b, right_b & ~right_a))
    neither = number - both - only_a - only_b
    accuracies = compare_accuracies(both=both, only_a=only_a, only_b=only_b, neither=neither, level=level)
    macro_f1, loss, calibration_error = _compare_by_bootstrap(pairing, level=level, seed=seed)
    return ModelComparison(
        **vars(accuracies),
        pairing=pairing,
        macro_f1=macro_f1,
        loss=loss,
        calibration_error=calibration_error,
        classes=compare_classes(pairing, level=level),
        detectable=detectable_difference(number, discordance=(only_a + only_b) / number, level=level),
    )


def compare_accuracies(
    *, both: int, only_a: int, only_b: int, neither: int, level: float = LEVEL
) -> AccuracyComparison:
    """Compare two accuracies from the numbers of images that both models, one of them, or neither gets right."""
    number = both + only_a + only_b + neither
    low, high = difference_interval(only_a, only_b, number, level=level)
    return AccuracyComparison(
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=neither,
        p_value=mcnemar(only_a, only_b),
        level=level,
        accuracy=Difference((both + only_a) / number, (both + only_b) / number, low, high),
    )


def compare_classes(pairing: Pairing, *, level: float = LEVEL) -> tuple[ClassDifference, ...]:
    """Compare the recalls of the classes that have images.

    The p-values are corrected by Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian
    Journal of Statistics 6:65-70: with probability 1 - level no class is called different that is not.
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
    return tuple(ClassDifference(*row, each, level) for row, each in zip(rows, corrected, strict=True))


def holm(p_values: list[float]) -> list[float]:
    """Return the p-values corrected for their number (Holm 1979), in the same order."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, float)[order] * factors))
    return [float(each) for each in corrected]


def verdict_of(difference: float, *, is_shown: bool) -> Verdict:
    """Return the verdict about A, whose figure is higher than that of B by `difference`."""
    if not is_shown or difference == 0:
        return "not shown"
    return "better" if difference > 0 else "worse"


def _probabilities(pairing: Pairing) -> list[tuple[Predictions, Probabilities]]:
    """Return each model's predictions with its calibrated probabilities, or with its raw ones if one has no others."""
    return [(each, each.best_probabilities if pairing.is_calibrated else each.probabilities) for each in pairing.models]


@dataclass(frozen=True)
class _Images:
    """What the figures of a model need of each image: (N,) arrays.

    `gaps` are 1 or 0, for a correct or wrong prediction, less the probability of the predicted class; `bins` are those
    of the expected calibration error. `weights` is how often each image counts, (N,) float64 with the sum N.
    """

    num_classes: int
    actual: Labels
    predicted: Labels
    losses: Values
    bins: npt.NDArray[np.int64]
    gaps: Values

    @classmethod
    def of(cls, predictions: Predictions, probabilities: Probabilities) -> Self:
        """Return the values of each image; the loss is the cross-entropy in nats."""
        confidences = predictions.confidences(probabilities)
        of_actual = probabilities[np.arange(len(predictions)), predictions.actual].astype(np.float64)
        return cls(
            num_classes=len(predictions.class_names),
            actual=predictions.actual,
            predicted=predictions.predicted,
            losses=-np.log(np.maximum(of_actual, SMALLEST_PROBABILITY)),
            bins=bins_of(confidences),
            gaps=predictions.is_correct - confidences.astype(np.float64),
        )

    def macro_f1(self, weights: Values) -> float:
        """Return the mean F1 of the classes."""
        of_correct = weights * (self.actual == self.predicted)
        correct, actual, predicted = (
            np.bincount(labels, each, minlength=self.num_classes)
            for labels, each in ((self.actual, of_correct), (self.actual, weights), (self.predicted, weights))
        )
        return float(f1_scores(num_correct=correct, actual=actual, predicted=predicted).mean())

    def loss(self, weights: Values) -> float:
        """Return the mean loss in nats."""
        return float((weights * self.losses).mean())  # a product by `@` keeps all cores busy and is slower

    def bin_errors(self, weights: Values) -> Values:
        """Return the part of each bin, (NUM_BINS,): its sign is that of accuracy less mean probability."""
        errors: Values = np.bincount(self.bins, weights * self.gaps, minlength=NUM_BINS) / len(self.gaps)
        return errors


def _compare_by_bootstrap(pairing: Pairing, *, level: float, seed: int) -> tuple[Difference, Difference, Difference]:
    """Return macro F1, loss and expected calibration error of both models, and the intervals of their differences.

    Those of macro F1 and loss are percentile intervals. The expected calibration error is a sum of absolute values,
    which noise only raises, so that its percentile intervals contain the truth far too rarely. Its interval is the
    difference plus and minus the upper quantile of the sum of the absolute deviations of the bins of both models. This
    sum is at least the error of the difference (triangle inequality), so that the interval is rather too wide.
    """
    a, b = (_Images.of(each, probabilities) for each, probabilities in _probabilities(pairing))
    number, once = len(pairing), np.ones(len(pairing))
    errors_a, errors_b = a.bin_errors(once), b.bin_errors(once)

    def statistics(rows: npt.NDArray[np.int64]) -> Values:
        weights = np.bincount(rows, minlength=number).astype(np.float64)
        deviations = np.abs(a.bin_errors(weights) - errors_a) + np.abs(b.bin_errors(weights) - errors_b)
        f1, loss = a.macro_f1(weights) - b.macro_f1(weights), a.loss(weights) - b.loss(weights)
        return np.array([f1, loss, deviations.sum()])

    drawn = stats.bootstrap(
        (np.arange(number),),
        statistics,
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        vectorized=False,
        confidence_level=1 - level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = drawn.confidence_interval
    calibration_a, calibration_b = (float(np.abs(each).sum()) for each in (errors_a, errors_b))
    middle, half = calibration_a - calibration_b, float(np.quantile(drawn.bootstrap_distribution[2], 1 - level))
    return (
        Difference(a.macro_f1(once), b.macro_f1(once), float(low[0]), float(high[0])),
        Difference(a.loss(once), b.loss(once), float(low[1]), float(high[1])),
        Difference(calibration_a, calibration_b, middle - half, middle + half),
    )
