"""Writes ``RESULTS.md`` and its pictures from the JSON lines: `python -m benchmarks.study report`.

Every sentence with a verdict is computed from the numbers by rules that stand in the section's
module; a part that was not run is said to be so.
"""

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.study import _figures_choices as choices
from benchmarks.study import _figures_curves as curves
from benchmarks.study import _figures_forest as forests
from benchmarks.study._figures import save
from benchmarks.study._report_causes import causes_section
from benchmarks.study._report_cost import cost_section
from benchmarks.study._report_data import BASE, Study, load
from benchmarks.study._report_headroom import headroom_section
from benchmarks.study._report_help import help_section
from benchmarks.study._report_questions import questions_section
from benchmarks.study._report_rates import rates_section
from benchmarks.study._report_rules import rules_section
from benchmarks.study._report_text import NOT_RUN, Section, label, table
from benchmarks.study._report_traces import traces_section
from benchmarks.study._statistics import MARGIN, RESAMPLES, SEED

SECTIONS: tuple[Callable[[Study], Section], ...] = (
    help_section,
    causes_section,
    rates_section,
    cost_section,
    questions_section,
    traces_section,
    headroom_section,
    rules_section,
)
#: What each picture is drawn by.
FIGURES: dict[str, Callable[[Study], Figure | None]] = {
    "does_it_help.png": forests.does_it_help,
    "aggregates.png": forests.aggregates,
    "controls.png": forests.controls,
    "learning_rates.png": curves.learning_rates,
    "cost.png": curves.cost,
    "curves.png": curves.curves,
    "questions.png": choices.open_choices,
    "traces.png": choices.traces,
    "headroom.png": forests.headroom,
    "rules.png": forests.rules,
}
#: Beside the lines: the long tables, and which lines each figure comes from.
TABLES = "TABLES.md"
#: Sections whose answers stand at the top: one line each.
ANSWERS: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (3,), (6, 7))


def main(results: Path, output: Path | None = None) -> Path:
    """Writes the report of a results folder.

    Args:
      results: folder with the study's ``.jsonl`` files; pictures and long tables are written there
        too.
      output: the file to write; by default ``benchmarks/RESULTS.md`` for the committed results
        and ``RESULTS.md`` inside ``results`` for others.

    Returns:
      the file that was written.

    Raises:
      ValueError: if the folder has no results, or lines that cannot be read.
    """
    study = load(results)
    output = default_output(results) if output is None else output
    sections, drawn = [], []
    # disable=None: a bar for terminals, none in a file.
    with tqdm(total=len(SECTIONS) + len(FIGURES), unit="part", disable=None) as bar:
        for write in SECTIONS:
            sections.append(write(study))
            bar.update()
        for name, draw in FIGURES.items():
            if save(results / name, functools.partial(draw, study)):
                drawn.append(name)
            bar.update()
    folder = Path(os.path.relpath(results, output.parent)).as_posix()
    output.parent.mkdir(parents=True, exist_ok=True)
    page, tables = compose(study, sections, drawn, folder)
    output.write_text(page, encoding="utf-8")
    (results / TABLES).write_text(tables, encoding="utf-8")
    print(f"{output}: {sections[0].answer}", file=sys.stderr)
    return output


def default_output(results: Path) -> Path:
    """Beside the committed results' parent, as ``benchmarks/RESULTS.md``; else inside."""
    parent = results.resolve().parent
    committed = parent.name == "results" and parent.parent.name == "benchmarks"
    return (results.parent.parent if committed else results) / "RESULTS.md"


