"""The statistics of comparisons have the published values, and their verdicts do not depend on names and orders."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats
from sklearn.metrics import f1_score, log_loss

from pipeline.comparison.models import Difference, ModelComparison, compare_accuracies, compare_models, holm
from pipeline.comparison.paired import detectable_difference, difference_interval, mcnemar, mcnemar_greater
from pipeline.comparison.pairing import pair, take
from pipeline.comparison.recipes import compare_recipes, image_variance, mean_difference_interval
from pipeline.core.errors import UserError
from pipeline.evaluation.calibration import calibration
from pipeline.evaluation.predictions import Predictions
from tests.compared import candidate, predictions, random_predictions, shuffled

Correct = npt.NDArray[np.bool_]


@pytest.fixture(name="a", scope="module")
def _a() -> Predictions:
    return random_predictions(400, num_classes=4, accuracy=0.85, seed=1)


@pytest.fixture(name="b", scope="module")
def _b() -> Predictions:
    return random_predictions(400, num_classes=4, accuracy=0.75, seed=2)


@pytest.fixture(name="comparison", scope="module")
def _comparison(a: Predictions, b: Predictions) -> ModelComparison:
    return compare_models(pair(candidate(a), candidate(b)))


def correct(accuracies: list[float], *, images: int = 1000, seed: int = 0) -> Correct:
    """Return a model for each accuracy, which is exact, with its wrong images at random places."""
    random = np.random.default_rng(seed)
    return np.array([random.permutation(images) < round(each * images) for each in accuracies])


# 1 and 7 discordant pairs of 21 (Bentur 2009), 6 and 16 of 161 (Cavo 2012): Fagerland, Lydersen and Laake 2017,
# "Statistical Analysis of Contingency Tables", chapter 8; the values are those of its R package contingencytables
@pytest.mark.parametrize(
    ("only_a", "only_b", "number", "p_value", "interval"),
    [(1, 7, 21, 0.0703125, (-0.517, -0.026)), (6, 16, 161, 0.052479, (-0.1240, -0.0054))],
)
def test_exact_p_value_and_interval_of_a_difference_are_the_published_ones(
    only_a: int, only_b: int, number: int, p_value: float, interval: tuple[float, float]
) -> None:
    assert mcnemar(only_a, only_b) == pytest.approx(p_value, abs=1e-6)
    assert difference_interval(only_a, only_b, number) == pytest.approx(interval, abs=6e-4 if number == 21 else 6e-5)


def test_the_one_sided_p_value_is_that_of_the_sign_test() -> None:
    for only_a, only_b in ((0, 5), (5, 0), (7, 1), (400, 350)):
        expected = stats.binomtest(only_a, only_a + only_b, alternative="greater").pvalue
        assert mcnemar_greater(only_a, only_b) == pytest.approx(expected)
    assert mcnemar_greater(0, 0) == 1


@pytest.mark.parametrize("number", [1, 2, 50, 50_000])
def test_an_interval_is_within_the_possible_differences_and_contains_the_estimate(number: int) -> None:
    for only_a, only_b in {(0, 0), (number, 0), (0, number), (number // 2, number - number // 2), (1, 0)}:
        low, high = difference_interval(only_a, only_b, number)
        assert -1 <= low <= (only_a - only_b) / number <= high <= 1
        assert low < high
        assert difference_interval(only_b, only_a, number) == pytest.approx((-high, -low), abs=1e-9)
        assert 0 <= mcnemar(only_a, only_b) == mcnemar(only_b, only_a) <= 1


def test_equal_models_are_called_different_with_at_most_the_probability_of_the_level() -> None:
    """With a mid-p-value, it would be 7.7 % with 16 discordant images."""
    for discordant in (*range(1, 60), 137, 300):
        shown = [
            compare_accuracies(both=0, only_a=each, only_b=discordant - each, neither=300).verdict != "not shown"
            for each in range(discordant + 1)
        ]
        assert stats.binom.pmf(np.arange(discordant + 1), discordant, 0.5) @ shown <= 0.05


def test_without_discordant_images_nothing_is_shown() -> None:
    assert mcnemar(0, 0) == 1
    assert detectable_difference(100, discordance=0) is None
    found = compare_accuracies(both=90, only_a=0, only_b=0, neither=10)
    assert found.verdict == "not shown"
    # Tango 1998: without discordant pairs, the ends are plus and minus z^2 / (n + z^2)
    z = NormalDist().inv_cdf(0.975)
    assert found.accuracy.high == -found.accuracy.low == pytest.approx(z**2 / (100 + z**2))


# 0.45 and 0.05 discordant: 23 pairs for both, powerandsamplesize.com, "Compare Paired Proportions: McNemar's Z-test",
# which has its formula from Connor 1987, page 209
@pytest.mark.parametrize(("sides", "power"), [(2, 0.8), (1, 0.9)])
def test_the_detectable_difference_belongs_to_the_published_number_of_pairs(sides: int, power: float) -> None:
    at_22, at_23 = (detectable_difference(n, discordance=0.5, power=power, sides=sides) for n in (22, 23))
    assert at_22
    assert at_23
    assert at_23 <= 0.40 < at_22


def test_the_detectable_difference_is_shown_with_the_stated_power() -> None:
    number, discordance = 10_000, 0.15
    difference = detectable_difference(number, discordance=discordance)
    assert difference
    of_a, of_b = (discordance + difference) / 2, (discordance - difference) / 2
    drawn = np.random.default_rng(0).multinomial(number, [of_a, of_b, 1 - discordance], 2000)
    assert np.mean([mcnemar(int(x), int(y)) <= 0.05 for x, y, _ in drawn]) == pytest.approx(0.8, abs=0.03)


def test_too_few_images_can_show_no_difference() -> None:
    assert detectable_difference(20, discordance=0.05) is None


def test_p_values_are_corrected_as_by_holm() -> None:
    # the values of p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") in R: factors 4, 3, 2, 1, and none below one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_the_figures_of_a_model_are_those_of_other_libraries(comparison: ModelComparison, a: Predictions) -> None:
    labels = range(len(a.class_names))
    assert comparison.accuracy.a == a.is_correct.mean()
    assert comparison.macro_f1.a == pytest.approx(f1_score(a.actual, a.predicted, average="macro", labels=labels))
    assert comparison.loss.a == pytest.approx(log_loss(a.actual, a.probabilities, labels=labels))
    expected = calibration(a, a.probabilities)["expected_calibration_error"]
    assert comparison.calibration_error.a == pytest.approx(expected)


def test_figures_that_can_be_computed_by_hand() -> None:
    # A is right 3 times of 4, B 2 times; F1 of A is 2/3 and 4/5, of B 1/2 and 1/2
    a, b = predictions([0, 0, 1, 1], [0, 1, 1, 1]), predictions([0, 0, 1, 1], [0, 1, 0, 1], confidence=0.6)
    found = compare_models(pair(candidate(a), candidate(b)))
    assert (found.both, found.only_a, found.only_b, found.neither) == (2, 1, 0, 1)
    assert (found.accuracy.a, found.accuracy.b, found.accuracy.difference) == (0.75, 0.5, 0.25)
    assert (found.macro_f1.a, found.macro_f1.b) == pytest.approx(((2 / 3 + 4 / 5) / 2, 0.5))
    assert found.loss.a == pytest.approx(-(3 * math.log(0.8) + math.log(0.2)) / 4, rel=1e-6)
    assert (found.calibration_error.a, found.calibration_error.b) == pytest.approx((0.05, 0.1), rel=1e-6)


def test_the_interval_of_the_loss_is_that_of_the_normal_approximation(comparison: ModelComparison) -> None:
    a, b = comparison.pairing.models
    of_actual = [each.probabilities[np.arange(400), each.actual].astype(float) for each in (a, b)]
    differences = np.log(of_actual[1]) - np.log(of_actual[0])
    half = 1.96 * differences.std() / math.sqrt(400)
    found = comparison.loss
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half), abs=0.1 * half)


def test_the_interval_of_the_calibration_error_contains_the_truth_also_if_a_model_is_calibrated() -> None:
    """The true errors are 0 and 0.1; noise only raises them, so that all percentiles of a bootstrap are above -0.1."""
    random = np.random.default_rng(0)
    confidences = random.uniform(0.5, 0.9, 1000).astype(np.float32)
    a = predictions([0] * 1000, [*map(int, random.random(1000) > confidences)])
    models = []
    for excess in (0, 0.1):
        of_predicted = np.eye(2, dtype=np.float32)[a.predicted]
        rest = (1 - confidences - excess)[:, None]
        models.append(replace(a, probabilities=of_predicted * (1 - 2 * rest) + rest))
    found = compare_models(pair(*map(candidate, models))).calibration_error
    assert found.low < -0.1 < found.difference < found.high


def mirrored(difference: Difference) -> list[float]:
    return [difference.b, difference.a, -difference.high, -difference.low]


def test_swapping_the_models_mirrors_everything(comparison: ModelComparison, a: Predictions, b: Predictions) -> None:
    found = compare_models(pair(candidate(shuffled(b)), candidate(a)))
    assert comparison.verdict == "better"
    assert found.verdict == "worse"
    assert (found.only_a, found.only_b, found.p_value) == (comparison.only_b, comparison.only_a, comparison.p_value)
    for name in ("accuracy", "macro_f1", "loss", "calibration_error"):
        expected = mirrored(getattr(comparison, name))
        assert list(vars(getattr(found, name)).values()) == pytest.approx(expected, abs=1e-9)
    for one, other in zip(found.classes, comparison.classes, strict=True):
        assert (one.recall_a, one.corrected_p_value) == (other.recall_b, other.corrected_p_value)


def test_the_order_of_the_images_does_not_matter(comparison: ModelComparison, a: Predictions, b: Predictions) -> None:
    found = compare_models(pair(candidate(shuffled(a)), candidate(shuffled(b, seed=1))))
    assert replace(found, pairing=comparison.pairing) == comparison


def test_the_level_is_that_of_test_intervals_and_classes(comparison: ModelComparison) -> None:
    strict = compare_models(comparison.pairing, level=1e-9)
    assert strict.verdict == "not shown"
    assert {each.verdict for each in strict.classes} == {"not shown"}
    for name in ("accuracy", "macro_f1", "loss", "calibration_error"):
        wide, narrow = getattr(strict, name), getattr(comparison, name)
        assert wide.high - wide.low > narrow.high - narrow.low


def test_a_class_in_which_one_model_fails_is_named() -> None:
    actual = [0, 1, 2] * 100
    a = predictions(actual, actual, classes=("x", "y", "z", "without images"))
    b = replace(a, predicted=np.where(a.actual == 1, 0, a.actual))
    found = compare_models(pair(candidate(a), candidate(b)))
    assert [(each.name, each.images, each.verdict) for each in found.classes] == [
        ("x", 100, "not shown"),
        ("y", 100, "better"),
        ("z", 100, "not shown"),
    ]


def test_the_same_model_is_not_shown_to_differ_from_itself(a: Predictions) -> None:
    found = compare_models(pair(candidate(a), candidate(a)))
    assert (found.p_value, found.verdict, found.detectable) == (1, "not shown", None)
    assert (found.loss.low, found.loss.high) == (0, 0)


def test_calibrated_probabilities_are_used_only_if_both_models_have_them(a: Predictions) -> None:
    calibrated = replace(a, calibrated_probabilities=np.full_like(a.probabilities, 0.25))
    raw = compare_models(pair(candidate(calibrated), candidate(a)))
    assert raw.loss.difference == 0
    both = compare_models(pair(candidate(calibrated), candidate(calibrated)))
    assert both.loss.a == pytest.approx(math.log(4))


def test_a_single_common_image_is_refused(a: Predictions) -> None:
    one = candidate(take(a, np.array([0])))
    with pytest.raises(UserError, match=r"found 1 image .* allowed: two or more"):
        compare_models(pair(one, one))


def test_one_class_and_two_images_are_enough() -> None:
    one = predictions([0, 0], [0, 0], classes=("only",), confidence=1)
    found = compare_models(pair(candidate(one), candidate(one)))
    assert (found.macro_f1.a, found.loss.a, found.verdict) == (1, 0, "not shown")


def test_a_recipe_with_one_seed_is_refused() -> None:
    two, one = correct([0.9, 0.8]), correct([0.9])
    with pytest.raises(UserError, match="the first recipe has 1 model; allowed: two or more seeds of each"):
        compare_recipes(one, two)
    with pytest.raises(UserError, match="the second recipe has 1 model"):
        compare_recipes(two, one)


def test_with_few_seeds_the_interval_is_that_of_welchs_test() -> None:
    a, b = np.array([0.70, 0.72, 0.75]), np.array([0.60, 0.66, 0.61])
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert mean_difference_interval(a, b) == pytest.approx(tuple(expected))


def test_with_more_seeds_the_bootstrap_over_models_agrees_with_welchs_test() -> None:
    random = np.random.default_rng(3)
    a, b = random.normal(0.70, 0.01, 20), random.normal(0.69, 0.01, 15)
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert mean_difference_interval(a, b) == pytest.approx((low, high), abs=0.05 * (high - low))


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_the_recipes_level_is_not_above_the_stated_one(seeds: int) -> None:
    random, shown = np.random.default_rng(seeds), 0
    for _ in range(200):
        a, b = random.normal(0.7, 0.005, (2, seeds))
        low, high = mean_difference_interval(a, b)
        shown += not low <= 0 <= high
    assert shown <= 200 * 0.05 + 2 * math.sqrt(200 * 0.05 * 0.95)


@pytest.mark.parametrize(("seeds", "level"), [(4, 0.01), (5, 0.001)])
def test_the_recipes_level_is_kept_also_where_it_is_low(seeds: int, level: float) -> None:
    """With 10,000 draws of a bootstrap it would be 2 % with 4 seeds and 1.4 % with 5."""
    random, shown = np.random.default_rng(seeds), 0
    for _ in range(2000):
        a, b = random.normal(0.7, 0.005, (2, seeds))
        low, high = mean_difference_interval(a, b, level=level)
        shown += not low <= 0 <= high
    assert shown <= 2000 * level + 2 * math.sqrt(2000 * level * (1 - level))


def test_swapping_recipes_or_seeds_mirrors_or_keeps_the_interval() -> None:
    a, b = correct([0.80, 0.81, 0.83, 0.84, 0.82]), correct([0.77, 0.78, 0.78, 0.80], seed=1)
    found, swapped, other_order = compare_recipes(a, b), compare_recipes(b, a), compare_recipes(a[::-1], b[::-1])
    assert (found.verdict, swapped.verdict) == ("better", "worse")
    assert list(vars(swapped.accuracy).values()) == pytest.approx(mirrored(found.accuracy))
    assert list(vars(other_order.accuracy).values()) == pytest.approx(list(vars(found.accuracy).values()))
    assert swapped.detectable == pytest.approx(found.detectable)


def test_recipes_that_are_equally_accurate_by_chance_are_not_shown_to_differ() -> None:
    """Without variance between seeds, any difference would be shown, if their different errors were ignored."""
    a, b = correct([0.9, 0.9], images=60), correct([0.95, 0.95], images=60, seed=1)
    found = compare_recipes(a, b)
    assert found.accuracy.difference == pytest.approx(-0.05)
    assert found.verdict == "not shown"
    assert found.detectable > 0


def test_models_that_all_predict_the_same_have_an_interval_of_no_width() -> None:
    same = np.tile(correct([0.9]), (5, 1))
    found = compare_recipes(same, same)
    assert (found.accuracy.low, found.accuracy.high, found.verdict) == (0, 0, "not shown")


def test_the_interval_covers_also_that_other_images_may_suit_one_recipe_better() -> None:
    """Models and images are drawn: the recipes are equally good on all images, but each is better on some of them."""
    random, shown, without_images, images = np.random.default_rng(0), 0, 0, 200
    for _ in range(100):
        of_image, suits_a = random.uniform(0.3, 0.7, images), random.choice([-0.3, 0.3], images)
        a, b = (random.random((6, images)) < of_image + each for each in (suits_a, -suits_a))
        shown += compare_recipes(a, b).verdict != "not shown"
        low, high = mean_difference_interval(a.mean(1), b.mean(1))
        without_images += not low <= 0 <= high
    assert shown <= 5 + 2 * math.sqrt(100 * 0.05 * 0.95)
    assert without_images > 20


def test_the_variance_between_images_is_estimated_without_that_between_models() -> None:
    """Half of the images suit one recipe by 0.6 more: a variance of 0.36 between images, of 200 images."""
    random, found = np.random.default_rng(0), []
    for _ in range(50):
        suits_a = random.choice([-0.3, 0.3], 200)
        a, b = (random.random((3, 200)) < 0.5 + each for each in (suits_a, -suits_a))
        found.append(image_variance(a, b))
    assert np.mean(found) == pytest.approx(0.36 / 200, rel=0.05)


def test_a_difference_between_recipes_is_found() -> None:
    random = np.random.default_rng(1)
    a, b = ([*map(float, random.normal(mean, 0.005, 5))] for mean in (0.74, 0.70))
    found = compare_recipes(correct(a, images=10_000), correct(b, images=10_000, seed=1))
    assert found.verdict == "better"
    assert found.accuracies_a == pytest.approx(a, abs=1e-4)
    assert 0 < found.detectable < 0.02
