"""Means with their 95 % confidence intervals, by Student's t."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05


class Interval(NamedTuple):
    """A mean and the ends of its 95 % confidence interval (NaN with one value)."""

    mean: float
    low: float
    high: float


def half_width(spread: float, count: int, level: float = LEVEL) -> float:
    """From the mean of so many values, of this standard deviation, to the end of its interval."""
    return float(stats.t.ppf(1 - level / 2, count - 1)) * spread / math.sqrt(count)


def mean_interval(values: np.ndarray) -> Interval:
    """Student's interval of the mean; of paired differences it is the paired t-test's."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if values.size < 2:
        return Interval(mean, math.nan, math.nan)
    reach = half_width(float(values.std(ddof=1)), values.size)
    return Interval(mean, mean - reach, mean + reach)
