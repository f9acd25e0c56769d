"""Fit the temperature that calibrates the probabilities of a trained network."""

import math
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from pipeline.artifacts import Labels
from pipeline.models.config import MAX_TEMPERATURE, MIN_TEMPERATURE

ROWS_PER_BLOCK = 4096  # images whose logits are in memory as float64
SIGNIFICANT_DIGITS = 4

Logits = npt.NDArray[np.float32]  # (N, num_classes)


def fit_temperature(logits: Logits, labels: Labels) -> float:
    """Return the temperature by which logits (N, num_classes) float32 are divided before the softmax.

    It minimizes the negative log-likelihood of the labels (N,) int64, as in Guo et al. 2017 (arXiv:1706.04599), between
    MIN_TEMPERATURE and MAX_TEMPERATURE. Where all images are classified correctly, the likelihood only grows as the
    temperature falls, until every probability is 1. Then the temperature is instead the one at which the mean
    probability of all classes but the predicted one is 1 / (N + 2), the expected fraction of errors after none in N
    images (Laplace's rule of succession).

    The sums are in float64 and the result is rounded to 4 significant digits: the same logits give the same temperature
    on every CPU.
    """
    if (logits.argmax(1) == labels).all():
        expected = 1 / (len(labels) + 2)

        def loss(log_temperature: float) -> float:
            return abs(math.log(_mean_doubt(logits, log_temperature) / expected))
    else:

        def loss(log_temperature: float) -> float:
            return _negative_log_likelihood(logits, labels, log_temperature)

    bounds = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    return float(f"{math.exp(found.x):.{SIGNIFICANT_DIGITS}g}")


def _negative_log_likelihood(logits: Logits, labels: Labels, log_temperature: float) -> float:
    """Return the mean negative logarithm of the probability of the label."""
    total, start = 0.0, 0
    for scaled in _scaled_blocks(logits, log_temperature):
        own = scaled[np.arange(len(scaled)), labels[start : start + len(scaled)]]
        total += float((np.log(np.exp(scaled).sum(1)) - own).sum())
        start += len(scaled)
    return total / len(labels)


def _mean_doubt(logits: Logits, log_temperature: float) -> float:
    """Return the mean probability of all classes but the predicted one, at least the smallest positive float."""
    total = 0.0
    for scaled in _scaled_blocks(logits, log_temperature):
        exponentials = np.exp(scaled)
        exponentials[np.arange(len(scaled)), scaled.argmax(1)] = 0  # it was 1
        others = exponentials.sum(1)
        total += float((others / (1 + others)).sum())
    return max(total / len(logits), sys.float_info.min)


def _scaled_blocks(logits: Logits, log_temperature: float) -> Iterator[npt.NDArray[np.float64]]:
    """Yield the logits of blocks of images in float64, divided by the temperature and shifted to a maximum of 0."""
    for start in range(0, len(logits), ROWS_PER_BLOCK):
        block = logits[start : start + ROWS_PER_BLOCK].astype(np.float64)
        yield (block - block.max(1, keepdims=True)) / math.exp(log_temperature)
