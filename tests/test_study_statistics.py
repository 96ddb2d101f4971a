"""The statistics of the study, each against an independent computation, and its report."""

import itertools
import math

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats")
bootstrap = pytest.importorskip("arch.bootstrap")
pytestmark = pytest.mark.slow

from benchmarks.study._statistics import (
    MARGIN,
    Interval,
    aggregate,
    compare,
    holm,
    interquartile_mean,
    mean_interval,
    paired_interval,
    performance_profile,
    relative_difference,
    relative_losses,
)


def paired_losses(seed, seeds=60, effect=0.1):
    """Skewed losses: a split that both arms share, times noise of each, times the effect."""
    rng = np.random.default_rng(seed)
    split = rng.lognormal(0, 0.4, seeds)
    arm, base = (split * rng.lognormal(0, 0.2, seeds) for _ in range(2))
    return arm * (1 + effect), base


def test_bca_interval_covers_at_its_level():
    """The truth is an effect of 10 %; 300 studies of 40 seeds each."""
    hits = []
    for seed in range(300):
        interval = compare(*paired_losses(seed, seeds=40)).relative
        hits.append(interval.low <= 0.1 <= interval.high)
    # Nominal 0.95; the bootstrap of 40 skewed pairs is known to lose up to two points. Standard
    # error 0.0126: three of them below 0.93 and above 0.95.
    assert 0.892 <= np.mean(hits) <= 0.988


def test_bca_interval_is_archs_too():
    arm, base = paired_losses(1)

    def ratio(pairs):
        return np.array([pairs[:, 0].sum() / pairs[:, 1].sum() - 1])

    theirs = bootstrap.IIDBootstrap(np.stack([arm, base], axis=1), seed=np.random.default_rng(5))
    low, high = theirs.conf_int(ratio, reps=20000, method="bca").ravel()
    ours = compare(arm, base).relative
    assert math.isclose(ours.estimate, ratio(np.stack([arm, base], axis=1))[0])
    # Two bootstraps of 5,000 and 20,000 draws: an end's Monte Carlo error is some 3 % of the width.
    np.testing.assert_allclose([ours.low, ours.high], [low, high], atol=0.1 * (high - low))


def test_pairing_narrows_the_interval():
    arm, base = paired_losses(2)
    paired = compare(arm, base).relative
    apart = compare(arm, np.roll(base, 1)).relative
    # The split's variance is 0.16 of 0.2 in all: unpaired, about 5^(1/2) as wide.
    assert paired.high - paired.low < 0.7 * (apart.high - apart.low)


def test_a_negative_loss_keeps_the_meaning_of_better():
    """Returns of 110 against 100 are a loss that is 10 % lower."""
    better = -np.linspace(109, 111, 20)
    worse = -np.linspace(99, 101, 20)
    found = compare(better, worse)
    np.testing.assert_allclose(found.relative.estimate, -0.1)
    assert found.relative.below_zero
    same = compare(worse * 1.002 + np.tile([0.01, -0.01], 10), worse)
    assert same.p_equivalent < 0.05 < found.p_equivalent


def test_the_same_runs_differ_by_nothing():
    arm, _ = paired_losses(3)
    found = compare(arm, arm)
    assert found.relative == Interval(0, 0, 0)
    assert (found.p, found.median) == (1, 0)
    assert found.p_equivalent < 1e-9


def test_too_few_seeds_have_no_interval():
    found = compare(np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    assert found.relative.estimate == 0.5
    assert np.isnan([found.relative.low, found.relative.high, found.p, found.p_equivalent]).all()
    assert math.isnan(compare(np.array([np.inf]), np.array([1.0])).relative.estimate)
    assert math.isnan(mean_interval(np.array([])).estimate)


def test_diverged_runs_are_counted_not_hidden():
    arm, base = paired_losses(4, effect=-0.3)
    arm[:6] = np.inf
    base[:3] = np.inf
    found = compare(arm, base)
    assert (found.diverged, found.base_diverged, found.seeds) == (0.1, 0.05, 60)
    both = np.arange(60) >= 6
    np.testing.assert_allclose(
        found.relative.estimate, arm[both].sum() / base[both].sum() - 1, rtol=1e-12
    )
    # Three pairs diverged together (no difference), three in the arm alone (worst of all).
    difference = np.concatenate([[0, 0, 0, 1e9, 1e9, 1e9], arm[6:] - base[6:]])
    np.testing.assert_allclose(found.median, np.median(difference) / np.median(base))
    arm[:] = np.inf
    assert compare(arm, base).median == np.inf


def test_paired_test_is_a_permutation_tests():
    """Against all 2^12 sign changes of the differences; the t-test assumes more."""
    arm, base = paired_losses(5, seeds=12, effect=0.15)
    difference = arm - base
    signs = np.array(list(itertools.product([-1, 1], repeat=12)))
    permuted = np.abs((signs * difference).mean(axis=1))
    exact = np.mean(permuted >= abs(difference.mean()) - 1e-12)
    # 12 skewed differences: the two tests agree to a few hundredths.
    assert abs(compare(arm, base).p - exact) < 0.03


def test_equivalence_is_the_90_percent_interval_inside_the_margin():
    """Base constant: the ratio is the mean difference, and TOST Student's 90 % interval."""
    rng = np.random.default_rng(6)
    base = np.full(50, 2.0)
    for spread, shift in itertools.product([0.005, 0.02, 0.1], [0.0, 0.008, 0.012, 0.02]):
        arm = base * (1 + shift + spread * rng.standard_normal(50))
        relative = arm / base - 1
        reach = stats.t.ppf(0.95, 49) * relative.std(ddof=1) / 50**0.5
        inside = abs(relative.mean()) + reach < MARGIN
        assert (compare(arm, base).p_equivalent < 0.05) == inside


def test_equivalence_errs_at_most_at_its_level():
    """At the margin itself, arms are called equivalent once in twenty."""
    rng = np.random.default_rng(7)
    called = []
    for _ in range(400):
        base = 1 + 0.2 * rng.standard_normal(50)
        arm = base * (1 + MARGIN) + 0.005 * rng.standard_normal(50)
        called.append(_only_equivalence(arm, base) < 0.05)
    # Standard error 0.011; three of them on either side of 0.05.
    assert 0.017 < np.mean(called) < 0.083


def _only_equivalence(arm, base):
    from benchmarks.study import _statistics

    return _statistics._equivalence(arm, base)  # without the bootstrap, which takes longer


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1; never falling: 0.04, 0.06, 0.06, 0.06.
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1, 1])
    np.testing.assert_allclose(holm([0.01, math.nan, 0.03]), [0.02, math.nan, 0.03])
    assert holm([]).size == 0


