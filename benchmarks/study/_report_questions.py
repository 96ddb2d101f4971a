"""Questions 5 and 6: the choices that the sources leave open, and Section 4.4's traces."""

import math
from collections.abc import Mapping

import numpy as np

from benchmarks.study._report_data import Judged, Line, Runs, Study, runs_of
from benchmarks.study._report_text import (
    NOT_RUN,
    Section,
    count,
    folded,
    listed,
    number,
    p_value,
    percent,
    picture,
    table,
)

#: question -> what is varied, and the value that the others are compared with.
QUESTIONS: dict[str, tuple[str, str]] = {
    "num_probes": ("number of probes K", "1"),
    "probe": ("probe distribution", "rademacher"),
    "scope": ("joint, block, flipout", "joint"),
    "hvp": ("exact products, or finite differences of step", "exact"),
    "update_interval": ("update interval", "1"),
    "curvature_decay": ("decay of the curvature's average", "0"),
    "sensitivity": ("lambda, at a fixed learning rate", "0"),
    "sensitivity_retuned": ("lambda, learning rate tuned again", "0"),
    "alpha_range": ("range of alpha", "0.5 to 1.5"),
    "layers": ("what a layer is", "module"),
    "schedule": ("schedules of lambda and alpha", "constant"),
    "learned": ("lambda learned for each layer", "one lambda"),
}

#: When the layers' traces were read.
WHEN = {"start": "at the start", "middle": "in the middle", "end": "at the end"}


def questions(study: Study) -> dict[str, dict[str, dict[str, Runs]]]:
    """Question -> workload -> value -> runs, in the order of the table above."""
    found: dict[str, dict[str, dict[str, list[Line]]]] = {}
    for workload in study.workloads:
        for line in study.lines("question", workload):
            values = found.setdefault(line["question"], {}).setdefault(workload, {})
            values.setdefault(text_of(line["value"]), []).append(line)
    names = sorted(found, key=lambda q: ([*list(QUESTIONS), q]).index(q))
    return {
        q: {
            w: {value: runs_of(value, lines) for value, lines in _sorted(values).items()}
            for w, values in found[q].items()
        }
        for q in names
    }


def text_of(value: object) -> str:
    """A value as tables and axes show it."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def reference(question: str, values: Mapping[str, Runs]) -> str:
    """The value that the others are compared with."""
    usual = QUESTIONS.get(question, ("", ""))[1]
    return usual if usual in values else next(iter(values))


def judge_question(
    study: Study, question: str, by_workload: Mapping[str, Mapping[str, Runs]]
) -> dict[tuple[str, str], Judged]:
    """Every value against the usual one; Holm over all of the question's comparisons."""
    pairs: dict[str, tuple[Runs | None, Runs | None]] = {}
    for workload, values in by_workload.items():
        usual = reference(question, values)
        pairs |= {
            f"{workload}\n{value}": (runs, values[usual])
            for value, runs in values.items()
            if value != usual
        }
    found = study.judge_runs(pairs)
    return {(key.split("\n")[0], key.split("\n")[1]): judged for key, judged in found.items()}


def questions_section(study: Study) -> Section:
    """One line and one table a question."""
    title = "5. What do the sources' open choices change?"
    asked = questions(study)
    if not asked:
        return Section(title, f"K, probes, scope, products, interval, lambda, ...: {NOT_RUN}.")
    judged = {q: judge_question(study, q, found) for q, found in asked.items()}
    matter = [_name(q) for q in asked if any(_matters(j) for j in judged[q].values())]
    section = Section(
        title,
        f"{len(matter)} of {count(len(asked), 'choice')} have a value that changes the held-out"
        f" loss, and not by chance or within 1 %{': ' + listed(matter) if matter else ''}.",
    )
    missing = [_name(q) for q in QUESTIONS if q not in asked and q != "sensitivity_retuned"]
    section.blocks = [
        table(
            ("choice", "against", "finding"),
            [(_name(q), _usual(q, asked[q]), _finding(judged[q])) for q in asked],
        ),
        f"{NOT_RUN.capitalize()}: {', '.join(missing)}." if missing else "",
        picture("questions.png", "Held-out loss for each choice, relative to the usual one"),
        *(folded(_name(q), _values(q, asked[q], judged[q], section)) for q in asked),
        (
            "Limits: LAMA's other settings are the tuned ones of its arm, so these are changes"
            " around that optimum, without averaging over steps unless that is the choice;"
            " p-values are Holm's over all comparisons of a choice."
        ),
    ]
    return section


