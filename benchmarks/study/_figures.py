"""Two pictures: differences between arms, and what tuning takes."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.lab._style import BLUE, COLORS, MARKERS, save_all
from benchmarks.study._arms import TRIALS


def draw_all(folder: Path, summary: dict[str, Any]) -> None:
    """Draws both into the folder."""
    figures = {"forest.png": lambda: _forest(summary), "tuning.png": lambda: _tuning(summary)}
    save_all(folder, figures)


def _panels(summary: dict[str, Any], height: float) -> tuple[Figure, Any]:
    count = len(summary)
    figure, panels = plt.subplots(
        1, count, figsize=(3 * count, height), squeeze=False, layout="constrained"
    )
    return figure, panels[0]


def _forest(summary: dict[str, Any]) -> Figure:
    """Means and intervals; grey is what the study cannot see."""
    figure, panels = _panels(summary, 3.0)
    for axes, own in zip(panels, summary.values(), strict=True):
        workload, rows = own["workload"], own["contrasts"]
        ends = np.sort(workload.shown([-own["visible"], own["visible"]]))
        axes.axvspan(*ends, color="0.9", linewidth=0)
        axes.axvline(0, color="0.4", linewidth=0.8)
        margin = workload.shown(-(workload.margin or -np.log(0.99)))
        axes.axvline(margin, color="0.4", linewidth=0.8, linestyle=":")
        labels = [" - ".join(row["pair"]) for row in rows] + ["A - A'"]
        contrasts = [row["contrast"] for row in rows] + [own["floor"]]
        for y, contrast in enumerate(contrasts):
            ends = workload.shown([contrast.low, contrast.high])
            axes.plot(ends, [y, y], color=BLUE)
            axes.plot(workload.shown(contrast.mean), y, "o", color=BLUE)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        words = "return, points: more is better" if workload.margin else "loss, %: less is better"
        axes.set(title=workload.name, xlabel=words)
    return figure


def _tuning(summary: dict[str, Any]) -> Figure:
    """Held-out loss after k trials, over that of AdamW after all."""
    figure, panels = _panels(summary, 3.2)
    for axes, own in zip(panels, summary.values(), strict=True):
        workload, base = own["workload"], own["arms"]["A"]["after"][-1]
        for i, (name, arm) in enumerate(own["arms"].items()):
            values = workload.shown(arm["after"] - base)
            # A and A' share a colour: what lies between them is luck.
            look = {"color": COLORS[max(0, i - 1)], "marker": MARKERS[max(0, i - 1)]}
            look["linestyle"] = "--" if name == "A'" else "-"
            axes.plot(range(1, TRIALS + 1), values, label=name, markersize=4, **look)
        words = "return over AdamW's, points" if workload.margin else "loss over AdamW's, %"
        axes.set(title=workload.name, xlabel="trials", ylabel=words)
        axes.set_xticks(range(1, TRIALS + 1))
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    return figure
