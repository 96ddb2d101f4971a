"""The pictures: steps beside Adam's, and how cost grows."""

import functools
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.lab._style import BLUE, COLORS, MARKERS, VERMILLION, logarithmic, save_all

AXIS_NAMES = {
    "K": "probes K",
    "parameters": "parameters",
    "depth": "layers",
    "batch": "batch (examples)",
    "devices": "virtual devices",
}


def draw_all(folder: Path) -> None:
    """Draws every picture from ``results.json`` in the folder, into the folder."""
    results = json.loads((folder / "results.json").read_text())
    figures = {
        "steps.png": functools.partial(_steps, results["models"]),
        "growth.png": functools.partial(_growth, results["growth"]),
    }
    save_all(folder, figures)


def _steps(models: dict[str, Any]) -> Figure:
    """Each contender's step over Adam's with its interval, one panel a model."""
    of_model = {
        name: {label: found for group in model["steps"].values() for label, found in group.items()}
        for name, model in models.items()
    }
    labels = list(dict.fromkeys(label for found in of_model.values() for label in found))
    figure, panels = plt.subplots(
        1,
        len(models),
        figsize=(max(6.0, 3.2 + 2.1 * len(models)), 0.28 * len(labels) + 1.9),
        sharey=True,
        squeeze=False,
    )
    colors = {True: VERMILLION, False: BLUE}
    for axes, (name, found) in zip(panels.flat, of_model.items(), strict=True):
        for label, row in found.items():
            y, color = -labels.index(label), colors["lama" in label.lower()]
            if row["interval"]:  # a few rounds have none
                axes.plot(row["interval"], [y, y], color=color, alpha=0.5)
            axes.plot(row["over_adam"]["median"], y, "o", color=color)
        axes.axvline(1, color="gray", linewidth=1)
        logarithmic(axes, "x")
        axes.set(title=name)
    panels.flat[0].set_yticks([-i for i in range(len(labels))], labels)
    figure.supxlabel("time of a step over optax.adam's", fontsize=10)
    handles = [
        Line2D([], [], color=colors[ours], marker="o", label=label)
        for ours, label in ((True, "with what LAMA needs"), (False, "Optax's own"))
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=2)
    figure.suptitle(
        "Ten probes at every step cost many times Adam's step; one at every tenth costs little"
        " (median, 95 %)",
        fontsize=11,
    )
    return figure


def _growth(growth: dict[str, Any]) -> Figure:
    """Time over size, a panel for each kind of size; the legend is common."""
    labels = list(dict.fromkeys(label for lines in growth.values() for label in lines))
    count = len(growth)
    columns = min(3, count)
    rows = -(-count // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(9.6, 3 * rows + 0.6), squeeze=False)
    for axes, (name, lines) in zip(panels.flat, growth.items(), strict=False):
        for label, line in lines.items():
            i = labels.index(label)
            look: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "markersize": 5}
            look["marker"] = MARKERS[i % len(MARKERS)]
            axes.plot(line["sizes"], 1e3 * np.asarray(line["seconds"]), label=label, **look)
        logarithmic(axes, "xy")
        sizes = next(iter(lines.values()))["sizes"]
        if len(sizes) > 1 and sizes[-1] <= 4096:  # else powers of ten
            axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set(xlabel=AXIS_NAMES[name])
        slope = next((line["slope"] for k, line in lines.items() if k != "gradient"), None)
        axes.set_title("" if slope is None else f"hutchinson: about size$^{{{slope:.1f}}}$")
    for axes in list(panels.flat)[count:]:
        axes.axis("off")
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.supylabel("milliseconds for an estimate", fontsize=10)
    figure.suptitle(
        "An estimate grows as a gradient does, and with K; in block scope faster with depth",
        fontsize=12,
    )
    return figure
