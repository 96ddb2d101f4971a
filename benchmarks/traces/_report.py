"""The tables that a person reads: printed, and kept in results.txt."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.lab._tables import table
from benchmarks.lab._training import text_warning
from benchmarks.traces._measure import GRADIENT, TORCH_GRADIENT, is_peer

#: More layers than this are shown as their median and extremes.
MAX_COLUMNS = 4
TITLES = {"hessian": "The Hessian's trace", "gauss-newton": "The Gauss-Newton trace"}

NOTES = """\
compile: tracing and compilation. n: independent estimates. gradients: time over that of a gradient
in the same framework, median over blocks of rounds in which all took turns. sd: standard deviation
of one estimate over the layer's trace. work: time x variance over that of the default, `fisher()`
or `flipout()`, median over the layers, with time in seconds and in gradients of each framework.
Above 1 is more work to the same standard error. XTrace's variance falls faster than its time grows:
its work holds for the number of products that it was given. z: largest distance, over the layers,
of the mean from the trace, in standard errors. The trace is that of gauss_newton, which is exact,
and in networks of ReLU the Hessian's too. On the transformer it is a mean of many estimates: of the
Hessian's by flipout, layer by layer; of the Gauss-Newton trace with random signs at the outputs,
for each sequence by itself."""


def report(summary: dict[str, Any]) -> str:
    """All tables, matrix by matrix and model by model."""
    sections = []
    for matrix, models in summary["matrices"].items():
        sections += [f"{TITLES[matrix]}: {_contenders(model)}" for model in models.values()]
    sections.append(NOTES)
    if summary["over_hessian"]:
        sections.append(_over_hessian(summary["over_hessian"]))
    if (warning := text_warning()) is not None:
        sections.append(warning)
    return "\n\n".join(sections)


def _contenders(model: dict[str, Any]) -> str:
    """Time and variance of all contenders of one model."""
    names = model["layers"]
    many = len(names) > MAX_COLUMNS
    columns = ["sd least", "median", "most"] if many else [f"sd {name}" for name in names]
    header = ["", "compile, s", "n", "ms", "gradients", *columns, "work, s", "work, gradients", "z"]
    rows: list[Sequence[str]] = []
    errors, peers = [], {}
    for label, found in model["contenders"].items():
        if "error" in found:
            errors.append(f"{label}: {found['error']}")
            continue
        seconds = model["compile"].get(label)
        row = [label, "" if seconds is None else f"{seconds:.1f}", str(found["count"])]
        row.append(f"{1e3 * found['median_seconds']:.3g}")
        if label not in (GRADIENT, TORCH_GRADIENT):
            sd, work = found["sd"], found["work"]
            shown = [sd.min(), np.median(sd), sd.max()] if many else sd
            row += [f"{found['gradients'].median:.2f}", *(f"{x:.3f}" if x else "0" for x in shown)]
            row += [f"{work['seconds']:.3g}", f"{work['gradients']:.3g}"]
            row.append(f"{found['largest_z']:.1f}")
            if is_peer(label):
                peers[label] = min(work.values())
        rows.append([*row, *[""] * (len(header) - len(row))])
    lines = [model["title"], table(header, rows), *errors]
    if peers:
        best = min(peers, key=lambda label: peers[label])
        lines.append(f"Best of the others: {best}, {peers[best]:.3g} times {model['base']}'s work.")
    return "\n".join(lines)


def _over_hessian(models: dict[str, Any]) -> str:
    rows = []
    for name, found in models.items():
        ratio = found["ratio"]
        figures = (np.median(ratio), ratio.min(), ratio.max(), np.median(found["error"]))
        rows.append([name, *(f"{x:.3f}" for x in figures)])
    header = ["", "median layer", "least", "most", "standard error"]
    return f"Gauss-Newton trace over the Hessian's\n{table(header, rows)}"
