"""Forest plots: the answer in one picture, the aggregates, controls, headroom and rules."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.study._figures import ALL, COLORS, DASHES, GREY, Series, forest, panels
from benchmarks.study._report_causes import CONTROLS
from benchmarks.study._report_data import BASE, Study
from benchmarks.study._report_help import BASELINES, LAMA
from benchmarks.study._report_rules import RULES
from benchmarks.study._report_text import label
from benchmarks.study._statistics import performance_profile


def against(study: Study, arm: str, base: str = BASE, name: str | None = None) -> Series:
    """An arm's relative difference on every workload, and over all."""
    points = {w: j.comparison.relative for w, j in study.judge(arm, base).items()}
    found = study.aggregate(arm, base)
    return Series(name or label(arm), points | ({ALL: found.difference} if found else {}))


def does_it_help(study: Study) -> Figure | None:
    """Every arm against Adam(lr, b1)."""
    groups = {"LAMA-Adam": LAMA, "Other optimizers": BASELINES}
    by_title = {
        title: [against(study, arm) for arm in arms if study.judge(arm)]
        for title, arms in groups.items()
    }
    title = f"Held-out loss against {label(BASE)}, every arm tuned with as many trials"
    return panels(by_title, study.workloads, title, row_height=0.7, columns=3)


def controls(study: Study) -> Figure | None:
    """LAMA's controls against LAMA, and all against Adam."""
    by_title = {
        f"minus {label(base)}": [
            against(study, arm, base)._replace(look=i)
            for i, arm in enumerate(arms)
            if study.judge(arm, base)
        ]
        for base, arms in (("lama", (*CONTROLS,)), (BASE, (*CONTROLS, "lama")))
    }
    return panels(by_title, study.workloads, "Controls of LAMA, same seeds", row_height=0.6)


def headroom(study: Study) -> Figure | None:
    """Static settings per layer against one b1."""
    series = []
    for search in ("layer_momenta", "layer_rates"):
        found = {w: study.headroom(w) for w in study.workloads}
        judged = study.judge_runs(
            {w: (f.get(search), f.get("global_momentum")) for w, f in found.items()}
        )
        points = {w: j.comparison.relative for w, j in judged.items()}
        series.append(Series(f"static {label(search)}", points))
    title = "Headroom: searched static settings, equal budgets"
    return panels({"minus one tuned b1": series}, study.workloads, title)


def rules(study: Study) -> Figure | None:
    """Each rule against what it has to beat, and against Adam."""
    beaten = [
        against(study, rule, control, f"{rule.upper()} minus {label(control)}")._replace(look=i)
        for i, (rule, (_, controls_, _)) in enumerate(RULES.items())
        for control in controls_
        if control != BASE and study.judge(rule, control)
    ]
    versus_adam = [
        against(study, rule)._replace(look=i) for i, rule in enumerate(RULES) if study.judge(rule)
    ]
    by_title = {"minus its control": beaten, f"minus {label(BASE)}": versus_adam}
    return panels(by_title, study.workloads, "Rules V1 to V6, same seeds", row_height=0.7)


def aggregates(study: Study) -> Figure | None:
    """Interquartile mean, probability of improvement and performance profiles."""
    found = {a: f for a in (*LAMA, *BASELINES) if (f := study.aggregate(a))}
    if not found:
        return None
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13.5, 3 + 0.3 * len(found)), width_ratios=(3, 2, 4)
    )
    series = [
        Series("", {arm: a.difference for arm, a in found.items() if arm in group})
        for group in (LAMA, BASELINES)
    ]
    rows = list(found)
    forest(left, rows, series, spread=0)
    left.set_yticks(range(len(rows)), [label(arm) for arm in rows])
    left.set_title("Interquartile mean, difference")
    middle.axvline(0.5, color=GREY, linewidth=1)
    for y, (arm, aggregate) in enumerate(found.items()):
        p, color = aggregate.improvement, COLORS[0 if arm in LAMA else 1]
        middle.plot([p.low, p.high], [y, y], color=color)
        middle.plot(p.estimate, y, "o" if arm in LAMA else "s", color=color, markersize=5)
    middle.set_yticks(range(len(rows)), [""] * len(rows))
    middle.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1), xlabel="probability, same seed")
    middle.set_title(f"Lower loss than {label(BASE)}")

    thresholds = np.linspace(0, 0.5, 251)
    excess = _excess(study, [BASE, *found])
    shown = [BASE, *(a for a in (*LAMA, "adam", "sgd", "sophia", "lam_weight") if a in found)]
    for i, arm in enumerate(shown):
        right.plot(
            100 * thresholds,
            performance_profile(excess[arm], thresholds),
            color=GREY if arm == BASE else COLORS[i - 1],
            linestyle=DASHES[i],
            linewidth=4 if arm == BASE else 1.6,
            alpha=0.5 if arm == BASE else 1,
            label=label(arm),
        )
    right.set(
        xlabel=f"loss above the best arm's on the same seed,\n% of {label(BASE)}'s mean loss",
        ylabel="share of runs at or below",
        ylim=(0, 1),
        title="Performance profile",
    )
    right.legend(fontsize=9, loc="lower right")
    return figure


def _excess(study: Study, arms: list[str]) -> dict[str, list[np.ndarray]]:
    """By arm and workload: loss above the best arm's on the same seed, over the base's mean."""
    excess: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
    for workload in study.workloads:
        runs = {arm: r for arm in arms if (r := study.runs(workload, arm))}
        if BASE not in runs or not np.isfinite(runs[BASE].finite_mean):
            continue
        seeds = [set(r.seeds.tolist()) for r in runs.values()]
        common = sorted(set.intersection(*seeds))
        losses = {
            arm: r.test[[r.seeds.tolist().index(s) for s in common]] for arm, r in runs.items()
        }
        best = np.min(list(losses.values()), axis=0)
        best = np.where(np.isfinite(best), best, 0)  # every arm diverged: all infinitely above
        for arm, values in losses.items():
            excess[arm].append((values - best) / abs(runs[BASE].finite_mean))
    return excess
