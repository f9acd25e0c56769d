"""Coverage and accuracy in the report are those of a count by hand, and few images are called few."""

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.evaluation.predictions import Predictions
from pipeline.reporting.coverage import CoverageCurve, coverage_curve, threshold_results, typical_result
from pipeline.reporting.figures import coverage


def predictions(confidences: npt.ArrayLike, is_correct: npt.ArrayLike) -> Predictions:
    """Return predictions of two classes, in which the second is predicted with these probabilities."""
    highest = np.asarray(confidences, dtype=np.float32)
    probabilities = np.stack([1 - highest, highest], axis=1)
    number, actual = len(highest), np.asarray(is_correct).astype(np.int64)
    return Predictions(
        ("no", "yes"), [""] * number, [""] * number, actual, np.ones(number, np.int64), probabilities, None
    )


def points(curve: CoverageCurve) -> list[tuple[int, float, float]]:
    return list(zip(curve.images.tolist(), curve.coverages.tolist(), curve.accuracies.tolist(), strict=True))


def test_the_curve_begins_with_the_most_probable_image() -> None:
    found = coverage_curve(predictions([0.9, 0.6, 0.8, 0.7], [1, 0, 1, 0]))
    assert points(found) == [(1, 0.25, 1.0), (2, 0.5, 1.0), (3, 0.75, 2 / 3), (4, 1.0, 0.5)]


def test_images_of_equal_probability_are_one_point_of_the_curve() -> None:
    found = coverage_curve(predictions([0.9, 0.9, 0.6, 0.6], [1, 0, 1, 1]))
    assert points(found) == [(2, 0.5, 0.5), (4, 1.0, 0.75)]


def test_a_threshold_counts_the_images_at_or_above_it() -> None:
    [half, most] = threshold_results(predictions([0.9, 0.75, 0.6, 0.55], [1, 0, 1, 1]), {0.95: 0.0, 0.5: 0.75})
    assert (half.stated, half.reported, half.coverage, half.accuracy) == (0.5, 2, 0.5, 0.5)
    assert (most.stated, most.reported, most.coverage, most.accuracy) == (0.95, 4, 1.0, 0.75)
    assert half.accuracy_interval == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert most.coverage_interval == pytest.approx((0.5101, 1.0), abs=1e-4)
    assert typical_result([half, most]) == most
    assert typical_result([]) is None


def test_a_threshold_above_all_images_has_no_accuracy() -> None:
    [found] = threshold_results(predictions([0.9, 0.6], [1, 1]), {0.5: 0.95})
    assert (found.reported, found.coverage, found.accuracy, found.accuracy_interval) == (0, 0.0, None, None)


@pytest.mark.parametrize("number", [1, 2, 9, 1000])
@pytest.mark.parametrize("fraction_correct", [0.0, 0.5, 1.0])
def test_the_figure_of_few_or_many_right_or_wrong_images_has_a_text(number: int, fraction_correct: float) -> None:
    confidences = np.linspace(0.5, 1.0, number)
    found = predictions(confidences, np.arange(number) < fraction_correct * number)
    results = threshold_results(found, {0.5: 2.0, 0.9: 0.55})
    svg = coverage(coverage_curve(found), results).replace("\u00a0", " ")
    assert f"by coverage, of {number:,} test images: " in svg
    assert ("at the threshold for 90 %" in svg) == (number > 1)
    assert "at the threshold for 50 %" not in svg
    assert len(svg) < 40_000
