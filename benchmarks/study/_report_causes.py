"""Question 2: why? Controls that keep one property of LAMA and take away another."""

import math

from benchmarks.study._report_data import BASE, Study
from benchmarks.study._report_text import (
    NOT_RUN,
    Section,
    capital,
    label,
    listed,
    number,
    p_value,
    percent,
    picture,
    table,
)

#: Control -> what it keeps and what it means if that does as well as LAMA.
CONTROLS = {
    "adam_matched": (
        "Adam, each layer's learning rate multiplied by LAMA's mean gain there",
        "LAMA's change of the step size is enough to explain its loss",
    ),
    "lama_frozen": (
        "each layer's alpha is frozen at its mean over time",
        "it does not matter that alpha follows the curvature in time",
    ),
    "lama_shuffled": (
        "the alphas are given to other layers",
        "it does not matter which layer has which alpha",
    ),
    "lama_flipped": (
        "the sign of lambda is flipped",
        "it does not matter whether curvature raises or lowers alpha",
    ),
}


def causes_section(study: Study) -> Section:
    """LAMA against its controls, on the same seeds."""
    title = "2. Why? Controls on the same seeds"
    controls = [c for c in CONTROLS if study.judge(c, "lama")]
    if not controls:
        return Section(title, f"Controls of LAMA: {NOT_RUN}.")
    gain = study.aggregate("lama")
    helps = gain is not None and gain.difference.below_zero
    opening = capital(f"{label('lama')} has {'a' if helps else 'no'}")
    groups: dict[str, list[str]] = {}
    for control in controls:
        groups.setdefault(_word(study, control), []).append(label(control))
    words = [f"{word}: {listed(names)}" for word, names in groups.items()]
    section = Section(
        title, f"{opening} gain over {label(BASE)} to explain; on LAMA's seeds, {'; '.join(words)}."
    )
    section.blocks = [
        table(
            ("control", "what it is", "minus LAMA, all workloads", "does", "which would mean"),
            [_row(study, control) for control in controls],
        ),
        _differences(study, controls, section),
        picture("controls.png", "Controls of LAMA relative to LAMA and to Adam"),
        (
            "A control does worse where its interval over all workloads lies above 0, else as well:"
            " then nothing that it takes away has been shown to matter. p-values: Holm over the"
            " workloads."
        ),
        (
            "Limits: the controls take alpha and gain from LAMA's own runs, their means over time;"
            " they are not tuned again."
        ),
    ]
    section.details.append(("What tuned LAMA did to each layer", _layers(study)))
    return section


def _word(study: Study, control: str) -> str:
    found = study.aggregate(control, "lama")
    if found is None or math.isnan(found.difference.low):
        return "too few runs"
    if found.difference.above_zero:
        return "worse than LAMA"
    return "better than LAMA" if found.difference.below_zero else "as good as LAMA"


def _row(study: Study, control: str) -> tuple[str, ...]:
    found, word = study.aggregate(control, "lama"), _word(study, control)
    what, meaning = CONTROLS[control]
    as_well = word in ("as good as LAMA", "better than LAMA")
    difference = percent(found.difference) if found else NOT_RUN
    return label(control), what, difference, word, meaning if as_well else ""


def _differences(study: Study, controls: list[str], section: Section) -> str:
    judged = {c: study.judge(c, "lama") for c in controls}
    lama = study.judge("lama")
    header = ["workload", f"LAMA minus {label(BASE)}"]
    for control in controls:
        header += [f"{label(control)} minus LAMA", "p"]
    rows = []
    for workload in study.workloads:
        if not any(workload in found for found in judged.values()):
            continue
        section.cite(workload, *(study.runs(workload, a) for a in (BASE, "lama", *controls)))
        row = [
            workload,
            percent(lama[workload].comparison.relative) if workload in lama else NOT_RUN,
        ]
        for control in controls:
            found = judged[control].get(workload)
            row += (
                [percent(found.comparison.relative), p_value(found.p)] if found else [NOT_RUN, ""]
            )
        rows.append(row)
    return table(header, rows)


def _layers(study: Study) -> str:
    rows = []
    for workload in study.workloads:
        runs = study.runs(workload, "lama")
        line = runs.line if runs else {}
        for name, alpha, gain in zip(
            *(line.get(key) or () for key in ("layers", "alpha_mean", "gain_mean")), strict=False
        ):
            rows.append((workload, name, *(number(x) for x in (alpha, gain) if x is not None)))
    header = ("workload", "layer", "mean alpha", "mean gain of the step")
    return table(header, rows) if rows else ""
