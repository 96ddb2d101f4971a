"""Questions 7 and 8: the headroom of static per-layer settings, and the rules V1 to V5."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.study._report_data import BASE, Judged, Runs, Study, Trial
from benchmarks.study._report_rates import best_by_rate, width_difference
from benchmarks.study._report_text import (
    NOT_RUN,
    Section,
    capital,
    count,
    folded,
    label,
    listed,
    number,
    p_value,
    percent,
    picture,
    signed,
    table,
)
from benchmarks.study._statistics import (
    LEVEL,
    Array,
    Interval,
    mean_interval,
    paired_interval,
    relative_difference,
)

SURVIVES, FALSIFIED, OPEN = "survives", "falsified", "not decided"
#: Learning rates over Adam's best one at which V5 has to be better.
LARGE = 10.0


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
}

#: Written before the results: how the criteria are read.
READING = (
    "Rules fixed beforehand. A rule beats a control where the paired 95 % interval of its relative"
    " difference in held-out loss lies below 0 and, on one workload, Holm's p over the workloads is"
    " below 0.05; else the control does as well. Overall, the same criterion is put to the"
    " interquartile mean over workloads (V5: to the mean over workloads, five at least). A rule"
    " whose difference lies inside +-1 % survives in name only, and the table says so."
)


def headroom_section(study: Study) -> Section:
    """Static momenta and rates per layer against one b1, all with equal search budgets."""
    title = "7. Is there headroom for momentum per layer at all?"
    base = "global_momentum"
    searches = {w: study.headroom(w) for w in study.workloads}
    judged = {
        search: study.judge_runs({w: (f.get(search), f.get(base)) for w, f in searches.items()})
        for search in ("layer_momenta", "layer_rates")
    }
    if not judged["layer_momenta"]:
        return Section(title, f"The search over static momenta per layer: {NOT_RUN}.")
    none = [w for w, j in judged["layer_momenta"].items() if j.word != "better"]
    answers = [_headroom(search, found) for search, found in judged.items() if found]
    section = Section(title, f"{capital('; '.join(answers))}.")
    rows = []
    for workload in judged["layer_momenta"]:
        found = searches[workload]
        section.cite(workload, *found.values())
        row = [workload, number(found[base].finite_mean, 4)]
        for by_workload in judged.values():
            one = by_workload.get(workload)
            row += (
                [percent(one.comparison.relative), p_value(one.p), one.word]
                if one
                else [NOT_RUN, "", ""]
            )
        trials = {str(r.line.get("trials", "-")) for r in found.values()}
        rows.append([*row, ", ".join(sorted(trials)), str(found[base].seeds.size)])
    header = ["workload", "one b1, loss"]
    for search in judged:
        header += [label(search), "p (Holm)", "verdict"]
    section.blocks = [
        table([*header, "trials each", "seeds"], rows),
        picture("headroom.png", "Static settings per layer relative to one tuned b1"),
        (
            "No static momentum per layer was found there that beats one b1, so no curvature rule"
            f" that settles can be expected to win on {listed(none)}."
            if none
            else ""
        ),
        (
            "Held-out loss on seeds that the search did not see, relative to one b1, searched as"
            " often. Limits: a search of so few trials in more dimensions finds less of its"
            " optimum, so a headroom of zero is one that such a search cannot reach."
        ),
    ]
    return section


def _headroom(search: str, judged: Mapping[str, Judged]) -> str:
    better = [w for w, j in judged.items() if j.word == "better"]
    worse = [w for w, j in judged.items() if j.word.startswith("worse")]
    text = f"a static {label(search)} beats one b1 on {len(better)} of"
    text += f" {count(len(judged), 'workload')}" + (f" ({listed(better)})" if better else "")
    return text + (f" and loses on {len(worse)} ({listed(worse)})" if worse else "")


def rules_section(study: Study) -> Section:
    """V1 to V5 against what falsifies each."""
    title = "8. Is there a rule worth having?"
    run = [rule for rule in RULES if any(study.runs(w, rule) for w in study.workloads)]
    if not run:
        return Section(title, f"Rules V1 to V5: {NOT_RUN}.")
    verdicts = {rule: verdicts_of(study, rule) for rule in run}
    overall = {rule: overall_verdict(study, rule) for rule in run}
    by_word = {
        word: [r.upper() for r in run if overall[r][0] == word]
        for word in (SURVIVES, FALSIFIED, OPEN)
    }
    words = [f"{word.capitalize()}: {listed(rules)}." for word, rules in by_word.items() if rules]
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
        table((*header, "verdict"), rows),
        f"{NOT_RUN.capitalize()}: {listed([r.upper() for r in RULES if r not in run])}."
        if len(run) < len(RULES)
        else "",
        picture("rules.png", "Each rule relative to what it has to beat"),
        *(
            folded(f"{label(r)}, by workload", _by_workload(study, r, verdicts[r], section))
            for r in run
        ),
    ]
    return section


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
    inside = all(i.low > -0.01 and i.high < 0.01 for i in intervals)
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


def cap_evidence(study: Study, workload: str) -> tuple[Interval, Interval] | None:
    """V5's width minus Adam's, decades, and its relative loss at a large learning rate."""
    arm, base = study.trials(workload, "v5"), study.trials(workload, BASE)
    if not arm or not base:
        return None
    return width_difference(arm, base), _loss_at_large_rate(arm, base)


def _cap_verdict(width: Interval, loss: Interval) -> str:
    if math.isnan(width.low) and math.isnan(loss.low):
        return OPEN
    return SURVIVES if width.above_zero or loss.below_zero else FALSIFIED


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