def _matters(judged: Judged) -> bool:
    return judged.word in ("better", "worse", "worse (diverges)")


def _name(question: str) -> str:
    return QUESTIONS.get(question, (question.replace("_", " "), ""))[0]


def _usual(question: str, by_workload: Mapping[str, Mapping[str, Runs]]) -> str:
    return ", ".join(dict.fromkeys(reference(question, v) for v in by_workload.values()))


def _finding(judged: Mapping[tuple[str, str], Judged]) -> str:
    words = [j.word for j in judged.values()]
    parts = [f"{words.count(word)} {word}" for word in ("equivalent", "undecided") if word in words]
    parts += [
        f"{value} {j.word} on {workload} ({percent(j.comparison.relative)})"
        for (workload, value), j in judged.items()
        if _matters(j)
    ]
    return "; ".join(parts)


def _values(
    question: str,
    by_workload: Mapping[str, Mapping[str, Runs]],
    judged: Mapping[tuple[str, str], Judged],
    section: Section,
) -> str:
    rows = []
    for workload, values in by_workload.items():
        for value, runs in values.items():
            section.cite(workload, runs)
            found = judged.get((workload, value))
            rows.append(
                (
                    workload,
                    value,
                    number(runs.finite_mean, 4),
                    percent(found.comparison.relative) if found else "",
                    p_value(found.p) if found else "",
                    found.word if found else "",
                    str(runs.seeds.size),
                )
            )
    header = ("workload", _name(question), "held-out loss", "relative difference", "p (Holm)")
    return table((*header, "verdict", "seeds"), rows)


def _sorted(values: Mapping[str, list[Line]]) -> dict[str, list[Line]]:
    def key(item: tuple[str, list[Line]]) -> float:
        value = item[1][0]["value"]
        return float(value) if isinstance(value, int | float) else 0.0  # words keep their order

    return dict(sorted(values.items(), key=key))


def layer_traces(
    study: Study, workload: str
) -> tuple[list[str], dict[str, dict[str, list[float]]]]:
    """Names of the layers; "curvature" and "trace" at start, middle and end, means over seeds."""
    runs = study.runs(workload, "lama")
    if runs is None or "trace" not in runs.line:
        return [], {}
    found = {
        key: {
            when: [math.nan if x is None else float(x) for x in values]
            for when, values in runs.line[key].items()
        }
        for key in ("curvature", "trace")
    }
    return list(runs.line["layers"]), found


def traces_section(study: Study) -> Section:
    """Section 4.4: is the first layer's trace the higher one?"""
    title = "6. Section 4.4: which layer has the larger trace?"
    found = {w: layer_traces(study, w) for w in study.workloads}
    found = {w: f for w, f in found.items() if len(f[0]) > 1}
    if not found:
        return Section(title, f"Traces per layer: {NOT_RUN}.")

    def first_is_largest(key: str, when: str) -> list[str]:
        return [w for w, (_, seen) in found.items() if np.argmax(seen[key][when]) == 0]

    when = list(next(iter(found.values()))[1]["trace"])
    parts = []
    for key, name in (("trace", "trace"), ("curvature", "curvature per parameter")):
        counts = [f"{len(first_is_largest(key, w))} {WHEN.get(w, w)}" for w in when]
        parts.append(f"the largest {name} on {listed(counts)}")
    section = Section(
        title,
        f"Of {count(len(found), 'workload')} the first layer has {' and '.join(parts)}; the paper"
        " says that it is the higher one.",
    )
    rows = []
    for workload, (names, seen) in found.items():
        section.cite(workload, study.runs(workload, "lama"))
        for i, name in enumerate(names):
            values = [seen[key][w][i] for key in ("trace", "curvature") for w in when]
            rows.append((workload, name, *map(number, values)))
    header = [f"{key}, {w}" for key in ("trace", "curvature") for w in when]
    section.blocks = [
        table(("workload", "layer", *header), rows),
        picture("traces.png", "Trace of each layer at the start, in the middle and at the end"),
        (
            "Means over seeds, on the path of tuned LAMA, from the estimates that it used;"
            " curvature is the trace over the layer's number of parameters, loss per parameter"
            " squared."
        ),
    ]
    return section
