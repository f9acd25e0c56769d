"""Answer whether one recipe is better than another, from several seeds of each."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from pipeline.comparison.models import Difference, Verdict, verdict_of
from pipeline.comparison.paired import LEVEL, POWER
from pipeline.core.errors import UserError
from pipeline.evaluation.intervals import Interval

Values = npt.NDArray[np.float64]
RESAMPLES = 10_000
FEWEST_FOR_BOOTSTRAP = 4  # with fewer models, the bootstrap's intervals are too narrow
FEWEST_DRAWS_IN_TAIL = 20  # with fewer, the end of an interval is one of the most extreme draws, and too near


@dataclass(frozen=True)
class RecipeComparison:
    """The comparison of two recipes by their models' accuracies on the same images.

    `accuracies_a` and `accuracies_b` have one value for each seed; `accuracy` the means and the interval of their
    difference. `detectable` is the smallest true difference that this number of seeds shows with 80 % power.
    """

    accuracies_a: tuple[float, ...]
    accuracies_b: tuple[float, ...]
    accuracy: Difference
    level: float
    detectable: float

    @property
    def verdict(self) -> Verdict:
        """Return what is shown of recipe A."""
        return verdict_of(self.accuracy.difference, is_shown=not self.accuracy.low <= 0 <= self.accuracy.high)


def compare_recipes(
    correct_a: npt.NDArray[np.bool_], correct_b: npt.NDArray[np.bool_], *, level: float = LEVEL, seed: int = 0
) -> RecipeComparison:
    """Compare two recipes; the arrays (number of models, N) are True where a model gets one of the same N images right.

    The interval covers both that other seeds give other models, and that other images may suit one recipe better: see
    `mean_difference_interval` and `image_variance`. Raises UserError where a recipe has fewer than two models.
    """
    for name, correct in (("first", correct_a), ("second", correct_b)):
        if len(correct) < 2:
            raise UserError(
                f"the {name} recipe has {len(correct)} model; allowed: two or more seeds of each, since a single one "
                "does not show how much the seed matters; train more: `make run RECIPE=… SEEDS=5`"
            )
    a, b = correct_a.mean(1), correct_b.mean(1)
    of_images = math.sqrt(image_variance(correct_a, correct_b))
    low, high = mean_difference_interval(a, b, other_deviation=of_images, level=level, seed=seed)
    return RecipeComparison(
        accuracies_a=tuple(map(float, a)),
        accuracies_b=tuple(map(float, b)),
        accuracy=Difference(float(a.mean()), float(b.mean()), low, high),
        level=level,
        detectable=_detectable(a, b, other_deviation=of_images, level=level),
    )


def mean_difference_interval(
    a: Values, b: Values, *, other_deviation: float = 0.0, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Return the interval of the difference of two means over models, by a bootstrap over the models.

    With few models, percentiles of a bootstrap are too narrow; they are expanded as in Hesterberg 2015, "What teachers
    should know about the bootstrap", The American Statistician 69:371-386, with the degrees of freedom of Welch 1947.
    It is Welch's t-interval with fewer than four models of a recipe, and where the level is too low for the number of
    draws: 4 models each at the level 1 % were called different in 2 % of cases by the bootstrap. `other_deviation` is
    the standard deviation of a further, independent error of the difference. Neither the order of the models nor that
    of the recipes matters.
    """
    if a.mean() < b.mean():
        low, high = mean_difference_interval(b, a, other_deviation=other_deviation, level=level, seed=seed)
        return -high, -low
    estimate, freedom = float(a.mean() - b.mean()), _degrees_of_freedom(a, b)
    quantile = float(stats.t.isf(level / 2, freedom))
    tail = float(stats.norm.sf(quantile))
    if min(len(a), len(b)) < FEWEST_FOR_BOOTSTRAP or tail * RESAMPLES < FEWEST_DRAWS_IN_TAIL:
        half = quantile * math.hypot(_standard_error(a, b), other_deviation)
        return estimate - half, estimate + half
    generator = np.random.default_rng(seed)
    draws = _resampled_errors(a, generator) - _resampled_errors(b, generator)
    draws += generator.normal(0.0, other_deviation, RESAMPLES)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return estimate + float(low), estimate + float(high)


def _resampled_errors(values: Values, generator: np.random.Generator) -> Values:
    """Return how far means of resampled models are from the mean: (RESAMPLES,), with an unbiased variance."""
    means: Values = np.sort(values)[generator.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    errors: Values = (means - values.mean()) * math.sqrt(len(values) / (len(values) - 1))
    return errors


def _standard_error(a: Values, b: Values) -> float:
    """Return the standard error of the difference of the means over models."""
    return math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))


def _degrees_of_freedom(a: Values, b: Values) -> float:
    """Return the degrees of freedom of Welch's test; models that are all equal give those of equal variances.

    `scipy.stats.ttest_ind` has the same formula, but warns where the models of a recipe are all equal.
    """
    of_a, of_b = float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
    if of_a + of_b == 0:
        return len(a) + len(b) - 2
    return (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))


def image_variance(correct_a: npt.NDArray[np.bool_], correct_b: npt.NDArray[np.bool_]) -> float:
    """Return the variance of the difference of the mean accuracies that is due to the choice of the images.

    It is that of the recipes' difference from image to image, less the part that is due to the models (the expected
    mean squares of a two-way random model: Gallas, Pennello and Myers 2007, "Multireader multicase variance analysis
    for binary data", Journal of the Optical Society of America A 24:B70); it is 0 where the models explain all of it,
    as for two groups of one recipe. Where the models of each recipe are equally accurate, as happens with two seeds and
    few images, that part is not subtracted, since the accuracies do not show it.
    """
    number: int = correct_a.shape[1]
    if number < 2:
        return 0.0
    by_image = float((correct_a.mean(0) - correct_b.mean(0)).var(ddof=1))
    of_models = sum(float(each.var(0, ddof=1).mean()) / len(each) for each in (correct_a, correct_b))
    if all(np.ptp(each.mean(1)) == 0 for each in (correct_a, correct_b)):
        return max(by_image, of_models) / number
    return max(0.0, by_image - of_models) / number


def _detectable(a: Values, b: Values, *, other_deviation: float, level: float) -> float:
    """Return the smallest difference of the means that is shown with 80 % power.

    It is the sum of two quantiles of the t-distribution times the standard error, which approximates the power of
    Welch's test.
    """
    freedom = _degrees_of_freedom(a, b)
    quantiles = stats.t.isf(level / 2, freedom) + stats.t.ppf(POWER, freedom)
    return float(quantiles * math.hypot(_standard_error(a, b), other_deviation))