def compose(
    study: Study, sections: list[Section], drawn: list[str], folder: str
) -> tuple[str, str]:
    """The page and its long tables; a picture that was not drawn is left out."""
    lines = [" ".join(sections[i].answer for i in group) for group in ANSWERS]
    answers = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
    where = f"[{folder}]({folder})" if folder != "." else "this folder"
    written = (
        f"Written by `python -m benchmarks.study report` from the JSON lines in {where}; the"
        " protocol is in `benchmarks/README.md`. Every arm on every workload, and the lines that"
        f" each figure comes from: [{TABLES}]({folder}/{TABLES})."
    )
    parts = [
        "# Does layer-adaptive momentum help?",
        written,
        answers,
        _reading(),
        _what_was_run(study),
        *(section.markdown() for section in sections),
    ]
    text = "\n\n".join(parts) + "\n"

    def keep(match: re.Match[str]) -> str:
        return match[0].replace("{pictures}/", f"{folder}/") if match[2] in drawn else ""

    text = re.sub(r"!\[([^]]*)\]\(\{pictures\}/([^)]*)\)", keep, text).replace("(./", "(")
    tables = [
        "# Does layer-adaptive momentum help? The tables behind the answers",
        *(f"## {s.title}\n\n{s.tables()}" for s in sections if s.tables()),
    ]
    return re.sub(r"\n{3,}", "\n\n", text), "\n\n".join(tables) + "\n"


def _reading() -> str:
    return (
        f"How to read it. Every arm is compared with {label(BASE)}, its learning rate and b1 tuned"
        " with as many trials. The primary figure is the relative difference of the mean held-out"
        " losses at a fixed number of steps, paired by seed (split, initialisation, batch order):"
        " negative is lower, that is better. In brackets: 95 % intervals, unless said otherwise"
        f" BCa bootstrap of {RESAMPLES} resamples, seed {SEED}. p: paired t-test, Holm over the"
        f" workloads. *Equivalent*: within +-{100 * MARGIN:g} % by two one-sided paired t-tests,"
        " Holm alike; it comes before *better* and *worse*, which need p < 0.05 and an interval"
        " without 0; else *undecided*. An arm that diverges on more than one run in a hundred"
        " more than its base is *worse (diverges)*. Over all workloads: difference of the"
        " interquartile means of losses relative to the base's mean, every workload counting the"
        " same, stratified bootstrap (arch) over seeds."
    )


def _what_was_run(study: Study) -> str:
    rows = []
    for workload in study.workloads:
        tuned = list(study.lines("tune", workload))
        # After more tuning an arm has a later line, which counts.
        final = list({line["arm"]: line for line in study.lines("final", workload)}.values())
        trials = {a: len(study.trials(workload, a)) for a in dict.fromkeys(t["arm"] for t in tuned)}
        base = study.runs(workload, BASE)
        rows.append(
            (
                workload,
                _span([line["steps"] for line in (*final, *tuned)]),
                _span(list(trials.values())),
                _span([len(line["seeds"]) for line in tuned]),
                str(base.seeds.size) if base else NOT_RUN,
                str(len({line["arm"] for line in final})),
                f"{sum(line.get('seconds') or 0 for line in study.all_lines(workload)) / 60:.1f}",
                "; ".join(sorted({_edge(line) for line in final if line.get("edge")})),
            )
        )
    header = (
        "workload",
        "steps",
        "distinct trials an arm",
        "tuning seeds",
        "final seeds",
        "arms",
        "minutes",
    )
    return (
        "What was run:\n\n"
        + table((*header, "optimum at an edge"), rows)
        + "\n\n"
        + _versions(study)
    )


def _edge(line: dict) -> str:
    return f"{label(line['arm'])} ({', '.join(line['edge'])})"


def _versions(study: Study) -> str:
    seen: dict[str, set[str]] = {}
    for workload in study.workloads:
        for line in study.all_lines(workload):
            for name, version in line.get("versions", {}).items():
                seen.setdefault(name, set()).add(str(version))
    if not seen:
        return ""
    return "Versions: " + ", ".join(f"{n} {' and '.join(sorted(v))}" for n, v in seen.items()) + "."


def _span(numbers: list[int]) -> str:
    if not numbers:
        return NOT_RUN
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
