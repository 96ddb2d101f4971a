"""Two pictures: differences between optimizers, and what tuning takes."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.lab._style import BLUE, COLORS, MARKERS, save_all
from benchmarks.study._arms import ARMS, TRIALS

#: Of the picture of tuning; the tables have the others.
TUNED = ("A'", "M", "L", "E")


def draw_all(folder: Path, summary: dict[str, Any]) -> None:
    """Draws both into the folder."""
    figures = {"forest.png": lambda: _forest(summary), "tuning.png": lambda: _tuning(summary)}
    save_all(folder, figures)


def _panels(count: int, height: float) -> tuple[Figure, Any]:
    """Two a row, so that the words can be read at a page's width."""
    columns = min(2, count)
    rows = -(-count // columns)
    size = (max(6.4, 4.6 * columns), height * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axes in panels.flat[count:]:
        axes.axis("off")
    return figure, panels.flat[:count]


def _forest(summary: dict[str, Any]) -> Figure:
    """Means and intervals; grey is what the study cannot see."""
    figure, panels = _panels(len(summary), 3.2)
    for axes, own in zip(panels, summary.values(), strict=True):
        workload, rows = own["workload"], own["contrasts"]
        ends = np.sort(workload.shown([-own["visible"], own["visible"]]))
        axes.axvspan(*ends, color="0.9", linewidth=0)
        axes.axvline(0, color="0.4", linewidth=0.8)
        margin = workload.shown(-(workload.margin or -np.log(0.99)))
        axes.axvline(margin, color="0.4", linewidth=0.8, linestyle=":")
        pairs = [row["pair"] for row in rows] + [("A", "A'")]
        contrasts = [row["contrast"] for row in rows] + [own["floor"]]
        for y, contrast in enumerate(contrasts):
            ends = workload.shown([contrast.low, contrast.high])
            axes.plot(ends, [y, y], color=BLUE)
            axes.plot(workload.shown(contrast.mean), y, "o", color=BLUE)
        labels = [" - ".join(ARMS[name].title for name in pair) for pair in pairs]
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        words = "return, points: more is better" if workload.margin else "loss, %: less is better"
        one, other = (row["verdict"].partition(":")[0] for row in rows[:2])
        axes.set_title(
            f"{workload.name}: LAMA against AdamW {one},\nagainst AdamW (b1) {other}",
            loc="right",
            fontsize=10,
        )
        axes.set_xlabel(words)
    figure.suptitle(
        "Held-out loss, tuned against tuned: mean and 95 % interval over studies\n"
        "(grey: cannot be told from luck; dotted: an improvement that counts)",
        fontsize=11,
    )
    return figure


def _tuning(summary: dict[str, Any]) -> Figure:
    """Held-out loss after k trials, over that of AdamW after as many."""
    figure, panels = _panels(len(summary), 3.0)
    counts = np.arange(1, TRIALS + 1)
    for axes, own in zip(panels, summary.values(), strict=True):
        workload = own["workload"]
        axes.axhline(0, color="0.4", linewidth=0.8)
        for i, name in enumerate(name for name in TUNED if name in own["arms"]):
            found = own["arms"][name]["over_adamw"]
            mean = workload.shown([contrast.mean for contrast in found])
            ends = workload.shown([[c.low for c in found], [c.high for c in found]])
            axes.errorbar(
                counts + 0.13 * (i - 1.5),
                mean,
                np.abs(ends - mean),
                fmt=MARKERS[i],
                color=COLORS[i],
                markersize=5,
                label=ARMS[name].title,
            )
        words = "return, points" if workload.margin else "loss, %"
        axes.set(title=workload.name, xlabel="trials of each", ylabel=f"{words} over AdamW's")
        axes.set_xticks(counts)
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.suptitle(
        "Better or worse than AdamW after as many trials? (mean, 95 % interval)",
        fontsize=11,
    )
    return figure
