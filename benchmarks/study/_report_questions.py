"""Question 5: the choices that the sources leave open."""

from collections.abc import Mapping

from benchmarks.study._report_data import Judged, Line, Runs, Study, runs_of
from benchmarks.study._report_text import (
    NOT_RUN,
    Section,
    count,
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
    "scope": ("joint or block, flipout or not", "joint"),
    "hvp": ("exact products or finite differences", "exact"),
    "update_interval": ("update interval", "1"),
    "curvature_decay": ("decay of the curvature's average", "0"),
    "sensitivity": ("lambda at a fixed learning rate", "0"),
    "sensitivity_retuned": ("lambda with the rate tuned again", "0"),
    "alpha_range": ("range of alpha", "0.5 to 1.5"),
    "layers": ("what a layer is", "module"),
    "schedule": ("schedules of lambda and alpha", "constant"),
    "learned": ("lambda learned for each layer", "one lambda"),
}


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
        (
            "Limits: LAMA's other settings are the tuned ones of its arm, so these are changes"
            " around that optimum, without averaging over steps unless that is the choice;"
            " p-values are Holm's over all comparisons of a choice."
        ),
    ]
    section.details = [(_name(q), _values(q, asked[q], judged[q], section)) for q in asked]
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
    by_place: dict[str, list[str]] = {}
    for (workload, value), j in judged.items():
        if _matters(j):
            size = f"{100 * j.comparison.relative.estimate:+.2g} %"
            by_place.setdefault(f"{j.word} on {workload}", []).append(f"{value} ({size})")
    return "; ".join([*parts, *(f"{place}: {', '.join(v)}" for place, v in by_place.items())])


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
