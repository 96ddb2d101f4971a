"""Means over seeds with their 95 % confidence intervals."""

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t


class Interval(NamedTuple):
    """A mean over seeds and the ends of its 95 % confidence interval (NaN with one seed)."""

    mean: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether the interval leaves the sign open."""
        return not (self.low > 0 or self.high < 0)


def mean_interval(values: np.ndarray) -> Interval:
    """Student's interval of the mean; of paired differences it is the paired t-test's."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if values.size < 2:
        return Interval(mean, math.nan, math.nan)
    reach = float(student_t.ppf(0.975, values.size - 1) * values.std(ddof=1)) / values.size**0.5
    return Interval(mean, mean - reach, mean + reach)
