"""Timing that survives a machine whose speed changes: contenders take turns, ratios are paired.

In every round each contender is visited once, in a shuffled order; what is compared is the ratio
of two contenders' times within a round, and of these the median over the rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

#: Works for about as many seconds as it is told, returns the seconds that one unit of work took.
Visit = Callable[[float], float]


class Spread(NamedTuple):
    """A median and the range of what it is the median of."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of the values of all rounds."""
        array = np.asarray(values, np.float64)
        return cls(float(np.median(array)), float(array.min()), float(array.max()))


def interleave(
    visits: Mapping[str, Visit], rounds: int, window: float, seed: int | Sequence[int]
) -> dict[str, list[float]]:
    """Seconds for one unit of each contender's work, one entry a round."""
    rng = np.random.default_rng(seed)
    names = list(visits)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for i in rng.permutation(len(names)):
            seconds[names[i]].append(visits[names[i]](window))
    return seconds


def paired_ratios(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> list[float]:
    """The contender's time over the reference's in the same round, of all rounds."""
    return np.divide(seconds[name], seconds[reference]).tolist()


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the median, by order statistics; None below six values.

    Each value is above the median with probability 1/2, so their number is binomial. Assumes the
    values to be independent.
    """
    ordered = np.sort(values)
    below = int(binom.ppf(0.025, len(ordered), 0.5))
    if below == 0:
        return None
    return float(ordered[below - 1]), float(ordered[-below])
