"""Compute confidence intervals of fractions of images, such as accuracies, and of F1 scores."""

import math

Interval = tuple[float, float]  # the lower and the upper end


def wilson_interval(num_correct: int, num_images: int) -> Interval:
    """Return the 95 % confidence interval (low, high) of an accuracy (Wilson 1927), which stays within 0 and 1."""
    z = 1.959963984540054
    accuracy, weight = num_correct / num_images, z * z / num_images
    center = (accuracy + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(accuracy * (1 - accuracy) / num_images + weight / (4 * num_images))
    # an accuracy of 0 or 1 is the end of its interval, but rounding could put it outside
    low = 0.0 if num_correct == 0 else center - half
    return low, 1.0 if num_correct == num_images else center + half


def f1_interval(num_correct: int, num_involved: int) -> Interval:
    """Return the 95 % confidence interval (low, high) of the F1 score of a class.

    It is the indirect Wilson interval of Lam, Gopal and Qian 2023 (arXiv:2309.14621). `num_involved` is the number of
    images that are of the class, predicted as it, or both (TP + FP + FN); `num_correct` (TP) of them are both. This
    fraction F* has a Wilson interval, and F1 = 2 F* / (1 + F*) increases with it.
    """
    low, high = wilson_interval(num_correct, num_involved)
    return 2 * low / (1 + low), 2 * high / (1 + high)
