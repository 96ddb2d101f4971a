"""What is concluded from independent studies: intervals, verdicts, and what tuning costs."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from benchmarks.lab._statistics import LEVEL, half_width, mean_interval

#: How many studies are too many to think of.
MOST = 10_000


class Contrast(NamedTuple):
    """Differences between two arms, one a study; below 0 the first one is better."""

    mean: float
    low: float
    high: float
    spread: float  # standard deviation over studies
    p: float
    studies: int


def contrast(differences: Sequence[float]) -> Contrast:
    """The paired t over studies: mean, 95 % interval and p-value."""
    values = np.asarray(differences, np.float64)
    found, spread = mean_interval(values), float(values.std(ddof=1))
    if spread > 0:
        p = float(stats.ttest_1samp(values, 0.0).pvalue)
    else:
        p = 1.0 if found.mean == 0 else 0.0
    return Contrast(*found, spread, p, len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm for the number of contrasts."""
    return [float(p) for p in multipletests(p_values, LEVEL, method="holm")[1]]


def verdict(
    found: Contrast, adjusted: float, margin: float, contrasts: int, words: str = "1 %"
) -> str:
    """The words that were fixed beforehand.

    Args:
      found: the contrast; below 0 the first arm is better.
      adjusted: its p-value by Holm.
      margin: the least improvement that counts, above 0, in the differences' unit.
      contrasts: how many there are, for the number of studies that would decide.
      words: the margin in words.
    """
    if found.high < 0 and found.mean <= -margin and adjusted <= LEVEL:
        return "helps"
    if found.low > -margin:
        return f"does not help by {words} or more"
    needed = studies_needed(found, margin, contrasts)
    return f"undecided: {needed} studies would decide" if needed else "undecided"


def studies_needed(found: Contrast, margin: float, contrasts: int) -> int | None:
    """The fewest studies that would decide, if mean and spread stay as they are; None: too many.

    For "helps" the level is shared among all contrasts, as the first step of Holm does.
    """
    helps = found.mean <= -margin
    room = -found.mean if helps else found.mean + margin
    level = LEVEL / contrasts if helps else LEVEL
    for count in range(found.studies + 1, MOST + 1):
        if half_width(found.spread, count, level) < room:
            return count
    return None


def after_trials(validation: Sequence[float], held_out: Sequence[float], count: int) -> float:
    """The mean held-out value of the best of ``count`` trials by validation.

    The mean over all subsets of the trials made: without bias, for trials drawn independently.
    """
    subsets = list(itertools.combinations(range(len(validation)), count))
    best = [min(subset, key=lambda i: validation[i]) for subset in subsets]
    return float(np.mean([held_out[i] for i in best]))


def steps_to(curve: Sequence[tuple[int, float]], target: float) -> float:
    """Steps at which a curve first reaches the target, linear between looks; else infinite."""
    before = curve[0]
    for step, value in curve:
        if value <= target:
            part = (before[1] - target) / (before[1] - value) if before[1] > value else 1.0
            return before[0] + part * (step - before[0])
        before = (step, value)
    return math.inf
