"""Question 8: the rules V1 to V6, each against the control that falsifies it."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.study._report_cap import LARGE, cap_evidence
from benchmarks.study._report_data import BASE, BETTER_ADAM, Runs, Study
from benchmarks.study._report_text import (
    NOT_RUN,
    Section,
    label,
    listed,
    p_value,
    percent,
    picture,
    signed,
    table,
)
from benchmarks.study._statistics import (
    LEVEL,
    MARGIN,
    Aggregate,
    Interval,
    mean_interval,
)

SURVIVES, FALSIFIED, OPEN = "survives", "falsified", "not decided"


class Rule(NamedTuple):
    """A rule, what it has to beat and when it is falsified."""

    equation: str
    controls: tuple[str, ...]
    criterion: str


RULES = {
    "v1": Rule(
        "b_l = b1 alpha(ln q_l - median ln q)",
        (BASE, "v1_shuffled"),
        "its interval against Adam(lr, b1) holds 0, or shuffled alpha does as well",
    ),
    "v2": Rule(
        "b_l = clip((2 sigmoid(ln q_l) - 1)^2, 0, sqrt(b2))",
        (BASE,),
        "it loses to the tuned global b1: its interval lies above 0",
    ),
    "v3": Rule(
        "YellowFin per layer, preconditioned",
        ("v3_global",),
        "the global version does as well",
    ),
    "v4": Rule(
        "u = (1 - nu_l) g + nu_l m, nu_l = 1/(1 + q_l)",
        ("v4_fixed",),
        "a fixed nu does as well",
    ),
    "v5": Rule(
        "lr_l = min(lr, c 2 (1 + b)/((1 - b) q_max,l/lr))",
        (BASE,),
        f"no wider learning-rate range, and no better loss at {LARGE:g} times the best rate of"
        " Adam(lr, b1)",
    ),
    "v6": Rule(
        "lr_l = lr clip((median q / q_l)^p, 1/10, 10)",
        (BASE, "v6_shuffled"),
        "its interval against Adam(lr, b1) holds 0, or shuffled rates do as well",
    ),
}

#: How the criteria are read; written before the first run of protocol 1.
READING = (
    "V1 to V5 were fixed before any run, V6 before the first of protocol 2. A rule beats a"
    " control where the paired 95 % interval of its relative difference in held-out loss lies below"
    " 0 and, on one workload, Holm's p over the workloads is below 0.05; else the control does as"
    " well. Overall, the same criterion is put to the interquartile mean over workloads (V5: to the"
    " mean over workloads, five at least). A rule whose difference lies inside +-1 % survives in"
    " name only, and the table says so. Worth having is a rule that survives, not in name only,"
    " with a loss below that of both Adams, the interval without 0 (V5, which is to widen a range:"
    " not above either)."
)


def rules_section(study: Study) -> Section:
    """V1 to V6 against what falsifies each."""
    title = "8. Is there a rule worth having?"
    run = [rule for rule in RULES if any(study.runs(w, rule) for w in study.workloads)]
    if not run:
        return Section(title, f"Rules V1 to V6: {NOT_RUN}.")
    verdicts = {rule: verdicts_of(study, rule) for rule in run}
    overall = {rule: overall_verdict(study, rule) for rule in run}
    by_word = {
        word: [r.upper() for r in run if overall[r][0] == word]
        for word in (SURVIVES, FALSIFIED, OPEN)
    }
    words = [f"{word.capitalize()}: {listed(rules)}." for word, rules in by_word.items() if rules]
    worth = [r.upper() for r in run if worth_having(study, r, overall[r])]
    words.append(f"Worth having beside {label(BASE)}: {listed(worth) or 'none'}.")
    section = Section(title, " ".join(words))
    rows = []
    for rule in run:
        counts = [list(verdicts[rule].values()).count(w) for w in (SURVIVES, FALSIFIED)]
        text = f"{overall[rule][0]}{_in_name_only(overall[rule])}"
        evidence = overall[rule][1]
        rows.append(
            (
                label(rule),
                f"`{RULES[rule].equation}`",
                RULES[rule].criterion,
                evidence,
                str(counts[0]),
                str(counts[1]),
                text,
                *(percent(a.difference) if a else NOT_RUN for a in _against_adams(study, rule)),
            )
        )
    header = (
        "rule",
        "equation",
        "falsified if",
        "over all workloads",
        "survives on",
        "falsified on",
    )
    section.blocks = [
        READING,
        table((*header, "verdict", f"minus {label(BASE)}", f"minus {label(BETTER_ADAM)}"), rows),
        f"{NOT_RUN.capitalize()}: {listed([r.upper() for r in RULES if r not in run])}."
        if len(run) < len(RULES)
        else "",
        picture("rules.png", "Each rule relative to what it has to beat"),
    ]
    section.details = [
        (f"{label(r)}, by workload", _by_workload(study, r, verdicts[r], section)) for r in run
    ]
    return section


def worth_having(study: Study, rule: str, overall: tuple[str, str, bool]) -> bool:
    """Whether a rule that survives its controls also serves a user better than Adam does."""
    found = _against_adams(study, rule)
    if overall[0] != SURVIVES or overall[2] or not all(found):
        return False
    intervals = [a.difference for a in found if a]
    if rule == "v5":
        return not any(interval.above_zero for interval in intervals)
    return all(interval.below_zero for interval in intervals)


def _against_adams(study: Study, rule: str) -> list[Aggregate | None]:
    return [study.aggregate(rule, base) for base in (BASE, BETTER_ADAM)]


def verdicts_of(study: Study, rule: str) -> dict[str, str]:
    """Survives or falsified, on every workload on which the rule ran."""
    if rule == "v5":
        return {
            w: _cap_verdict(*evidence)
            for w in study.workloads
            if (evidence := cap_evidence(study, w)) is not None
        }
    judged = [study.judge(rule, control) for control in RULES[rule].controls]
    return {
        w: _word([j[w].comparison.relative for j in judged], [j[w].p for j in judged], rule)
        for w in study.workloads
        if all(w in j for j in judged)
    }


def overall_verdict(study: Study, rule: str) -> tuple[str, str, bool]:
    """The verdict over all workloads, its evidence, and whether it lies within +-1 %."""
    if rule == "v5":
        found = [e for w in study.workloads if (e := cap_evidence(study, w)) is not None]
        width, loss = (
            mean_interval(np.array([e[i].estimate for e in found if not math.isnan(e[i].estimate)]))
            for i in (0, 1)
        )
        evidence = f"width {signed(width)} decades; loss at large rates {percent(loss)}"
        return _cap_verdict(width, loss), evidence, False
    aggregates = [study.aggregate(rule, control) for control in RULES[rule].controls]
    evidence = "; ".join(
        f"minus {label(c)} {percent(a.difference)}" if a else f"{label(c)} {NOT_RUN}"
        for c, a in zip(RULES[rule].controls, aggregates, strict=True)
    )
    intervals = [a.difference for a in aggregates if a]
    if len(intervals) < len(aggregates):
        return OPEN, evidence, False
    inside = all(i.low > -MARGIN and i.high < MARGIN for i in intervals)
    return _word(intervals, [0.0] * len(intervals), rule), evidence, inside


def _word(intervals: list[Interval], p: list[float], rule: str) -> str:
    if any(math.isnan(i.low) for i in intervals):
        return OPEN
    if rule == "v2":
        return FALSIFIED if intervals[0].above_zero else SURVIVES
    beats = all(i.below_zero and q < LEVEL for i, q in zip(intervals, p, strict=True))
    return SURVIVES if beats else FALSIFIED


def _in_name_only(found: tuple[str, str, bool]) -> str:
    return " (within +-1 %: in name only)" if found[2] and found[0] == SURVIVES else ""


def _cap_verdict(width: Interval, loss: Interval) -> str:
    if math.isnan(width.low) and math.isnan(loss.low):
        return OPEN
    return SURVIVES if width.above_zero or loss.below_zero else FALSIFIED


def _by_workload(study: Study, rule: str, verdicts: Mapping[str, str], section: Section) -> str:
    rows = []
    for workload, word in verdicts.items():
        if rule == "v5":
            evidence = cap_evidence(study, workload)
            assert evidence is not None
            row = [signed(evidence[0]), percent(evidence[1])]
        else:
            row = []
            for control in RULES[rule].controls:
                found = study.judge(rule, control)[workload]
                row += [percent(found.comparison.relative), p_value(found.p)]
        runs: list[Runs | None] = [
            study.runs(workload, a) for a in (rule, *RULES[rule].controls, BASE)
        ]
        section.cite(workload, *runs)
        against = study.judge(rule).get(workload)
        if BASE not in RULES[rule].controls or rule == "v5":
            row.append(percent(against.comparison.relative) if against else "")
        rows.append([workload, *row, word])
    header = ["workload"]
    if rule == "v5":
        header += [
            "range wider by, decades",
            f"validation loss at {LARGE:g} times Adam's best rate",
        ]
    else:
        for control in RULES[rule].controls:
            header += [f"minus {label(control)}", "p (Holm)"]
    if BASE not in RULES[rule].controls or rule == "v5":
        header.append(f"minus {label(BASE)}")
    return table([*header, "verdict"], rows)
