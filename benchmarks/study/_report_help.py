"""Question 1: does LAMA help, tuned against tuned?"""

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from benchmarks.study._report_data import BASE, BETTER_ADAM, Judged, Runs, Study
from benchmarks.study._report_text import (
    NOT_RUN,
    Section,
    count,
    label,
    listed,
    number,
    p_value,
    percent,
    picture,
    share,
    signed,
    table,
)
from benchmarks.study._statistics import MARGIN, Aggregate, Interval, mean_interval

#: The arms that the first question is about, the headline first.
LAMA = ("lama", "lama_ema", "lama_paper")
#: Baselines that everyone knows, and document 2's rule.
BASELINES = (
    "adam",
    "sgd",
    "amsgrad",
    "radam",
    "nadam",
    "rmsprop",
    "sophia",
    "lam_weight",
    "lam_layer",
)
WORDS = ("better", "equivalent", "undecided", "worse", "worse (diverges)")


def help_section(study: Study) -> Section:
    """Every arm against Adam with tuned learning rate and b1."""
    arms = [arm for arm in (*LAMA, *BASELINES) if arm in study.arms()]
    judged = {arm: study.judge(arm) for arm in arms}
    answers = [answer(study, arm, judged[arm]) for arm in LAMA if judged.get(arm)]
    section = Section(
        "1. Does LAMA help, tuned against tuned?",
        answers[0] if answers else f"LAMA against tuned {label(BASE)}: {NOT_RUN}.",
    )
    if not any(judged.values()):
        return section
    section.blocks = [
        " ".join(answers[1:]),
        _forms(study, {arm: found for arm, found in judged.items() if arm in LAMA}),
        picture("does_it_help.png", f"Held-out loss of each arm relative to tuned {label(BASE)}"),
        f"Over all workloads, each of which counts the same, relative to {label(BASE)}:",
        _aggregates(study, arms, judged),
        picture("aggregates.png", "Interquartile mean, probability of improvement, profiles"),
        (
            "The interquartile mean leaves out the best and the worst quarter of all runs;"
            " P(lower) is the probability of a lower held-out loss on the same seed, a tie"
            " counting half."
        ),
        _caution(study),
        (
            "Limits: small models, few hundred steps, one fixed number of steps for each"
            " workload; the verdicts hold for these. Means leave out pairs in which a run"
            " diverged (the share is printed); medians, P(lower) and the interquartile mean count"
            " such a run as the worst."
        ),
    ]
    section.details = [(f"All arms on {w}", _all_arms(study, w)) for w in study.workloads]
    return section


def answer(study: Study, arm: str, judged: Mapping[str, Judged], base: str = BASE) -> str:
    """One sentence on one arm, from its numbers alone."""
    found = study.aggregate(arm, base)
    assert found is not None
    return f"{verdict(label(arm), label(base), found)}: {tally(judged)}."


def verdict(name: str, base: str, found: Aggregate) -> str:
    """Whether the arm helps over all workloads, by the interval of the interquartile mean."""
    interval = found.difference
    size = f"interquartile mean {percent(interval)}, {count(found.workloads, 'workload')}"
    inside = interval.low > -MARGIN and interval.high < MARGIN
    if math.isnan(interval.low):
        return f"Not settled: {name} has too few runs for an interval against {base} ({size})"
    if inside:
        return f"No: {name} equals {base} within {100 * MARGIN:g} % ({size})"
    if interval.below_zero:
        return f"Yes: {name} has a lower held-out loss than {base} ({size})"
    if interval.above_zero:
        return f"No: {name} has a higher held-out loss than {base} ({size})"
    return f"No: {name} cannot be told from {base} ({size})"


def tally(judged: Mapping[str, Judged]) -> str:
    """On how many workloads an arm is better, equivalent, undecided or worse, and on which."""
    by_word: dict[str, list[str]] = {}
    for workload, found in judged.items():
        by_word.setdefault(found.word, []).append(workload)
    if len(by_word) == 1:
        where = f"each of {len(judged)} workloads" if len(judged) > 1 else next(iter(judged))
        return f"{next(iter(by_word))} on {where}"
    parts = [
        f"{word} on {len(by_word[word])} ({listed(by_word[word])})"
        for word in WORDS
        if word in by_word
    ]
    return listed(parts)


