"""Question 3: is LAMA less sensitive to its learning rate, as the paper claims?

The range of an arm holds the learning rates at which some tried setting of its other
hyper-parameters has a validation loss within 5 % of the arm's best, in decades. Between the
outermost such rate and the next one tried, the end is where the straight line between the two
losses, over log10 of the rate, crosses 5 %.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.study._report_data import Study, Trial
from benchmarks.study._report_text import (
    NOT_RUN,
    Section,
    count,
    label,
    picture,
    signed,
    table,
)
from benchmarks.study._statistics import FEWEST, SEED, Array, Interval, mean_interval

TOLERANCE = 0.05
#: Arms whose ranges are compared: with as many tuned hyper-parameters each.
PAIRS = (("lama_paper", "adam"), ("lama", "adam_b1"), ("lama_ema", "adam_b1"))
RESAMPLES = 500


class Range(NamedTuple):
    """Ends of the good learning rates, log10; open where the tried rates end before they do."""

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def decades(self) -> float:
        """Its width."""
        return self.high - self.low


def range_within(rates: Array, losses: Array, tolerance: float = TOLERANCE) -> Range | None:
    """The range of rates whose loss is within ``tolerance`` of the lowest.

    Args:
      rates: (n,) rising learning rates, each once.
      losses: (n,) the lowest loss at each; infinite where every run diverged.
      tolerance: how far above the lowest, relative to its size.

    Returns:
      the `Range`; None if every loss is infinite.
    """
    if not np.isfinite(losses).any():
        return None
    best = losses.min()
    threshold = best + tolerance * abs(best)
    inside = np.flatnonzero(losses <= threshold)
    x = np.log10(rates)

    def end(last: int, beyond: int) -> tuple[float, bool]:
        if not 0 <= beyond < len(x):
            return float(x[last]), True
        if not math.isfinite(losses[beyond]):  # no line to infinity: the last good rate
            return float(x[last]), False
        part = (threshold - losses[last]) / (losses[beyond] - losses[last])
        return float(x[last] + part * (x[beyond] - x[last])), False

    low, open_low = end(inside[0], inside[0] - 1)
    high, open_high = end(inside[-1], inside[-1] + 1)
    return Range(low, high, open_low, open_high)


def best_by_rate(trials: Sequence[Trial]) -> tuple[Array, Array]:
    """Learning rates, rising, and the lowest mean validation loss at each."""
    losses = np.array([trial.losses.mean() for trial in trials])
    return _lowest(np.array([trial.rate for trial in trials]), losses)


def _lowest(rates: Array, losses: Array) -> tuple[Array, Array]:
    """Distinct rates and the lowest loss at each; losses (trials, ...) to (rates, ...)."""
    distinct, which = np.unique(rates, return_inverse=True)
    lowest = np.full((len(distinct), *losses.shape[1:]), np.inf)
    np.minimum.at(lowest, which, losses)
    return distinct, lowest


def width_difference(arm: Sequence[Trial], base: Sequence[Trial]) -> Interval:
    """Decades by which the arm's range is the wider one; bootstrap over the tuning seeds."""
    found = [range_within(*best_by_rate(trials)) for trials in (arm, base)]
    if found[0] is None or found[1] is None:
        return Interval(math.nan)
    estimate = found[0].decades - found[1].decades
    sizes = {len(trial.losses) for trial in (*arm, *base)}
    if len(sizes) != 1 or min(sizes) < FEWEST:
        return Interval(estimate)
    # The same draws for both: they were tuned on the same seeds.
    chosen = np.random.default_rng(SEED).integers(min(sizes), size=(RESAMPLES, min(sizes)))
    draws = _drawn_widths(arm, chosen) - _drawn_widths(base, chosen)
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(estimate, float(low), float(high))


def _drawn_widths(trials: Sequence[Trial], chosen: np.ndarray) -> Array:
    """The width for every resample of the seeds; NaN where every trial diverged."""
    losses = np.array([trial.losses[chosen].mean(axis=1) for trial in trials])
    rates, lowest = _lowest(np.array([trial.rate for trial in trials]), losses)
    found = [range_within(rates, column) for column in lowest.T]
    return np.array([math.nan if one is None else one.decades for one in found])


def rates_section(study: Study) -> Section:
    """The width of the range of good learning rates of every arm."""
    title = "3. How sensitive is it to the learning rate?"
    arms = list(dict.fromkeys(x for pair in PAIRS for x in pair))
    by_pair = {pair: _differences(study, *pair) for pair in PAIRS}
    answers = [_answer(*pair, found) for pair, found in by_pair.items() if found]
    if not answers:
        return Section(title, f"Learning-rate ranges of LAMA and Adam: {NOT_RUN}.")
    section = Section(title, f"Of the ranges of good learning rates, {'; '.join(answers)}.")
    tuned = [arm for arm in arms if any(study.trials(w, arm) for w in study.workloads)]
    rows = []
    for workload in study.workloads:
        cells = [_cell(study.trials(workload, arm)) for arm in tuned]
        if any(cells):
            rows.append([workload, *(cell or NOT_RUN for cell in cells)])
            for arm in tuned:
                best = min(study.trials(workload, arm), key=lambda t: t.losses.mean(), default=None)
                if best:
                    section.sources.setdefault(workload, []).append(best.id)
    section.blocks = [
        (
            f"Width of the learning rates within {100 * TOLERANCE:.0f} % of the arm's best"
            " validation loss, decades (rates tried):"
        ),
        table(["workload", *map(label, tuned)], rows),
        (
            "The arm's width minus the base's, decades, with a 95 % bootstrap interval over the"
            " tuning seeds:"
        ),
        table(
            ["workload", *(f"{label(a)} minus {label(b)}" for a, b in by_pair)],
            [
                [w, *(signed(found[w]) if w in found else NOT_RUN for found in by_pair.values())]
                for w in study.workloads
                if any(w in found for found in by_pair.values())
            ],
        ),
        picture("learning_rates.png", "Validation loss against learning rate, best of the rest"),
        (
            "Limits: an arm with few rates tried has its range resolved coarsely; other"
            " hyper-parameters are the best tried at each rate, from the seeds of"
            " tuning; a sign \u2265 marks a range that reaches the end of the rates tried. The"
            " ids are those of each arm's best trial; the range is from all `tune` lines of that"
            " arm."
        ),
    ]
    return section


def _differences(study: Study, arm: str, base: str) -> dict[str, Interval]:
    trials = {w: (study.trials(w, arm), study.trials(w, base)) for w in study.workloads}
    found = {w: width_difference(a, b) for w, (a, b) in trials.items() if a and b}
    return {w: interval for w, interval in found.items() if not math.isnan(interval.estimate)}


def _answer(arm: str, base: str, found: dict[str, Interval]) -> str:
    overall = mean_interval(np.array([interval.estimate for interval in found.values()]))
    wider = sum(interval.estimate > 0 for interval in found.values())
    if math.isnan(overall.low):
        verdict = "cannot be told from"
    elif overall.low > 0:
        verdict = "is wider than"
    else:
        verdict = "is narrower than" if overall.high < 0 else "is not wider than"
    return (
        f"that of {label(arm)} {verdict} that of {label(base)} ({signed(overall)} decades, wider on"
        f" {wider} of {count(len(found), 'workload')})"
    )


def _cell(trials: list[Trial]) -> str:
    if not trials:
        return ""
    rates, losses = best_by_rate(trials)
    found = range_within(rates, losses)
    if found is None:
        return "diverged"
    sign = "\u2265 " if found.open_low or found.open_high else ""
    return f"{sign}{found.decades:.2f} ({len(rates)})"
