"""What the study says of two arms, paired by seed, and of many workloads together.

The primary figure is the relative difference of the mean held-out losses,
``(mean(arm) - mean(base)) / |mean(base)|``: a ratio of means and not a mean of ratios, which one
seed whose loss is near zero would rule, and the absolute value since a return's "loss" is negative.
The equivalence test is of the same ratio: ``arm - (1 + margin) base`` has a mean below zero exactly
when the ratio is below ``1 + margin``. A run that diverged has an infinite loss: means leave its
pair out and its share is reported; medians, ranks and interquartile means keep it.

The stratified bootstrap is arch's. rliable 1.2 was tried first: it wants arch < 8, which does not
import beside pandas 3, and it draws from NumPy's global generator whatever seed it is given.

Every bootstrap draws from `SEED`, so a report is the same whenever it is written.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from arch.bootstrap import IndependentSamplesBootstrap
from scipy import stats

Array = npt.NDArray[np.float64]

SEED = 0
RESAMPLES = 4999
#: Differences within +-1 % are called equivalent, when the test says so.
MARGIN = 0.01
LEVEL = 0.05
#: With fewer pairs, no interval is given.
FEWEST = 5


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % confidence interval (NaN with too few seeds)."""

    estimate: float
    low: float = math.nan
    high: float = math.nan

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is: a loss that is lower, and not by chance."""
        return self.high < 0

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is: a loss that is higher, and not by chance."""
        return self.low > 0


class Comparison(NamedTuple):
    """One arm against another over the same seeds."""

    relative: Interval  # of the means, of the pairs in which neither diverged
    median: float  # median paired difference over |median of the base|, all pairs
    p: float  # two-sided paired t-test of the mean difference
    p_equivalent: float  # two one-sided paired t-tests, +-MARGIN
    diverged: float  # share of the arm's runs
    base_diverged: float
    seeds: int


class Aggregate(NamedTuple):
    """One arm against another over all workloads, each of which counts the same."""

    iqm: float  # interquartile mean of the loss relative to the base's mean
    difference: Interval  # of that and the base's own
    improvement: Interval  # probability that the arm's loss is the lower one on the same seed
    workloads: int


def compare(arm: Array, base: Array) -> Comparison:
    """Compares two arms' losses, seed by seed.

    Args:
      arm: (seeds,) losses, infinite where the run diverged.
      base: (seeds,) losses of the arm to compare with, over the same seeds.

    Returns:
      the `Comparison`; interval and p-values are NaN with fewer than `FEWEST` pairs.
    """
    both = np.isfinite(arm) & np.isfinite(base)
    x, y = arm[both], base[both]
    return Comparison(
        relative=paired_interval(relative_difference, x, y),
        median=_median_difference(arm, base),
        p=_t_test(x - y, "two-sided") if x.size >= FEWEST else math.nan,
        p_equivalent=_equivalence(x, y) if x.size >= FEWEST else math.nan,
        diverged=float(np.mean(~np.isfinite(arm))),
        base_diverged=float(np.mean(~np.isfinite(base))),
        seeds=int(arm.size),
    )


def relative_difference(arm: Array, base: Array, axis: int = -1) -> Array:
    """Difference of the means over the size of the base's mean."""
    scale = base.mean(axis=axis)
    with np.errstate(divide="ignore", invalid="ignore"):  # a base without any loss
        result: Array = (arm.mean(axis=axis) - scale) / np.abs(scale)
    return result


def paired_interval(statistic: Callable[..., Array], *samples: Array) -> Interval:
    """BCa interval (bias-corrected and accelerated, Efron 1987) of a statistic of paired samples.

    Args:
      statistic: function of the samples and ``axis``, as `scipy.stats.bootstrap` wants it.
      *samples: arrays of one length; element i of each belongs to seed i.
    """
    if not samples[0].size:
        return Interval(math.nan)
    estimate = float(statistic(*samples, axis=-1))
    if samples[0].size < FEWEST or not math.isfinite(estimate):
        return Interval(estimate)
    same = len(samples) == 2 and np.array_equal(*samples)
    if same or all(np.ptp(sample) == 0 for sample in samples):
        return Interval(estimate, estimate, estimate)  # nothing varies
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # A bootstrap without spread: the interval is NaN, and printed as none.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="BCa",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
    return Interval(estimate, float(found.low), float(found.high))


