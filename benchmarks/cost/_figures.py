"""The picture: steps beside Adam's."""

import functools
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.lab._style import BLUE, VERMILLION, logarithmic, save_all


def draw_all(folder: Path) -> None:
    """Draws it from ``results.json`` in the folder, into the folder."""
    results = json.loads((folder / "results.json").read_text())
    save_all(folder, {"steps.png": functools.partial(_steps, results["models"])})


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
