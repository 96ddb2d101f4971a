"""The tables that a person reads: printed, and kept in results.txt."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.lab._tables import table
from benchmarks.lab._training import text_warning
from benchmarks.traces._measure import GRADIENT, TORCH_GRADIENT
from benchmarks.traces._summary import best_peer

#: Ours that are held against each peer.
SHOWN = (
    "hutchinson block",
    "flipout joint",
    "flipout joint, K=10",
    "flipout block",
    "flipout block, K=10",
)
#: More layers than this are shown as their median and extremes.
MAX_COLUMNS = 4

NOTES = """\
In all tables of contenders
compile: tracing and compilation. n: independent estimates. gradients: time over that of a gradient
in the same framework, median over blocks of rounds in which all took turns. sd: standard deviation
of one estimate over the layer's trace. work: time x variance, over that of `flipout()`, median over
the layers; above 1 is more work to the same standard error. z: largest distance, over the layers,
of the mean from the best known trace, in standard errors; a biased estimator's grows with n.
gauss_newton has no variance; where it works, in networks of ReLU, it is the best known trace."""


def report(summary: dict[str, Any]) -> str:
    """All tables, in the order in which their questions arise."""
    sections = []
    for model in summary["models"].values():
        sections.append(contenders(model, model["flipout"]))
        sections.append(peers(model, SHOWN, model["flipout"]))
    sections.append(NOTES)
    if "transformer" in summary["models"] and text_warning():
        sections.append(str(text_warning()))
    return "\n\n".join(sections)


def contenders(model: dict[str, Any], base: str) -> str:
    """Time and variance of all contenders; ``base`` has work 1."""
    merged, names = model["contenders"], model["layers"]
    many = len(names) > MAX_COLUMNS
    columns = ["sd least", "median", "most"] if many else [f"sd {name}" for name in names]
    header = ["", "compile, s", "n", "ms", "gradients", *columns, "work", "z"]
    rows: list[Sequence[str]] = []
    for label, found in merged.items():
        if "error" in found:
            rows.append([f"{label}: {found['error']}", *[""] * (len(header) - 1)])
            continue
        seconds = model["compile"].get(label)
        timing = ["" if seconds is None else f"{seconds:.1f}", str(found["count"])]
        timing += [f"{1e3 * found['median_seconds']:.3g}", ""]
        if found["gradients"] is not None and label not in (GRADIENT, TORCH_GRADIENT):
            timing[-1] = f"{found['gradients'].median:.2f}"
        if "sd" not in found:
            rows.append([label, *timing, *[""] * (len(columns) + 2)])
            continue
        sd = found["sd"]
        shown = [sd.min(), np.median(sd), sd.max()] if many else sd
        work = np.median(found["work"] / merged[base]["work"])
        digits = [f"{x:.3f}" if x else "0" for x in shown]
        row = [label, *timing, *digits, f"{work:.3g}"]
        rows.append([*row, f"{found['largest_z']:.1f}"])
    # Errors are sentences: they stand below, not in the columns.
    errors = [row[0] for row in rows if not any(row[1:])]
    body = table(header, [row for row in rows if any(row[1:])])
    return "\n".join([model["title"], body, *errors])


def peers(model: dict[str, Any], labels: Sequence[str], chosen: str) -> str:
    """How much more work each peer needs than ours of ``labels``; ``chosen`` is summed up."""
    merged = model["contenders"]
    shown = {label: merged[label] for label in labels if label in merged}
    found = list(merged[chosen]["vs_peers"])
    if not found:
        return "No peer is installed: pip install '.[peers]'"
    rows = []
    for peer in found:
        units = [own["vs_peers"][peer] for own in shown.values()]
        rows.append([peer, *(f"{u['seconds']:.3g} / {u['gradients']:.3g}" for u in units)])
    best = best_peer(merged[chosen])
    assert best is not None
    return (
        "How many times more work a peer needs for the same standard error (below 1: less)\n"
        + table(["than", *shown], rows)
        + "\nMedian over the layers, in seconds / in gradients of each framework. Best peer of"
        f" {chosen}: {best[0]},\n{best[1]:.3g} times, by the smaller of its two ratios."
        " XTrace's variance falls faster than its time grows:\nits ratio holds for the number of"
        " products that it was given."
    )
