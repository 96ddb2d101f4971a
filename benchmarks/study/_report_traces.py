"""Question 6: the traces per layer of the paper's Section 4.4, on every workload."""

import math

import numpy as np

from benchmarks.study._report_data import Study
from benchmarks.study._report_text import NOT_RUN, Section, count, listed, number, picture, table

#: When the layers' traces were read.
WHEN = {"start": "at the start", "middle": "in the middle", "end": "at the end"}


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
        table(
            ("workload", *(f"largest {key}, {w}" for key in ("trace", "curvature") for w in when)),
            [
                (
                    w,
                    *(
                        names[int(np.argmax(seen[k][t]))]
                        for k in ("trace", "curvature")
                        for t in when
                    ),
                )
                for w, (names, seen) in found.items()
            ],
        ),
        picture("traces.png", "Trace of each layer at the start, in the middle and at the end"),
        (
            "Means over seeds, on the path of tuned LAMA, from the estimates that it used;"
            " curvature is the trace over the layer's number of parameters, loss per parameter"
            " squared."
        ),
    ]
    section.details.append(
        ("Every layer's trace and curvature", table(("workload", "layer", *header), rows))
    )
    return section
