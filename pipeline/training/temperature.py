"""Fit the temperature that calibrates the probabilities of a trained network."""

import math

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from pipeline.artifacts import Labels
from pipeline.models.config import MAX_TEMPERATURE, MIN_TEMPERATURE

ROWS_PER_BLOCK = 4096  # images whose logits are in memory as float64
SIGNIFICANT_DIGITS = 4
# the standard deviation of the prior distribution of the logarithm of the temperature: 95 % between 0.38 and 2.7
PRIOR_DEVIATION = 0.5

Logits = npt.NDArray[np.float32]  # (N, num_classes)


def fit_temperature(logits: Logits, labels: Labels) -> float:
    """Return the temperature by which logits (N, num_classes) float32 are divided before the softmax.

    It minimizes the sum of the negative log-likelihoods of the labels (N,) int64, as in Guo et al. 2017
    (arXiv:1706.04599), between MIN_TEMPERATURE and MAX_TEMPERATURE, plus log(temperature)² / (2 PRIOR_DEVIATION²).
    This prior matters only where the split has few errors: a network without an error on a small validation split would
    get the lowest temperature, and be certain of every image.

    The sums are in float64 and the result is rounded to 4 significant digits: the same logits give the same temperature
    on every CPU.
    """

    def loss(log_temperature: float) -> float:
        prior = log_temperature**2 / (2 * PRIOR_DEVIATION**2)
        return _negative_log_likelihood(logits, labels, temperature=math.exp(log_temperature)) + prior

    bounds = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    return float(f"{math.exp(found.x):.{SIGNIFICANT_DIGITS}g}")


def _negative_log_likelihood(logits: Logits, labels: Labels, *, temperature: float) -> float:
    """Return the sum of the negative logarithms of the probabilities of the labels."""
    total = 0.0
    for start in range(0, len(logits), ROWS_PER_BLOCK):
        block = logits[start : start + ROWS_PER_BLOCK].astype(np.float64)
        scaled = (block - block.max(1, keepdims=True)) / temperature  # at most 0: the exponentials do not overflow
        own = scaled[np.arange(len(scaled)), labels[start : start + ROWS_PER_BLOCK]]
        total += float((np.log(np.exp(scaled).sum(1)) - own).sum())
    return total