def mean_interval(values: Array) -> Interval:
    """BCa interval of a mean over seeds; runs that diverged are left out."""
    return paired_interval(np.mean, values[np.isfinite(values)])


def holm(p_values: Sequence[float]) -> Array:
    """Holm's adjusted p-values (1979); NaN, which is no test, stays NaN and counts for nothing."""
    p = np.asarray(p_values, np.float64)
    adjusted = np.full_like(p, np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(order) else steps
    return adjusted


def aggregate(arms: Sequence[Array], bases: Sequence[Array]) -> Aggregate:
    """Interquartile mean and probability of improvement over workloads (Agarwal et al. 2021).

    The bootstrap is stratified: seeds are resampled within each workload, an arm's and its base's
    together. 95 % percentile intervals.

    Args:
      arms: for each workload, the (seeds,) losses of the arm, infinite where it diverged.
      bases: the same of the base, over the same seeds.
    """
    pairs = [
        np.stack([relative_losses(arm, base), relative_losses(base, base)], axis=1)
        for arm, base in zip(arms, bases, strict=True)
    ]

    weights = _group_weights(pairs)

    def statistic(*resampled: Array) -> Array:
        arm, base = np.concatenate(resampled).T
        iqm, base_iqm = (_weighted_middle(values, weights) for values in (arm, base))
        lower = np.sum(weights * ((arm < base) + (arm == base) / 2))
        return np.array([iqm, iqm - base_iqm, lower])

    with np.errstate(invalid="ignore"):  # inf - inf: both diverge on more than a quarter
        iqm, difference, improvement = statistic(*pairs)
        low, high = np.full((2, 3), np.nan)
        if min(len(pair) for pair in pairs) >= FEWEST:
            bootstrap = IndependentSamplesBootstrap(*pairs, seed=np.random.default_rng(SEED))
            draws = bootstrap.apply(statistic, reps=2000)
            low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return Aggregate(
        float(iqm),
        Interval(float(difference), float(low[1]), float(high[1])),
        Interval(float(improvement), float(low[2]), float(high[2])),
        len(pairs),
    )


def relative_losses(arm: Array, base: Array) -> Array:
    """Each run's loss relative to the base's mean over its runs that did not diverge."""
    finite = base[np.isfinite(base)]
    scale = float(finite.mean()) if finite.size else math.nan
    return (arm - scale) / abs(scale)


def interquartile_mean(groups: Sequence[Array]) -> float:
    """Mean of the middle half of all values, where each group has the same weight in all.

    With groups of one size it is the mean without the lowest and the highest quarter.
    """
    return _weighted_middle(np.concatenate(groups), _group_weights(groups))


def _group_weights(groups: Sequence[Array]) -> Array:
    return np.concatenate([np.full(len(g), 1 / (len(g) * len(groups))) for g in groups])


def _weighted_middle(values: Array, weights: Array) -> float:
    order = np.argsort(values)
    ends = np.cumsum(weights[order]).clip(0.25, 0.75)
    inside = np.diff(ends, prepend=0.25)
    kept = inside > 1e-12  # rounding of the sums, which an infinite loss would blow up
    return float(values[order][kept] @ inside[kept] / inside[kept].sum())


def performance_profile(groups: Sequence[Array], thresholds: Array) -> Array:
    """Share of runs, averaged over workloads, with a relative loss of at most each threshold."""
    shares = [(group[:, None] <= thresholds).mean(axis=0) for group in groups]
    result: Array = np.mean(shares, axis=0)
    return result


def _median_difference(arm: Array, base: Array) -> float:
    if not arm.size:
        return math.nan
    with np.errstate(invalid="ignore"):  # inf - inf, replaced by 0: both diverged
        difference = np.where(np.isfinite(arm) | np.isfinite(base), arm - base, 0)
        return float(np.median(difference) / abs(np.median(base)))


def _equivalence(arm: Array, base: Array) -> float:
    margin = MARGIN * math.copysign(1, base.mean()) * base
    not_worse = _t_test(arm - base - margin, "less")
    return max(not_worse, _t_test(arm - base + margin, "greater"))


def _t_test(values: Array, alternative: str) -> float:
    if np.ptp(values) == 0:  # no spread: the mean is what it is
        mean = float(values[0])
        right = {"two-sided": mean != 0, "less": mean < 0, "greater": mean > 0}[alternative]
        return 0.0 if right else 1.0
    return float(stats.ttest_1samp(values, 0, alternative=alternative).pvalue)
