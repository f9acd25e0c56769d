"""Test whether two ways differ, from the results that both have with the same seeds."""

import math
import statistics
from collections.abc import Sequence

import numpy as np


def p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired t-test (Student 1908): how likely such a mean is without an effect.

    `differences` has the result of one way minus that of the other, for each of at least two seeds. It is assumed that
    they are normally distributed.
    """
    deviation, mean = statistics.stdev(differences), statistics.mean(differences)
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    return t_distribution_tails(mean / (deviation / math.sqrt(len(differences))), freedom=len(differences) - 1)


def t_distribution_tails(t: float, *, freedom: int) -> float:
    """Return the probability of a value beyond -|t| and |t| with this number of degrees of freedom.

    With t = sqrt(freedom) * tan(angle), the density in the angle is proportional to cos(angle) ** (freedom - 1).
    """
    angles, step = np.linspace(0, math.pi / 2, 1_000_000, endpoint=False, retstep=True)
    density = np.cos(angles + step / 2) ** (freedom - 1)
    return float(density[angles >= math.atan(abs(t) / math.sqrt(freedom))].sum() / density.sum())
