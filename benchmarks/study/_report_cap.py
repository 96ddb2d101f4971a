"""What V5, curvature as a cap of the learning rate, is judged by: ranges and large rates."""

import math

import numpy as np

from benchmarks.study._report_data import BASE, Study, Trial
from benchmarks.study._report_rates import best_by_rate, width_difference
from benchmarks.study._statistics import Array, Interval, paired_interval, relative_difference

#: Learning rates over Adam's best one at which V5 has to be better.
LARGE = 10.0


def cap_evidence(study: Study, workload: str) -> tuple[Interval, Interval] | None:
    """V5's width minus Adam's, decades, and its relative loss at a large learning rate."""
    arm, base = study.trials(workload, "v5"), study.trials(workload, BASE)
    if not arm or not base:
        return None
    return width_difference(arm, base), _loss_at_large_rate(arm, base)


def _loss_at_large_rate(arm: list[Trial], base: list[Trial]) -> Interval:
    rates, losses = best_by_rate(base)
    if not np.isfinite(losses).any():
        return Interval(math.nan)
    highest = min(max(t.rate for t in trials) for trials in (arm, base))
    wanted = min(LARGE * rates[int(np.argmin(losses))], highest)
    x, y = (losses_at(trials, wanted) for trials in (arm, base))
    if not np.isfinite(y).all():  # Adam diverges there: any finite loss is better
        return Interval(*(-1.0,) * 3) if np.isfinite(x).all() else Interval(math.nan)
    if not np.isfinite(x).all():
        return Interval(*(1.0,) * 3)
    return paired_interval(relative_difference, x, y) if x.shape == y.shape else Interval(math.nan)


def losses_at(trials: list[Trial], rate: float) -> Array:
    """Losses by seed at any rate between those tried: a straight line over its logarithm.

    Between the two neighbouring rates, the best setting of each; infinite where one of them
    diverged.
    """
    best: dict[float, Trial] = {}
    for trial in sorted(trials, key=lambda t: -t.losses.mean()):
        best[trial.rate] = trial
    below = max((r for r in best if r <= rate), default=min(best))
    above = min((r for r in best if r >= rate), default=max(best))
    part = math.log(rate / below) / math.log(above / below) if above > below else 0.0
    if part in (0, 1):
        return best[above if part else below].losses
    return (1 - part) * best[below].losses + part * best[above].losses
