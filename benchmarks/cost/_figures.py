"""The picture: steps beside Adam's."""

import functools
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.lab._style import BLUE, VERMILLION, logarithmic, save_all


def draw_all(folder: Path) -> None:
    """Draws it from ``results.json`` in the folder, into the folder."""
    results = json.loads((folder / "results.json").read_text())
    save_all(folder, {"steps.png": functools.partial(_steps, results["models"])})


def _steps(models: dict[str, Any]) -> Figure:
    """Each contender's step over Adam's with its interval, one panel a model."""
    labels = list(next(iter(models.values()))["steps"])
    figure, panels = plt.subplots(
        1,
        len(models),
        figsize=(max(6.0, 3.2 + 2.1 * len(models)), 0.28 * len(labels) + 1.9),
        sharey=True,
        squeeze=False,
    )
    for axes, (name, model) in zip(panels.flat, models.items(), strict=True):
        for i, (label, row) in enumerate(model["steps"].items()):
            y, color = -i, BLUE if label.startswith("optax") else VERMILLION
            if row["interval"]:  # a few rounds have none
                axes.plot(row["interval"], [y, y], color=color, alpha=0.5)
            axes.plot(row["over_adam"], y, "o", color=color)
        axes.axvline(1, color="gray", linewidth=1)
        logarithmic(axes, "x")
        axes.set(title=name)
    panels.flat[0].set_yticks([-i for i in range(len(labels))], labels)
    figure.supxlabel("time of a step over optax.adam's", fontsize=10)
    figure.suptitle(
        "Curvature at every tenth step costs little; ten probes at every step cost many times"
        " Adam's step (median, 95 %)",
        fontsize=11,
    )
    return figure
