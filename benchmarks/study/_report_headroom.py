"""Question 7: could momentum per layer win at all? Static settings, searched with equal budgets."""

import math
from collections.abc import Mapping

from benchmarks.study._report_data import Judged, Study
from benchmarks.study._report_text import (
    NOT_RUN,
    Section,
    capital,
    count,
    label,
    listed,
    number,
    p_value,
    percent,
    picture,
    table,
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
    rows: list[list[str]] = []
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
    chosen = _selected(study, list(judged["layer_momenta"]))
    section.details.append(("What each search selected", chosen))
    return section


def _headroom(search: str, judged: Mapping[str, Judged]) -> str:
    better = [w for w, j in judged.items() if j.word == "better"]
    worse = [w for w, j in judged.items() if j.word.startswith("worse")]
    text = f"a static {label(search)} beats one b1 on {len(better)} of"
    text += f" {count(len(judged), 'workload')}" + (f" ({listed(better)})" if better else "")
    return text + (f" and loses on {len(worse)} ({listed(worse)})" if worse else "")


def _selected(study: Study, workloads: list[str]) -> str:
    rows = []
    for workload in workloads:
        base = study.headroom(workload)["global_momentum"].number("best_validation")
        for search, runs in study.headroom(workload).items():
            best, hypers = runs.number("best_validation"), runs.line["hypers"]
            change = math.nan if search == "global_momentum" else best / base - 1
            rows.append(
                (
                    workload,
                    label(search),
                    number(best, 4),
                    "" if math.isnan(change) else f"{100 * change:+.2f} %",
                    _values(hypers.get("lr")),
                    _values(hypers.get("decay")),
                )
            )
    header = ("workload", "search", "validation loss", "from one b1's", "learning rate", "b1")
    return table(header, rows)


def _values(value: float | list[float] | None) -> str:
    """A number, or one for each layer."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    same = len(set(values)) == 1
    return ", ".join(f"{x:.3g}" for x in (values[:1] if same else values))
