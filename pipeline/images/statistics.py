"""Compute mean and standard deviation of pixels from exact sums: the result is the same on every machine."""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import Images

MIN_DEVIATION = 1 / 255  # the result for a channel that is constant: pixels are divided by the deviation


def mean_and_deviation(blocks: Iterable[Images]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of pixels / 255 for each channel, over all images (n, H, W, C) uint8."""
    counts: npt.NDArray[np.int64] | int = 0
    for block in blocks:
        channels = [np.bincount(block[..., channel].ravel(), minlength=256) for channel in range(block.shape[-1])]
        counts = counts + np.stack(channels).astype(np.int64)
    moments = [_moments(histogram) for histogram in np.atleast_2d(counts).tolist()]
    return [mean for mean, _ in moments], [max(deviation, MIN_DEVIATION) for _, deviation in moments]


def _moments(histogram: list[int]) -> tuple[float, float]:
    """Return mean and standard deviation of value / 255; `histogram` has the number of pixels of each value."""
    total = sum(histogram)
    first = sum(value * count for value, count in enumerate(histogram))
    second = sum(value * value * count for value, count in enumerate(histogram))
    return first / (255 * total), math.sqrt((total * second - first * first) / (255 * total) ** 2)
