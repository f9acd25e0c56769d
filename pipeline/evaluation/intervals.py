"""Compute confidence intervals of accuracies."""

import math


def wilson_interval(num_correct: int, num_images: int) -> tuple[float, float]:
    """Return the 95 % confidence interval (low, high) of an accuracy (Wilson 1927), which stays within 0 and 1."""
    z = 1.959963984540054
    accuracy, weight = num_correct / num_images, z * z / num_images
    center = (accuracy + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(accuracy * (1 - accuracy) / num_images + weight / (4 * num_images))
    # an accuracy of 0 or 1 is the end of its interval, but rounding could put it outside
    low = 0.0 if num_correct == 0 else center - half
    return low, 1.0 if num_correct == num_images else center + half