def test_interquartile_mean_by_sorting():
    values = np.random.default_rng(8).standard_normal((9, 40))
    middle = np.sort(values.ravel())[90:270].mean()
    np.testing.assert_allclose(interquartile_mean(list(values)), middle, rtol=1e-12)
    np.testing.assert_allclose(middle, stats.trim_mean(values.ravel(), 0.25), rtol=1e-12)
    # A group of half the size, given twice over, is the same group: each weighs the same.
    np.testing.assert_allclose(
        interquartile_mean([values[0], values[1, :20]]),
        interquartile_mean([values[0], np.tile(values[1, :20], 2)]),
        rtol=1e-12,
    )
    # An infinite tenth lies in the quarter that is cut off; an infinite half does not.
    assert np.isfinite(interquartile_mean([np.r_[np.full(4, np.inf), values[0, 4:]]]))
    assert interquartile_mean([np.r_[np.full(20, np.inf), values[0, 20:]]]) == np.inf


def test_aggregate_is_relative_to_each_workloads_base():
    rng = np.random.default_rng(9)
    scales, seeds = [1.0, -200.0, 0.01], [200, 50, 100]
    bases = [s * rng.lognormal(0, 0.1, n) for s, n in zip(scales, seeds, strict=True)]
    arms = [base - 0.05 * abs(base.mean()) for base in bases]  # 5 % lower on every seed
    found = aggregate(arms, bases)
    np.testing.assert_allclose(found.difference, (-0.05, -0.05, -0.05), rtol=1e-9)
    np.testing.assert_allclose(found.improvement, (1, 1, 1), rtol=1e-12)  # a sum of weights
    by_hand = interquartile_mean([relative_losses(a, b) for a, b in zip(arms, bases, strict=True)])
    np.testing.assert_allclose(found.iqm, by_hand, rtol=1e-12)
    swapped = aggregate(bases, bases)
    assert swapped.difference == (0, 0, 0)
    np.testing.assert_allclose(swapped.improvement, (0.5, 0.5, 0.5), rtol=1e-12)


def test_aggregate_resamples_within_workloads():
    """The probability's interval against the binomial's, whose strata are of unequal size."""
    rng = np.random.default_rng(10)
    bases = [np.ones(n) for n in (100, 40)]
    wins = [rng.random(n) < p for n, p in ((100, 0.9), (40, 0.3))]
    found = aggregate([np.where(w, 0.9, 1.1) for w in wins], bases).improvement
    shares = [w.mean() for w in wins]
    np.testing.assert_allclose(found.estimate, np.mean(shares), rtol=1e-12)
    error = np.sqrt(sum(p * (1 - p) / w.size for p, w in zip(shares, wins, strict=True))) / 2
    # Percentiles of 2,000 draws and the normal law of 140 coins: a tenth of the width apart.
    np.testing.assert_allclose(
        found[1:], np.mean(shares) + error * np.array([-1.96, 1.96]), atol=0.4 * error
    )


def test_aggregate_lives_with_divergence():
    base = np.linspace(1, 2, 40)
    arm = np.where(np.arange(40) < 30, np.inf, base)
    found = aggregate([arm], [base])
    assert found.iqm == np.inf
    np.testing.assert_allclose(found.improvement.estimate, 0.5 * 10 / 40, rtol=1e-12)


def test_performance_profile_counts():
    groups = [np.array([-0.1, 0.0, 0.2, np.inf]), np.array([0.05, 0.3])]
    np.testing.assert_allclose(
        performance_profile(groups, np.array([-1, 0.0, 0.1, 0.3])),
        [0, 0.25, 0.5, (0.75 + 1) / 2],
    )


def test_relative_difference_is_along_the_last_axis():
    arm, base = np.array([[1.0, 3.0], [2.0, 2.0]]), np.array([[1.0, 1.0], [4.0, 4.0]])
    np.testing.assert_allclose(relative_difference(arm, base), [1, -0.5])
    interval = paired_interval(relative_difference, *paired_losses(11))
    assert interval == paired_interval(relative_difference, *paired_losses(11))  # one seed, fixed
