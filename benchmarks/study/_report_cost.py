"""Question 4: what does it cost? Steps, gradient-equivalents and time to one target."""

import math
from typing import NamedTuple

import numpy as np

from benchmarks.study._report_data import BASE, Runs, Study
from benchmarks.study._report_text import (
    NOT_RUN,
    Section,
    count,
    label,
    listed,
    number,
    picture,
    table,
)

#: The arms of the table, the base first.
ARMS = (BASE, "adam", "sgd", "sophia", "lam_weight", "lam_layer", "lama_paper", "lama", "lama_ema")


class Cost(NamedTuple):
    """What an arm needs to reach the target; infinite where half of the runs do not."""

    reached: float  # share of the runs
    steps: float  # median over all runs
    gradients: float  # times gradient-equivalents of a step
    seconds: float

    def over(self, base: "Cost") -> tuple[float, float, float]:
        """Ratios of steps, gradient-equivalents and time."""
        pairs = zip(self[1:], base[1:], strict=True)
        steps, gradients, seconds = (
            a / b if math.isfinite(a + b) and b > 0 else math.nan for a, b in pairs
        )
        return steps, gradients, seconds


def cost(runs: Runs) -> Cost | None:
    """Median cost to the target; None if the line has none."""
    if runs.line.get("steps_to_target") is None:
        return None
    steps = runs.values("steps_to_target")
    median = float(np.percentile(steps, 50, method="inverted_cdf"))
    return Cost(
        float(np.isfinite(steps).mean()),
        median,
        median * runs.number("gradient_equivalents_per_step"),
        median * runs.number("microseconds_per_step") / 1e6,
    )


def costs(study: Study, workload: str) -> dict[str, Cost]:
    """The cost of every arm of the table that was run."""
    runs = {arm: study.runs(workload, arm) for arm in ARMS}
    found = {arm: cost(r) for arm, r in runs.items() if r}
    return {arm: c for arm, c in found.items() if c}


def cost_section(study: Study) -> Section:
    """Steps, gradient-equivalents and time to the target."""
    title = "4. What does it cost to reach the same loss?"
    by_workload = {w: found for w in study.workloads if (found := costs(study, w))}
    answers = [text for arm in ("lama", "lama_ema") if (text := _answer(arm, by_workload))]
    if not answers:
        return Section(title, f"Cost to the target of LAMA and {label(BASE)}: {NOT_RUN}.")
    section = Section(title, f"To the same validation loss as {label(BASE)}, {'; '.join(answers)}.")
    rows = []
    for workload, found in by_workload.items():
        base = study.runs(workload, BASE) or study.runs(workload, next(iter(found)))
        target = base.number("target") if base else math.nan
        section.cite(workload, *(study.runs(workload, arm) for arm in found))
        for arm, c in found.items():
            ratios = c.over(found[BASE]) if BASE in found and arm != BASE else (math.nan,) * 3
            rows.append(
                (
                    workload,
                    label(arm),
                    number(target, 4),
                    f"{100 * c.reached:.0f} %",
                    *(number(x) for x in c[1:]),
                    *(number(x) for x in ratios),
                )
            )
    header = ("workload", "arm", "target", "reached by", "steps", "gradients", "seconds")
    section.blocks = [
        _means(by_workload),
        picture("cost.png", f"Steps, gradient-equivalents and time relative to {label(BASE)}"),
        picture("curves.png", "Validation loss during training"),
        (
            "Medians over seeds; a run that never reaches the target takes infinitely long."
            f" Ratios are to {label(BASE)}. Gradients: gradient-equivalents, in which"
            " Hessian-vector products are counted. The target is 1.05 times the validation loss"
            " of tuned Adam(lr), the same for every arm of a workload."
        ),
        (
            "Limits: seconds are those of one run among many trained at once on this machine,"
            " good for ratios; the target is read at the steps at which validation loss was"
            " logged."
        ),
    ]
    columns = (*header, "steps ratio", "gradients ratio", "time ratio")
    section.details.append(("Cost on every workload", table(columns, rows)))
    return section


def _ratios(arm: str, by_workload: dict[str, dict[str, Cost]]) -> np.ndarray:
    """Steps, gradients and time over the base's, where most runs of both get there."""
    both = [found for found in by_workload.values() if arm in found and BASE in found]
    ratios = np.array([found[arm].over(found[BASE]) for found in both]).reshape(-1, 3)
    return ratios[np.isfinite(ratios).all(axis=1)]


def _means(by_workload: dict[str, dict[str, Cost]]) -> str:
    rows = []
    for arm in ARMS[1:]:
        usable = _ratios(arm, by_workload)
        if usable.size:
            means = np.exp(np.log(usable).mean(axis=0))
            rows.append((label(arm), *(number(x) for x in means), str(len(usable))))
    header = (
        "geometric mean of ratios",
        "steps",
        "gradients",
        "time",
        "workloads where most get there",
    )
    return table(header, rows)


def _answer(arm: str, by_workload: dict[str, dict[str, Cost]]) -> str:
    both = {w: f for w, f in by_workload.items() if arm in f and BASE in f}
    if not both:
        return ""
    usable = _ratios(arm, by_workload)
    never = [w for w, found in both.items() if math.isinf(found[arm].steps)]
    text = f"the cost of {label(arm)} cannot be told: on no workload do most runs get there"
    if usable.size:
        steps, gradients, seconds = np.exp(np.log(usable).mean(axis=0))
        text = (
            f"{label(arm)} takes {steps:.2f} times the steps, {gradients:.2f} times the gradients"
            f" and {seconds:.2f} times the time (geometric mean, {count(len(usable), 'workload')})"
        )
    return text + (f"; most of its runs miss it on {listed(never)}" if never else "")