def _forms(study: Study, judged: Mapping[str, Mapping[str, Judged]]) -> str:
    header = ["workload", f"{label(BASE)}, loss"]
    for arm in judged:
        header += [f"{label(arm)}: relative difference", "p (Holm)", "verdict"]
    rows = []
    for workload in study.workloads:
        base = study.runs(workload, BASE)
        if base is None:
            continue
        row = [workload, number(base.finite_mean, 4)]
        for found in (judged[arm].get(workload) for arm in judged):
            row += (
                [percent(found.comparison.relative), p_value(found.p), found.word]
                if found
                else [NOT_RUN, "", ""]
            )
        rows.append(row)
    return table(header, rows)


def _aggregates(study: Study, arms: list[str], judged: Mapping[str, Mapping[str, Judged]]) -> str:
    rows = []
    for arm in arms:
        found, better = study.aggregate(arm), study.aggregate(arm, BETTER_ADAM)
        if found is None:
            continue
        words = Counter(j.word for j in judged[arm].values())
        rows.append(
            (
                label(arm),
                percent(found.difference),
                percent(better.difference) if better else NOT_RUN,
                signed(found.improvement).replace("+", ""),
                *(str(words[word] or "") for word in WORDS),
            )
        )
    return table(
        (
            "arm",
            "interquartile mean, difference",
            f"difference from {label(BETTER_ADAM)}",
            "P(lower)",
            *WORDS,
        ),
        rows,
    )


def _caution(study: Study) -> str:
    lost = [w for w, judged in study.judge("adam").items() if judged.word == "better"]
    if not lost:
        return ""
    return (
        f"Caution: on {listed(lost)} {label('adam')} has the lower held-out loss of the two Adams,"
        " so there the grid over two hyper-parameters was too coarse for the base, and for every"
        f" arm with two. The column on {label(BETTER_ADAM)} is the fairer one."
    )


def _all_arms(study: Study, workload: str) -> str:
    base = study.runs(workload, BASE)
    rows = []
    for arm in study.arms():
        runs = study.runs(workload, arm)
        if runs is None:
            continue
        judged = study.judge(arm).get(workload) if arm != BASE else None
        rows.append(_arm_row(runs, base, judged))
    header = (
        "arm",
        "held-out loss",
        "relative difference",
        "median",
        "p (Holm)",
        "p equivalent",
        "diverged",
        "verdict",
        "metric",
        "seeds",
        "settings",
        "line",
    )
    metric = base.line.get("metric_name") if base else None
    note = f"\n\nMetric: {metric}. Lines: of `{workload}.jsonl`." if metric else ""
    return table(header, rows) + note


def _arm_row(runs: Runs, base: Runs | None, judged: Judged | None) -> tuple[str, ...]:
    loss = mean_interval(runs.test)
    metric = runs.values("test_metric", math.nan) if "test_metric" in runs.line else None
    return (
        label(runs.arm),
        _loss(loss),
        percent(judged.comparison.relative) if judged else "",
        percent(Interval(judged.comparison.median)) if judged else "",
        p_value(judged.p) if judged else "",
        p_value(judged.p_equivalent) if judged else "",
        share(float(np.mean(~np.isfinite(runs.test)))),
        judged.word if judged else "",
        number(float(np.nanmean(metric)), 4) if metric is not None else "",
        str(runs.seeds.size),
        ", ".join(f"{name} {_setting(value)}" for name, value in runs.line["hypers"].items()),
        f"`#{runs.id}`",
    )


def _loss(loss: Interval) -> str:
    text = number(loss.estimate, 4)
    known = not math.isnan(loss.low)
    return f"{text} [{number(loss.low, 4)}, {number(loss.high, 4)}]" if known else text


def _setting(value: float | list[float]) -> str:
    """A hyper-parameter; of one for each layer, the lowest and the highest."""
    if isinstance(value, list):
        return (
            _setting(value[0]) if len(set(value)) == 1 else f"{min(value):.3g} to {max(value):.3g}"
        )
    return f"{value:.3g}"
